"""The command line: parse, call, print."""

import sys


def main() -> None:
    """Run the command line."""
    sys.exit("normkit: no command is built yet")
