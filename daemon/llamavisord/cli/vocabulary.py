"""What the arguments of all commands are made of: how a command is added, and what its values may be."""

from __future__ import annotations

import argparse

from llamavisor.quantities import parse_duration

WAIT_MAX_S = 3600.0
"""The daemon lets nobody wait longer; whoever wants to asks again."""
SOCKET_HELP = "the daemon's control socket (else LLAMAVISOR_SOCKET)"


class Commands:
    """Adds commands to a parser, each with what all commands have."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, dest: str) -> None:
        self._actions = parser.add_subparsers(title=title, metavar="COMMAND", dest=dest, required=True)

    @property
    def names(self) -> tuple[str, ...]:
        """All that there are."""
        return tuple(self._actions.choices)

    def add(
        self, name: str, does: str, *, details: str = "", talks: bool = False, json: bool = False
    ) -> argparse.ArgumentParser:
        """A command that does what `does` says.

        Args:
            name: the command.
            does: one line for the list of commands.
            details: what its own help adds.
            talks: whether it talks to the daemon.
            json: whether it can answer in JSON.
        """
        description = f"{does[0].upper()}{does[1:]}.{details and ' '}{details}"
        parser = self._actions.add_parser(name, help=does, description=description, allow_abbrev=False)
        parser.set_defaults(parser=parser)
        add_debug(parser)
        if talks:
            add_socket(parser, SOCKET_HELP, default=argparse.SUPPRESS)
        if json:
            parser.add_argument("--json", action="store_true", help="answer in JSON")
        return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug` may stand before the command and behind it."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def add_socket(parser: argparse.ArgumentParser, told: str, *, default: str | None = None) -> None:
    """`--socket` likewise; behind the command it does not take back what stands before it."""
    parser.add_argument("--socket", metavar="PATH", default=default, help=told)


def add_wait(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    """Whether and how long a command waits."""
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to wait until it is done (default: yes)",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default=timeout_s,
        metavar="TIME",
        help=f'how long to wait, such as "90s" or "10m", at most 1h (default: {timeout_s / 60:.0f}m)',
    )


def duration(text: str) -> float:
    """A time to wait, such as "90s": more than none, and no longer than the daemon lets anybody wait."""
    try:
        seconds = parse_duration(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    if not 0 < seconds <= WAIT_MAX_S:
        raise argparse.ArgumentTypeError("expected more than nothing and at most 1h")
    return seconds


def amount(text: str) -> float:
    """A number from 0 up."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("expected a number from 0 up")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = amount(text)
    if number > 1:
        raise argparse.ArgumentTypeError("expected a number from 0 to 1")
    return number


def positive(text: str) -> int:
    """A whole number from 1 up."""
    number = count(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a whole number from 1 up")
    return number


def count(text: str) -> int:
    """A whole number from 0 up."""
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise argparse.ArgumentTypeError("expected a whole number from 0 up")
    return int(text)
