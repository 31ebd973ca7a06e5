"""What models take of each device on each router, as far as it is known: expected before, measured after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import anyio

from llamavisor import footprint
from llamavisor.appraisal import Appraisal
from llamavisor.events import Event, Warned
from llamavisor.ledger import Footprints
from llamavisor.router import Router
from llamavisor.shelf import Offered
from llamavisor.slots import Key


@dataclass(slots=True)
class _Known:
    """What is known of one model on one router; `appraisal` is None where nobody could say."""

    offered: Offered
    appraisal: Appraisal | None
    measured: Mapping[str, int]


class Appraisals:
    """The book of them. Written by the scheduler and by what measures, on one event loop.

    Args:
        devices_of: the GPUs that a router sees.
        footprints: what is remembered beyond this daemon's life.
        publish: where events go.
    """

    def __init__(
        self,
        devices_of: Callable[[str], tuple[footprint.Device, ...]],
        *,
        footprints: Footprints | None = None,
        publish: Callable[[Event], None],
    ) -> None:
        self._devices_of = devices_of
        self._footprints = footprints
        self._publish = publish
        self._known: dict[Key, _Known] = {}
        self._asking: dict[Key, anyio.Event] = {}
        self._warned: set[tuple[str, str]] = set()

    def __repr__(self) -> str:
        return f"<Appraisals of {len(self._known)}>"

    def is_known(self, router: Router, model: str) -> bool:
        """Whether the model has been appraised as the router is told of it now."""
        known = self._known.get((router.name, model))
        return known is not None and known.offered is router.shelf.offer.models.get(model)

    async def appraise(self, router: Router, model: str) -> None:
        """Find out what the model takes there, unless that is known."""
        key = router.name, model
        while key in self._asking:  # somebody else wants to know it too
            await self._asking[key].wait()
        offered = router.shelf.offer.models.get(model)
        if offered is None or self.is_known(router, model):
            return
        self._asking[key] = anyio.Event()
        try:
            appraisal = await router.appraise(offered, self._devices_of(router.name))
        finally:
            self._asking.pop(key).set()
        before = self._known.get(key)
        measured = before.measured if before is not None and before.offered is offered else {}
        self._known[key] = _Known(offered, appraisal, measured)
        for warning in appraisal.warnings if appraisal is not None else ():
            if (model, warning) not in self._warned:
                self._warned.add((model, warning))
                self._publish(Warned(subject=f"model {model}", text=warning))

    def get(self, key: Key) -> Appraisal | None:
        """What was found out; None if nothing was, or nobody could say."""
        known = self._known.get(key)
        return known.appraisal if known is not None else None

    def expected(self, key: Key) -> Mapping[str, int]:
        """Bytes that are set aside for the model, by device: what it is known or expected to take, and may grow to."""
        known = self._known.get(key)
        if known is None or known.appraisal is None:
            return known.measured if known is not None else {}
        expected = known.appraisal.footprint.grown()
        for device, size in known.measured.items():
            expected[device] = max(expected.get(device, 0), size)
        return expected

    def measured(self, key: Key) -> Mapping[str, int]:
        """Bytes that the model was last seen to take, by device; empty if it was not looked at since its load."""
        known = self._known.get(key)
        return known.measured if known is not None else {}

    def note(self, key: Key, measured: Mapping[str, int], *, is_telling: bool) -> None:
        """A loaded model was seen to take so much of each device.

        Args:
            key: which.
            measured: bytes by device.
            is_telling: whether it has answered somebody, and not for long: then the next estimate follows from it.
        """
        known = self._known.get(key)
        if known is None:
            return
        known.measured = dict(measured)
        appraisal = known.appraisal
        if is_telling and appraisal is not None and self._footprints is not None:
            # What a driver does not tell of one process must not be learned as nothing.
            reckoned = {device for device, size in appraisal.footprint.bytes.items() if size > 0}
            if reckoned <= measured.keys():
                self._footprints.record(appraisal.key, measured)

    def unloaded(self, key: Key) -> None:
        """The model has gone: what was measured was of that life, and its next load is appraised anew."""
        self._known.pop(key, None)

    def forget(self, routers: Collection[str]) -> None:
        """Keep nothing of routers but these."""
        self._known = {key: known for key, known in self._known.items() if key[0] in routers}
