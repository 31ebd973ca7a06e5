"""A fleet with a gateway's rights: who has a model keeps it, who waits is served, no memory is promised twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GIB, Client, GatewayStage, models
from fakes.machine import KILLED, FakeModel
from llamavisor.catalog import EntryState
from llamavisor.demands import MAX_WAITING_PER_MODEL, STALL_S, Why
from llamavisor.errors import DemandRefusedError, ModelNotFoundError, RouterNotReadyError
from llamavisor.events import (
    DemandMet,
    DemandRefused,
    ModelAdded,
    ModelChanged,
    ModelLoadFailed,
    ModelQuarantined,
    ModelUnloaded,
    RouterRecovered,
    UnloadReason,
)
from llamavisor.eviction import MIN_RESIDENCY_S
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.settings import FleetSettings
from llamavisor.states import ModelState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]


@pytest.fixture
def it(tmp_path: Path) -> GatewayStage:
    """Five models of 4 GiB each, not yet running; a router has room for two."""
    return GatewayStage(tmp_path, models(["alpha", "beta", "gamma", "delta", "omega"]))


async def test_a_lease_loads_a_model_and_tells_where_it_answers(it: GatewayStage) -> None:
    """The address is that of the model's own process, and it stays until the lease ends."""
    async with it.running():
        async with it.fleet.lease("alpha") as endpoint:
            child = it.hosts["main"].process.children["alpha"]
            assert (endpoint.router, endpoint.model, endpoint.port) == ("main", "alpha", child.port)
            assert endpoint.url == f"http://127.0.0.1:{child.port}"
            assert it.loaded() == {"alpha"}
        assert it.loaded() == {"alpha"}


async def test_a_loaded_model_is_had_at_once(it: GatewayStage) -> None:
    """By as many as like; only one load is made."""
    async with it.running():
        clients = [it.client("alpha") for _ in range(10)]
        await it.until(lambda: all(client.has_it for client in clients))
        late = it.client("alpha")
        await it.until(lambda: late.has_it)
        assert late.waited_s < 0.01
        assert it.hosts["main"].process.loads == ["alpha"]
        assert len(it.story.of(DemandMet)) == 11


async def test_the_least_recently_used_leaves(it: GatewayStage) -> None:
    """When a third is asked for, and there is room for two."""
    async with it.running():
        await it.served("alpha", "beta")
        await anyio.sleep(MIN_RESIDENCY_S)
        await it.served("alpha", "gamma")
        assert it.loaded() == {"alpha", "gamma"}
        assert [(event.model, event.reason) for event in it.story.of(ModelUnloaded)] == [("beta", UnloadReason.EVICTED)]


async def test_who_has_a_model_keeps_it(it: GatewayStage) -> None:
    """A third waits until one of two is done, however long that takes; nothing is cut off."""
    async with it.running():
        first, second = it.client("alpha"), it.client("beta")
        await it.until(lambda: first.has_it and second.has_it)
        third = it.client("gamma")
        await anyio.sleep(100.0)
        assert not third.is_answered
        assert it.loaded() == {"alpha", "beta"}
        second.leave()
        await it.until(lambda: third.has_it)
        assert it.loaded() == {"alpha", "gamma"}
        assert first.has_it


async def test_memory_is_never_promised_twice(it: GatewayStage) -> None:
    """Whoever asks for whatever: what is loaded and loading stays within the budget, and everybody is served."""
    async with it.running():
        clients = [it.client(name) for name in ["alpha", "beta", "gamma", "delta", "omega"] * 3]
        served: set[Client] = set()
        while len(served) < len(clients):
            await anyio.sleep(0.05)
            states = [model.state for model in it["main"].table]
            held = [state for state in states if state is not ModelState.UNLOADED]
            assert len(held) <= 2, it["main"].table
            for client in clients:
                assert client.error is None
                if client.has_it and client not in served:
                    served.add(client)
                    client.leave()


