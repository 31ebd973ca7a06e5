"""On which router a model is loaded: where it is, else where least is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.eviction import Budget, Demand, Plan, Reason, Refusal, Resident, choose
from llamavisor.gauge.device import RAM_ID as RAM
from llamavisor.placement import Candidate, Choice, Reserved, loss, place

A_GPU, B_GPU = "0000:01:00.0", "0000:02:00.0"
NOW = 10_000.0


def candidate(router: str, gpu: str, size: int = 4, *, budget: int = 12, models_max: int = 0) -> Candidate:
    """A router with one card, on which the model would take so much."""
    return Candidate(router, Budget({gpu: budget}, models_max), {gpu: size, RAM: 1})


def resident(name: str, router: str, gpu: str, size: int = 4, *, idle: float = 600.0, cost: float = 10.0) -> Resident:
    """A model that was loaded long ago."""
    return Resident(name, {gpu: size}, last_used=NOW - idle, loaded_at=0.0, reload_cost_s=cost, router=router)


def chosen(outcome: Choice | Refusal) -> tuple[str, tuple[str, ...]]:
    """The router of a choice, and the victims."""
    assert isinstance(outcome, Choice), outcome
    return outcome.router, outcome.plan.names


A, B = candidate("a", A_GPU), candidate("b", B_GPU)
A_FULL = [resident(f"a{at}", "a", A_GPU) for at in range(3)]
B_FULL = [resident(f"b{at}", "b", B_GPU) for at in range(3)]
FULL = [*A_FULL, *B_FULL]


@pytest.mark.parametrize(
    ("residents", "expected"),
    [
        pytest.param([], ("a", ()), id="of equals the first"),
        pytest.param([*A_FULL, resident("x", "b", B_GPU)], ("b", ()), id="where it is loaded"),
        pytest.param([replace(resident("x", "b", B_GPU), is_loading=True)], ("b", ()), id="where it is being loaded"),
        pytest.param(
            [replace(resident("x", "a", A_GPU), is_loading=True), resident("x", "b", B_GPU)],
            ("b", ()),
            id="rather where it is loaded",
        ),
        pytest.param([replace(resident("x", "b", B_GPU), is_leaving=True)], ("a", ()), id="not where it is leaving"),
        pytest.param(A_FULL, ("b", ()), id="where there is room"),
        pytest.param(
            [*A_FULL[:2], replace(A_FULL[2], is_leaving=True), *B_FULL[:2]], ("b", ()), id="rather room at once"
        ),
        pytest.param(
            [*A_FULL, *B_FULL[:2], replace(B_FULL[2], is_leaving=True)], ("b", ()), id="who is leaving costs nothing"
        ),
        pytest.param(FULL, ("a", ("a0",)), id="of equal evictions the first"),
        pytest.param([*A_FULL, replace(B_FULL[0], last_used=NOW - 700), *B_FULL[1:]], ("b", ("b0",)), id="idle longer"),
        pytest.param(
            [*A_FULL, *(replace(each, reload_cost_s=9.0) for each in B_FULL)], ("b", ("b0",)), id="loaded again sooner"
        ),
        pytest.param(
            [*(replace(each, bytes={A_GPU: 3}) for each in A_FULL), resident("a3", "a", A_GPU, 3), *B_FULL],
            ("b", ("b0",)),
            id="one rather than two",
        ),
    ],
)
def test_least_is_lost(residents: list[Resident], expected: tuple[str, tuple[str, ...]]) -> None:
    """Where it is; else where there is room; else where the eviction costs least; else the first."""
    assert chosen(place("x", [A, B], residents, now=NOW)) == expected


def test_loss_is_reloads_over_time_idle() -> None:
    """A plan costs each victim's reload over the time that it has been idle, and a minute."""
    plan = Plan((resident("p", "a", A_GPU, idle=40, cost=10), resident("q", "a", A_GPU, idle=240, cost=30)))
    assert loss(plan, now=NOW) == pytest.approx(10 / 100 + 30 / 300)
    assert loss(Plan((), plan.victims), now=NOW) == 0.0
    assert loss(Plan((resident("new", "a", A_GPU, idle=-5, cost=6),)), now=NOW) == pytest.approx(6 / 60)


