"""The commands, from the parser of the command line; its own help is as wide as the terminal, and differs by Python."""

from __future__ import annotations

import argparse
import functools
import re
from collections import Counter
from collections.abc import Iterator

from llamavisord.cli.arguments import make_parser
from llamavisord.reference.markdown import code, prose, table
from llamavisord.reference.quantities import duration

COMMON = """\
These mean the same everywhere. `--debug` and `--socket` may also stand before the command, `--json` only behind one
that prints data, `--version` stands alone, and every command has `--help`."""
_ABOUT = f"{COMMON} What a command takes is in its first line."
_DEFAULT = re.compile(r" \(default: (%\(default\)s|[^)]*)\)")
"""It has a column of its own; some versions of Python add one by themselves."""


def commands() -> Iterator[str]:
    """Every command with its arguments; those that most have are told once."""
    parser = make_parser()
    found = list(below(parser, parser.prog))
    before = taken(parser)
    shown = {_key(action): action for _, command in found for action in taken(command) if is_common(action)}
    yield _ABOUT
    yield ""
    yield from _arguments([*({_key(action): action for action in before} | shown).values()])
    for words, command in found:
        arguments = taken(command)
        yield f"### `{words}`"
        yield ""
        yield f"`{' '.join([words, *map(synopsis, arguments)])}`"
        yield ""
        yield prose(command.description or "")
        yield ""
        yield from _arguments([action for action in arguments if not is_common(action)])


def is_common(action: argparse.Action) -> bool:
    """Whether most commands have the same argument."""
    return _key(action) in _common()


@functools.cache
def _common() -> frozenset[tuple[str, str | None]]:
    parser = make_parser()
    found = list(below(parser, parser.prog))
    counted = Counter(_key(action) for _, command in found for action in taken(command))
    return frozenset(key for key, count in counted.items() if count > len(found) / 2)


def _key(action: argparse.Action) -> tuple[str, str | None]:
    """Arguments of two commands with the same key are the same."""
    return spelled(action), action.help


def below(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The commands of a parser that are no further choice of commands, with the words that lead to them."""
    for action in parser._actions:  # noqa: SLF001 (argparse tells of them in no other way)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 (likewise)
            for name, command in action.choices.items():
                deeper = list(below(command, f"{words} {name}"))
                yield from deeper or [(f"{words} {name}", command)]


def taken(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a command, the way that they are written; `--help` goes without saying."""
    actions = [
        action
        for action in parser._actions  # noqa: SLF001 (likewise)
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)  # noqa: SLF001 (likewise)
        and action.help != argparse.SUPPRESS
    ]
    return sorted(actions, key=lambda action: not action.option_strings)


def _arguments(actions: list[argparse.Action]) -> Iterator[str]:
    rows = [(code(spelled(action)), code(default_of(action)), prose(help_of(action))) for action in actions]
    yield from table(("argument", "default", "what it does"), rows)


def help_of(action: argparse.Action) -> str:
    """What an argument does, without its default."""
    return _DEFAULT.sub("", action.help or "") % vars(action)


def value_of(action: argparse.Action) -> str:
    """The word that stands for the value of an argument, empty if it takes none."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return f"{{{','.join(map(str, action.choices))}}}"
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"{name}..." if action.nargs in ("*", "+") else name


def spelled(action: argparse.Action) -> str:
    """All ways to write an argument, and its value."""
    return " ".join(filter(None, [", ".join(action.option_strings), value_of(action)]))


def synopsis(action: argparse.Action) -> str:
    """An argument as it stands in the first line of its command."""
    if not action.option_strings:
        return f"[{value_of(action)}]" if action.nargs in ("?", "*") else value_of(action)
    spellings = action.option_strings if isinstance(action, argparse.BooleanOptionalAction) else [_longest(action)]
    return f"[{' '.join(filter(None, [' | '.join(spellings), value_of(action)]))}]"


def _longest(action: argparse.Action) -> str:
    return max(action.option_strings, key=len)


def default_of(action: argparse.Action) -> str:
    """What holds if nothing is said, as people write it; empty for nothing, and for a switch that is off."""
    match action.default:
        case None | False | argparse.SUPPRESS | []:
            return ""
        case True:
            return (
                _longest(action) if not isinstance(action, argparse.BooleanOptionalAction) else action.option_strings[0]
            )
        case float(seconds):
            return duration(seconds)
        case default:
            return str(default)
