"""Whom to unload so that a demand fits: tables for the order and the refusals, properties for what always holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.eviction import (
    MODELS,
    Budget,
    Demand,
    Plan,
    Reason,
    Refusal,
    Resident,
    choose,
    expired,
    relieve,
)

GPU, OTHER, RAM = "0000:01:00.0", "0000:02:00.0", "RAM"
GIB = 2**30
NOW = 10_000.0
LONG_AGO = 100.0


def resident(name: str, size: int = 4, *, idle: float = 1000.0, gpu: str = GPU, **more: object) -> Resident:
    """A model that was loaded long ago and takes so much of one device."""
    it = Resident(name, {gpu: size}, last_used=NOW - idle, loaded_at=LONG_AGO)
    return replace(it, **more)  # type: ignore[arg-type]


def victims(outcome: Plan | Refusal) -> tuple[str, ...]:
    """The names of a plan's victims."""
    assert isinstance(outcome, Plan), outcome
    return outcome.names


def refused(outcome: Plan | Refusal) -> Refusal:
    """The refusal that it is."""
    assert isinstance(outcome, Refusal), outcome
    return outcome


# --- the order --------------------------------------------------------------------------------------------------------

OLD, MIDDLE, NEW = resident("old", idle=300), resident("middle", idle=200), resident("new", idle=100)


@pytest.mark.parametrize(
    ("residents", "size", "expected"),
    [
        pytest.param([], 12, (), id="an empty device"),
        pytest.param([NEW, OLD], 4, (), id="room"),
        pytest.param([NEW, OLD, MIDDLE], 4, ("old",), id="least recently used"),
        pytest.param([NEW, OLD, MIDDLE], 5, ("old", "middle"), id="as many as it takes, in order"),
        pytest.param([NEW, OLD, MIDDLE], 12, ("old", "middle", "new"), id="all"),
        pytest.param([replace(OLD, loaded_at=NOW - 59), MIDDLE, NEW], 4, ("middle",), id="young ones later"),
        pytest.param([replace(OLD, loaded_at=NOW - 60), MIDDLE, NEW], 4, ("old",), id="not young after a minute"),
        pytest.param([replace(OLD, loaded_at=NOW - 1)], 12, ("old",), id="youth never delays a demand"),
        pytest.param(
            [resident("a", reload_cost_s=3.0), resident("b", reload_cost_s=2.0), NEW], 4, ("b",), id="the cheaper one"
        ),
        pytest.param([resident("b"), resident("a"), NEW], 4, ("a",), id="by name"),
        pytest.param([replace(OLD, in_flight=1), MIDDLE, NEW], 4, ("middle",), id="not who answers somebody"),
        pytest.param([replace(OLD, leases=1), MIDDLE, NEW], 4, ("middle",), id="not who is leased"),
        pytest.param([replace(OLD, is_pinned=True), MIDDLE, NEW], 4, ("middle",), id="not who is pinned"),
        pytest.param([replace(OLD, is_loading=True), MIDDLE, NEW], 4, ("middle",), id="not who is being loaded"),
        pytest.param(
            [resident("small", 1, idle=300), resident("large", 9, idle=200), resident("tiny", 1, idle=100)],
            10,
            ("large",),
            id="a small old one stays if it alone is no help",
        ),
        pytest.param(
            [resident("a", 4, gpu=OTHER, idle=900), resident("b", 8, idle=100), resident("c", 4, idle=50)],
            4,
            ("b",),
            id="only from the device that is short",
        ),
        pytest.param([Resident("unknown", {}, 0.0, 0.0), OLD, MIDDLE, NEW], 4, ("old",), id="not who frees nothing"),
    ],
)
def test_order_of_victims(residents: list[Resident], size: int, expected: tuple[str, ...]) -> None:
    """Twelve are there: the least recently used leave, the young last, the protected never, and none in vain."""
    budget = Budget({GPU: 12, OTHER: 12})
    assert victims(choose(residents, budget, Demand("x", {GPU: size}), now=NOW)) == expected


def test_min_residency_can_be_set() -> None:
    """A model counts as young for as long as the caller says."""
    residents = [replace(OLD, loaded_at=NOW - 90), MIDDLE, NEW]
    demand = Demand("x", {GPU: 4})
    assert victims(choose(residents, Budget({GPU: 12}), demand, now=NOW, min_residency_s=100.0)) == ("middle",)
    assert victims(choose(residents, Budget({GPU: 12}), demand, now=NOW, min_residency_s=0.0)) == ("old",)


