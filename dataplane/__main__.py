"""`python -m dataplane` is the command `dataplane`."""

from dataplane.cli import main

main()
