"""Who may load, who waits and who is refused: one step over one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llamavisor.admission import STUCK_S, Admission
from llamavisor.cause import Consequence
from llamavisor.claims import Lane
from llamavisor.demands import (
    CANCEL_BELOW,
    DRAIN_AFTER_S,
    STALL_S,
    Action,
    CancelLoad,
    Grant,
    Lease,
    Limits,
    Load,
    Refuse,
    Rejection,
    Unload,
    Why,
)
from llamavisor.eviction import Budget, Demand, Plan, Reason, choose
from llamavisor.gauge import RAM_ID as RAM
from llamavisor.orders import LOAD_STALL_S
from llamavisor.placement import Candidate, Choice
from llamavisor.quarantine import FIRST_S, FORGIVEN_AFTER_S, MAX_S, Quarantine, Quarantines
from llamavisor.slots import Stage

GPU, OTHER_GPU = "0000:01:00.0", "0000:02:00.0"


def at(
    router: str = "r",
    size: int = 4,
    *,
    gpu: str = GPU,
    budget: int | None = 12,
    models_max: int = 0,
    ready: bool = True,
) -> Candidate:
    """A router with one card, on which the model would take so much."""
    return Candidate(router, Budget({gpu: budget}, models_max), {gpu: size}, is_ready=ready)


class Desk:
    """Asks, keeps what was answered, and lets time pass only when told to."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.admission = Admission(limits)
        self.now = 1000.0
        self.leases: dict[int, Lease] = {}
        self.rejections: dict[int, Rejection] = {}

    def note(self, actions: list[Action]) -> list[Action]:
        """Keep the answers, return the rest: what routers are to do, and who is in quarantine."""
        for action in actions:
            if isinstance(action, Grant):
                self.leases[action.number] = action.lease
            elif isinstance(action, Refuse):
                self.rejections[action.number] = action.rejection
        return [action for action in actions if not isinstance(action, Grant | Refuse)]

    def ask(self, model: str, *candidates: Candidate) -> tuple[int, list[Action]]:
        """A client wants the model, on one router with a card of 12 where it takes 4 unless said otherwise."""
        number, actions = self.admission.ask(model, candidates or (at(),), self.now)
        return number, self.note(actions)

    def loaded(self, model: str, router: str = "r") -> list[Action]:
        """A load has succeeded."""
        return self.note(self.admission.loaded(router, model, None, self.now))

    def gone(self, model: str, router: str = "r") -> list[Action]:
        """A process has ended."""
        return self.note(self.admission.gone(router, model, self.now))

    def failed(self, model: str, router: str = "r", *, then: Consequence = Consequence.QUARANTINE) -> list[Action]:
        """A load has not succeeded."""
        admission = self.admission
        return self.note(admission.load_failed(router, model, "broken", then=then, now=self.now))

    def release(self, number: int) -> list[Action]:
        """A client has its answer."""
        return self.note(self.admission.release(self.leases.pop(number), self.now))

    def wait(self, seconds: float) -> list[Action]:
        """Time passes."""
        self.now += seconds
        return self.note(self.admission.tick(self.now))

    def has(self, model: str, *candidates: Candidate) -> int:
        """Have a model loaded and leased; returns the number of its demand."""
        number, actions = self.ask(model, *candidates)
        assert [type(action) for action in actions] == [Load]
        load = actions[0]
        assert isinstance(load, Load)
        self.loaded(model, load.router)
        assert number in self.leases
        self.now += 1.0
        return number

    def has_idle(self, *models: str, size: int = 4) -> None:
        """Have models loaded that nobody uses, the first the longest idle."""
        for model in models:
            self.release(self.has(model, at(size=size)))


@pytest.fixture
def desk() -> Desk:
    """An empty table."""
    return Desk()


def test_demands_for_one_model_share_one_load(desk: Desk) -> None:
    """The second client causes nothing, and has its lease at the same moment as the first."""
    first, actions = desk.ask("a")
    second, more = desk.ask("a")
    assert (actions, more) == ([Load("r", "a")], [])
    assert desk.leases == {}
    assert desk.loaded("a") == []
    assert {first, second} == set(desk.leases)
    assert desk.leases[first] != desk.leases[second]


def test_a_loaded_model_is_granted_at_once_though_others_wait(desk: Desk) -> None:
    """A demand for a resident model never waits behind a load."""
    desk.has("a")
    desk.ask("b")
    number, actions = desk.ask("a")
    assert actions == []
    assert desk.leases[number] == Lease(desk.leases[number].number, "r", "a")


def test_a_victim_is_unloaded_and_seen_gone_before_the_load(desk: Desk) -> None:
    """Unload, gone, load: in this order, and the least recently used goes."""
    desk.has_idle("a", "b", "c")
    number, actions = desk.ask("d")
    assert actions == [Unload("r", "a")]
    assert desk.wait(5) == []
    assert desk.gone("a") == [Load("r", "d")]
    assert desk.loaded("d") == []
    assert number in desk.leases


def test_the_count_of_models_is_seen_gone_too() -> None:
    """With models_max reached the load waits for the end of the victim's process, not only for its unload."""
    desk = Desk()
    desk.release(desk.has("a", at(models_max=1, budget=None)))
    _, actions = desk.ask("b", at(models_max=1, budget=None))
    assert actions == [Unload("r", "a")]
    assert desk.gone("a") == [Load("r", "b")]


def test_two_demands_never_choose_the_same_victim(desk: Desk) -> None:
    """Each closes its own, though either would do for both if it were asked alone."""
    desk.has_idle("a", "b", "c")
    assert desk.ask("d")[1] == [Unload("r", "a")]
    assert desk.ask("e")[1] == [Unload("r", "b")]
    assert [set(order.victims) for order in desk.admission.orders] == [{("r", "a")}, {("r", "b")}]


def test_loads_on_one_device_are_one_after_the_other(desk: Desk) -> None:
    """The second begins when the first is done, though there is room for both."""
    assert desk.ask("a")[1] == [Load("r", "a")]
    assert desk.ask("b")[1] == []
    assert desk.loaded("a") == [Load("r", "b")]


def test_a_cancelled_load_keeps_others_from_its_device_until_it_has_gone(desk: Desk) -> None:
    """What it had taken may not be back yet."""
    number, _ = desk.ask("a")
    desk.ask("b")
    assert desk.note(desk.admission.give_up(number, desk.now)) == [CancelLoad("r", "a")]
    assert desk.gone("a") == [Load("r", "b")]