def test_count_and_bytes_are_one_mechanism() -> None:
    """Who has to leave for the count is enough for the bytes too, if its bytes are; else more leave."""
    residents = [resident("large", 8, idle=100), resident("small", 1, idle=200)]
    assert victims(choose(residents, Budget({GPU: 12}, models_max=2), Demand("x", {GPU: 3}), now=NOW)) == ("small",)
    assert victims(choose(residents, Budget({GPU: 12}, models_max=2), Demand("x", {GPU: 5}), now=NOW)) == ("large",)
    assert victims(choose(residents, Budget({}, models_max=1), Demand("x", {}), now=NOW)) == ("small", "large")
    assert victims(choose(residents, Budget({}, models_max=3), Demand("x", {}), now=NOW)) == ()


def test_what_is_not_known_is_not_enforced() -> None:
    """Without a known budget there is always room, however much is there."""
    for budget in (Budget({GPU: None}), Budget({})):
        assert choose([OLD, MIDDLE], budget, Demand("x", {GPU: 10**15}), now=NOW) == Plan()


def test_overdrawn_device_matters_only_to_who_takes_some_of_it() -> None:
    """A device over its budget is made to fit by who demands it, and left alone by who does not."""
    residents = [OLD, MIDDLE, NEW]
    budget = Budget({GPU: 9, OTHER: 10})
    assert victims(choose(residents, budget, Demand("x", {OTHER: 5, GPU: 0}), now=NOW)) == ()
    assert victims(choose(residents, budget, Demand("x", {OTHER: 5, GPU: 1}), now=NOW)) == ("old",)


def test_several_devices_are_freed_together() -> None:
    """One who holds both devices makes two others superfluous."""
    one = resident("one", 4, idle=300)
    two = resident("two", 4, gpu=OTHER, idle=200)
    both = replace(resident("both", idle=100), bytes={GPU: 4, OTHER: 4})
    outcome = choose([one, two, both], Budget({GPU: 8, OTHER: 8}), Demand("x", {GPU: 4, OTHER: 8}), now=NOW)
    assert victims(outcome) == ("two", "both")


# --- who is going, and what is promised -------------------------------------------------------------------------------


def test_who_is_leaving_is_waited_for_and_not_chosen_again() -> None:
    """Two demands never choose the same victim: the second waits for who leaves anyway, or chooses another."""
    residents = [replace(OLD, is_leaving=True), MIDDLE, NEW]
    budget = Budget({GPU: 12})
    assert choose(residents, budget, Demand("x", {GPU: 4}), now=NOW) == Plan((), (residents[0],))
    first = {GPU: 4}
    second = choose(residents, budget, Demand("y", {GPU: 4}), now=NOW, reserved=first)
    assert second == Plan((MIDDLE,), (residents[0],))


def test_who_is_leaving_elsewhere_is_not_waited_for() -> None:
    """With room there is nothing to wait for."""
    leaving = replace(OLD, is_leaving=True)
    assert choose([leaving], Budget({GPU: 12}), Demand("x", {GPU: 8}), now=NOW).is_free  # type: ignore[union-attr]


def test_model_on_its_way_out_must_have_gone_before_it_comes_back() -> None:
    """A model that is leaving is waited for by a demand for itself, even where there is room for both."""
    leaving = replace(OLD, is_leaving=True)
    assert choose([leaving], Budget({GPU: 99}), Demand("old", {GPU: 4}), now=NOW) == Plan((), (leaving,))


def test_resident_model_needs_nothing() -> None:
    """A demand for what is loaded, or being loaded, is met, whatever the budget says."""
    for there in (OLD, replace(OLD, is_loading=True)):
        assert choose([there], Budget({GPU: 3}, models_max=1), Demand("old", {GPU: 4}), now=NOW) == Plan()


