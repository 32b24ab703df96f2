"""``python -m fieldmesh.engine --fd N --exchange N --parent PID``: the engine's process (of engine.host)."""

from __future__ import annotations

import argparse
import sys

from fieldmesh.engine.child import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fieldmesh.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the host")
    parser.add_argument("--parent", type=int, required=True, help="process id of the host")
    parser.add_argument("--exchange", type=int, required=True, help="inherited memory for states")
    arguments = parser.parse_args()
    sys.exit(main(arguments.fd, arguments.parent, arguments.exchange))
