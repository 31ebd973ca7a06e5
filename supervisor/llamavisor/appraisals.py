"""What models take of each device on each router, as far as it is known: expected before, measured after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from llamavisor import footprint
from llamavisor.appraisal import Appraisal
from llamavisor.gauge import RAM_ID
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
    """

    def __init__(
        self, devices_of: Callable[[str], tuple[footprint.Device, ...]], *, footprints: Footprints | None = None
    ) -> None:
        self._devices_of = devices_of
        self._footprints = footprints
        self._known: dict[Key, _Known] = {}

    def __repr__(self) -> str:
        return f"<Appraisals of {len(self._known)}>"

    def is_known(self, router: Router, model: str) -> bool:
        """Whether the model has been appraised as the router is told of it now."""
        known = self._known.get((router.name, model))
        return known is not None and known.offered is router.shelf.offer.models.get(model)

    async def appraise(self, router: Router, model: str) -> None:
        """Find out what the model takes there, unless that is known."""
        offered = router.shelf.offer.models.get(model)
        if offered is None or self.is_known(router, model):
            return
        appraisal = await router.appraise(offered, self._devices_of(router.name))
        before = self._known.get((router.name, model))
        measured = before.measured if before is not None and before.offered is offered else {}
        self._known[router.name, model] = _Known(offered, appraisal, measured)

    def get(self, key: Key) -> Appraisal | None:
        """What was found out; None if nothing was, or nobody could say."""
        known = self._known.get(key)
        return known.appraisal if known is not None else None

    def expected(self, key: Key) -> Mapping[str, int]:
        """Bytes that are set aside for the model, by device: what it is known or expected to take, and may grow to."""
        known = self._known.get(key)
        if known is None or known.appraisal is None:
            return known.measured if known is not None else {}
        estimate = known.appraisal.footprint
        expected = dict(estimate.bytes)
        expected[RAM_ID] = expected.get(RAM_ID, 0) + (estimate.growth_bytes or 0)
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
        if is_telling and known.appraisal is not None and self._footprints is not None:
            self._footprints.record(known.appraisal.key, measured)

    def unloaded(self, key: Key) -> None:
        """The model has gone: what was measured was of that life, and its next load is appraised anew."""
        self._known.pop(key, None)

    def forget(self, routers: Collection[str]) -> None:
        """Keep nothing of routers but these."""
        self._known = {key: known for key, known in self._known.items() if key[0] in routers}