def test_other_routers_share_devices_but_not_the_count() -> None:
    """A neighbour's models take bytes, and may have to go for them; they do not count for this router's models_max."""
    mine, theirs = resident("a", router="one", idle=10), resident("a", router="two", idle=20)
    demand = Demand("x", {GPU: 4}, router="one")
    assert victims(choose([mine, theirs], Budget({GPU: 12}, models_max=2), demand, now=NOW)) == ()
    for_bytes = choose([mine, theirs], Budget({GPU: 8}, models_max=2), demand, now=NOW)
    assert isinstance(for_bytes, Plan)
    assert [each.router for each in for_bytes.victims] == ["two"]
    for_count = choose([mine, theirs], Budget({GPU: 12}, models_max=1), demand, now=NOW)
    assert isinstance(for_count, Plan)
    assert [each.router for each in for_count.victims] == ["one"]


# --- refusals ---------------------------------------------------------------------------------------------------------

PINNED = replace(OLD, name="pinned", is_pinned=True)
BUSY = replace(MIDDLE, name="busy", in_flight=2)
LEASED = replace(MIDDLE, name="leased", leases=1)
LOADING = replace(NEW, name="loading", is_loading=True)


@pytest.mark.parametrize(
    ("residents", "size", "reserved", "reason", "blockers"),
    [
        pytest.param([], 13, 0, Reason.TOO_LARGE, (), id="larger than the device"),
        pytest.param([PINNED], 13, 0, Reason.TOO_LARGE, (), id="larger, whoever is there"),
        pytest.param([PINNED, BUSY, NEW], 9, 0, Reason.ALL_PINNED, ("pinned",), id="pinned"),
        pytest.param([replace(PINNED, is_loading=True)], 9, 0, Reason.ALL_PINNED, ("pinned",), id="pinned, loading"),
        pytest.param([replace(PINNED, in_flight=1)], 9, 0, Reason.ALL_PINNED, ("pinned",), id="pinned, busy"),
        pytest.param([PINNED, BUSY], 8, 0, Reason.ALL_BUSY, ("busy",), id="busy beside a pinned one"),
        pytest.param([LEASED, NEW], 9, 0, Reason.ALL_BUSY, ("leased",), id="leased"),
        pytest.param([LOADING, NEW], 9, 0, Reason.LOADING, ("loading",), id="loading"),
        pytest.param([BUSY, LOADING, NEW], 8, 0, Reason.ALL_BUSY, ("busy",), id="the end of requests is enough"),
        pytest.param([BUSY, LOADING, NEW], 9, 0, Reason.ALL_BUSY, ("busy", "loading"), id="it takes both"),
        pytest.param(
            [replace(BUSY, bytes={GPU: 1}), LOADING], 9, 0, Reason.LOADING, ("loading",), id="only loads matter"
        ),
        pytest.param([BUSY], 8, 5, Reason.RESERVED, (), id="promised to others"),
        pytest.param([BUSY], 6, 3, Reason.ALL_BUSY, ("busy",), id="busy, and something promised to others"),
        pytest.param([PINNED], 9, 12, Reason.ALL_PINNED, ("pinned",), id="pinned, whatever becomes of promises"),
    ],
)
def test_refusal_says_what_stands_in_the_way(
    residents: list[Resident], size: int, reserved: int, reason: Reason, blockers: tuple[str, ...]
) -> None:
    """Of twelve: what is final comes before what ends, and only who can be waited for is named."""
    outcome = refused(choose(residents, Budget({GPU: 12}), Demand("x", {GPU: size}), now=NOW, reserved={GPU: reserved}))
    assert (outcome.reason, tuple(each.name for each in outcome.blockers)) == (reason, blockers)
    assert outcome.device == GPU
    assert outcome.is_final == (reason in {Reason.TOO_LARGE, Reason.ALL_PINNED})


def test_all_pinned_and_one_more_asked_for() -> None:
    """The refusal at the cap on the count names who is pinned, and says what to do."""
    residents = [replace(OLD, is_pinned=True), replace(NEW, is_pinned=True)]
    outcome = refused(choose(residents, Budget({}, models_max=2), Demand("x", {}), now=NOW))
    assert outcome.device == MODELS
    assert outcome.text == "model x: there is room for 2 models, and what is pinned leaves too little: old, new"
    assert outcome.retry_when == "unpin old or new"


