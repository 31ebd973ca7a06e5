"""Names of models, routers and pulls for the completions of shells: quick, and silent where no daemon answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from llamavisord.cli.client import Client, find_socket
from llamavisord.cli.errors import CommandError
from llamavisord.exit_codes import ExitCode

PATIENCE_S = 1.0
"""Nobody waits longer for a Tab."""
DISK_PATIENCE_S = 5.0
"""Pulls that were left are on the disk: a models folder that hangs is waited for, and the others are told of."""
_COMMAND_WORDS = 2
"""The program and its command; a name that stands behind them is not wanted again."""


def complete(words: Sequence[str]) -> int:
    """Print the names of one kind, each on a line.

    Args:
        words: "models", "routers" or "pulls", then what stands on the command line so far: it may name a socket.
    """
    kind, *line = words or [""]
    try:
        names = _names(kind, Client(find_socket(_socket(line), os.environ)), line[_COMMAND_WORDS:])
        # A name that a shell would take for two is not offered; any text can be one.
        print("\n".join(dict.fromkeys(name for name in names if name.isprintable())))
    except (CommandError, OSError, ValueError, LookupError, TypeError):
        return ExitCode.OK
    return ExitCode.OK


def _names(kind: str, client: Client, said: Sequence[str]) -> list[str]:
    if kind == "routers":
        found = client.call("GET", "/control/v1/routers", {}, timeout_s=PATIENCE_S)["routers"]
        return [router["name"] for router in found if router["name"] not in said]
    if kind == "models":
        found = client.call("GET", "/control/v1/models", {}, timeout_s=PATIENCE_S)["models"]
        return list(_with_aliases([each for each in found if not {each["name"], *each["aliases"]} & set(said)]))
    if kind == "pulls":
        found = client.call("GET", "/control/v1/pulls", {}, timeout_s=DISK_PATIENCE_S)["pulls"]
        return [pull["id"] for pull in found if pull["state"] != "done"]
    return []


def _with_aliases(models: Sequence[dict[str, Any]]) -> Iterator[str]:
    for model in models:
        yield model["name"]
    for model in models:
        yield from model["aliases"]


def _socket(line: Sequence[str]) -> str | None:
    """What `--socket` says, the last one."""
    found = None
    for word, following in zip(line, [*line[1:], ""], strict=False):
        if word == "--socket":
            found = following or None
        elif word.startswith("--socket="):
            found = word.partition("=")[2] or None
    return os.path.expanduser(found) if found else None  # noqa: PTH111 (of a word that no shell has expanded yet)
