"""Which models are left alone for a while: they could not be loaded the last times, or crashed or hung too often."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llamavisor.slots import Key

FIRST_S = 30.0
"""How long a model is left alone after its first failure; twice as long after each further one."""
MAX_S = 1800.0
FORGIVEN_AFTER_S = 300.0
"""Of a model that was loaded so long ago, and has not failed since, the failures before that do not count."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The model is not loaded on that router before `until`.

    Attributes:
        router: the router.
        model: the model.
        until: when it may be tried again, in monotonic seconds.
        failures: how often in a row it has failed.
        reason: why it failed the last time.
    """

    router: str
    model: str
    until: float
    failures: int
    reason: str


class Quarantines:
    """What has failed, by router and model. A model that fails on one router may be loaded on another."""

    def __init__(self) -> None:
        self._failed: dict[Key, Quarantine] = {}
        self._loaded_at: dict[Key, float] = {}  # Invariant: only of those that were loaded after they failed
        self._suspected_at: dict[Key, float] = {}

    def __repr__(self) -> str:
        return f"<Quarantines {sorted(self._failed)}>"

    def get(self, router: str, model: str, now: float) -> Quarantine | None:
        """Why the model is not to be loaded on that router now; None if nothing speaks against it."""
        failed = self._failed.get((router, model))
        return failed if failed is not None and now < failed.until else None

    def all(self, now: float) -> list[Quarantine]:
        """All that are not to be loaded now."""
        return [failed for failed in self._failed.values() if now < failed.until]

    def failed(self, key: Key, reason: str, now: float) -> Quarantine:
        """It has failed: it is left alone for min(30 min, 30 s x 2^(failures - 1))."""
        before, loaded_at = self._failed.get(key), self._loaded_at.pop(key, None)
        is_forgiven = loaded_at is not None and now - loaded_at >= FORGIVEN_AFTER_S
        failures = 1 if before is None or is_forgiven else before.failures + 1
        delay_s = min(MAX_S, FIRST_S * 2.0 ** min(failures - 1, 10))  # an unbounded power would overflow
        self._failed[key] = Quarantine(*key, until=now + delay_s, failures=failures, reason=reason)
        return self._failed[key]

    def suspect(self, key: Key, reason: str, now: float) -> Quarantine | None:
        """It, or its router, ended while it was loading, nobody knows why: it counts as failed if that happens again.

        Returns:
            For how long it is left alone, None if it is not.
        """
        before, self._suspected_at[key] = self._suspected_at.get(key), now
        is_again = before is not None and now - before < FORGIVEN_AFTER_S
        return self.failed(key, reason, now) if is_again else None

    def loaded(self, key: Key, now: float) -> None:
        """It was loaded, by whomever."""
        self._suspected_at.pop(key, None)
        if (failed := self._failed.get(key)) is not None:
            self._loaded_at[key] = now
            if now < failed.until:  # what can be loaded need not be left alone
                self._failed[key] = Quarantine(*key, until=now, failures=failed.failures, reason=failed.reason)

    def recall(self, quarantine: Quarantine) -> None:
        """An earlier daemon knew this; what is known better stays."""
        self._failed.setdefault((quarantine.router, quarantine.model), quarantine)

    def forget(self, routers: Collection[str]) -> None:
        """Keep nothing of routers but these."""
        for known in (self._failed, self._loaded_at, self._suspected_at):
            for key in [key for key in known if key[0] not in routers]:
                del known[key]

    def forgive(self, model: str) -> None:
        """Its file or options have changed, or a person says so: whatever was, was of another model."""
        for known in (self._failed, self._loaded_at, self._suspected_at):
            for key in [key for key in known if key[1] == model]:
                del known[key]
