"""What is wrong with a configuration, where it was written, and how that is said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamavisor.errors import LlamavisorError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from.

    Attributes:
        source: path of the configuration file, name of an environment variable, a flag, or "default".
        line: line in the file, from 1; None where there is none.
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = Origin("default")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        text: what, why, and what to do.
        origin: where it was written, None if it was written nowhere.
        key: its key in a file, such as `router[1].port`; empty where the origin says enough.
    """

    text: str
    origin: Origin | None = None
    key: str = ""

    def __str__(self) -> str:
        parts = (str(self.origin) if self.origin else "", self.key, self.text)
        text = ": ".join(part for part in parts if part)
        return "".join(char if char.isprintable() else " " for char in text)


class ConfigError(LlamavisorError):
    """Raised when a configuration cannot be used: unreadable, not understood, or contradicting itself.

    Carries everything that was found, so that a person can put it all right at once; `str(error)` is one line
    for each.
    """

    code = "config_invalid"

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(Problem(each) if isinstance(each, str) else each for each in problems)
        super().__init__("\n".join(map(str, self.problems)))
