"""The one table of what takes memory, over all routers: who is loading, loaded, or on the way out.

It is written by `admission` alone, and holds what admission knows: what it was told, and what it has decided itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum

from llamavisor.eviction import Resident

Key = tuple[str, str]
"""A router's name and a model's: one slot."""


class Stage(Enum):
    """Where a slot is in its life. It begins as LOADING or LOADED and ends by being removed, from any stage."""

    LOADING = "loading"
    LOADED = "loaded"
    DRAINING = "draining"  # closed to new leases; unloaded when the last one ends, open again if nobody needs its room
    LEAVING = "leaving"  # to be unloaded, or failed to load: its process ends, and its bytes are not free before that


class Slot:
    """One model on one router.

    Args:
        resident: how eviction sees it at first.
        stage: where it is in its life.
        since: when its load began, or was first heard of.
        is_ours: whether admission had it loaded.

    Attributes:
        key: its router and its model.
        stage: where it is in its life.
        since: when its load began, or was first heard of.
        is_ours: whether admission had it loaded.
        is_dismissed: whether it leaves whether or not anybody needs its room.
        progress: the fraction of its load that is done.
        stuck_until: until when it is not asked again to leave, after its router would not let it.
        leases: the numbers of the leases on it.
        has_answered: whether it has done for anybody what it was had for.
        failures: how often in a row it has answered that it could not.
    """

    def __init__(self, resident: Resident, stage: Stage, since: float, *, is_ours: bool = False) -> None:
        self.key: Key = resident.router, resident.name
        self.stage = stage
        self.since = since
        self.is_ours = is_ours
        self.is_dismissed = False
        self.progress = 0.0
        self.stuck_until = 0.0
        self.leases: set[int] = set()
        self.has_answered = False
        self.failures = 0
        self._resident = resident
        self._leased_at: float | None = None  # when a lease last began or ended, until `resident` tells of it

    def __repr__(self) -> str:
        return f"<Slot {'/'.join(self.key)} {self.stage.value} leases={len(self.leases)}>"

    @property
    def resident(self) -> Resident:
        """How eviction sees it. Leases, thousands in a second perhaps, are told of only when somebody looks."""
        if self._leased_at is not None:
            self._resident = replace(self._resident, leases=len(self.leases), last_used=self._leased_at)
            self._leased_at = None
        return self._resident

    @resident.setter
    def resident(self, resident: Resident) -> None:
        self._resident, self._leased_at = resident, None

    def become(self, stage: Stage) -> None:
        """Enter a stage. A load that was cancelled, or failed, counts as one until its process has gone."""
        is_loading = stage is Stage.LOADING or (stage is Stage.LEAVING and self.resident.is_loading)
        is_leaving = stage in {Stage.DRAINING, Stage.LEAVING}
        self.resident = replace(self.resident, is_loading=is_loading, is_leaving=is_leaving)
        self.stage = stage

    def add_lease(self, number: int, now: float) -> None:
        """Promise somebody that it stays."""
        self.leases.add(number)
        self._leased_at = now

    def end_lease(self, number: int, now: float) -> bool:
        """Take the promise back; returns whether there was one: that of a former life of the slot is none."""
        if number not in self.leases:
            return False
        self.leases.remove(number)
        self._leased_at = now
        return True

    def may_go(self, now: float) -> bool:
        """Whether it can be unloaded at once."""
        return not self.resident.is_busy and now >= self.stuck_until


class Slots:
    """All slots, by router and model."""

    def __init__(self) -> None:
        self._slots: dict[Key, Slot] = {}

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def get(self, key: Key) -> Slot | None:
        """The slot, None if there is none."""
        return self._slots.get(key)

    def add(self, slot: Slot) -> None:
        """Take in a slot that was not there."""
        self._slots[slot.key] = slot

    def remove(self, key: Key) -> Slot | None:
        """Forget a slot whose process has ended."""
        return self._slots.pop(key, None)

    def residents(self, now: float) -> list[Resident]:
        """How eviction sees them. Who would not leave when asked counts as busy for a while."""
        return [
            slot.resident if slot.stuck_until <= now else replace(slot.resident, in_flight=slot.resident.in_flight + 1)
            for slot in self
        ]

    def taken(self, device: str) -> int:
        """What they hold of a device, those that are leaving included."""
        return sum(slot.resident.bytes.get(device, 0) for slot in self)

    def count(self, router: str) -> int:
        """How many a router has, those that are leaving included."""
        return sum(slot.resident.router == router for slot in self)
