"""What those who came before have laid claim to, while the orders are looked at one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamavisor.demands import Order
from llamavisor.eviction import Demand
from llamavisor.gauge.device import RAM_ID as RAM
from llamavisor.placement import Candidate, Reserved
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
        waits: the slots that those of them wait for that are not being loaded yet.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.reserved = Reserved()
        self.waits: set[Key] = set()
        loads = [slot.resident for slot in slots if slot.resident.is_loading]
        self._lanes = [Lane.of(each.router, each.bytes, (each.router, each.name)) for each in loads]

    def __repr__(self) -> str:
        return f"<Claims {self.reserved}, lanes={[lane.key for lane in self._lanes]}>"

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

    def reserve(self, demand: Demand) -> None:
        """Lay claim to the room that an order will have."""
        for device, size in demand.bytes.items():
            self.reserved.bytes[device] = self.reserved.bytes.get(device, 0) + size
        self.reserved.models[demand.router] = self.reserved.models.get(demand.router, 0) + 1

    def reserve_all(self, model: str, candidates: Sequence[Candidate]) -> None:
        """Lay claim to whatever comes free for a model that there is no room for, wherever it may be loaded."""
        taken: dict[str, int] = {}  # a device that two routers share is reserved once
        for each in candidates:
            demand = Demand(model, each.bytes, each.router)
            is_usable = each.is_ready and each.is_open
            if is_usable and demand.within(each.budget) == demand:  # else it will never be loaded there
                more = {device: max(size - taken.get(device, 0), 0) for device, size in each.bytes.items()}
                taken |= {device: max(size, taken.get(device, 0)) for device, size in each.bytes.items()}
                self.reserve(Demand(model, more, each.router))

    def has_room(self, candidate: Candidate) -> bool:
        """Whether there is room at this moment, beside everybody who is there or on the way out.

        What is reserved need not be asked for again: that there will be room for all when those who leave have gone was
        found when the candidate was chosen.
        """
        most = candidate.budget.models_max
        if most > 0 and self._slots.count(candidate.router) >= most:
            return False
        for device, size in candidate.bytes.items():
            limit = candidate.budget.bytes.get(device)
            if limit is not None and size > 0 and self._slots.taken(device) + size > limit:
                return False
        return True

    def is_answering(self, keys: set[Key]) -> bool:
        """Whether one of the slots goes only when somebody's answer has ended, which may take long."""
        return any((slot := self._slots.get(key)) and slot.stage is Stage.DRAINING for key in keys)
