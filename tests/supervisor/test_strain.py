"""Short memory: who leaves, when loads are refused, and that it ends; and the budget after a kill by the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.gauge.device import RAM, Pressure, Reading, unknown
from llamavisor.penalty import FACTOR, LASTS_S, LEAST, Penalty
from llamavisor.strain import (
    CALM_AFTER_S,
    CALM_FLOORS,
    CALM_PERCENT,
    FORGOTTEN_AFTER_S,
    FULL_PERCENT,
    READINGS,
    RELIEF_S,
    Advice,
    Level,
    Strain,
    floor_bytes,
)

MIB = 2**20
TOTAL = 100 * 1024 * MIB
FLOOR = floor_bytes(TOTAL)
SHORT, BETWEEN, PLENTY = FLOOR // 2, FLOOR * 3 // 2, 10 * FLOOR
STILL = Pressure(0.0, 0.0)
THRASHING = Pressure(80.0, FULL_PERCENT + 1.0)


class Watch:
    """Reads memory every five seconds, and keeps the time."""

    def __init__(self) -> None:
        self.strain = Strain()
        self.now = 1000.0

    def see(
        self, free: int | None, pressure: Pressure | None = STILL, *, can_relieve: bool = True, after_s: float = 5.0
    ) -> Advice:
        """One more reading; None is one that is unknown."""
        self.now += after_s
        if free is None:
            reading = unknown(RAM, self.now, "the test says so")
        else:
            reading = Reading(RAM, TOTAL, TOTAL - free, free, self.now)
        return self.strain.step(reading, pressure, self.now, can_relieve=can_relieve)

    def levels(self, times: int, free: int | None, pressure: Pressure | None = STILL, **how: bool) -> list[Level]:
        """Several readings that are all alike."""
        return [self.see(free, pressure, **how).level for _ in range(times)]

    def is_short(self, *, can_relieve: bool = True) -> Advice:
        """So many readings that memory is short."""
        return [self.see(SHORT, can_relieve=can_relieve) for _ in range(READINGS)][-1]


@pytest.mark.parametrize(("total", "floor"), [(1024 * MIB, 256 * MIB), (12_800 * MIB, 256 * MIB), (TOTAL, 2048 * MIB)])
def test_the_floor(total: int, floor: int) -> None:
    """2 % of RAM should be free, and no less than 256 MiB."""
    assert floor_bytes(total) == floor


@pytest.mark.parametrize(("free", "pressure"), [(SHORT, STILL), (PLENTY, THRASHING), (None, THRASHING)])
def test_a_sign_counts_when_it_lasts(free: int | None, pressure: Pressure) -> None:
    """Too little that is free, or work that stands still, makes memory short at the third reading in a row."""
    watch = Watch()
    assert watch.levels(READINGS - 1, free, pressure) == [Level.CALM] * (READINGS - 1)
    assert watch.see(PLENTY) == Advice()
    assert watch.levels(READINGS, free, pressure) == [Level.CALM] * (READINGS - 1) + [Level.RELIEVE]


def test_a_reading_counts_once() -> None:
    """The same reading, looked at again and again, is one reading."""
    strain = Strain()
    reading = Reading(RAM, TOTAL, TOTAL - SHORT, SHORT, 1000.0)
    for tick in range(20):
        assert strain.step(reading, STILL, 1000.0 + tick, can_relieve=True) == Advice()


def test_idle_models_give_back_what_makes_it_calm_again() -> None:
    """Who is to leave brings as much as is needed until memory counts as calm, not only to the floor."""
    advice = Watch().is_short()
    assert advice.level is Level.RELIEVE
    assert advice.lacking_bytes == CALM_FLOORS * FLOOR - SHORT
    assert advice.text == f"{SHORT // MIB} MiB of RAM are free, and {FLOOR // MIB} MiB should be"
    assert advice.retry_after_s is None


def test_pressure_alone_has_at_least_one_model_leave() -> None:
    """How many bytes help against thrashing nobody knows: the least recently used model is a beginning."""
    watch = Watch()
    watch.levels(READINGS - 1, PLENTY, THRASHING)
    advice = watch.see(PLENTY, THRASHING)
    assert (advice.level, advice.lacking_bytes) == (Level.RELIEVE, 1)
    assert advice.text == "work stood still for want of memory for 21 % of the last 10 s"


def test_nothing_is_refused_before_those_who_leave_have_made_a_difference() -> None:
    """While they leave nobody else is asked to; if it is still short then, loads are refused, and more may leave."""
    watch = Watch()
    watch.is_short()
    meanwhile = watch.see(SHORT, after_s=RELIEF_S - 1.0)
    assert (meanwhile.level, meanwhile.lacking_bytes) == (Level.RELIEVE, 0)
    then = watch.see(SHORT, after_s=1.0)
    assert (then.level, then.lacking_bytes) == (Level.REFUSE, CALM_FLOORS * FLOOR - SHORT)
    assert then.retry_after_s == CALM_AFTER_S


def test_loads_are_refused_at_once_if_nobody_can_leave() -> None:
    """There is nothing to wait for then."""
    advice = Watch().is_short(can_relieve=False)
    assert (advice.level, advice.lacking_bytes) == (Level.REFUSE, 0)


def test_relief_that_almost_helps_goes_on_and_refuses_nothing() -> None:
    """Above the floor and not calm yet: more leave, if they can; loads that are not refused yet go on."""
    watch = Watch()
    watch.is_short()
    assert watch.see(BETWEEN, after_s=RELIEF_S) == Advice(
        Level.RELIEVE,
        CALM_FLOORS * FLOOR - BETWEEN,
        f"{SHORT // MIB} MiB of RAM are free, and {FLOOR // MIB} MiB should be",
    )
    assert watch.levels(20, BETWEEN, can_relieve=False) == [Level.RELIEVE] * 20


def test_it_ends_when_all_has_been_well_for_a_while() -> None:
    """The way back is one step, after half a minute in which nothing was amiss; who asks is told how long that is."""
    watch = Watch()
    watch.is_short(can_relieve=False)
    assert watch.see(PLENTY).retry_after_s == CALM_AFTER_S
    assert watch.see(PLENTY, after_s=20.0).retry_after_s == CALM_AFTER_S - 20.0
    assert watch.see(BETWEEN).retry_after_s == CALM_AFTER_S
    assert watch.see(PLENTY, Pressure(0.0, CALM_PERCENT), after_s=CALM_AFTER_S).level is Level.REFUSE
    watch.see(PLENTY)
    assert watch.see(PLENTY, after_s=CALM_AFTER_S - 0.5) == Advice(
        Level.REFUSE, 0, f"{SHORT // MIB} MiB of RAM are free, and {FLOOR // MIB} MiB should be", 1.0
    )
    assert watch.see(PLENTY, after_s=0.5) == Advice()


def test_what_is_unknown_changes_nothing() -> None:
    """It makes memory neither short nor calm, has nobody leave, and does not interrupt what it cannot deny."""
    watch = Watch()
    assert watch.levels(10, None, None) == [Level.CALM] * 10
    watch.levels(READINGS - 1, SHORT)
    assert watch.see(None).level is Level.CALM
    assert watch.see(SHORT).level is Level.RELIEVE
    lost = watch.see(None, None, can_relieve=False, after_s=RELIEF_S)
    assert (lost.level, lost.lacking_bytes) == (Level.RELIEVE, 0)
    watch.see(PLENTY)
    assert watch.levels(8, PLENTY, None) == [Level.RELIEVE] * 8
    assert watch.see(PLENTY).level is Level.CALM


def test_it_begins_with_relief_every_time() -> None:
    """That idle models had to leave before is no reason to refuse loads at once when memory is short again."""
    watch = Watch()
    watch.is_short()
    watch.see(PLENTY)
    assert watch.see(PLENTY, after_s=CALM_AFTER_S).level is Level.CALM
    advice = watch.is_short()
    assert (advice.level, advice.lacking_bytes) == (Level.RELIEVE, CALM_FLOORS * FLOOR - SHORT)


def test_pressure_that_is_seen_is_not_forgotten() -> None:
    """One sign that is there is enough to know that memory is short, whatever else is unknown, for however long."""
    watch = Watch()
    times = int(2 * FORGOTTEN_AFTER_S / 5.0)
    assert watch.levels(times, None, THRASHING, can_relieve=False)[-times + READINGS :] == [Level.REFUSE] * (
        times - READINGS
    )


def test_a_gauge_that_has_failed_does_not_refuse_for_ever() -> None:
    """After five minutes in which nothing was known memory is not taken to be short any more."""
    watch = Watch()
    watch.is_short(can_relieve=False)
    assert watch.see(None, None, after_s=FORGOTTEN_AFTER_S - 1.0).level is Level.REFUSE
    assert watch.strain.step(None, None, watch.now + 1.0, can_relieve=True) == Advice()


def test_a_kernel_that_tells_of_no_pressure() -> None:
    """It is judged by what is free."""
    watch = Watch()
    assert watch.levels(READINGS, SHORT, None)[-1] is Level.RELIEVE
    watch.see(PLENTY, None)
    assert watch.see(PLENTY, None, after_s=CALM_AFTER_S).level is Level.CALM


@dataclass(frozen=True)
class Seen:
    """One step and what came of it."""

    now: float
    free: int | None
    pressure: Pressure | None
    can_relieve: bool
    advice: Advice

    @property
    def is_short(self) -> bool:
        """Whether something shows that memory is short."""
        by_pressure = self.pressure is not None and self.pressure.full_avg10 > FULL_PERCENT
        return by_pressure or (self.free is not None and self.free < FLOOR)


STEPS = st.lists(
    st.tuples(
        st.sampled_from([1.0, 5.0, 60.0]),
        st.sampled_from([None, SHORT, SHORT, SHORT, BETWEEN, PLENTY]),
        st.sampled_from([None, STILL, THRASHING, Pressure(50.0, 10.0)]),
        st.booleans(),
    ),
    max_size=60,
)


def _run(steps: list[tuple[float, int | None, Pressure | None, bool]]) -> tuple[Watch, list[Seen]]:
    watch, seen = Watch(), []
    for after_s, free, pressure, can_relieve in steps:
        advice = watch.see(free, pressure, can_relieve=can_relieve, after_s=after_s)
        seen.append(Seen(watch.now, free, pressure, can_relieve, advice))
    return watch, seen


@given(STEPS)
def test_it_never_flaps(steps: list[tuple[float, int | None, Pressure | None, bool]]) -> None:
    """Memory becomes short at most once in the time in which it has to be well; from REFUSE it goes to CALM only."""
    _, seen = _run(steps)
    begun = [
        after.now for before, after in pairwise(seen) if before.advice.level is Level.CALM is not after.advice.level
    ]
    assert all(later - earlier >= CALM_AFTER_S for earlier, later in pairwise(begun))
    assert all(
        after.advice.level is not Level.RELIEVE
        for before, after in pairwise(seen)
        if before.advice.level is Level.REFUSE
    )


@given(STEPS)
def test_refusal_comes_last(steps: list[tuple[float, int | None, Pressure | None, bool]]) -> None:
    """Nothing is refused but on a sign, and after idle models were asked to leave, or if none could."""
    _, seen = _run(steps)
    asked_at: float | None = None
    before = Level.CALM
    for each in seen:
        advice = each.advice
        if before is not Level.REFUSE and advice.level is Level.REFUSE:
            assert each.is_short
            assert not each.can_relieve if asked_at is None else each.now - asked_at >= RELIEF_S
        if advice.lacking_bytes:
            assert each.can_relieve
            assert asked_at is None or each.now - asked_at >= RELIEF_S
            asked_at = each.now
        if advice.level is Level.CALM:
            asked_at = None
            assert advice == Advice()
        assert (advice.retry_after_s is None) is (advice.level is not Level.REFUSE)
        before = advice.level


@given(STEPS)
def test_the_unknown_never_acts(steps: list[tuple[float, int | None, Pressure | None, bool]]) -> None:
    """A step of which nothing is known asks nobody to leave and makes nothing worse."""
    _, seen = _run(steps)
    for before, after in pairwise(seen):
        if after.free is None and after.pressure is None:
            assert after.advice.lacking_bytes == 0
            assert after.advice.level in {before.advice.level, Level.CALM}


@given(STEPS, st.booleans())
def test_it_always_ends(steps: list[tuple[float, int | None, Pressure | None, bool]], can_relieve: bool) -> None:
    """Whatever was before: when all is well for long enough, or nothing is known for long enough, it is over."""
    watch, _ = _run(steps)
    watch.see(PLENTY)
    assert watch.see(PLENTY, after_s=CALM_AFTER_S).level is Level.CALM
    watch, _ = _run(steps)
    watch.see(None, None, can_relieve=can_relieve)
    assert watch.see(None, None, after_s=FORGOTTEN_AFTER_S).level is Level.CALM


# --- after a kill -----------------------------------------------------------------------------------------------------


def test_each_kill_lowers_the_budget_for_a_while() -> None:
    """A tenth less for each, for ten minutes each, and then all of it again."""
    penalty = Penalty()
    assert penalty.lowered(1000, 0.0) == 1000
    penalty.note(1, 0.0)
    penalty.note(1, 100.0)
    assert penalty.lowered(1000, 100.0) == int(1000 * FACTOR**2)
    assert penalty.lowered(1000, LASTS_S - 1.0) == int(1000 * FACTOR**2)
    assert penalty.lowered(1000, LASTS_S) == int(1000 * FACTOR)
    assert penalty.lowered(1000, LASTS_S + 100.0) == 1000


def test_the_budget_never_falls_below_half() -> None:
    """However many are killed, and all of it comes back ten minutes after the last."""
    penalty = Penalty()
    for second in range(100):
        penalty.note(1000, float(second))
        assert penalty.lowered(1000, float(second)) == int(1000 * LEAST)
    assert penalty.lowered(1000, 99.0 + LASTS_S - 1.0) == int(1000 * LEAST)
    assert penalty.lowered(1000, 99.0 + LASTS_S) == 1000


@given(st.lists(st.tuples(st.floats(0.0, 400.0), st.integers(0, 3)), max_size=30))
def test_the_budget_is_what_the_kills_of_ten_minutes_make_of_it(kills: list[tuple[float, int]]) -> None:
    """Forgetting old kills never changes the result."""
    penalty, now, noted = Penalty(), 0.0, list[float]()
    for after_s, count in kills:
        now += after_s
        penalty.note(count, now)
        noted += [now] * count
        counting = sum(now - at < LASTS_S for at in noted)
        assert penalty.lowered(10**12, now) == int(10**12 * max(LEAST, FACTOR**counting))
