"""Keeps a models folder that only looks empty from taking all models away: an unmounted disk leaves its mount point."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

AGAIN_S = 2.0
"""What takes everything away is believed when it is seen twice, at least so long apart."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a look is not believed yet.

    Attributes:
        problem: what a person is told.
        again_in_s: when to look again.
    """

    problem: str
    again_in_s: float


class Guard:
    """Doubts what would take everything away until it is seen twice.

    Two things are doubted: that no file is left where there were some, and that a folder is on another device than
    before. Whatever else is found is believed.

    Args:
        root: path of the models folder, which is not repeated in what is told.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._suspicion: tuple[str, ...] = ()
        self._since = 0.0

    def __repr__(self) -> str:
        return f"<Guard {self._suspicion}>"

    def forget(self) -> None:
        """The folder could not be looked at: the two looks must follow each other."""
        self._suspicion = ()

    def doubt(
        self, *, had: int, has: int, before: Mapping[str, int], devices: Mapping[str, int], now: float
    ) -> Doubt | None:
        """Whether a look is to be doubted; None when it is believed.

        Args:
            had: how many files there were.
            has: how many there are.
            before: st_dev of the folders before, by path.
            devices: st_dev of the folders now.
            now: monotonic seconds.
        """
        moved = sorted(path for path, device in devices.items() if before.get(path, device) != device) if had else []
        suspicion = (*moved, *([] if has or not had else ["empty"]))
        if not suspicion:
            self._suspicion = ()
            return None
        if suspicion != self._suspicion:
            self._suspicion, self._since = suspicion, now
        rest = self._since + AGAIN_S - now
        if rest <= 0:
            self._suspicion = ()
            return None
        return Doubt(f"{self._tell(had, moved)}; believed if it is still so in {math.ceil(rest)} s", rest)

    def _tell(self, had: int, moved: list[str]) -> str:
        if moved:
            which = moved[0].removeprefix(self._root).strip("/")
            subject = f"its folder {which}" if which else "it"
            return f"{subject} is on another device than before, as when a disk is mounted or unmounted"
        return f"all {had} model files are gone, as when a disk is unmounted"
