"""Commands that show the program itself: demo, version."""

from __future__ import annotations

import platform
from argparse import Namespace

from llamavisord import __version__
from llamavisord.cli.render import Screen
from llamavisord.exit_codes import ExitCode


def version(arguments: Namespace) -> int:
    """Say which version this is."""
    screen = Screen()
    if arguments.json:
        screen.json({"version": __version__, "python": platform.python_version()})
    else:
        screen.line(f"llamavisor {__version__}")
    return ExitCode.OK


def demo(arguments: Namespace) -> int:
    """Show it working."""
    from llamavisord.cli import demo as story  # noqa: PLC0415 (it alone needs what it imports)

    return story.run(arguments.llama_server)
