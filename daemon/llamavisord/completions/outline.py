"""The command line as a shell completes it: every command, its flags, and what kind of word comes where."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from llamavisord.cli.arguments import make_parser
from llamavisord.cli.program import COMPLETE
from llamavisord.reference.commands import help_of, taken, value_of

PROGRAM = "llamavisor"
CALL = f"{PROGRAM} {COMPLETE}"
"""How a shell asks for names: the kind and the words of the line follow."""


class Kind(Enum):
    """What is offered for a word."""

    MODELS = "models"
    """Names of models, from the daemon."""
    ROUTERS = "routers"
    """Names of routers, likewise."""
    PULLS = "pulls"
    """IDs of pulls that have not ended well, likewise."""
    SOURCES = "sources"
    """Names of models, and paths of files."""
    FILES = "files"
    """Paths of files and folders."""
    FOLDERS = "folders"
    """Paths of folders."""
    WORDS = "words"
    """The few words that may stand there."""
    ANYTHING = "anything"
    """Nothing is offered: a number, a size, a new name."""


_KINDS = {
    "FILE": Kind.FILES,
    "PATH": Kind.FILES,
    "DIR": Kind.FOLDERS,
    "model": Kind.MODELS,
    "models": Kind.MODELS,
    "names": Kind.MODELS,
    "router": Kind.ROUTERS,
    "cancel": Kind.PULLS,
    "SRC": Kind.SOURCES,
}
"""By how a value is called for people, else by its name in the program."""
_WORDS = {
    "TYPE": (
        *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M"),
        *("Q6_K", "Q8_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS"),
        *("IQ4_NL", "TQ1_0", "TQ2_0", "MXFP4_MOE", "F16", "BF16", "F32", "COPY"),
    )
}
"""Likewise: of what nobody checks but who is given it. The types are the usual ones of llama-quantize: to ask the tool
would keep whoever presses Tab waiting."""


@dataclass(frozen=True, slots=True)
class Value:
    """One value of a flag or a command.

    Attributes:
        name: what it is called for people.
        kind: what is offered.
        words: the choices, of `Kind.WORDS`.
    """

    name: str
    kind: Kind
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag with all its spellings; `value` is None for a switch."""

    spellings: tuple[str, ...]
    does: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class Command:
    """One command; the first is the program itself.

    Attributes:
        path: the words that lead to it, without the program.
        does: one line.
        flags: what it takes.
        commands: the words that may follow, each with one line; of a command with such there are no others.
        values: what else may follow, one after the other.
        is_repeated: whether the last of them may come any number of times.
    """

    path: tuple[str, ...]
    does: str
    flags: tuple[Flag, ...]
    commands: tuple[tuple[str, str], ...] = ()
    values: tuple[Value, ...] = ()
    is_repeated: bool = False


def outline() -> list[Command]:
    """Every command, the program first."""
    return list(_below(make_parser(), (), ""))


def _below(parser: argparse.ArgumentParser, path: tuple[str, ...], does: str) -> Iterator[Command]:
    actions = taken(parser)
    flags = tuple(
        Flag(tuple(action.option_strings), help_of(action), None if action.nargs == 0 else _value(action))
        for action in actions
        if action.option_strings
    )
    help_ = Flag(("-h", "--help"), "show what it takes", None)
    positionals = [action for action in actions if not action.option_strings]
    deeper = [
        action
        for action in parser._actions  # noqa: SLF001 (argparse tells of them in no other way)
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001 (likewise)
    ]
    told = {each.dest: each.help or "" for action in deeper for each in action._get_subactions()}  # noqa: SLF001 (likewise)
    yield Command(
        path=path,
        does=does,
        flags=(*flags, help_),
        commands=tuple(told.items()),
        values=tuple(map(_value, positionals)),
        is_repeated=bool(positionals) and positionals[-1].nargs in {"*", "+"},
    )
    for action in deeper:
        for name, command in action.choices.items():
            if name in told:
                yield from _below(command, (*path, name), told[name])


def _value(action: argparse.Action) -> Value:
    name = action.metavar if isinstance(action.metavar, str) else action.dest
    if action.choices:
        return Value(action.dest, Kind.WORDS, tuple(map(str, action.choices)))
    if name in _WORDS:
        return Value(name, Kind.WORDS, _WORDS[name])
    is_path = action.type is Path
    kind = _KINDS.get(name) or _KINDS.get(action.dest) or (Kind.FILES if is_path else Kind.ANYTHING)
    return Value(value_of(action).removesuffix("...") or name, kind)
