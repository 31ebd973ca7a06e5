"""The command line. It talks to the daemon over its control socket and, to be quick, imports nothing heavy."""

from llamavisord.cli.entry import main

__all__ = ["main"]
