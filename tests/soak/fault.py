"""What every fault has: how it is done, how it is seen that it was noticed, and how, that all is well again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

import anyio
from journal import Event
from stage import Stage, router_of

EVERYTHING = "daemon"
"""The claim of what touches everything."""


@dataclass(slots=True)
class Record:
    """What became of one fault; the times are Unix seconds, the durations seconds.

    Attributes:
        label: of its class.
        claims: what it touches.
        began: when it was done.
        ended: when all was well again, or it was given up.
        detected_s: until it was noticed; None if nothing notices it.
        recovered_s: until all was well again, counted from the fault, or from when its cause was put right.
        was_overtaken: whether something else, such as an eviction, ended it before it could be measured.
        lost: requests that it took.
    """

    label: str
    claims: frozenset[str]
    began: float = 0.0
    ended: float = float("inf")
    detected_s: float | None = None
    recovered_s: float | None = None
    was_overtaken: bool = False
    lost: list[str] = field(default_factory=list)


class Fault:
    """One kind of fault, done once to one router or one of its models.

    Args:
        stage: where.
        model: the model, which also says which router.
        choose: of what is left to chance.

    Class attributes:
        label: in the table.
        weight: how often it is done, among all kinds.
        is_slow: whether it takes more than a minute.
        detect_s: it has to be noticed within so long; None if there is nothing to notice.
        recover_s: likewise all has to be well.
    """

    label: ClassVar[str]
    weight: ClassVar[int] = 2
    is_slow: ClassVar[bool] = False
    detect_s: ClassVar[float | None] = 5.0
    recover_s: ClassVar[float] = 60.0

    def __init__(self, stage: Stage, model: str, choose: Random) -> None:
        self.stage = stage
        self.model = model
        self.router = router_of(model)
        self.choose = choose
        self.done_at = 0.0
        self.cured_at = 0.0

    def __repr__(self) -> str:
        return f"<{self.label} on {self.model}>"

    @property
    def claims(self) -> frozenset[str]:
        """What it touches: a router, a model as "router/model", or everything."""
        return frozenset({f"{self.router}/{self.model}"})

    @property
    def target(self) -> str:
        """For people."""
        return ", ".join(sorted(self.claims))

    def is_due(self) -> bool:
        """Whether it can be done now."""
        return True

    async def prepare(self) -> bool:
        """See that it can be done; False if it cannot."""
        return True

    async def inject(self) -> None:
        """Do it."""
        raise NotImplementedError

    def is_seen(self, event: Event) -> bool:
        """Whether this event says that it was noticed."""
        raise NotImplementedError

    async def cure(self) -> None:
        """Put right what nobody else can."""

    def is_healed(self, event: Event) -> bool:
        """Whether this event says that all is well again."""
        raise NotImplementedError

    async def healed_at(self, since: int) -> float | None:
        """Unix seconds of when all was well again, None if it was not in time."""
        event = await self.stage.journal.first(self.is_healed, since, self.recover_s)
        return None if event is None else float(event["time"])

    def is_overtaken(self, event: Event) -> bool:
        """Whether after this event it cannot be measured any more."""
        return False

    async def tidy(self) -> None:
        """Leave nothing behind."""

    async def run(self, record: Record) -> None:
        """Do it, and write down what became of it."""
        journal, findings = self.stage.journal, self.stage.findings
        mark = journal.mark
        record.began = self.done_at = time.time()
        try:
            await self.inject()
            record.began = self.cured_at = self.done_at
            if self.detect_s is not None:
                event = await journal.first(self._seen_or_overtaken(mark), mark, self.detect_s)
                if event is None:
                    findings.broken("noticed in time", f"{self!r}: not within {self.detect_s} s")
                elif self.is_seen(event):
                    record.detected_s = float(event["time"]) - self.done_at
                else:
                    record.was_overtaken = True
            await self.cure()
            if record.was_overtaken:
                return
            healed_at = await self.healed_at(mark)
            if healed_at is None and any(map(self.is_overtaken, journal.events[mark:])):
                record.was_overtaken = True
            elif healed_at is None:
                findings.broken("well again in time", f"{self!r}: not within {self.recover_s} s")
            else:
                record.recovered_s = max(0.0, healed_at - self.cured_at)
        finally:
            with anyio.CancelScope(shield=True):
                await self.tidy()
            record.ended = time.time()

    def _seen_or_overtaken(self, mark: int) -> Callable[[Event], bool]:
        return lambda event: self.is_seen(event) or self.is_overtaken(event)


class Victim:
    """A process that is sent signals, and no other that has its number later."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def __repr__(self) -> str:
        return f"<Victim {self.pid}>"

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def conflict(some: frozenset[str], others: frozenset[str]) -> bool:
    """Whether two faults touch the same: everything, a router and one of its models, or one model."""
    return any(
        EVERYTHING in {one, other} or one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")
        for one in some
        for other in others
    )
