"""What those who came before have laid claim to, while the orders are looked at one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamavisor.demands import Order
from llamavisor.eviction import MODELS, Demand
from llamavisor.placement import RAM, Candidate
from llamavisor.slots import Key, Slots, Stage


@dataclass(frozen=True, slots=True)
class Lane:
    """Where a load takes place: two loads that share a device would both believe in the same free memory.

    Attributes:
        router: the router.
        devices: the devices; none if that is not known: then any load of the same router may share them.
        key: the slot that loads there, or will.
    """

    router: str
    devices: frozenset[str]
    key: Key

    @classmethod
    def of(cls, router: str, size: Mapping[str, int], key: Key) -> Lane:
        """The lane of a load that takes so much of each device.

        Every model takes some RAM. It counts only if at least half of the model lies there: else loads on different
        cards could never be at the same time.
        """
        devices = {device for device, taken in size.items() if taken > 0}
        if 2 * size.get(RAM, 0) < sum(size.values()):
            devices.discard(RAM)
        return cls(router, frozenset(devices), key)

    def is_shared_with(self, other: Lane) -> bool:
        """Whether the two must not be used at the same time."""
        if self.devices and other.devices:
            return not self.devices.isdisjoint(other.devices)
        return self.router == other.router


class Claims:
    """The claims of the orders that have been looked at so far, over the slots that there are. Made anew for each step.

    Args:
        slots: the table.

    Attributes:
        reserved: what they will take, wherever they may be loaded.
        waits: the slots that they wait for.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.reserved: list[Demand] = []
        self.waits: set[Key] = set()
        self._free: dict[Key, int] = {}  # of the room that is free: what they do not get from their own victims
        loads = [slot.resident for slot in slots if slot.resident.is_loading]
        self._lanes = [Lane.of(each.router, each.bytes, (each.router, each.name)) for each in loads]

    def wait(self, order: Order, keys: set[Key]) -> None:
        """The order waits for these slots, and for all that those before it wait for."""
        self.waits |= keys
        order.waits = frozenset(self.waits)

    def in_lane(self, lane: Lane) -> list[Lane]:
        """Whose turn it is, of all who share the lane."""
        return [each for each in self._lanes if each.is_shared_with(lane)]

    def keep_lane(self, lane: Lane) -> None:
        """Somebody loads there, or is about to."""
        self._lanes.append(lane)

    def reserve(self, order: Order, demand: Demand) -> None:
        """Lay claim to the room that the order needs."""
        self.reserved.append(demand)
        own = [slot.resident for key in order.victims if (slot := self._slots.get(key))]
        for device, size in demand.bytes.items():
            self._claim((device, ""), size - sum(each.bytes.get(device, 0) for each in own))
        self._claim((MODELS, demand.router), 1 - sum(each.router == demand.router for each in own))

    def reserve_all(self, order: Order, candidates: Sequence[Candidate]) -> None:
        """Lay claim to whatever comes free for an order that there is no room for, wherever it may be loaded."""
        taken: dict[str, int] = {}  # a device that two routers share is reserved once
        for each in candidates:
            demand = Demand(order.model, each.bytes, each.router)
            if each.is_ready and demand.within(each.budget) == demand:  # else it will never be loaded there
                more = {device: max(size - taken.get(device, 0), 0) for device, size in each.bytes.items()}
                taken |= {device: max(size, taken.get(device, 0)) for device, size in each.bytes.items()}
                self.reserve(order, Demand(order.model, more, each.router))

    def has_room(self, candidate: Candidate) -> bool:
        """Whether there is room at this moment, beside everybody who is there or on the way out."""
        most, router = candidate.budget.models_max, candidate.router
        if most > 0 and self._slots.count(router) + self._free.get((MODELS, router), 0) >= most:
            return False
        for device, size in candidate.bytes.items():
            limit = candidate.budget.bytes.get(device)
            if limit is not None and size > 0:
                used = self._slots.taken(device) + self._free.get((device, ""), 0)
                if used + size > limit:
                    return False
        return True

    def is_answering(self, keys: set[Key]) -> bool:
        """Whether one of the slots goes only when somebody's answer has ended, which may take long."""
        return any((slot := self._slots.get(key)) and slot.stage is Stage.DRAINING for key in keys)

    def _claim(self, room: Key, size: int) -> None:
        self._free[room] = self._free.get(room, 0) + max(size, 0)
