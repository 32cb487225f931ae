"""`python -m vla`."""

from .cli import main

main()