def test_loads_on_different_devices_run_at_the_same_time(desk: Desk) -> None:
    """Two cards are two lanes, though both models take a little RAM."""
    budget = Budget({GPU: 12, OTHER_GPU: 12, RAM: 100})
    assert desk.ask("a", Candidate("r", budget, {GPU: 4, RAM: 1}))[1] == [Load("r", "a")]
    assert desk.ask("b", Candidate("r", budget, {OTHER_GPU: 4, RAM: 1}))[1] == [Load("r", "b")]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param({GPU: 4}, {GPU: 4}, True, id="one card"),
        pytest.param({GPU: 4}, {OTHER_GPU: 4}, False, id="two cards"),
        pytest.param({GPU: 4, OTHER_GPU: 4}, {OTHER_GPU: 4}, True, id="a card in common"),
        pytest.param({RAM: 4}, {RAM: 4}, True, id="RAM"),
        pytest.param({GPU: 4, RAM: 4}, {RAM: 4}, True, id="half in RAM"),
        pytest.param({GPU: 4, RAM: 1}, {RAM: 4}, False, id="a little RAM"),
        pytest.param({GPU: 4}, {}, False, id="not known, another router"),
        pytest.param({GPU: 0}, {GPU: 4}, False, id="nothing"),
    ],
)
def test_lanes(one: dict[str, int], other: dict[str, int], expected: bool) -> None:
    """Two loads share a lane if they share a device that matters."""
    lanes = Lane.of("a", one, ("a", "x")), Lane.of("b", other, ("b", "y"))
    assert lanes[0].is_shared_with(lanes[1]) is expected
    assert lanes[1].is_shared_with(lanes[0]) is expected


def test_what_is_not_known_shares_the_lane_of_its_router() -> None:
    """A load whose devices nobody knows may be anywhere on its router."""
    assert Lane.of("a", {}, ("a", "x")).is_shared_with(Lane.of("a", {GPU: 4}, ("a", "y")))


def test_first_come_first_served(desk: Desk) -> None:
    """A small demand does not take the room that a larger one before it waits for."""
    busy = desk.has("a", at(size=8))
    assert desk.ask("b", at(size=8))[1] == []
    assert desk.ask("c", at(size=2))[1] == []
    assert desk.release(busy) == [Unload("r", "a")]
    assert desk.gone("a") == [Load("r", "b")]
    assert desk.loaded("b") == [Load("r", "c")]


def test_whom_it_does_not_hurt_may_go_first(desk: Desk) -> None:
    """A demand that needs nothing of what another waits for is not held up by it."""
    desk.has("a", at(size=8))
    desk.ask("b", at(size=8))
    assert desk.ask("c", at("s", size=8, gpu=OTHER_GPU))[1] == [Load("s", "c")]


def test_the_room_of_a_drained_model_keeps_nobody_else_waiting(desk: Desk) -> None:
    """While a demand waits for somebody's answer to end, another is loaded into room that neither needs."""
    desk.has("a", at(size=8))
    desk.ask("b", at(size=8))
    desk.wait(DRAIN_AFTER_S)
    assert desk.ask("c", at(size=4))[1] == [Load("r", "c")]


def test_nothing_is_kept_where_a_demand_will_never_be_served(desk: Desk) -> None:
    """It waits for the large card; the small one is for others."""
    desk.has("a", at(size=8))
    desk.ask("b", at(size=8), at("s", size=8, gpu=OTHER_GPU, budget=6))
    assert desk.ask("c", at("s", gpu=OTHER_GPU, budget=6))[1] == [Load("s", "c")]


def test_nothing_is_kept_for_who_waits_for_a_router_to_come_up(desk: Desk) -> None:
    """Where pinned models leave no room, others that are smaller may be loaded."""
    desk.admission.pin({"a"}, desk.now)
    desk.has("a", at(size=8))
    desk.ask("b", at(size=8), at("s", size=8, gpu=OTHER_GPU, ready=False))
    assert desk.ask("c", at(size=4))[1] == [Load("r", "c")]


def test_a_device_that_two_routers_share_is_kept_once(desk: Desk) -> None:
    """A demand that may be loaded on either takes its bytes only once."""
    one, two = (at(name, size=2, budget=24, models_max=1) for name in ("r", "s"))
    desk.has("a", one)
    desk.has("b", two)
    desk.ask("c", replace(one, bytes={GPU: 8}), replace(two, bytes={GPU: 8}))
    assert desk.ask("d", at("t", size=12, budget=24))[1] == [Load("t", "d")]
    desk.loaded("d", "t")
    assert desk.ask("e", at("t", size=1, budget=24))[1] == []


def test_a_demand_for_a_leaving_model_waits_for_its_end_and_has_it_loaded_again(desk: Desk) -> None:
    """No lease is given on who has been told to go."""
    desk.has_idle("a", "b", "c")
    desk.ask("d")
    number, actions = desk.ask("a")
    assert actions == [Unload("r", "b")]
    assert number not in desk.leases
    assert desk.gone("a") == [Load("r", "d")]
    assert desk.gone("b") == []
    assert desk.loaded("d") == [Load("r", "a")]
    assert desk.loaded("a") == []
    assert number in desk.leases


def test_a_model_just_loaded_cannot_be_chosen_before_its_first_request(desk: Desk) -> None:
    """Who waited for it has it in the same step, even if an older demand wants its room."""
    first, _ = desk.ask("a", at(size=8))
    desk.ask("b", at(size=8))
    desk.note(desk.admission.give_up(first, desk.now))
    desk.now += 1
    again, _ = desk.ask("a", at(size=8))
    assert desk.gone("a") == [Load("r", "b")]
    assert desk.loaded("b") == []
    assert again not in desk.leases
    assert desk.wait(1) == []


def test_an_older_demand_does_not_choose_what_others_are_about_to_get(desk: Desk) -> None:
    """A model that somebody else had loaded is granted before the order before it may evict it."""
    desk.note(desk.admission.loading("r", "a", {GPU: 8}, desk.now))
    older, actions = desk.ask("b", at(size=8))
    assert actions == []
    younger, _ = desk.ask("a", at(size=8))
    assert desk.loaded("a") == []
    assert younger in desk.leases
    assert older not in desk.leases


