"""The llamavisor daemon and its command line: everything with a socket, a terminal or a configuration file."""

__version__ = "0.1.0"