def test_two_routers_on_one_card_see_each_other() -> None:
    """What the neighbour holds of the shared card is not free, and may have to go for it."""
    one, two = candidate("one", A_GPU, 8), candidate("two", A_GPU, 8)
    theirs = resident("theirs", "two", A_GPU, 8)
    assert chosen(place("x", [one], [theirs], now=NOW)) == ("one", ("theirs",))
    outcome = place("x", [one, two], [theirs], now=NOW)
    assert isinstance(outcome, Choice)
    assert [each.router for each in outcome.plan.victims] == ["two"]
    busy = replace(theirs, in_flight=1)
    refusal = place("x", [one, two], [busy], now=NOW)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.blockers) == (Reason.ALL_BUSY, (busy,))


def test_what_is_promised_on_a_shared_card_is_taken() -> None:
    """A demand that waits at the neighbour has its bytes; the count is promised per router."""
    one, two = candidate("one", A_GPU, 8, models_max=1), candidate("two", A_GPU, 4, models_max=1)
    waits = Reserved({A_GPU: 8}, {"one": 1})
    assert chosen(place("x", [one, two], [], now=NOW, reserved=waits)) == ("two", ())
    refusal = place("x", [one], [], now=NOW, reserved=waits)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.RESERVED
    both = Reserved({A_GPU: 10}, {"one": 2})
    assert isinstance(place("x", [two], [], now=NOW, reserved=both), Refusal)  # 10 of 12, and 4 are asked for
    small = Reserved({A_GPU: 1}, {"one": 1})
    assert isinstance(place("x", [one], [], now=NOW, reserved=small), Refusal)  # for the count
    assert chosen(place("x", [one], [], now=NOW, reserved=replace(small, models={"two": 1}))) == ("one", ())


def test_model_may_be_kept_to_a_router_or_to_devices() -> None:
    """`router` and `devices` are honoured, even where the model is loaded elsewhere; RAM is always allowed."""
    assert chosen(place("x", [A, B], [], now=NOW, router="b")) == ("b", ())
    assert chosen(place("x", [A, B], [resident("x", "a", A_GPU)], now=NOW, router="b")) == ("b", ())
    only_b = [replace(each, devices=frozenset({B_GPU})) for each in (A, B)]
    assert chosen(place("x", only_b, [], now=NOW)) == ("b", ())
    untouched = replace(A, bytes={A_GPU: 0, RAM: 4}, devices=frozenset({B_GPU}))
    assert chosen(place("x", [untouched], [], now=NOW)) == ("a", ())
    for nowhere in (place("x", only_b, [], now=NOW, router="a"), place("x", [], [], now=NOW)):
        assert isinstance(nowhere, Refusal)
        assert nowhere.reason is Reason.NO_ROUTER
        assert nowhere.is_final


DOWN = replace(A, is_ready=False)
HUGE_B = candidate("b", B_GPU, 99)


@pytest.mark.parametrize(
    ("candidates", "residents", "reason", "router"),
    [
        pytest.param([DOWN], [], Reason.NOT_READY, "a", id="down"),
        pytest.param([DOWN], [resident("x", "a", A_GPU)], Reason.NOT_READY, "a", id="down, and it was there"),
        pytest.param([DOWN, HUGE_B], [], Reason.NOT_READY, "a", id="down, and too large for the other"),
        pytest.param([replace(HUGE_B, is_ready=False)], [], Reason.TOO_LARGE, "b", id="down, and too large for it"),
        pytest.param(
            [DOWN, B], [replace(each, in_flight=1) for each in B_FULL], Reason.ALL_BUSY, "b", id="down, the other busy"
        ),
        pytest.param(
            [HUGE_B, A], [replace(each, is_pinned=True) for each in A_FULL], Reason.ALL_PINNED, "a", id="both final"
        ),
        pytest.param(
            [A, B],
            [replace(each, is_pinned=True) for each in A_FULL] + [replace(each, is_loading=True) for each in B_FULL],
            Reason.LOADING,
            "b",
            id="pinned here, loading there",
        ),
        pytest.param(
            [A, B], [replace(each, leases=1) for each in FULL], Reason.ALL_BUSY, "a", id="of equals the first"
        ),
    ],
)
def test_refusal_is_the_one_that_ends(
    candidates: Sequence[Candidate], residents: list[Resident], reason: Reason, router: str
) -> None:
    """If nobody can have it, what can be waited for is told, and of whom."""
    outcome = place("x", candidates, residents, now=NOW)
    assert isinstance(outcome, Refusal)
    assert (outcome.reason, outcome.demand.router) == (reason, router)