def test_the_last_to_give_up_cancels_a_load_that_has_only_begun(desk: Desk) -> None:
    """As long as one waits it goes on."""
    first, _ = desk.ask("a")
    second, _ = desk.ask("a")
    assert desk.admission.give_up(first, desk.now) == []
    assert desk.admission.give_up(second, desk.now) == [CancelLoad("r", "a")]
    assert desk.admission.give_up(second, desk.now) == []


def test_a_load_that_has_got_far_is_not_cancelled(desk: Desk) -> None:
    """It is done soon, and whoever gave up may come back."""
    number, _ = desk.ask("a")
    desk.admission.progressed("r", "a", CANCEL_BELOW, desk.now)
    desk.admission.progressed("r", "a", 0.0, desk.now)  # a further stage
    assert desk.admission.give_up(number, desk.now) == []


def test_a_load_of_somebody_else_is_not_cancelled(desk: Desk) -> None:
    """A person wanted it, whoever else waited."""
    desk.admission.loading("r", "a", {GPU: 4}, desk.now)
    number, actions = desk.ask("a")
    assert actions == []
    assert desk.admission.give_up(number, desk.now) == []


def test_who_comes_after_a_cancelled_load_has_it_loaded_again(desk: Desk) -> None:
    """The end of the load, and even its late success, are not taken for theirs."""
    number, _ = desk.ask("a")
    desk.admission.give_up(number, desk.now)
    again, actions = desk.ask("a")
    assert actions == []
    assert desk.loaded("a") == []
    assert desk.failed("a") == []
    assert desk.gone("a") == [Load("r", "a")]
    desk.loaded("a")
    assert again in desk.leases


def test_a_load_is_cancelled_when_the_model_can_be_had_elsewhere(desk: Desk) -> None:
    """Somebody else had it loaded there; who would have it on the first router alone keeps that load."""
    places = at("r"), at("s", gpu=OTHER_GPU)
    number, actions = desk.ask("a", *places)
    assert actions == [Load("r", "a")]
    desk.admission.loading("s", "a", {OTHER_GPU: 4}, desk.now)
    assert desk.loaded("a", "s") == [CancelLoad("r", "a")]
    assert desk.leases[number].router == "s"
    desk.ask("b", *places)
    bound, actions = desk.admission.ask("b", [at("r")], desk.now, only="r")
    desk.note(actions)
    desk.gone("a")
    desk.admission.loading("s", "b", {OTHER_GPU: 4}, desk.now)
    assert desk.loaded("b", "s") == []
    desk.loaded("b")
    assert desk.leases[bound].router == "r"


def test_the_queue_is_bounded() -> None:
    """Per model and altogether; the refusal says when to come again."""
    desk = Desk(Limits(max_waiting=3, max_waiting_per_model=2))
    desk.ask("a")
    desk.ask("a")
    refused, _ = desk.ask("a")
    desk.ask("b")
    also, _ = desk.ask("c")
    assert {number: each.why for number, each in desk.rejections.items()} == {
        refused: Why.QUEUE_FULL,
        also: Why.QUEUE_FULL,
    }
    assert all((each.retry_after_s or 0) > 0 for each in desk.rejections.values())
    assert desk.admission.waiting == 3


def test_a_demand_is_late_by_stall_and_not_by_total_time(desk: Desk) -> None:
    """As long as its own load may progress it waits; then it is told why, and when to come again."""
    number, _ = desk.ask("a")
    for tenth in range(1, 10):
        assert desk.wait(LOAD_STALL_S - 1) == []
        desk.admission.progressed("r", "a", tenth / 10, desk.now)
    assert desk.wait(LOAD_STALL_S - 1) == []
    assert desk.rejections == {}
    assert desk.wait(1) == []
    assert desk.rejections[number].why is Why.STALLED
    assert (desk.rejections[number].retry_after_s or 0) > 0
    assert "nothing has moved" in desk.rejections[number].text


def test_a_hung_load_is_cancelled_with_its_last_demand(desk: Desk) -> None:
    """A late-comer has as long as anybody."""
    desk.ask("a")
    desk.now += LOAD_STALL_S / 2
    late, _ = desk.ask("a")
    assert desk.wait(LOAD_STALL_S / 2) == []
    assert late not in desk.rejections
    assert desk.wait(LOAD_STALL_S / 2) == [CancelLoad("r", "a")]
    assert late in desk.rejections


def test_a_load_that_tells_no_progress_is_waited_for(desk: Desk) -> None:
    """Slow is not dead: who waits for another load is refused after a while, who waits for this one is not."""
    slow, _ = desk.ask("a", at(size=8))
    other, _ = desk.ask("b", at(size=8))
    for _ in range(5):
        desk.wait(STALL_S)
    assert desk.rejections[other].why is Why.STALLED
    desk.loaded("a")
    assert slow in desk.leases


def test_who_waits_behind_a_load_that_progresses_is_not_late(desk: Desk) -> None:
    """Progress of anything that it waits for is enough."""
    desk.ask("a")
    number, _ = desk.ask("b")
    for _ in range(3):
        desk.wait(STALL_S - 1)
        desk.admission.progressed("r", "a", 0.5, desk.now)
    desk.loaded("a")
    desk.loaded("b")
    assert number in desk.leases


def test_who_waits_for_the_turn_of_somebody_else_is_not_late(desk: Desk) -> None:
    """A person's load is progress too for who waits for its device."""
    desk.note(desk.admission.loading("r", "a", {GPU: 4}, desk.now))
    number, actions = desk.ask("b")
    assert actions == []
    for _ in range(2):
        desk.wait(STALL_S - 1)
        desk.admission.progressed("r", "a", 0.5, desk.now)
    assert number not in desk.rejections


def test_who_waits_behind_others_is_not_late_while_they_move(desk: Desk) -> None:
    """The end of a victim of the first is progress for the second, whose turn comes after."""
    desk.has_idle("a", size=8)
    assert desk.ask("b", at(size=8))[1] == [Unload("r", "a")]
    number, actions = desk.ask("c", at(size=8))
    assert actions == []
    desk.now += STALL_S - 1
    assert desk.gone("a") == [Load("r", "b")]
    desk.wait(2)
    assert number not in desk.rejections


