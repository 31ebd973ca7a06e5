"""What may be written for a key, in words, from the type that checks it."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

_PLAIN = {str: "text", bool: "true or false", int: "whole number", float: "number"}


def words(hint: Any) -> str:
    """The words for a type: its title if it has one, else what follows from its parts.

    Raises:
        TypeError: there are none; a title is to be given where the type is made.
    """
    if hint in _PLAIN:
        return _PLAIN[hint]
    match get_origin(hint):
        case origin if origin is Annotated:
            return _annotated(*get_args(hint))
        case origin if origin in (Union, types.UnionType):
            return _either(words(each) for each in get_args(hint) if each is not types.NoneType)
        case origin if origin is Literal:
            return _either(f'"{each}"' for each in get_args(hint))
        case origin if origin in (list, tuple):
            return f"list of {words(get_args(hint)[0])}"
        case origin if origin is dict:
            return f"table of {words(get_args(hint)[1])}"
    raise TypeError(f"no words for {hint}: give it a Field(title=…)")


def _annotated(hint: Any, *metadata: object) -> str:
    """The last title counts; bounds are told behind the words of the type itself."""
    infos = [each for each in metadata if isinstance(each, FieldInfo)]
    for info in reversed(infos):
        if info.title:
            return info.title
    bounds = [bound for info in infos for bound in info.metadata]
    low = next((bound.ge for bound in bounds if isinstance(bound, Ge)), None)
    high = next((bound.le for bound in bounds if isinstance(bound, Le)), None)
    return f"{words(hint)}{_between(low, high)}"


def _between(low: object, high: object) -> str:
    if high is not None:
        return f" from {low or 0} to {high}"
    return f" from {low} up" if low is not None else ""


def _either(choices: Iterable[str]) -> str:
    *some, last = dict.fromkeys(choices)
    return f"{', '.join(some)} or {last}" if some else last
