"""Who waits for an answer of admission, and how it reaches them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from llamavisor.demands import Lease, Rejection, Why
from llamavisor.errors import DemandRefusedError
from llamavisor.events import DemandMet, DemandRefused, Event

REFUSED_AGAIN_S = 60.0
"""That the same model is refused for the same reason is news once in so long; every refusal is counted."""

Answer = Callable[[Lease | Rejection], None]
"""Called once, in the step in which it is decided."""


@dataclass(frozen=True, slots=True)
class _Waiter:
    model: str
    since: float
    answer: Answer


class Waiters:
    """All of them, by the number of their demand. Used by the scheduler alone.

    Args:
        publish: where events go.
    """

    def __init__(self, publish: Callable[[Event], None]) -> None:
        self._publish = publish
        self._waiters: dict[int, _Waiter] = {}
        self._refused_at: dict[tuple[str, Why], float] = {}

    def __repr__(self) -> str:
        return f"<Waiters {sorted(self._waiters)}>"

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, number: int, model: str, answer: Answer) -> None:
        """Somebody waits for the model."""
        self._waiters[number] = _Waiter(model, anyio.current_time(), answer)

    def remove(self, number: int) -> None:
        """They do not wait any longer."""
        self._waiters.pop(number, None)

    def grant(self, number: int, lease: Lease) -> bool:
        """Their demand is met; False if they have left in the meantime."""
        waiter = self._waiters.pop(number, None)
        if waiter is None:
            return False
        wait_s = anyio.current_time() - waiter.since
        self._publish(DemandMet(router=lease.router, model=lease.model, wait_s=wait_s))
        waiter.answer(lease)
        return True

    def refuse(self, number: int, rejection: Rejection) -> None:
        """Their demand is not going to be met."""
        waiter = self._waiters.pop(number, None)
        if waiter is None:
            return
        now, key = anyio.current_time(), (waiter.model, rejection.why)
        is_repeated = now - self._refused_at.get(key, -math.inf) < REFUSED_AGAIN_S
        if not is_repeated:
            self._refused_at[key] = now
        self._publish(
            DemandRefused(
                model=waiter.model,
                reason=rejection.why.value,
                detail=rejection.detail,
                wait_s=now - waiter.since,
                retry_after_s=rejection.retry_after_s,
                is_repeated=is_repeated,
            )
        )
        waiter.answer(rejection)


def refusal(rejection: Rejection) -> DemandRefusedError:
    """A rejection as those who asked are told of it."""
    hint = rejection.refusal.retry_when if rejection.refusal is not None else ""
    if rejection.why is Why.QUARANTINED:
        hint = "see `llamavisor logs`"
    text = f"model {rejection.model}: {rejection.detail}"
    return DemandRefusedError(text, hint=hint, reason=rejection.why.value, retry_after_s=rejection.retry_after_s)
