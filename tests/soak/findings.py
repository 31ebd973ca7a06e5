"""What is broken, when that was seen, and once only."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken invariant: which one, when, and what was seen."""

    time: float
    invariant: str
    text: str


class Findings:
    """All of them."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self.began = time.time()

    def __repr__(self) -> str:
        return f"<Findings {len(self.all)}>"

    def broken(self, invariant: str, text: str) -> None:
        """An invariant does not hold. What has been said already is not repeated."""
        if all((each.invariant, each.text) != (invariant, text) for each in self.all):
            self.all.append(Finding(time.time(), invariant, text))
            print(f"! {self.at(time.time())} {invariant}: {text}", flush=True)

    def at(self, unix: float) -> str:
        """A time as people read it here: seconds since the beginning."""
        return f"{unix - self.began:7.2f} s"
