"""Which faults come, and when: a sequence that follows from a seed, as far as faults leave each other be."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from random import Random

import anyio
import anyio.abc
import commands
import file_faults
import process_faults
from fault import Fault, Record, conflict
from stage import CHAT_MODELS, Stage

EVERY_S = 4.0
"""On the average, between two faults."""
BARRIER_S = 15.0
"""A fault that has waited for so long goes before all that touch what it touches."""
WAITING = 8
"""So many may wait; then no more come."""
LOOK_S = 0.2

KINDS: tuple[type[Fault], ...] = (
    process_faults.RouterKilled,
    process_faults.RouterStopped,
    process_faults.ChildKilled,
    process_faults.ChildCrashed,
    process_faults.ChildStopped,
    process_faults.ChildHeld,
    process_faults.DaemonKilled,
    process_faults.DaemonStopped,
    file_faults.FileReplaced,
    file_faults.FileTruncated,
    file_faults.FileDeleted,
    file_faults.FileDropped,
    file_faults.FolderMoved,
    file_faults.DiskFull,
    commands.ReloadGood,
    commands.ReloadBad,
    commands.Restart,
    commands.StopAndStart,
    commands.LoadAndPin,
    commands.Unload,
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault of the sequence: what, on which model or its router, how long after the last, and its own chance."""

    kind: type[Fault]
    model: str
    pause_s: float
    seed: int


def planned(seed: int, kinds: Sequence[type[Fault]], every_s: float) -> Iterator[Planned]:
    """The sequence, without end. Each kind comes once before any comes at random."""
    choose = Random(seed)
    once = list(kinds)
    choose.shuffle(once)
    while True:
        kind = once.pop() if once else choose.choices(kinds, [kind.weight for kind in kinds])[0]
        pause_s = min(choose.expovariate(1 / every_s), 4 * every_s)
        yield Planned(kind, choose.choice(CHAT_MODELS), pause_s, choose.randrange(2**32))


@dataclass(slots=True)
class _Waiting:
    """A fault that has come and was not done yet."""

    fault: Fault
    since: float


class Plan:
    """Does them.

    Args:
        stage: where.
        sequence: which.

    Attributes:
        records: of all that were done, in their order.
    """

    def __init__(self, stage: Stage, sequence: Iterator[Planned]) -> None:
        self.records: list[Record] = []
        self._stage = stage
        self._sequence = sequence
        self._waiting: list[_Waiting] = []
        self._held: list[frozenset[str]] = []

    def __repr__(self) -> str:
        return f"<Plan {len(self.records)} done, {len(self._waiting)} wait, {len(self._held)} are under way>"

    async def run(self, until: float) -> None:
        """Do them until then, and wait for those that are under way."""
        following, due = next(self._sequence), time.monotonic()
        async with anyio.create_task_group() as group:
            while time.monotonic() < until:
                if time.monotonic() >= due and len(self._waiting) < WAITING:
                    fault = following.kind(self._stage, following.model, Random(following.seed))
                    self._waiting.append(_Waiting(fault, time.monotonic()))
                    following = next(self._sequence)
                    due = time.monotonic() + following.pause_s
                self._begin(group)
                await anyio.sleep(LOOK_S)

    def _begin(self, group: anyio.abc.TaskGroup) -> None:
        """Begin those that touch nothing of what is under way, or of what has waited for too long."""
        now, taken = time.monotonic(), list(self._held)
        for waiting in tuple(self._waiting):
            fault = waiting.fault
            if any(conflict(fault.claims, claims) for claims in taken):
                if now - waiting.since > BARRIER_S:
                    taken.append(fault.claims)
            elif fault.is_due():
                self._waiting.remove(waiting)
                self._held.append(fault.claims)
                taken.append(fault.claims)
                group.start_soon(self._do, fault)

    async def _do(self, fault: Fault) -> None:
        try:
            is_possible = False
            with suppress(OSError, HTTPException, AssertionError):
                is_possible = await fault.prepare()
            if not is_possible:
                await fault.tidy()
                return
            record = Record(fault.label, fault.claims)
            self.records.append(record)
            print(f"  {self._stage.findings.at(time.time())} {fault.label}: {fault.target}", flush=True)
            await fault.run(record)
        except (OSError, HTTPException, AssertionError) as error:
            self._stage.findings.broken("the control socket answers", f"{fault!r}: {error!r}")
        finally:
            self._held.remove(fault.claims)
            self._stage.ready_since.clear()  # of before the fault
