"""What docstrings say: of a class or a function, of its attributes, of the members of an enum."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from enum import Enum
from typing import Any

_SECTION = re.compile(r"^(Args|Attributes|Class attributes|Raises|Returns):$", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n     +.*)*)", re.MULTILINE)


class SilentError(Exception):
    """Raised when something that people use has no docstring: a page without it would be of no use."""


def told(thing: type | Callable[..., object]) -> str:
    """What a class or a function is, in the words of its docstring before the first section."""
    text = inspect.cleandoc(thing.__doc__ or "")
    if not text or text.startswith(f"{getattr(thing, '__name__', '')}("):  # what dataclasses write by themselves
        raise SilentError(f"{thing.__module__}.{thing.__qualname__} has no docstring")
    return _SECTION.split(text)[0].strip()


def attributes(cls: type) -> dict[str, str]:
    """What the section `Attributes:` of a class says of each."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    return dict(_ATTRIBUTE.findall(_SECTION.split(section)[0]))


def members(enum: type[Enum]) -> dict[str, str]:
    """What each value of an enum means, by the docstring below it."""
    below = _below(enum)
    for member in enum:
        if not below.get(member.name):
            raise SilentError(f"{enum.__name__}.{member.name} has no docstring")
    return {str(member.value): below[member.name] for member in enum}


def _below(cls: type[Any]) -> dict[str, str]:
    """The strings that stand below the assignments in the body of a class, by the names assigned to."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)  # noqa: S101 (a class has the source of one)
    found = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        match statement, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found