async def test_a_client_that_leaves_the_queue_ends_a_load_that_has_only_begun(it: GatewayStage) -> None:
    """Nobody else waits for it."""
    it.models["alpha"] = FakeModel(load_s=100.0, progress=(0.0, 0.1), takes={"RAM": 4 * GIB})
    async with it.running():
        client = it.client("alpha")
        await it.until(lambda: "alpha" in it.hosts["main"].process.children)
        client.give_up()
        await it.until(lambda: not it.fleet.memory.scheduler.admission.slots())
        assert it.hosts["main"].process.unloads == ["alpha"]
        await it.served("beta")


async def test_a_client_that_breaks_off_gives_its_lease_back(it: GatewayStage) -> None:
    """As one that ends in peace does."""
    async with it.running():
        client = it.client("alpha")
        await it.until(lambda: client.has_it)
        client.give_up()
        await it.until(lambda: client.is_over)
        assert [slot.leases for slot in it.fleet.memory.scheduler.admission.slots()] == [set()]


async def test_a_name_that_nobody_serves_is_an_error(it: GatewayStage) -> None:
    """At once."""
    async with it.running():
        client = it.client("nothing")
        await it.until(lambda: client.is_over)
        assert isinstance(client.error, ModelNotFoundError)


async def test_a_model_that_fits_nowhere_is_refused(it: GatewayStage) -> None:
    """With what it needs and what there is; nothing is unloaded for it."""
    it.models["huge"] = FakeModel(takes={"RAM": 20 * GIB})
    async with it.running(oversize="refuse"):
        await it.served("alpha", "beta")
        client = it.client("huge")
        await it.until(lambda: client.is_over)
        assert isinstance(client.error, DemandRefusedError)
        assert (client.error.reason, client.error.retry_after_s) == (Why.IMPOSSIBLE.value, None)
        assert "needs 20.0 GiB of RAM, and the whole budget is 10.0 GiB" in str(client.error)
        assert it.loaded() == {"alpha", "beta"}
        assert [event.reason for event in it.story.of(DemandRefused)] == ["impossible"]


async def test_a_model_that_is_too_large_is_left_to_llama_cpp(it: GatewayStage) -> None:
    """Once all else has gone, unless it is to be refused."""
    it.models["huge"] = FakeModel(takes={"RAM": 20 * GIB})
    async with it.running():
        await it.served("alpha", "beta", "huge")
        assert it.loaded() == {"huge"}


async def test_no_more_wait_than_the_settings_allow(it: GatewayStage) -> None:
    """For one model and altogether; the next is refused at once, and one may come when another has left."""
    it.models["alpha"] = FakeModel(load_s=100.0, progress=(0.0, 0.1), takes={"RAM": 4 * GIB})
    async with it.running(max_waiting=2, max_waiting_per_model=1):
        waiting = {name: it.client(name) for name in ("alpha", "beta")}
        await it.until(lambda: it.fleet.memory.scheduler.admission.waiting == 2)
        for name in ("alpha", "gamma"):
            client = it.client(name)
            await it.until(lambda client=client: client.is_over)
            assert isinstance(client.error, DemandRefusedError)
            assert client.error.reason == Why.QUEUE_FULL.value
        waiting["beta"].give_up()
        await it.until(lambda: it.fleet.memory.scheduler.admission.waiting == 1)
        another = it.client("gamma")
        await it.until(lambda: it.fleet.memory.scheduler.admission.waiting == 2)
        assert not another.is_over


async def test_pinned_models_stay(it: GatewayStage) -> None:
    """All pinned and one more asked for is refused with their names; unpinned, one leaves."""
    async with it.running():
        await it.served("alpha", "beta")
        assert it.fleet.memory.pin("alpha")
        assert it.fleet.memory.pin("beta")
        assert not it.fleet.memory.pin("beta")
        client = it.client("gamma")
        await it.until(lambda: client.is_over)
        assert isinstance(client.error, DemandRefusedError)
        assert "alpha, beta" in str(client.error)
        assert "unpin" in client.error.hint
        assert it.fleet.memory.unpin("alpha")
        await it.served("gamma")
        assert it.loaded() == {"beta", "gamma"}