def test_ready_router_is_not_passed_over_for_one_that_is_down() -> None:
    """An eviction now is better than room at some time."""
    assert chosen(place("x", [DOWN, B], B_FULL, now=NOW)) == ("b", ("b0",))


ROUTERS = {"a": (A_GPU,), "b": (B_GPU,), "shared": (A_GPU,), "both": (A_GPU, B_GPU)}
tables = st.lists(
    st.builds(
        Resident,
        name=st.sampled_from("xpqrstuv"),
        bytes=st.dictionaries(st.sampled_from([A_GPU, B_GPU]), st.integers(1, 6)),
        last_used=st.integers(9000, 10_000).map(float),
        loaded_at=st.sampled_from([0.0, NOW - 10]),
        reload_cost_s=st.sampled_from([1.0, 5.0]),
        in_flight=st.sampled_from([0, 0, 0, 1]),
        is_pinned=st.sampled_from([False, False, False, True]),
        is_loading=st.sampled_from([False, False, False, True]),
        is_leaving=st.sampled_from([False, False, False, True]),
        router=st.sampled_from(list(ROUTERS)),
    ),
    max_size=8,
    unique_by=lambda each: (each.name, each.router),
)
candidates = st.lists(st.sampled_from(list(ROUTERS)), unique=True).flatmap(
    lambda names: st.tuples(
        *(
            st.builds(
                Candidate,
                router=st.just(name),
                budget=st.builds(
                    Budget, bytes=st.just(dict.fromkeys((A_GPU, B_GPU), 12)), models_max=st.integers(0, 3)
                ),
                bytes=st.fixed_dictionaries(dict.fromkeys(ROUTERS[name], st.integers(0, 14))),
                devices=st.sampled_from([None, frozenset({A_GPU}), frozenset({B_GPU})]),
                is_ready=st.sampled_from([True, True, False]),
            )
            for name in names
        )
    )
)


@given(candidates, tables, st.randoms(use_true_random=False))
def test_choice_is_the_best_of_the_allowed(
    routers: Sequence[Candidate], residents: list[Resident], random: object
) -> None:
    """A choice is allowed and ready, where the model is if it is anywhere, and no other costs less; else all refuse."""
    outcome = place("x", routers, residents, now=NOW)
    shuffled = list(residents)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert place("x", routers, shuffled, now=NOW) == outcome
    ready = [each for each in routers if each.is_ready and each.is_allowed]
    outcomes = {
        each.router: choose(residents, each.budget, Demand("x", each.bytes, each.router), now=NOW) for each in ready
    }
    plans = {router: plan for router, plan in outcomes.items() if isinstance(plan, Plan)}
    if isinstance(outcome, Refusal):
        assert not plans
        down = [each for each in routers if each.is_allowed and not each.is_ready]
        is_any_down = any(
            (demand := Demand("x", each.bytes, each.router)).within(each.budget) == demand for each in down
        )
        may_end = any(isinstance(each, Refusal) and not each.is_final for each in outcomes.values())
        assert outcome.is_final == (not may_end and not is_any_down)
        return
    assert outcome.plan == plans[outcome.router]
    there = {each.router for each in residents if each.name == "x" and not each.is_leaving} & plans.keys()
    if there:
        assert outcome.router in there
    assert loss(outcome.plan, now=NOW) == min(loss(plan, now=NOW) for plan in plans.values())
