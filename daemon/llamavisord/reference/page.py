"""The whole page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llamavisord.exit_codes import ExitCode
from llamavisord.reference.commands import commands
from llamavisord.reference.configuration import configuration
from llamavisord.reference.control import addresses, problems
from llamavisord.reference.docstrings import members
from llamavisord.reference.environment import environment
from llamavisord.reference.events import happenings, words
from llamavisord.reference.markdown import prose, table
from llamavisord.reference.metrics import metrics

_INTRODUCTION = """\
# Reference

Everything that llamavisor takes, answers and tells. What it is for, and how to begin, is in the [README](README.md).
This page is generated from the code by `make reference`; what is to be said otherwise is said there.
"""


def page() -> str:
    """The page, in Markdown; the same on every machine. Not to be called in an event loop: it runs one itself."""
    parts = _parts()
    contents = [f"- [{title}](#{title.lower().replace(' ', '-')})" for title in parts]
    lines = [_INTRODUCTION, *contents, ""]
    for title, part in parts.items():
        lines += [f"## {title}", "", *part()]
    return "\n".join(lines).rstrip("\n") + "\n"


def _parts() -> dict[str, Callable[[], Iterator[str]]]:
    """The parts of the page by their titles."""
    return {
        "Commands": commands,
        "Exit codes": _exit_codes,
        "Configuration": configuration,
        "Environment": environment,
        "Control socket": addresses,
        "Problem codes": problems,
        "Metrics": metrics,
        "Events": happenings,
        "Words": words,
    }


def _exit_codes() -> Iterator[str]:
    rows = ((value, prose(meaning)) for value, meaning in members(ExitCode).items())
    yield from table(("exit code", "meaning"), rows)
