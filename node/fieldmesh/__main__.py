"""`fieldmesh` and `python -m fieldmesh`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from fieldmesh.cli.app import run

    sys.exit(run())


if __name__ == "__main__":
    main()