def test_every_answer_that_ends_on_a_closed_model_is_progress(desk: Desk) -> None:
    """Who waits for a model with many readers is served when the last has left."""
    first = desk.has("a", at(size=8))
    second, _ = desk.ask("a", at(size=8))
    number, _ = desk.ask("b", at(size=8))
    desk.wait(STALL_S - 1)
    assert desk.release(first) == []
    desk.wait(STALL_S - 1)
    assert number not in desk.rejections
    assert desk.release(second) == [Unload("r", "a")]


def test_a_router_that_has_come_up_is_progress(desk: Desk) -> None:
    """Though somebody else loads on its card first."""
    desk.note(desk.admission.loading("s", "z", {GPU: 4}, desk.now))
    number, _ = desk.ask("a", at(ready=False))
    desk.now += STALL_S - 1
    assert desk.note(desk.admission.router_up("r", desk.now)) == []
    desk.wait(2)
    assert number not in desk.rejections


def test_a_victim_that_has_gone_is_one_no_longer(desk: Desk) -> None:
    """Somebody else may have it loaded again before its room was used."""
    desk.has_idle("a", "b", "c")
    desk.ask("d", at(size=8))
    assert desk.admission.orders[0].victims == {("r", "a"), ("r", "b")}
    desk.gone("a")
    desk.note(desk.admission.loading("r", "a", {GPU: 4}, desk.now))
    assert ("r", "a") not in desk.admission.orders[0].victims


def test_progress_of_what_it_does_not_wait_for_is_none(desk: Desk) -> None:
    """A load on another router's card does not make an unserved demand wait longer."""
    desk.has("a", at(size=8))
    number, _ = desk.ask("b", at(size=8))
    desk.ask("c", at("s", gpu=OTHER_GPU))
    desk.wait(STALL_S - 1)
    desk.admission.progressed("s", "c", 0.5, desk.now)
    desk.wait(1)
    assert desk.rejections[number].why is Why.STALLED


def test_a_demand_that_has_waited_drains_a_busy_model_without_cutting_an_answer(desk: Desk) -> None:
    """It is closed to new leases, and unloaded when the last one has ended."""
    busy = desk.has("a", at(size=8))
    number, _ = desk.ask("b", at(size=8))
    assert desk.wait(DRAIN_AFTER_S) == []
    other, actions = desk.ask("a", at(size=8))
    assert actions == []
    assert other not in desk.leases
    assert desk.release(busy) == [Unload("r", "a")]
    assert desk.gone("a") == [Load("r", "b")]
    desk.loaded("b")
    assert number in desk.leases


def test_a_model_closed_in_vain_is_open_again(desk: Desk) -> None:
    """Who wanted its room has left: those who wait for it have it at once."""
    desk.has("a", at(size=8))
    number, _ = desk.ask("b", at(size=8))
    desk.wait(DRAIN_AFTER_S)
    other, _ = desk.ask("a", at(size=8))
    assert other not in desk.leases
    assert desk.note(desk.admission.give_up(number, desk.now)) == []
    assert other in desk.leases


def test_a_pin_saves_a_closed_model(desk: Desk) -> None:
    """It is open again; who wanted its room is refused, because waiting is pointless now."""
    busy = desk.has("a", at(size=8))
    number, _ = desk.ask("b", at(size=8))
    desk.wait(DRAIN_AFTER_S)
    assert desk.note(desk.admission.pin({"a"}, desk.now)) == []
    refusal = desk.rejections[number].refusal
    assert refusal is not None
    assert refusal.reason is Reason.ALL_PINNED
    assert "unpin a" in desk.rejections[number].text
    assert desk.release(busy) == []
    assert desk.ask("c", at(size=2))[1] == [Load("r", "c")]
    desk.loaded("c")
    assert desk.note(desk.admission.pin(set(), desk.now)) == []
    assert desk.ask("b", at(size=8))[1] == [Unload("r", "a")]


def test_a_pin_holds_for_loads_to_come(desk: Desk) -> None:
    """A model may be pinned before it is there."""
    desk.admission.pin({"a"}, desk.now)
    desk.has_idle("a", size=8)
    number, _ = desk.ask("b", at(size=8))
    assert desk.rejections[number].why is Why.IMPOSSIBLE


def test_a_model_that_answers_without_a_lease_stays(desk: Desk) -> None:
    """What is observed counts like a lease."""
    desk.has_idle("a", size=8)
    desk.admission.observed("r", "a", 1, desk.now)
    assert desk.ask("b", at(size=8))[1] == []
    assert desk.note(desk.admission.observed("r", "a", 0, desk.now)) == [Unload("r", "a")]
    assert desk.admission.observed("r", "a", 1, desk.now) == []


def test_a_released_lease_means_nothing_a_second_time(desk: Desk) -> None:
    """Neither does one of a former life of the model."""
    first = desk.has("a", at(size=8))
    old = desk.leases[first]
    desk.gone("a")
    second = desk.has("a", at(size=8))
    assert desk.ask("b", at(size=8))[1] == []
    before = desk.admission.residents(desk.now)
    desk.now += 1
    assert desk.admission.release(old, desk.now) == []
    assert desk.admission.residents(desk.now) == before
    new = desk.leases[second]
    assert desk.admission.release(new, desk.now) == [Unload("r", "a")]
    assert desk.admission.release(new, desk.now) == []


def test_a_load_that_fails_for_memory_is_tried_once_more_after_others_have_gone(desk: Desk) -> None:
    """Who is idle leaves; the second failure is a quarantine."""
    desk.has_idle("a")
    number, actions = desk.ask("b")
    assert actions == [Load("r", "b")]
    assert desk.failed("b", then=Consequence.EVICT) == [Unload("r", "a")]
    assert desk.gone("b") == []
    assert desk.gone("a") == [Load("r", "b")]
    assert desk.failed("b", then=Consequence.EVICT) == [Quarantine("r", "b", desk.now + FIRST_S, 1, "broken")]
    assert desk.rejections[number].why is Why.QUARANTINED
    assert desk.rejections[number].retry_after_s == FIRST_S


def test_the_second_try_can_succeed(desk: Desk) -> None:
    """Then nobody learns of the first."""
    number, _ = desk.ask("b")
    assert desk.failed("b", then=Consequence.EVICT) == []
    assert desk.gone("b") == [Load("r", "b")]
    assert desk.loaded("b") == []
    assert number in desk.leases
    assert desk.admission.quarantined(desk.now) == []


