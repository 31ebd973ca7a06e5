"""Who takes memory, what there is, and who waits for it: a snapshot for people and for monitoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """One model that takes memory, or is about to.

    Attributes:
        router: where it is.
        model: its name.
        state: "loading", "loaded", "sleeping", "draining" (closed to new requests, unloaded when idle) or "unloading".
        expected: bytes that it is reckoned to take, by device id; empty when nobody knows.
        source: where that is known from: "measured", "fit-params" or "formula"; "" when nobody knows.
        growth_bytes: RAM in `expected` that its prompt cache and checkpoints may grow to, None without a bound.
        measured: bytes that it was last seen to take, by device id; empty before it was looked at.
        in_flight: requests that it is answering, None when that is not known.
        leases: how many have been promised that it stays.
        used_at: monotonic time at which it was last seen to be used, None if it never was.
        loaded_at: monotonic time at which it became loaded, None while it is loading.
        ttl_s: after so many idle seconds it is unloaded, None for never.
        expires_at: monotonic time at which that will be if nobody uses it, None for never (or not now: it is busy).
        is_pinned: whether it is to stay.
        n_ctx: tokens of context that it got for each request, None while that is not known.
        n_ctx_asked: tokens of context that it was to get, likewise, None when nobody knows.
        is_ctx_ours: whether that was our choice, because nobody had made one.
    """

    router: str
    model: str
    state: str
    expected: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    growth_bytes: int | None = 0
    measured: Mapping[str, int] = field(default_factory=dict)
    in_flight: int | None = None
    leases: int = 0
    used_at: float | None = None
    loaded_at: float | None = None
    ttl_s: float | None = None
    expires_at: float | None = None
    is_pinned: bool = False
    n_ctx: int | None = None
    n_ctx_asked: int | None = None
    is_ctx_ours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """The memory of one device.

    Attributes:
        id: "RAM", or which device it physically is.
        name: as a person knows it: "RAM", "CUDA0 (NVIDIA H200)".
        total_bytes: what there is, None when it is not known.
        used_bytes: what of it is taken, by whomever; likewise.
        free_bytes: what of it can be had; likewise.
        budget_bytes: what models may take, None when it is not known and so not kept to.
        is_auto: whether the budget follows from what there is, and was not written.
        expected_bytes: what the models on it are reckoned to take, growth included.
        measured_bytes: what they were last seen to take, None before they were looked at.
        reason: why a number is missing; empty when all are there.
    """

    id: str
    name: str
    total_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None
    is_auto: bool
    expected_bytes: int
    measured_bytes: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Those who wait for one model.

    Attributes:
        model: its name.
        demands: how many they are.
        since: monotonic time since when the first of them has waited.
        obstacle: what they wait for, in one line.
    """

    model: str
    demands: int
    since: float
    obstacle: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A model that is not loaded for a while, because it has failed.

    Attributes:
        router: where.
        model: its name.
        until: monotonic time at which it may be tried again.
        failures: how often in a row it has failed.
        reason: why, the last time, in one line.
    """

    router: str
    model: str
    until: float
    failures: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """All of it at one moment.

    Attributes:
        occupants: by router, then name.
        devices: RAM first.
        queues: in the order of arrival.
        is_enforced: whether budgets are kept to, which needs `serve = "gateway"`; else they are only shown.
        strain: why no model is loaded for now: memory is short; "" while it is not.
        pinned: the models that are to stay once they are in memory, by name.
        quarantined: the models that are not loaded for now because they have failed.
    """

    occupants: tuple[Occupant, ...]
    devices: tuple[DeviceUse, ...]
    queues: tuple[Queue, ...]
    is_enforced: bool
    strain: str = ""
    pinned: tuple[str, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What would happen if a model were asked for now.

    Attributes:
        model: its name.
        router: where it would be loaded, or is; None if nowhere.
        is_resident: whether it is there already, or on its way.
        victims: the models that would be unloaded for it, each as (router, model), in order.
        waits_for: likewise those on their way out that it would wait for.
        needed: bytes that it would take, by device id; empty when nobody knows.
        refusal: why it cannot be loaded now, in one line; "" if it can.
        hint: what would have to happen before that, or "".
    """

    model: str
    router: str | None
    is_resident: bool = False
    victims: tuple[tuple[str, str], ...] = ()
    waits_for: tuple[tuple[str, str], ...] = ()
    needed: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""
    hint: str = ""