@pytest.mark.parametrize(
    ("residents", "demand", "text", "retry_when"),
    [
        ([], 30, f"model x: needs 30.0 GiB of {GPU}, and the whole budget is 24.0 GiB", "raise the budget"),
        ([BUSY], 22, f"model x: there is 24.0 GiB of {GPU}, and who holds it is busy: busy", "when busy is idle"),
        ([LOADING], 22, f"model x: there is 24.0 GiB of {GPU}, and who holds it is being loaded: loading", "when load"),
    ],
)
def test_refusal_of_bytes_is_told(residents: list[Resident], demand: int, text: str, retry_when: str) -> None:
    """What is needed and what there is are told in GiB."""
    large = [replace(each, bytes={GPU: 4 * GIB}) for each in residents]
    outcome = refused(choose(large, Budget({GPU: 24 * GIB}), Demand("x", {GPU: demand * GIB}), now=NOW))
    assert outcome.text == text
    assert outcome.retry_when.startswith(retry_when)
    assert outcome.lacking == (demand * GIB + sum(each.bytes[GPU] for each in large)) - 24 * GIB


def test_every_reason_has_its_words() -> None:
    """No reason is without a text and a way out."""
    for reason in Reason:
        refusal = Refusal(reason, Demand("x", {}), GPU, 1, 2, (OLD,))
        assert refusal.text.startswith("model x: ")
        assert refusal.retry_when


def test_busy_ones_can_be_drained_after_all_others() -> None:
    """Who waits too long may take who is busy: after all who are idle, and never who is pinned or being loaded."""
    residents = [replace(OLD, in_flight=1), MIDDLE, NEW]
    budget = Budget({GPU: 12})
    assert victims(choose(residents, budget, Demand("x", {GPU: 8}), now=NOW, may_drain=True)) == ("middle", "new")
    assert victims(choose(residents, budget, Demand("x", {GPU: 9}), now=NOW, may_drain=True)) == (
        "middle",
        "new",
        "old",
    )
    young = [replace(OLD, in_flight=1), replace(NEW, loaded_at=NOW - 1), MIDDLE]
    assert victims(choose(young, budget, Demand("x", {GPU: 8}), now=NOW, may_drain=True)) == ("middle", "new")
    stuck = [replace(OLD, in_flight=1, is_pinned=True), LOADING]
    outcome = refused(choose(stuck, budget, Demand("x", {GPU: 8}), now=NOW, may_drain=True))
    assert outcome.reason is Reason.LOADING


def test_demand_can_be_cut_to_the_budget() -> None:
    """For llama.cpp's own fit a demand takes all that there is, and no more."""
    demand = Demand("x", {GPU: 20, OTHER: 3, RAM: 99}).within(Budget({GPU: 12, OTHER: 12, RAM: None}))
    assert demand == Demand("x", {GPU: 12, OTHER: 3, RAM: 99})
    assert victims(choose([OLD, NEW], Budget({GPU: 12}), demand, now=NOW)) == ("old", "new")


# --- without a demand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ({}, ()),
        ({GPU: 0}, ()),
        ({GPU: -3}, ()),
        ({GPU: 1}, ("old",)),
        ({GPU: 5}, ("old", "new")),
        ({GPU: 99}, ("old", "new")),
        ({OTHER: 1}, ("elsewhere",)),
        ({GPU: 99, OTHER: 1}, ("elsewhere", "old", "new")),
    ],
)
def test_pressure_is_relieved_as_far_as_it_goes(lacking: dict[str, int], expected: tuple[str, ...]) -> None:
    """R3: the idle leave, least recently used first, until enough is free or nobody is left who may go."""
    residents = [NEW, OLD, BUSY, LOADING, PINNED, resident("elsewhere", gpu=OTHER, idle=400)]
    assert tuple(each.name for each in relieve(residents, lacking, now=NOW)) == expected


def test_idle_models_expire() -> None:
    """Longer than its ttl: the longest idle first; never the pinned, busy, loading, leaving, or without a ttl."""
    ttls = {"old": 299.0, "middle": 150.0, "new": 100.0, "never": None}
    residents = [
        *(MIDDLE, OLD, NEW, resident("never")),
        *(replace(OLD, name=name) for name in ("p", "f", "l", "o", "g")),
    ]
    protection = {"p": "is_pinned", "f": "in_flight", "l": "leases", "o": "is_loading", "g": "is_leaving"}
    residents = [replace(each, **{protection[each.name]: 1}) if each.name in protection else each for each in residents]
    gone = expired(residents, now=NOW, ttl_of=lambda each: ttls.get(each.name, 1.0))
    assert [each.name for each in gone] == ["old", "middle"]