def test_a_broken_model_is_refused_quickly_with_the_reason(desk: Desk) -> None:
    """Until the quarantine is over; a further failure makes it twice as long."""
    desk.ask("a")
    desk.failed("a")
    desk.gone("a")
    number, actions = desk.ask("a")
    assert actions == []
    assert desk.rejections[number].why is Why.QUARANTINED
    assert desk.rejections[number].text == "model a: it is not loaded for now: broken; try again in 30 s"
    desk.now += FIRST_S
    assert desk.ask("a")[1] == [Load("r", "a")]
    assert desk.failed("a") == [Quarantine("r", "a", desk.now + 2 * FIRST_S, 2, "broken")]


def test_a_forgiven_model_is_loaded_at_once(desk: Desk) -> None:
    """Its file or options have changed."""
    desk.ask("a")
    desk.failed("a")
    desk.gone("a")
    assert desk.admission.forgive("a", desk.now) == []
    assert desk.ask("a")[1] == [Load("r", "a")]


def test_what_fails_on_one_router_may_be_loaded_on_another(desk: Desk) -> None:
    """Who waits is served there, and does not learn of the failure."""
    where = (at("r"), at("s", gpu=OTHER_GPU))
    number, actions = desk.ask("a", *where)
    assert actions == [Load("r", "a")]
    assert desk.failed("a")[1:] == [Load("s", "a")]
    desk.loaded("a", "s")
    assert desk.leases[number].router == "s"


def test_a_process_that_ends_while_it_loads_is_a_failure(desk: Desk) -> None:
    """Even if nobody says so."""
    desk.ask("a")
    assert [type(each) for each in desk.gone("a")] == [Quarantine]


def test_a_serving_process_that_ends_is_no_failure(desk: Desk) -> None:
    """The next demand has it loaded again, unless it is said to crash too often."""
    desk.has("a")
    assert desk.gone("a") == []
    desk.has("a")
    assert [type(each) for each in desk.note(desk.admission.crashed("r", "a", "again", desk.now))] == [Quarantine]
    number, _ = desk.ask("a")
    assert desk.rejections[number].why is Why.QUARANTINED


def test_quarantines_double_up_to_a_bound_and_are_forgotten_after_a_good_while() -> None:
    """30 s, 60 s, … 30 min; a model that was loaded and did not fail for five minutes begins anew."""
    quarantines = Quarantines()
    key, now = ("r", "a"), 0.0
    delays = []
    for _ in range(9):
        delays.append(quarantines.failed(key, "broken", now).until - now)
        now += 10_000
    assert delays == [30, 60, 120, 240, 480, 960, 1800, 1800, 1800]
    assert delays[-1] == MAX_S
    quarantines.loaded(key, now)
    assert quarantines.failed(key, "broken", now + FORGIVEN_AFTER_S - 1).failures == 10
    quarantines.loaded(key, now)
    assert quarantines.get("r", "a", now) is None
    assert quarantines.failed(key, "broken", now + FORGIVEN_AFTER_S).failures == 1


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        pytest.param((at(size=13),), Reason.TOO_LARGE, id="too large"),
        pytest.param((replace(at(), devices=frozenset({OTHER_GPU})),), Reason.NO_ROUTER, id="not allowed"),
    ],
)
def test_what_is_impossible_is_refused_at_once(desk: Desk, candidates: tuple[Candidate, ...], reason: Reason) -> None:
    """And nobody is told to come again."""
    number, actions = desk.ask("a", *candidates)
    assert actions == []
    rejection = desk.rejections[number]
    assert (rejection.why, rejection.retry_after_s) == (Why.IMPOSSIBLE, None)
    assert rejection.refusal is not None
    assert rejection.refusal.reason is reason


def test_who_is_idle_first_leaves_though_another_was_closed(desk: Desk) -> None:
    """A busy model that was closed for a demand is open again as soon as somebody else's room will do."""
    desk.has("a")
    second = desk.has("b")
    number, _ = desk.ask("c", at(size=8))
    assert desk.wait(DRAIN_AFTER_S) == []
    assert [slot.stage for slot in desk.admission.slots()] == [Stage.DRAINING, Stage.LOADED]
    assert desk.release(second) == [Unload("r", "b")]
    assert desk.gone("b") == [Load("r", "c")]
    assert desk.ask("a")[0] in desk.leases
    desk.loaded("c")
    assert number in desk.leases


def test_an_oversize_model_is_left_to_llama_cpp_once_all_else_has_gone() -> None:
    """With `oversize = "fit"`, and only where nothing smaller would do."""
    desk = Desk(Limits(oversize="fit"))
    desk.has_idle("a", "b")
    assert desk.ask("c", at(size=20))[1] == [Unload("r", "a"), Unload("r", "b")]
    assert desk.gone("a") == []
    assert desk.gone("b") == [Load("r", "c", is_oversize=True)]


def test_a_model_that_fits_elsewhere_is_not_made_to_fit() -> None:
    """The larger card is preferred though it is full and the smaller one is empty."""
    desk = Desk(Limits(oversize="fit"))
    desk.has_idle("a", size=10)
    assert desk.ask("b", at("s", size=10, gpu=OTHER_GPU, budget=8), at("r", size=10))[1] == [Unload("r", "a")]


def test_a_router_that_is_not_up_is_waited_for(desk: Desk) -> None:
    """Until it is up."""
    number, actions = desk.ask("a", at(ready=False))
    assert actions == []
    desk.now += STALL_S - 1
    assert desk.note(desk.admission.router_up("r", desk.now)) == []
    assert desk.note(desk.admission.candidates_changed({("a", None): [at()]}, desk.now)) == [Load("r", "a")]
    assert number not in desk.rejections


def test_a_router_that_may_load_nothing_more_may_be_used(desk: Desk) -> None:
    """It waits for its restart: who is loaded there answers, and all else is loaded elsewhere, or waits."""
    desk.has_idle("a")
    closed = replace(at(), is_open=False)
    assert desk.ask("a", closed)[0] in desk.leases
    assert desk.ask("b", closed)[1] == []
    assert desk.ask("c", closed, at("s", gpu=OTHER_GPU))[1] == [Load("s", "c")]


