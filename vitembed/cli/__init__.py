"""The command line: thin commands that open something, call one library function, and print."""

from vitembed.cli.app import main

__all__ = ["main"]
