"""``python -m fieldmesh.engine --fd N --parent PID``: the engine's process (of engine.host)."""

from __future__ import annotations

import argparse
import sys

from fieldmesh.engine.child import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fieldmesh.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket on which channels come")
    parser.add_argument("--parent", type=int, required=True, help="process id of the host")
    arguments = parser.parse_args()
    sys.exit(main(arguments.fd, arguments.parent))
