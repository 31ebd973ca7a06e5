"""Models on their way in and out: the workers that have routers load and unload what admission has decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from llamavisor import events as ev
from llamavisor.admission import Admission
from llamavisor.cause import Subject, classify_refusal, consequence
from llamavisor.demands import Action
from llamavisor.errors import ApiError, LlamavisorError
from llamavisor.gauge import RAM_ID
from llamavisor.meter import Meter
from llamavisor.reclaim import await_reclaim
from llamavisor.router import Router
from llamavisor.slots import Key, Slot
from llamavisor.states import HAS_CHILD, RESIDENT

GONE_S = 10.0
"""After so long a process that does not end, though its router says that the model is unloaded, is warned about."""
READ_S = 0.5
"""How long a reading before an unload may take; an older one has to do then."""


@dataclass(frozen=True, slots=True)
class _Balance:
    """What was free of each device before a model left, and what of it comes free; None and absent are unknown."""

    free: Mapping[str, int | None]
    comes: Mapping[str, int]


class Moves:
    """What is under way. Used by the scheduler alone.

    Args:
        routers: those of the fleet, by name.
        admission: the table.
        meter: reads how much memory is free.
        publish: where events go.
        tell: takes what admission decides because of what has come of a move.
        start_soon: begins a worker.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        admission: Admission,
        meter: Meter,
        *,
        publish: Callable[[ev.Event], None],
        tell: Callable[[Sequence[Action]], None],
        start_soon: Callable[..., Any],
    ) -> None:
        self._routers = routers
        self._admission = admission
        self._meter = meter
        self._publish = publish
        self._tell = tell
        self._start_soon = start_soon
        self._loading: dict[Key, Slot] = {}  # whose load a worker has asked for
        self._seeing_off: set[Key] = set()  # whose process and memory are being waited for
        self._reasons: dict[Key, tuple[Slot, ev.UnloadReason]] = {}  # why models leave that have been told to
        self._balances: dict[Key, _Balance] = {}  # of those that have been told to leave

    def __repr__(self) -> str:
        return f"<Moves in={sorted(self._loading)} out={sorted(self._seeing_off)}>"

    def is_moving(self, key: Key) -> bool:
        """Whether a worker is at work on the model, and will tell what comes of it."""
        return key in self._loading or key in self._seeing_off

    def is_loading(self, key: Key) -> bool:
        """Whether the load of the model that is told of is ours."""
        slot = self._loading.get(key)
        return slot is not None and self._is_there(slot)

    def note_reason(self, key: Key, reason: ev.UnloadReason) -> None:
        """Say why a model is to leave; without that it leaves to make room."""
        if (slot := self._admission.slot(*key)) is not None:
            self._reasons[key] = slot, reason

    def load(self, key: Key) -> None:
        """Have a model loaded."""
        if (slot := self._admission.slot(*key)) is not None:
            self._loading[key] = slot
            self._start_soon(self._load, slot)

    def unload(self, key: Key, *, if_idle: bool) -> None:
        """Have a model unloaded, or a load ended; with `if_idle` only if nobody turns out to be answered by it."""
        if (slot := self._admission.slot(*key)) is not None:
            self._start_soon(self._unload, slot, if_idle)

    def see_off(self, key: Key) -> None:
        """A model's process has ended, or is about to: its place is free once it and its memory have gone."""
        slot = self._admission.slot(*key)
        if slot is not None and key not in self._seeing_off:
            self._seeing_off.add(key)
            self._start_soon(self._await_gone, slot)

    async def _load(self, slot: Slot) -> None:
        """The worker of a load. What comes of it is told by events, unless it could not even begin."""
        name, model = slot.key
        router = self._routers.get(name)
        try:
            if router is not None:
                await router.load(model)
        except LlamavisorError as error:
            # Of a router that has ended it is told besides when nothing of it is left.
            if router is not None and router.is_serving and self._is_there(slot):
                now, text = anyio.current_time(), str(error)
                then = consequence(classify_refusal(text), Subject.LOADING)
                self._tell(self._admission.load_failed(name, model, text, then=then, now=now))
                self.see_off(slot.key)
        finally:
            if self._loading.get(slot.key) is slot:
                del self._loading[slot.key]

    async def _unload(self, slot: Slot, if_idle: bool) -> None:
        """The worker of an unload."""
        name, model = slot.key
        router = self._routers.get(name)
        noted, reason = self._reasons.pop(slot.key, (slot, ev.UnloadReason.EVICTED))
        if noted is not slot:  # of a former life, which ended before it was told to
            reason = ev.UnloadReason.EVICTED
        if router is None:
            return  # what is left of it is cleared away
        await self._meter.read_now(READ_S)
        if not self._is_there(slot):
            return  # it has ended meanwhile; what there is of the model now is not meant
        self._balances[slot.key] = self._balance(slot)
        try:
            await router.unload(model, reason=reason, if_idle=if_idle)
        except ApiError:
            if self._is_there(slot):
                self._tell(self._admission.stayed(name, model, anyio.current_time()))
                if is_resident(router, model):  # it was loading when it was told to leave
                    self._tell(self._admission.loaded(name, model, None, anyio.current_time()))
        except LlamavisorError:
            pass  # its router has ended, which is told besides, or does not know it any more
        if router.is_serving and self._is_there(slot) and not has_child(router, model):
            self.see_off(slot.key)
        if slot.key not in self._seeing_off:  # of the next life this balance would be wrong
            self._balances.pop(slot.key, None)

    async def _await_gone(self, slot: Slot) -> None:
        name, model = slot.key
        router = self._routers.get(name)
        # Of one that has ended unasked the last reading has to do, and RAM says nothing.
        balance = self._balances.pop(slot.key, None) or self._balance(slot)
        try:
            if router is not None:
                await self._await_end(router, model)
            missing = await await_reclaim(self._meter.read_now, balance.free, balance.comes)
            for device, size in missing.items():
                if size > 0:
                    self._publish(ev.MemoryUnreclaimed(router=name, model=model, device=device, bytes=size))
        finally:
            self._seeing_off.discard(slot.key)
            self._balances.pop(slot.key, None)  # of one who was told to leave when its end was seen already
        # Of a router that has ended meanwhile it is told besides when nothing of it is left.
        if self._is_there(slot) and (router is None or router.is_serving):
            self._tell(self._admission.gone(name, model, anyio.current_time()))

    async def _await_end(self, router: Router, model: str) -> None:
        """Wait until no process of the model is left; nothing of it is free before that, however long it takes."""

        def has_ended() -> bool:
            return not router.table.has_process(model) or not router.is_serving

        with anyio.move_on_after(GONE_S) as scope:
            await router.wait_until(has_ended)
        if scope.cancelled_caught:
            text = f"its process on {router.name} does not end: the kernel holds it, and its memory"
            self._publish(ev.Warned(subject=f"model {model}", text=text))
            await router.wait_until(has_ended)

    def _balance(self, slot: Slot) -> _Balance:
        """What is free as last read, and what comes free with the end of a model's process."""
        free = {device: reading.free_bytes for device, reading in self._meter.readings.items()}
        router = self._routers.get(slot.key[0])
        model = router.table.get(slot.key[1]) if router is not None else None
        comes = {device: size for device, size in slot.resident.bytes.items() if device != RAM_ID}
        if model is not None and model.pid is not None:
            comes |= self._meter.freed_by(model.pid)
        return _Balance(free, comes)

    def _is_there(self, slot: Slot) -> bool:
        """Whether the slot is still the one of its model: there may be a later one, of which this says nothing."""
        return self._admission.slot(*slot.key) is slot


def is_resident(router: Router, name: str) -> bool:
    """Whether the router has the model loaded, as far as is known."""
    model = router.table.get(name)
    return model is not None and model.state in RESIDENT


def has_child(router: Router, name: str) -> bool:
    """Whether the router has a process for the model, as far as is known."""
    model = router.table.get(name)
    return model is not None and model.state in HAS_CHILD
