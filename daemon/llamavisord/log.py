"""The daemon's own log: one line for each event, to the journal of systemd or to stderr."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from aiohttp.http import HttpProcessingError

from llamavisor.events import Published, RequestEnded
from llamavisord import journal
from llamavisord.plain import plain

_log = logging.getLogger("llamavisor")


def begin(level: str) -> None:
    """Have everything logged from now on that is at least so grave: "debug", "info", "warning" or "error"."""
    handler: logging.Handler
    if journal.is_behind(sys.stderr.fileno(), os.environ):
        handler = journal.JournalHandler()
        handler.setFormatter(_Plain())
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Plain("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in ("httpx", "httpx2"):  # they tell of every request, signed addresses and all
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(_is_ours)


def log_event(published: Published) -> None:
    """Tell what has happened, if it is grave enough."""
    event, level = published.event, published.event.log_level
    if not _log.isEnabledFor(level):  # asked first: every request of a client passes here
        return
    more = {"event": event}
    if isinstance(event, RequestEnded) and event.body is not None:
        _log.log(level, "%s, asked: %s", event.message(), event.body, extra=more)
    else:
        _log.log(level, "%s", event.message(), extra=more)


class _Plain(logging.Formatter):
    """One event, one line: a model's name or llama-server's last words must not forge another."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 (likewise)
        """A traceback has many lines; indented, none of them looks like another event."""
        return "\n".join(f"  | {plain(line)}" for line in super().formatException(ei).splitlines())


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a line of the web server is worth its place; what is no HTTP is its sender's fault, and answered 400."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)