async def test_what_is_written_counts_as_soon_as_a_router_is_up(it: GatewayStage) -> None:
    """A model that is to stay is never chosen to leave, also when much has changed right before."""
    pinned = ModelRule("alpha", "[model.alpha]", ModelSettings(pin=True, router="two"))
    async with it.running(it.router("one")):
        it.bus.publish(ModelAdded(router="one", model="beta", path="/models/beta.gguf"))
        await anyio.sleep(0.001)
        both = FleetSettings(routers=(it.router("one"), it.router("two")), serve="gateway", rules=(pinned,))
        await it.fleet.apply(both)
        await it.until(lambda: it["two"].is_serving)
        assert it.fleet.memory.scheduler.is_pinned("alpha")


async def test_a_pinned_model_whose_file_is_damaged_stays(it: GatewayStage) -> None:
    """It could not come back: it serves until its file is fit to be loaded again, whoever else is asked for."""
    pinned = ModelRule("alpha", "[model.alpha]", ModelSettings(pin=True))
    async with it.running(rules=(pinned,)):
        await it.served("alpha", "beta")
        it.watches[0].put(replace(it.watches[0].entries["alpha"], state=EntryState.INVALID, reason="cut off"))
        await it.served("gamma", "delta")
        assert it.loaded() == {"alpha", "delta"}
        it.fleet.memory.note_specs()
        await it.served("beta", "gamma")
        assert it.loaded() == {"alpha", "gamma"}


async def test_a_word_that_changes_nothing_is_not_kept(it: GatewayStage) -> None:
    """To unpin what nobody has pinned decides nothing for the day on which somebody writes that it is to stay."""
    pins = it.fleet.memory._pins
    async with it.running():
        assert not it.fleet.memory.unpin("alpha")
        assert it.fleet.memory.pin("beta")
        assert it.fleet.memory.unpin("beta")
        assert pins.dump() == {}


async def test_a_load_that_fails_is_refused_and_left_alone_for_a_while(it: GatewayStage) -> None:
    """With llama-server's own reason; later it is tried again."""
    it.models["alpha"] = FakeModel(exit_code=1, prints=("error loading model",), takes={"RAM": GIB})
    async with it.running():
        first = it.client("alpha")
        await it.until(lambda: first.is_over)
        assert isinstance(first.error, DemandRefusedError)
        assert first.error.reason == Why.QUARANTINED.value
        assert "error loading model" in str(first.error)
        again = it.client("alpha")
        await it.until(lambda: again.is_over)
        assert isinstance(again.error, DemandRefusedError)
        assert len(it.story.of(ModelLoadFailed)) == 1
        assert len(it.story.of(ModelQuarantined)) == 1
        await anyio.sleep(again.error.retry_after_s)
        it.hosts["main"].models["alpha"].exit_code = 0
        await it.served("alpha")


async def test_a_load_that_fails_for_memory_is_tried_once_more(it: GatewayStage) -> None:
    """When who was idle has gone."""
    failing = FakeModel(exit_code=1, prints=("failed to allocate buffer of size 7",), takes={"RAM": 4 * GIB})
    it.models["gamma"] = failing
    async with it.running():
        await it.served("alpha")
        client = it.client("gamma")
        await it.until(lambda: it.loaded() == set())
        it.hosts["main"].models["gamma"].exit_code = 0
        await it.until(lambda: client.is_answered)
        assert client.has_it, client.error
        assert it.hosts["main"].process.loads == ["alpha", "gamma", "gamma"]


async def test_a_router_that_crashes_gets_back_what_it_had(it: GatewayStage) -> None:
    """Pinned first; who waits meanwhile is served when it is up again."""
    async with it.running():
        await it.served("alpha", "beta")
        it.fleet.memory.pin("alpha")
        it.hosts["main"].process.end(KILLED)
        client = it.client("beta")
        await it.until(lambda: client.has_it)
        await it.until(lambda: it.story.of(RouterRecovered))
        assert it.loaded() == {"alpha", "beta"}
        assert it.hosts["main"].process.loads[0] in {"alpha", "beta"}
        assert it.story.of(RouterRecovered)[0].models == ("alpha", "beta")