def test_fresh_model_does_not_expire_by_its_former_life() -> None:
    """A model that was loaded again, and not used since, is idle since its load; for LRU it is as old as its use."""
    again = resident("again", idle=5000, loaded_at=NOW - 90)
    assert expired([again], now=NOW, ttl_of=lambda _: 100.0) == ()
    assert expired([again], now=NOW + 11, ttl_of=lambda _: 100.0) == (again,)
    assert victims(choose([again, OLD], Budget({GPU: 8}), Demand("x", {GPU: 4}), now=NOW)) == ("again",)


# --- what always holds ------------------------------------------------------------------------------------------------

DEVICES = (GPU, OTHER, RAM)
amounts = st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 8))
tables = st.lists(
    st.builds(
        Resident,
        name=st.sampled_from("abcdefgh"),
        bytes=amounts,
        last_used=st.sampled_from([NOW - 500, NOW - 400, NOW - 30, NOW]),
        loaded_at=st.sampled_from([NOW - 600, NOW - 60, NOW - 20]),
        reload_cost_s=st.sampled_from([1.0, 2.0]),
        in_flight=st.sampled_from([0, 0, 0, 1]),
        leases=st.sampled_from([0, 0, 0, 1]),
        is_pinned=st.sampled_from([False, False, False, True]),
        is_loading=st.sampled_from([False, False, False, True]),
        is_leaving=st.sampled_from([False, False, False, True]),
        router=st.sampled_from(["", "", "two"]),
    ),
    max_size=7,
    unique_by=lambda each: (each.name, each.router),
)
budgets = st.builds(
    Budget,
    bytes=st.dictionaries(st.sampled_from(DEVICES), st.one_of(st.none(), st.integers(0, 24))),
    models_max=st.integers(0, 5),
)
demands = st.builds(Demand, name=st.just("x"), bytes=amounts)
promises = st.dictionaries(st.sampled_from((*DEVICES, MODELS)), st.integers(0, 4))


def fits(there: Iterable[Resident], budget: Budget, demand: Demand, reserved: dict[str, int]) -> bool:
    """Whether the demand fits beside these, said as plainly as it can be."""
    there = list(there)
    if budget.models_max:
        mine = sum(each.router == demand.router for each in there)
        if mine + 1 + reserved.get(MODELS, 0) > budget.models_max:
            return False
    return all(
        limit is None
        or not demand.bytes.get(device)
        or sum(each.bytes.get(device, 0) for each in there) + demand.bytes[device] + reserved.get(device, 0) <= limit
        for device, limit in budget.bytes.items()
    )


def is_evictable(each: Resident) -> bool:
    """Whether it may be chosen."""
    return not (each.in_flight or each.leases or each.is_pinned or each.is_loading or each.is_leaving)


@given(tables, budgets, demands, promises)
def test_plan_is_within_budget_minimal_and_spares_the_protected(
    residents: list[Resident], budget: Budget, demand: Demand, reserved: dict[str, int]
) -> None:
    """After a plan the demand fits; none of its victims is protected; no proper subset of them would do; in order."""
    outcome = choose(residents, budget, demand, now=NOW, reserved=reserved)
    staying = [each for each in residents if not each.is_leaving]
    fits_at_all = fits([each for each in staying if not is_evictable(each)], budget, demand, reserved)
    assert isinstance(outcome, Plan) == fits_at_all
    if isinstance(outcome, Refusal):
        return
    assert all(is_evictable(each) for each in outcome.victims)
    assert fits([each for each in staying if each not in outcome.victims], budget, demand, reserved)
    for size in range(len(outcome.victims)):
        for fewer in combinations(outcome.victims, size):
            assert not fits([each for each in staying if each not in fewer], budget, demand, reserved)
    keys = [
        (NOW - each.loaded_at < 60, each.last_used, each.reload_cost_s, each.name, each.router)
        for each in outcome.victims
    ]
    assert keys == sorted(keys)
    assert outcome.is_free == fits(residents, budget, demand, reserved)
    assert all(each.is_leaving for each in outcome.waits_for)
    unneeded = [each for each in residents if each not in outcome.victims and each not in outcome.waits_for]
    assert fits(unneeded, budget, demand, reserved)


