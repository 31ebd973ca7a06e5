"""Which of several places decides a key: flags of `serve`, variables, tables of the file, or the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from llamavisord.config import Setting
from llamavisord.document import spell
from llamavisord.problems import DEFAULT, Origin, Problem
from llamavisord.sources import Source
from llamavisord.toml_lines import Location

_K = TypeVar("_K", bound=BaseModel)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Picked(Generic[_T]):
    """The value that won, and where it was written; `source` is None for a default."""

    value: _T
    location: Location
    source: Source | None = None

    @property
    def origin(self) -> Origin:
        """Where it was written, for people."""
        return self.source.origin(self.location) if self.source else DEFAULT

    def problem(self, text: str) -> Problem:
        """What is wrong with it."""
        if self.source is None:
            return Problem(text, key=spell(self.location))
        return self.source.problem(self.location, text)


@dataclass(frozen=True, slots=True)
class View(Generic[_K]):
    """A table that may hold a key: the table, and where it was read."""

    keys: _K
    source: Source
    at: Location = ()


@dataclass(frozen=True, slots=True)
class Scope(Generic[_K]):
    """The tables that speak for the daemon or for one router, the one that wins first."""

    label: str
    views: Sequence[View[_K]]

    def find(self, key: str, read: Callable[[_K], _T | None]) -> Picked[_T] | None:
        """The value of `key`, None if it is written nowhere."""
        for view in self.views:
            if (value := read(view.keys)) is not None:
                return Picked(value, (*view.at, *key.split(".")), view.source)
        return None


class Picker:
    """Picks values, and notes every one of them for `config show`.

    Attributes:
        problems: what is wrong, so far.
        warnings: what a person should know although it works, so far.
        settings: every effective value and its origin, so far.
    """

    def __init__(self, warnings: Sequence[str] = ()) -> None:
        self.problems: list[Problem] = []
        self.warnings = list(warnings)
        self.settings: list[Setting] = []

    def pick(self, scope: Scope[_K], key: str, read: Callable[[_K], _T | None], default: _T) -> Picked[_T]:
        """The value of `key`, or the default."""
        picked = scope.find(key, read) or Picked(default, tuple(key.split(".")))
        self.show(scope, key, picked.value, picked.origin)
        return picked

    def path(self, scope: Scope[_K], key: str, read: Callable[[_K], str | None], default: Path) -> Picked[Path]:
        """Likewise a path, made absolute."""
        found = scope.find(key, read)
        if found is None:
            picked = Picked(default, (key,))
        else:
            picked = Picked(self.resolved(found), found.location, found.source)
        self.show(scope, key, picked.value, picked.origin)
        return picked

    def resolved(self, picked: Picked[str]) -> Path:
        """The absolute path that a text means where it was written."""
        if picked.source is None:
            return Path(picked.value)
        try:
            return picked.source.resolve(picked.value)
        except ValueError as exc:
            self.problems.append(picked.problem(str(exc)))
            return picked.source.base

    def show(self, scope: Scope[_K], key: str, value: object, origin: Origin) -> None:
        """Note a value."""
        name = f"{scope.label}.{key}" if scope.label else key
        self.settings.append(Setting(name, value, origin))
