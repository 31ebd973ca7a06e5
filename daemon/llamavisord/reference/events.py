"""The events, by what they are about, and the words that their fields and the labels of metrics hold."""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from llamavisor import events
from llamavisor.demands import Why
from llamavisor.events import Event
from llamavisor.states import ModelState
from llamavisord.reference.docstrings import attributes, members, told
from llamavisord.reference.markdown import code, prose, table

_ABOUT = """\
As `llamavisor events --json` and `GET /control/v1/events` tell them: an object with `id` (from 1, without gaps), `time`
(Unix seconds), `event` (the name), `message` (one line for a person) and the fields of its kind. Those that are not
kept are told with `--all` alone, to who listens. The level is that of the line in the log, as a rule."""
_NONE = re.compile(r"\bNone\b")
_JSON = {str: "text", int: "integer", float: "number", bool: "true or false", types.NoneType: "null"}
_UNITS = {
    "bytes_per_s": "bytes per second",
    "_s": "seconds",
    "seconds": "seconds",
    "bytes": "bytes",
    "bytes_in": "bytes",
    "bytes_out": "bytes",
}
"""The end of a field's name, and what its number counts; the first that fits."""


def kinds() -> list[type[Event]]:
    """Every kind of event, in the order of the modules and in them of the source."""
    found = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)]
    return sorted(set(found) - {Event}, key=lambda kind: (kind.__module__, _place(kind)))


def happenings() -> Iterator[str]:
    """Every event with its fields."""
    yield _ABOUT
    yield ""
    module = ""
    for kind in kinds():
        if kind.__module__ != module:
            module = kind.__module__
            yield f"### {prose(_subject(module))}"
            yield ""
            yield from table(("event", "level", "what has happened", "fields"), map(_row, _of(module)))
            for each in _of(module):
                yield from _meanings(each)


def words() -> Iterator[str]:
    """What the words mean that stand in fields, in labels, and in what commands show."""
    found: set[type[Enum]] = {
        hint for kind in kinds() for each in get_type_hints(kind).values() for hint in _enums(each)
    }
    for enum in sorted(found | {ModelState, Why}, key=lambda enum: enum.__name__):
        yield f"### {enum.__name__}"
        yield ""
        yield prose(told(enum))
        yield ""
        yield from table(("word", "meaning"), ((code(word), prose(text)) for word, text in members(enum).items()))


def _place(kind: type[Event]) -> int:
    return list(vars(sys.modules[kind.__module__])).index(kind.__name__)


def _subject(module: str) -> str:
    """What a module says that it is about."""
    return (sys.modules[module].__doc__ or "").strip().rstrip(".")


def _of(module: str) -> list[type[Event]]:
    return [kind for kind in kinds() if kind.__module__ == module]


def _row(kind: type[Event]) -> tuple[str, str, str, str]:
    level = logging.getLevelName(kind.level).lower()
    kept = "" if kind.is_kept else ", not kept"
    hints = get_type_hints(kind)
    shown = [f"{code(field.name)} {_type(field.name, hints[field.name])}" for field in fields(kind)]
    return code(kind.__name__), f"{level}{kept}", _meaning(told(kind)), "<br>".join(shown)


def _meanings(kind: type[Event]) -> Iterator[str]:
    if said := attributes(kind):
        yield f"The fields of `{kind.__name__}`:"
        yield ""
        rows = [(code(field.name), _meaning(said.get(field.name, ""))) for field in fields(kind)]
        yield from table(("field", "meaning"), rows)


def _meaning(text: str) -> str:
    """What a docstring says, with the word of JSON for nothing."""
    return _NONE.sub("null", prose(text))


def _type(name: str, hint: Any) -> str:
    """What a field holds, in the words of JSON, with its unit."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(name, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type('', get_args(hint)[0])}"
    unit = next((unit for end, unit in _UNITS.items() if name.endswith(end) and hint in (int, float)), "")
    return f"{_JSON[hint]}, {unit}" if unit else _JSON[hint]


def _enums(hint: Any) -> Iterator[type[Enum]]:
    if isinstance(hint, type) and issubclass(hint, Enum):
        yield hint
    for each in get_args(hint):
        yield from _enums(each)
