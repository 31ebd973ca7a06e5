"""What every event is."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from enum import Enum
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something notable that happened; every subclass adds what it happened to.

    Class attributes:
        level: the level of its log line, as a rule.
        is_kept: whether it is worth a place among the events that can be replayed.
        is_frequent: whether there may be thousands in a second; most listeners then need not hear of it.
    """

    level: ClassVar[int] = logging.INFO
    is_kept: ClassVar[bool] = True
    is_frequent: ClassVar[bool] = False

    @property
    def log_level(self) -> int:
        """The level of this one's log line: that of its kind, unless what happened is graver than usual."""
        return self.level

    @property
    def is_news(self) -> bool:
        """Whether this one is worth its place: as all of its kind, unless it only repeats another."""
        return self.is_kept

    def message(self) -> str:
        """One line for a person."""
        raise AssertionError(f"{type(self).__name__} does not say what it means")

    def as_dict(self) -> dict[str, object]:
        """Its name, its fields and its message, as JSON knows them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        return {"event": type(self).__name__, **plain, "message": self.message()}