async def test_a_crash_while_somebody_has_the_model_ends_no_other_lease(it: GatewayStage) -> None:
    """The model can be had again, and its old lease means nothing any more."""
    async with it.running():
        first, other = it.client("alpha"), it.client("beta")
        await it.until(lambda: first.has_it and other.has_it)
        await anyio.sleep(20.0)
        it.hosts["main"].process.crash("alpha")
        again = it.client("alpha")
        await it.until(lambda: again.has_it)
        first.leave()
        await it.until(lambda: first.is_over)
        slots = {slot.resident.name: len(slot.leases) for slot in it.fleet.memory.scheduler.admission.slots()}
        assert slots == {"alpha": 1, "beta": 1}


async def test_a_model_that_crashes_again_and_again_is_left_alone(it: GatewayStage) -> None:
    """P6: after three times within five minutes; the router goes on."""
    async with it.running():
        for _ in range(3):
            client = it.client("alpha")
            await it.until(lambda client=client: client.has_it)
            it.hosts["main"].process.crash("alpha")
            await anyio.sleep(1.0)
            client.leave()
        late = it.client("alpha")
        await it.until(lambda: late.is_over)
        assert isinstance(late.error, DemandRefusedError)
        assert "3 times" in str(late.error)
        assert it["main"].starts == 1


async def test_a_model_that_is_of_use_is_loaded_again_whatever_ends_it(it: GatewayStage) -> None:
    """It has answered somebody since it was loaded: it is killed, and does not crash by itself (DESIGN.md 11)."""
    async with it.running():
        for _ in range(6):
            await it.served("alpha")
            it.hosts["main"].process.crash("alpha")
            await it.until(lambda: it.loaded() == set())
        await it.served("alpha")


async def test_a_stalled_load_is_not_waited_for_without_end(it: GatewayStage) -> None:
    """A load that moves is; one that does not is given up by whoever waits, after a while."""
    it.models["alpha"] = FakeModel(load_s=10 * STALL_S, progress=(0.0,), takes={"RAM": GIB})
    it.models["beta"] = FakeModel(load_s=10 * STALL_S, progress=tuple(n / 20 for n in range(20)), takes={"RAM": GIB})
    async with it.running():
        slow = it.client("alpha")
        await it.until(lambda: slow.is_over)
        assert isinstance(slow.error, DemandRefusedError)
        assert slow.error.reason == Why.QUARANTINED.value
        assert "no progress" in str(slow.error)
        moving = it.client("beta")
        await it.until(lambda: moving.is_answered, within_s=30 * STALL_S)
        assert moving.has_it, moving.error


async def test_a_mended_model_is_tried_at_once(it: GatewayStage) -> None:
    """Its file has changed, or a person wants it loaded: what failed before was another one."""
    it.models["alpha"] = FakeModel(exit_code=1, takes={"RAM": GIB})
    async with it.running():
        for mend in ("file", "person"):
            failed = it.client("alpha")
            await it.until(lambda failed=failed: failed.is_over)
            assert isinstance(failed.error, DemandRefusedError)
            assert [each.model for each in it.fleet.memory.occupancy().quarantined] == ["alpha"]
            it.hosts["main"].models["alpha"].exit_code = 0
            if mend == "file":
                it.replace("alpha")
                await it.until(lambda: it.story.of(ModelChanged))
                await it.served("alpha")
                await it["main"].unload("alpha")
                it.hosts["main"].models["alpha"].exit_code = 1
            else:
                assert await it.fleet.load(it["main"], "alpha")
                assert not await it.fleet.load(it["main"], "alpha")


async def test_a_hammering_client_is_one_piece_of_news(it: GatewayStage) -> None:
    """Each refusal is counted; the same one again within a minute is neither a warning nor kept."""
    it.models["huge"] = FakeModel(takes={"RAM": 20 * GIB})
    async with it.running(oversize="refuse"):
        clients = [it.client("huge") for _ in range(50)]
        await it.until(lambda: all(client.is_over for client in clients))
        refused = it.story.of(DemandRefused)
        assert [event.is_news for event in refused] == [True] + [False] * 49
        assert sum(isinstance(each.event, DemandRefused) for each in it.bus.replay(0)) == 1
        await anyio.sleep(61.0)
        again = it.client("huge")
        await it.until(lambda: again.is_over)
        assert it.story.of(DemandRefused)[-1].is_news