@given(tables, budgets, demands, promises)
def test_victims_are_the_least_recently_used_that_help(
    residents: list[Resident], budget: Budget, demand: Demand, reserved: dict[str, int]
) -> None:
    """Whoever more valuable than all the others is chosen, without it all the less valuable would not do."""
    outcome = choose(residents, budget, demand, now=NOW, reserved=reserved)
    if isinstance(outcome, Refusal) or not outcome.victims:
        return

    def value(each: Resident) -> tuple[object, ...]:
        return (NOW - each.loaded_at < 60, each.last_used, each.reload_cost_s, each.name, each.router)

    most = value(outcome.victims[-1])
    dearer = [each for each in residents if not each.is_leaving and not (is_evictable(each) and value(each) < most)]
    assert not fits(dearer, budget, demand, reserved)


@given(tables, budgets, demands, promises)
def test_refusals_are_true(residents: list[Resident], budget: Budget, demand: Demand, reserved: dict[str, int]) -> None:
    """The reason is what stands in the way: without it the demand would fit, and final ones do not end by waiting."""
    outcome = choose(residents, budget, demand, now=NOW, reserved=reserved)
    if isinstance(outcome, Plan):
        return
    kept = [each for each in residents if not each.is_leaving and not is_evictable(each)]
    pinned = [each for each in kept if each.is_pinned]
    assert (outcome.reason is Reason.TOO_LARGE) == (not fits([], budget, demand, {}))
    assert outcome.is_final == (not fits(pinned, budget, demand, {}))
    assert (outcome.reason is Reason.RESERVED) == (not outcome.is_final and not fits(pinned, budget, demand, reserved))
    assert outcome.lacking > 0
    if outcome.reason in {Reason.ALL_BUSY, Reason.LOADING}:
        assert fits([each for each in kept if each not in outcome.blockers], budget, demand, reserved)
        assert not any(each.is_pinned for each in outcome.blockers)
    if outcome.reason is Reason.LOADING:
        assert all(each.is_loading for each in outcome.blockers)
    if outcome.reason is Reason.ALL_PINNED:
        assert outcome.blockers
        assert all(each.is_pinned for each in outcome.blockers)


@given(tables, budgets, demands, promises, st.randoms(use_true_random=False), st.booleans())
def test_input_order_does_not_matter(
    residents: list[Resident],
    budget: Budget,
    demand: Demand,
    reserved: dict[str, int],
    random: object,
    may_drain: bool,
) -> None:
    """The same table gives the same answer, however it is sorted."""
    shuffled = list(residents)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = choose(residents, budget, demand, now=NOW, reserved=reserved, may_drain=may_drain)
    assert choose(shuffled, budget, demand, now=NOW, reserved=reserved, may_drain=may_drain) == first
    assert relieve(shuffled, {GPU: 9, RAM: 3}, now=NOW) == relieve(residents, {GPU: 9, RAM: 3}, now=NOW)


@given(tables, budgets, demands, st.integers(-5000, 10**9))
def test_only_differences_of_time_matter(residents: list[Resident], budget: Budget, demand: Demand, shift: int) -> None:
    """T1: on a clock with another origin the same models leave."""
    moved = [replace(each, last_used=each.last_used + shift, loaded_at=each.loaded_at + shift) for each in residents]
    then, now = choose(residents, budget, demand, now=NOW), choose(moved, budget, demand, now=NOW + shift)
    if isinstance(then, Plan):
        assert victims(now) == then.names
    else:
        assert refused(now).reason is then.reason


@given(tables, budgets, demands, promises)
def test_draining_helps_unless_something_else_stands_in_the_way(
    residents: list[Resident], budget: Budget, demand: Demand, reserved: dict[str, int]
) -> None:
    """With draining allowed nothing is refused for being busy, and who is busy is taken only where it has to be."""
    without = choose(residents, budget, demand, now=NOW, reserved=reserved)
    outcome = choose(residents, budget, demand, now=NOW, reserved=reserved, may_drain=True)
    if isinstance(without, Plan):
        assert outcome == without
    elif isinstance(outcome, Refusal):
        assert outcome.reason is not Reason.ALL_BUSY
    else:
        assert without.reason is Reason.ALL_BUSY
        assert any(each.is_busy for each in outcome.victims)