def test_short_memory_refuses_loads_and_no_leases(desk: Desk) -> None:
    """Also who waits already is told to come again; once it is over everything is as before."""
    desk.has_idle("a")
    waiting = desk.ask("b", at(size=12))[0]
    desk.note(desk.admission.strain("2 MiB of RAM are free", desk.now, retry_after_s=20.0))
    assert desk.rejections[waiting].why is Why.STRAINED
    number, actions = desk.ask("c")
    assert (actions, desk.rejections[number].retry_after_s) == ([], 20.0)
    assert "2 MiB of RAM are free" in desk.rejections[number].text
    desk.note(desk.admission.strain("", desk.now))
    desk.gone("a")
    assert desk.ask("c")[1] == [Load("r", "c")]


def test_a_router_that_never_comes_up_is_a_stall(desk: Desk) -> None:
    """Not a wait without end."""
    number, _ = desk.ask("a", at(ready=False))
    desk.wait(STALL_S)
    assert desk.rejections[number].why is Why.STALLED


@pytest.mark.parametrize("has_crashed", [False, True])
def test_a_router_that_ends_takes_everything_with_it(desk: Desk, has_crashed: bool) -> None:
    """What is loading whenever it crashes may be the poison; else it is loaded again."""
    desk.has("a")
    number, _ = desk.ask("b")
    assert desk.note(desk.admission.router_ended("r", has_crashed=has_crashed, now=desk.now)) == []
    desk.note(desk.admission.router_gone("r", desk.now))
    assert desk.note(desk.admission.router_up("r", desk.now)) == [Load("r", "b")]
    desk.admission.loading("r", "a", {}, desk.now)
    desk.admission.loaded("r", "a", {}, desk.now)
    actions = desk.note(desk.admission.router_ended("r", has_crashed=has_crashed, now=desk.now))
    assert [type(action) for action in actions] == ([Quarantine] if has_crashed else [])
    assert {each.name for each in desk.admission.residents(desk.now)} == {"a", "b"}
    assert desk.ask("a")[1] == []
    assert desk.note(desk.admission.router_gone("r", desk.now)) == []
    assert desk.admission.residents(desk.now) == []
    assert (number in desk.rejections) is has_crashed
    loads = desk.note(desk.admission.router_up("r", desk.now))
    assert loads == ([Load("r", "a")] if has_crashed else [Load("r", "b")])


def test_a_model_that_its_router_will_not_unload_is_left_alone(desk: Desk) -> None:
    """The next candidate goes, and nobody asks again for a while."""
    desk.has_idle("a", "b", "c")
    assert desk.ask("d")[1] == [Unload("r", "a")]
    assert desk.note(desk.admission.stayed("r", "a", desk.now)) == [Unload("r", "b")]
    assert "a" not in [model for _, model in desk.admission.orders[0].victims]
    assert desk.ask("a")[1] == []
    assert STUCK_S > DRAIN_AFTER_S
    desk.gone("b")
    desk.loaded("d")
    assert desk.ask("e")[1] == [Unload("r", "c")]
    assert desk.ask("f", at(size=8))[1] == []


def test_a_dismissal_that_came_to_nothing_is_over(desk: Desk) -> None:
    """Its router would not let it go: by now it may be in use, or pinned, and whoever wanted it gone looks again."""
    desk.has_idle("a")
    assert desk.admission.dismiss("r", "a", desk.now) == [Unload("r", "a")]
    assert desk.note(desk.admission.stayed("r", "a", desk.now)) == []
    assert desk.ask("a")[0] in desk.leases
    assert desk.wait(2 * STUCK_S) == []
    assert desk.note(desk.admission.dismiss("r", "a", desk.now)) == []
    assert [slot.stage for slot in desk.admission.slots()] == [Stage.DRAINING]


def test_what_would_be_is_told_and_not_done() -> None:
    """As the queue would decide it, with what is too large made to fit and what has failed left alone."""
    desk = Desk(Limits(oversize="fit"))
    desk.has_idle("a", "b")
    usable, outcome = desk.admission.what_if("c", [at(size=20)], desk.now)
    assert isinstance(outcome, Choice)
    assert (outcome.plan.names, dict(usable[0].bytes)) == (("a", "b"), {GPU: 12})
    assert [slot.stage for slot in desk.admission.slots()] == [Stage.LOADED, Stage.LOADED]
    desk.note(desk.admission.crashed("r", "a", "broken", desk.now))
    desk.gone("a")
    _, outcome = desk.admission.what_if("a", [at()], desk.now)
    assert isinstance(outcome, Rejection)
    assert (outcome.why, [each.model for each in desk.admission.quarantined(desk.now)]) == (Why.QUARANTINED, ["a"])


def test_memory_pressure_has_the_idle_leave(desk: Desk) -> None:
    """As much as is needed beside what leaves already."""
    desk.has_idle("a", "b", "c")
    assert desk.admission.relieve({GPU: 5}, desk.now) == [Unload("r", "a"), Unload("r", "b")]
    assert desk.admission.relieve({GPU: 5}, desk.now) == []


def test_a_dismissed_model_leaves_when_it_is_idle(desk: Desk) -> None:
    """Though nobody needs its room; a new demand has it loaded again."""
    number = desk.has("a")
    assert desk.admission.dismiss("r", "a", desk.now) == []
    again, _ = desk.ask("a")
    assert again not in desk.leases
    assert desk.release(number) == [Unload("r", "a")]
    assert desk.gone("a") == [Load("r", "a")]


def test_a_model_that_somebody_else_unloads_is_not_granted(desk: Desk) -> None:
    """A person's unload is heard of, and nobody is asked to do it again."""
    desk.has("a")
    assert desk.admission.leaving("r", "a", desk.now) == []
    assert desk.ask("a")[1] == []
    assert desk.gone("a") == [Load("r", "a")]


def test_what_was_measured_counts_instead_of_what_was_expected(desk: Desk) -> None:
    """A model that turns out larger leaves less room, and one that was waiting for it chooses a victim."""
    desk.has_idle("a")
    desk.has_idle("b")
    assert desk.admission.sized("r", "b", {GPU: 8}, desk.now) == []
    assert desk.admission.sized("r", "z", {GPU: 8}, desk.now) == []
    assert desk.ask("c")[1] == [Unload("r", "a")]


