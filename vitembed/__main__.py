"""`python -m vitembed` is the command line, for where the console script is not on the path."""

from vitembed.cli import main

main()
