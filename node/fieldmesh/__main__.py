"""`fieldmesh` and `python -m fieldmesh`."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Read when grpc is imported. Its lines about lost connections are no errors of ours, nor in our log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from fieldmesh.cli.app import run

    sys.exit(run())


if __name__ == "__main__":
    main()