async def test_two_thousand_clients_of_a_cold_model_are_bounded(it: GatewayStage) -> None:
    """They share one question what it takes, and those beyond the bounds are told so at once."""
    async with it.running():
        clients = [it.client("alpha") for _ in range(2000)]
        await it.until(lambda: all(client.is_answered for client in clients))
        refused = [client.error for client in clients if client.error is not None]
        assert {error.reason for error in refused if isinstance(error, DemandRefusedError)} == {Why.QUEUE_FULL.value}
        assert len(refused) == 2000 - MAX_WAITING_PER_MODEL
        assert it.hosts["main"].appraisals == 1


async def test_a_forecast_is_what_will_be(it: GatewayStage) -> None:
    """Also for what is too large and is made to fit, and for what has failed."""
    it.models |= {"huge": FakeModel(takes={"RAM": 20 * GIB}), "bad": FakeModel(exit_code=1, takes={"RAM": GIB})}
    async with it.running():
        await it.served("alpha", "beta")
        told = await it.fleet.memory.forecast("huge")
        assert (told.victims, dict(told.needed)) == ((("main", "alpha"), ("main", "beta")), {"RAM": 10 * GIB})
        await it.served("huge")
        assert it.loaded() == {"huge"}
        failed = it.client("bad")
        await it.until(lambda: failed.is_over)
        told = await it.fleet.memory.forecast("bad")
        assert "is not loaded for now" in told.refusal
        assert "tried again in" in told.hint


async def test_a_name_goes_before_an_alias_of_another_router(it: GatewayStage) -> None:
    """And a router that was asked for has its own aliases."""
    async with it.running(it.router("one"), it.router("two")):
        it["one"].shelf._aliases["beta"] = "alpha"
        it["two"].shelf._aliases["x"] = "gamma"
        where = it.fleet.memory.scheduler.where
        assert (where.name_of("beta"), where.name_of("x"), where.name_of("x", only="one")) == ("beta", "gamma", "x")


async def test_a_stopped_router_is_an_error_and_no_wait(it: GatewayStage) -> None:
    """Until somebody starts it."""
    async with it.running():
        it["main"].stop()
        await it.until(lambda: it["main"].state.value == "stopped")
        client = it.client("alpha")
        await it.until(lambda: client.is_over)
        assert isinstance(client.error, RouterNotReadyError)
        it["main"].start()
        await it.until(lambda: it["main"].is_serving)
        await it.served("alpha")


async def test_with_two_routers_the_free_one_is_used(it: GatewayStage) -> None:
    """And a model that is loaded is used where it is."""
    routers = it.router("one", models_max=1), it.router("two", models_max=1)
    async with it.running(*routers):
        first, second = it.client("alpha"), it.client("beta")
        await it.until(lambda: first.has_it and second.has_it)
        assert {first.endpoint, second.endpoint} == {"one", "two"}
        again = it.client("beta")
        await it.until(lambda: again.has_it)
        assert again.endpoint == second.endpoint


async def test_routers_of_a_gateway_load_nothing_by_themselves(it: GatewayStage) -> None:
    """A lease with `serve = "router"` would be a promise that nobody keeps."""
    async with it.running(), it.fleet.lease("alpha"):
        it.fleet.memory.scheduler._decides = False
        client = it.client("beta")
        await it.until(lambda: client.is_over)
        assert isinstance(client.error, RouterNotReadyError)


async def test_who_asks_before_a_router_is_up_is_served_when_it_is(it: GatewayStage) -> None:
    """A start is a wait and no error."""
    async with it.running(wait=False):
        await it.until(lambda: list(it.fleet) and it["main"].shelf.wanted)
        client = it.client("alpha")
        await it.until(lambda: client.has_it)