def test_what_was_loaded_again_with_its_router_keeps_its_place(desk: Desk) -> None:
    """Its last use is that of its former life, and so it is the first to go."""
    for model, used in (("a", 300.0), ("b", 100.0), ("c", 200.0)):
        desk.note(desk.admission.loaded("r", model, {GPU: 4}, desk.now, last_used=used))
    assert desk.ask("d")[1] == [Unload("r", "b")]


def test_candidates_may_change_while_somebody_waits(desk: Desk) -> None:
    """A larger budget serves at once who had no room."""
    desk.has("a", at(size=8))
    desk.ask("b", at(size=8))
    changed = desk.admission.candidates_changed({("b", None): [at(size=8, budget=16)]}, desk.now)
    assert changed == [Load("r", "b")]


# The machine: routers that carry out what they are told, late, in any order, and not always.

ROUTERS = {"r": (GPU, 12, 3), "s": (GPU, 12, 0), "t": (OTHER_GPU, 8, 2)}
SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 7, "f": 9, "g": 13}
WHERE: dict[str, tuple[str, ...]] = {"b": ("r", "s"), "c": ("t",), "e": ("r",)}


@dataclass
class Process:
    """A model's process as the machine carries it out."""

    state: str = "loading"  # then loaded; leaving from either
    progress: float = 0.0
    in_flight: int = 0


