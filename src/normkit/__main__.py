"""``python -m normkit`` is the command line."""

from .cli import main

main()
