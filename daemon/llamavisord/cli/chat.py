"""The chat of `run`: what is typed, line by line, and what of it is no question."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from llamavisord.cli.errors import CommandError
from llamavisord.places import Places

PROMPT, MORE = ">>> ", "... "
"""What is shown before a line, and before a further line of one message."""
FENCE = '"""'
"""Begins and ends a message of several lines, or one that would be taken for a command."""
HISTORY_LINES = 1000
_ENDS = frozenset({"/bye", "/exit", "/quit"})
_WORDS_THAT_END = frozenset({"exit", "quit"})
_HINT = "Ctrl-C stops an answer; /clear forgets what was said; /bye or Ctrl-D ends; /help tells more"
_HELP = (
    "/clear           forgets what was said",
    "/bye             ends the chat, as do /exit, /quit, exit, quit and Ctrl-D",
    "/help            shows this",
    "Ctrl-C           stops an answer",
    f"{FENCE}              begins a message of several lines, and ends it; in it a / is nothing special",
)


class Partner(Protocol):
    """Who is talked with."""

    model: str

    def answer(self, text: str) -> None:
        """Ask, and say the answer as it comes."""

    def forget(self) -> None:
        """What was said is not known any more."""

    def note(self, text: str) -> None:
        """Tell something that is no answer."""

    def complain(self, error: CommandError) -> None:
        """Tell of an error that ends an answer and not the chat."""


def chat(partner: Partner) -> None:
    """Ask line by line until somebody has enough."""
    with _history(Places(os.environ).history) as kept_in:
        partner.note(f"{partner.model}: {_HINT}")
        while True:
            try:
                text, is_message = _read(input)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                partner.note(_HINT)
                continue
            except UnicodeDecodeError:
                partner.note("that is not UTF-8 text")
                continue
            if is_message or not text.startswith("/"):
                if not is_message and text in _WORDS_THAT_END:
                    partner.note(f"/bye or Ctrl-D ends a chat, and so does {text}; {FENCE}{text}{FENCE} would send it")
                    return
                if text:
                    _ask(partner, text)
            elif text in _ENDS:
                return
            elif text == "/clear":
                partner.forget()
            elif text in {"/help", "/?"}:
                for line in _help(kept_in):
                    partner.note(line)
            else:
                partner.note(f"{text.split()[0]} is no command here, and was not sent; {_HINT}")


def _ask(partner: Partner, text: str) -> None:
    try:
        partner.answer(text)
    except KeyboardInterrupt:
        print()
        partner.note("stopped")
    except CommandError as error:
        partner.complain(error)


def _read(ask: Callable[[str], str]) -> tuple[str, bool]:
    """What is typed next, and whether it is a message whatever it begins with."""
    line = ask(PROMPT).strip()
    if not line.startswith(FENCE):
        return line, False
    lines = [line.removeprefix(FENCE)]
    while not lines[-1].rstrip().endswith(FENCE):
        lines.append(ask(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip("\n"), True


def _help(kept_in: Path | None) -> Iterator[str]:
    yield from _HELP
    yield f"What you type is kept in {kept_in}." if kept_in else "What you type is not kept."


@contextmanager
def _history(path: Path) -> Iterator[Path | None]:
    """Have lines be edited, and those of the last chats be at hand; the path if this chat is kept too.

    Whoever puts something else than a file there, such as a link to /dev/null, has nothing kept.
    """
    try:
        import readline  # noqa: PLC0415 (a single answer need not pay for it)
    except ImportError:
        yield None
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            os.fchmod(fd, 0o600)  # what is asked is nobody else's business
        finally:
            os.close(fd)
        readline.read_history_file(path)
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            readline.write_history_file(path)
            path.chmod(0o600)