class Fleet(RuleBasedStateMachine):
    """Clients, people and routers, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.processes: dict[tuple[str, str], Process] = {}
        self.up = set(ROUTERS)
        self.pending: dict[int, str] = {}
        self.leases: dict[int, Lease] = {}
        self.pinned: set[str] = set()
        self.admission = Admission()
        self.oversize = "refuse"

    @initialize(oversize=st.sampled_from(["refuse", "fit"]))
    def begin(self, oversize: str) -> None:
        """With either way to treat what is too large."""
        self.oversize = oversize
        limits = Limits(max_waiting=40, max_waiting_per_model=10, oversize="fit" if oversize == "fit" else "refuse")
        self.admission = Admission(limits)

    def candidates(self, model: str) -> list[Candidate]:
        """Where a model may be."""
        return [
            at(name, SIZES[model], gpu=ROUTERS[name][0], budget=ROUTERS[name][1], models_max=ROUTERS[name][2])
            for name in WHERE.get(model, tuple(ROUTERS))
        ]

    def size(self, key: tuple[str, str]) -> int:
        """What a process takes of its router's card."""
        size, budget = SIZES[key[1]], ROUTERS[key[0]][1]
        return min(size, budget)

    def carry(self, actions: Sequence[Action]) -> None:
        """Take what was decided, and check that it was allowed to be."""
        for action in actions:
            match action:
                case Grant(number, lease):
                    assert self.processes[lease.router, lease.model].state == "loaded"
                    assert self.pending.pop(number) == lease.model
                    assert lease.number not in self.leases
                    self.leases[lease.number] = lease
                case Refuse(number, rejection):
                    assert self.pending.pop(number) == rejection.model
                    assert (rejection.retry_after_s is None) == (rejection.why is Why.IMPOSSIBLE)
                    assert rejection.text
                case Load(router, model):
                    self.check_load(router, model)
                    self.processes[router, model] = Process()
                case Unload(router, model):
                    process = self.processes[router, model]
                    assert process.state == "loaded"
                    assert process.in_flight == 0
                    assert model not in self.pinned
                    assert not [each for each in self.leases.values() if (each.router, each.model) == (router, model)]
                    process.state = "leaving"
                case CancelLoad(router, model):
                    process = self.processes[router, model]
                    assert process.state == "loading"
                    assert process.progress < CANCEL_BELOW
                    assert model not in self.pending.values()
                    process.state = "leaving"
                case Quarantine():
                    assert action.until > self.now

    def check_load(self, router: str, model: str) -> None:
        """There is room at this moment, the device is free for a load, and nobody who came before is worse off."""
        gpu, budget, models_max = ROUTERS[router]
        assert router in self.up
        assert (router, model) not in self.processes
        on_card = [key for key in self.processes if ROUTERS[key[0]][0] == gpu]
        loading = [key for key in on_card if self.processes[key].state == "loading"]
        assert not loading, "two loads on one device"
        assert sum(map(self.size, on_card)) + self.size((router, model)) <= budget, "over the budget"
        count = sum(key[0] == router for key in self.processes)
        assert not models_max or count < models_max, "over the count"
        residents = self.admission.residents(self.now)
        without = [each for each in residents if (each.router, each.name) != (router, model)]
        loads = {each.name for each in residents if each.is_loading and not each.is_leaving}
        for order in self.admission.orders:
            if order.model == model:
                break
            if order.model in loads:
                continue
            usable = [each for each in order.candidates if each.router in self.up]
            bad = {(each.router, each.model) for each in self.admission.quarantined(self.now)}
            usable = [each for each in usable if (each.router, order.model) not in bad]

            def has_room(among: Sequence[object], usable: list[Candidate] = usable, name: str = order.model) -> bool:
                now = self.now
                demands = [(Demand(name, each.bytes, each.router), each.budget) for each in usable]
                return any(
                    isinstance(choose(among, budget, demand, now=now, may_drain=True), Plan)  # type: ignore[arg-type]
                    for demand, budget in demands
                )

            assert has_room(residents) or not has_room(without), f"{model} takes the room of {order.model}"

    @rule(model=st.sampled_from(sorted(SIZES)))
    def ask(self, model: str) -> None:
        """A client comes."""
        number, actions = self.admission.ask(model, self.candidates(model), self.now)
        self.pending[number] = model
        self.carry(actions)

    @rule(models=st.lists(st.sampled_from(sorted(SIZES)), min_size=3, max_size=6), keep=st.booleans())
    def fill(self, models: list[str], keep: bool) -> None:
        """Clients come and are served, so that the cards are full; some of them stay."""
        for model in models:
            self.ask(model)
            for key in [key for key, process in self.processes.items() if process.state == "loading"]:
                self.finish_load(key)
            for number in sorted(self.leases)[: None if not keep else -2]:
                self.carry(self.admission.release(self.leases.pop(number), self.now))
            self.now += 1.0

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A client leaves the queue."""
        assume(self.pending)
        number = data.draw(st.sampled_from(sorted(self.pending)))
        del self.pending[number]
        self.carry(self.admission.give_up(number, self.now))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A client has its answer."""
        assume(self.leases)
        lease = self.leases.pop(data.draw(st.sampled_from(sorted(self.leases))))
        self.carry(self.admission.release(lease, self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 40.0, 130.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.carry(self.admission.tick(self.now))

    def pick(self, data: st.DataObject, *states: str) -> tuple[str, str]:
        """A process in one of the states."""
        found = sorted(key for key, process in self.processes.items() if process.state in states)
        assume(found)
        return data.draw(st.sampled_from(found))

    @rule(data=st.data(), fraction=st.floats(0, 1))
    def progress(self, data: st.DataObject, fraction: float) -> None:
        """A load gets further."""
        key = self.pick(data, "loading")
        process = self.processes[key]
        process.progress = max(process.progress, fraction)
        self.admission.progressed(*key, fraction, self.now)

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """A load succeeds."""
        self.finish_load(self.pick(data, "loading"))

    def finish_load(self, key: tuple[str, str]) -> None:
        """The router says loaded."""
        self.processes[key].state = "loaded"
        self.carry(self.admission.loaded(*key, None, self.now))

    @rule(data=st.data(), then=st.sampled_from(Consequence))
    def fail(self, data: st.DataObject, then: Consequence) -> None:
        """A load fails."""
        key = self.pick(data, "loading")
        self.processes[key].state = "leaving"
        self.carry(self.admission.load_failed(*key, "broken", then=then, now=self.now))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A process that was to end has ended."""
        self.end(self.pick(data, "leaving"))

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """A process ends unasked."""
        self.end(self.pick(data, "loading", "loaded"))

    def end(self, key: tuple[str, str]) -> None:
        """A process ends."""
        self.drop(key)
        self.carry(self.admission.gone(*key, self.now))

    def drop(self, key: tuple[str, str]) -> None:
        """It is not there any more, and neither are the answers that it gave. Some release late, some never."""
        del self.processes[key]

    @rule(data=st.data())
    def stay(self, data: st.DataObject) -> None:
        """A router will not unload a model."""
        key = self.pick(data, "leaving")
        assume(key[0] in self.up)
        assume(any((each.router, each.name) == key and not each.is_loading for each in self.admission.residents(0)))
        self.processes[key].state = "loaded"
        self.carry(self.admission.stayed(*key, self.now))

    @rule(data=st.data(), in_flight=st.integers(0, 2))
    def observe(self, data: st.DataObject, in_flight: int) -> None:
        """A router is asked who is busy."""
        key = self.pick(data, "loaded")
        self.processes[key].in_flight = in_flight
        self.carry(self.admission.observed(*key, in_flight, self.now))

    @rule(model=st.sampled_from(sorted(SIZES)), luck=st.integers(0, 3))
    def turn_pin(self, model: str, luck: int) -> None:
        """A person pins a model, which is rare, or unpins it."""
        if model not in self.pinned and luck < 3:
            return
        self.pinned ^= {model}
        self.carry(self.admission.pin(self.pinned, self.now))

    @rule(router=st.sampled_from(sorted(ROUTERS)), has_crashed=st.booleans(), luck=st.integers(0, 7))
    def turn_router(self, router: str, has_crashed: bool, luck: int) -> None:
        """A router ends, which is rare, or is up again."""
        if router in self.up:
            if luck < 7:
                return
            self.up.remove(router)
            for key in [key for key in self.processes if key[0] == router]:
                self.processes[key].state = "leaving"
            self.carry(self.admission.router_ended(router, has_crashed=has_crashed, now=self.now))
        else:
            for key in [key for key in self.processes if key[0] == router]:
                self.drop(key)
            self.carry(self.admission.router_gone(router, self.now))
            self.up.add(router)
            self.carry(self.admission.router_up(router, self.now))

    @rule(lacking=st.integers(1, 12), gpu=st.sampled_from([GPU, OTHER_GPU]))
    def press(self, lacking: int, gpu: str) -> None:
        """Memory is short."""
        self.carry(self.admission.relieve({gpu: lacking}, self.now))

    @rule(model=st.sampled_from(sorted(SIZES)))
    def forgive(self, model: str) -> None:
        """A person has mended a model."""
        self.carry(self.admission.forgive(model, self.now))

    @invariant()
    def has_disjoint_victims(self) -> None:
        """No two demands have the same victim, and all of them are on their way out."""
        victims = [key for order in self.admission.orders for key in order.victims]
        assert len(victims) == len(set(victims))
        residents = self.admission.residents(self.now)
        assert set(victims) <= {(each.router, each.name) for each in residents if each.is_leaving}

    @invariant()
    def knows_who_waits(self) -> None:
        """Whoever was neither granted nor refused nor gave up is in the queue, and nobody else."""
        assert sorted(number for order in self.admission.orders for number in order.tickets) == sorted(self.pending)

    @invariant()
    def sees_what_is_there(self) -> None:
        """The table holds the processes that there are."""
        assert {(each.router, each.name) for each in self.admission.residents(self.now)} == set(self.processes)

    def teardown(self) -> None:
        """Every demand ends, though everything hangs; and in time, as soon as everything does what it is told."""
        hung, steps = self.fork_hung(), 0
        if hung:
            bound_s = (len(SIZES) + 1) * (LOAD_STALL_S + 10)
            began = self.now
            while self.pending:
                self.wait(10.0)
                assert self.now - began <= bound_s, self.admission
        while self.pending:
            for key, process in list(self.processes.items()):
                if self.processes.get(key) is not process:
                    continue
                process.in_flight = 0
                self.carry(self.admission.observed(*key, 0, self.now))
                if process.state == "loading":
                    self.finish_load(key)
                elif process.state == "leaving":
                    self.end(key)
            for number in sorted(self.leases):
                self.carry(self.admission.release(self.leases.pop(number), self.now))
            self.wait(5.0)
            steps += 1
            assert steps * 5.0 <= STALL_S + DRAIN_AFTER_S + 5.0 * 4 * len(SIZES), self.admission

    def fork_hung(self) -> bool:
        """Whether everything hangs from now on: in every second run."""
        return len(self.pending) % 2 == 1


TestFleet: Callable[..., object] = Fleet.TestCase
Fleet.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
