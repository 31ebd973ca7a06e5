"""How often the daemon was started, and how often it had ended without saying so: only the ledger can tell."""

from __future__ import annotations

from typing import Any


class Lives:
    """A section of the ledger.

    Attributes:
        starts: how often the daemon was started, this time included.
        deaths: how often it had not ended in order: killed, crashed, or the machine was switched off.
        was_cut_short: whether the last one had not.
    """

    name = "lives"

    def __init__(self) -> None:
        self.starts = 1
        self.deaths = 0
        self.was_cut_short = False
        self._is_over = False
        self._changes = 1  # the file has to say at once that it runs

    def __repr__(self) -> str:
        return f"<Lives {self.starts}, {self.deaths} of them cut short>"

    @property
    def changes(self) -> int:
        """A number that grows with every change."""
        return self._changes

    def end(self) -> None:
        """The daemon ends in order."""
        self._is_over = True
        self._changes += 1

    def load(self, raw: object, now: float) -> str:  # noqa: ARG002 (ledger.Section)
        """Takes over what the file says."""
        before: dict[str, Any] = raw if isinstance(raw, dict) else {}
        counts = [before.get("starts"), before.get("deaths")]
        if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
            return "it is damaged, and begins anew"
        self.starts += before["starts"]
        self.was_cut_short = before.get("has_ended") is not True
        self.deaths += before["deaths"] + self.was_cut_short
        self._changes += 1
        return ""

    def dump(self) -> object:
        """What the file is to say."""
        return {"starts": self.starts, "deaths": self.deaths, "has_ended": self._is_over}
