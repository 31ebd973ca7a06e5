"""What is asked of admission, and what it answers: demands, leases, rejections, and the actions that carry them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from llamavisor.eviction import MIN_RESIDENCY_S, Refusal
from llamavisor.placement import Candidate
from llamavisor.quarantine import Quarantine
from llamavisor.slots import Key

MAX_WAITING = 512
"""So many demands wait at once; the next is refused: a queue that long is not served before its clients leave."""
MAX_WAITING_PER_MODEL = 128
"""Of one model; lower, so that the clients of one model cannot keep those of all others out."""
STALL_S = 120.0
"""A demand is refused once nothing that it waits for has moved for so long. It may wait for longer than that."""
DRAIN_AFTER_S = 30.0
"""A demand that has waited for so long may close busy models to new leases. Nobody's answer is cut off."""
CANCEL_BELOW = 0.25
"""A load that nobody waits for any more is cancelled if less than this fraction of it is done."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long, and how many, demands may wait.

    Attributes:
        max_waiting: of all models together.
        max_waiting_per_model: of one.
        stall_s: how long without progress of anything that it waits for a demand goes on waiting.
        drain_after_s: how long a demand waits before busy models are closed for it.
        min_residency_s: as for `eviction.choose`.
        oversize: what becomes of a demand that is larger than a device's whole budget: it is refused, or, once all
            else has been evicted, left to llama.cpp to fit.
    """

    max_waiting: int = MAX_WAITING
    max_waiting_per_model: int = MAX_WAITING_PER_MODEL
    stall_s: float = STALL_S
    drain_after_s: float = DRAIN_AFTER_S
    min_residency_s: float = MIN_RESIDENCY_S
    oversize: Literal["fit", "refuse"] = "refuse"


class Why(Enum):
    """Why a demand was refused."""

    IMPOSSIBLE = "impossible"
    """It will never fit, or may be nowhere, until a person or a new configuration changes that."""
    QUEUE_FULL = "queue_full"
    """Too many wait already."""
    TIMED_OUT = "timed_out"
    """It would have waited longer than whoever made it."""
    STALLED = "stalled"
    """Nothing that it waits for has moved for too long."""
    QUARANTINED = "quarantined"
    """Its last load failed, and the next try is not due yet."""
    STRAINED = "strained"
    """Memory is short, though it would fit the budget."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a demand was refused, and when to come again.

    Attributes:
        why: the reason.
        model: the model that was asked for.
        detail: what exactly stood in the way, in one line.
        retry_after_s: when the same demand may succeed, as far as can be guessed; None if waiting is pointless.
        refusal: what eviction or placement said last, if they were asked.
    """

    why: Why
    model: str
    detail: str
    retry_after_s: float | None
    refusal: Refusal | None = None

    @property
    def text(self) -> str:
        """What stood in the way and what to do, in one line."""
        if self.retry_after_s is not None:
            return f"model {self.model}: {self.detail}; try again in {self.retry_after_s:.0f} s"
        hint = f"; {self.refusal.retry_when}" if self.refusal is not None else ""
        return f"model {self.model}: {self.detail}{hint}"


@dataclass(frozen=True, slots=True)
class Lease:
    """The promise that a model stays where it is. It ends when it is released, or with the model's process."""

    number: int
    router: str
    model: str


@dataclass(frozen=True, slots=True)
class Grant:
    """The demand of that number is met."""

    number: int
    lease: Lease


@dataclass(frozen=True, slots=True)
class Refuse:
    """The demand of that number is not going to be met."""

    number: int
    rejection: Rejection


@dataclass(frozen=True, slots=True)
class Load:
    """Have the router load the model. There is room, and nobody else is loading on the same device.

    Attributes:
        router: the router.
        model: the model.
        is_oversize: whether it is larger than a budget, and left to llama.cpp to fit into what there is.
    """

    router: str
    model: str
    is_oversize: bool = False


@dataclass(frozen=True, slots=True)
class Unload:
    """Have the router unload the model: nobody uses it, and nobody will be given it."""

    router: str
    model: str


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """Have the router stop loading the model: nobody waits for it any more."""

    router: str
    model: str


Action = Grant | Refuse | Load | Unload | CancelLoad | Quarantine


@dataclass(eq=False, slots=True)
class Order:
    """All demands for one model that wait: they share one load, and the place in the queue of the first of them.

    Attributes:
        model: the model.
        only: the only router that comes into question for them, None for any. Those who want it on a certain one have
            an order of their own.
        candidates: where it may be, as last told.
        since: when the first demand came.
        progressed_at: when anything that it waits for last moved.
        tickets: since when each demand has waited, by its number; the oldest first.
        waits: the slots that it waits for, its own among them once it is being loaded.
        victims: the slots that were closed for it and have not gone. No two orders have the same one.
        after: the slots that have to have gone before it is tried again, though there might be room without.
        has_failed_for_memory: whether its second try is under way.
        refusal: why there is no room for it, if that is what it waits for.
    """

    model: str
    only: str | None
    candidates: tuple[Candidate, ...]
    since: float
    progressed_at: float
    tickets: dict[int, float] = field(default_factory=dict)
    waits: frozenset[Key] = frozenset()
    victims: set[Key] = field(default_factory=set)
    after: set[Key] = field(default_factory=set)
    has_failed_for_memory: bool = False
    refusal: Refusal | None = None

    @property
    def obstacle(self) -> str:
        """What it waits for, in one line."""
        if self.refusal is not None:
            return self.refusal.text.removeprefix(f"model {self.model}: ")
        names = ", ".join(sorted({model for _, model in self.waits}))
        return f"waited for {names}" if names else "waited for its turn"
