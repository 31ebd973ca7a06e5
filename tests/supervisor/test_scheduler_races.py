"""What happens to leases and loads while routers, processes and people do something else at the same moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from trio.testing import MockClock

from fakes.fleet import GIB, GatewayStage, models
from fakes.machine import KILLED, FakeModel
from llamavisor.errors import ModelLoadError
from llamavisor.events import ModelLoading, RouterGone, UnloadReason, Warned
from llamavisor.gauge import Device
from llamavisor.settings import FleetSettings, MemoryBudget
from llamavisor.slots import Key, Stage
from llamavisor.states import ModelState, RouterState

CARD = Device("0000:01:00.0", "nvidia", "a card")

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]


@pytest.fixture
def it(tmp_path: Path) -> GatewayStage:
    """Three models of 4 GiB each, not yet running; a router has room for two."""
    return GatewayStage(tmp_path, models(["alpha", "beta", "gamma"]))


async def test_who_wants_a_model_on_a_certain_router_has_it_there(it: GatewayStage) -> None:
    """Whoever waits for the same model elsewhere."""
    async with it.running(it.router("one"), it.router("two", models_max=1)):
        blocker = it.client("beta", router="two")
        await it.until(lambda: blocker.has_it)
        there, anywhere = it.client("alpha", router="two"), it.client("alpha")
        await it.until(lambda: anywhere.has_it)
        assert (anywhere.endpoint, there.is_answered) == ("one", False)
        blocker.leave()
        await it.until(lambda: there.has_it)
        assert there.endpoint == "two"


async def test_what_was_decided_for_a_router_that_ends_is_decided_anew(it: GatewayStage) -> None:
    """And not carried out by the next process besides."""
    async with it.running(it.router("one"), it.router("two")):
        moves = it.fleet.memory.scheduler._moves
        load = moves.load

        def load_after_a_restart(key: Key) -> None:
            if not it.story.of(RouterGone):
                it[key[0]].restart()
            load(key)

        moves.load = load_after_a_restart  # type: ignore[method-assign]
        client = it.client("alpha")
        await it.until(lambda: client.has_it)
        await it.until(lambda: it["one"].is_serving)
        await anyio.sleep(10.0)
        assert [it.loaded("one"), it.loaded("two")] == [set(), {"alpha"}]


async def test_the_room_of_a_router_that_ends_is_free_when_nothing_of_it_is_left(it: GatewayStage) -> None:
    """A process that loads outlives its router by a while."""
    it.models["alpha"] = FakeModel(load_s=60.0, takes={"RAM": 8 * GIB})
    async with it.running(it.router("one"), it.router("two")):
        first = it.client("alpha", router="one")
        await it.until(lambda: it.story.of(ModelLoading))
        process = it.hosts["one"].process
        process.script = replace(process.script, clear_s=5.0)
        second = it.client("beta", router="two")
        await anyio.sleep(1.0)
        process.end(KILLED)
        await it.until(lambda: second.has_it)
        began_at = it.story.times(ModelLoading)[1]
        assert began_at >= it.story.times(RouterGone)[0]
        first.give_up()


async def test_a_lease_leads_to_no_later_process(it: GatewayStage) -> None:
    """One that was given just before its router ended is lost: nobody would keep what is loaded then."""
    async with it.running():
        leases = it.fleet.leases
        lease = await leases._acquire("alpha", None)
        it.hosts["main"].process.end(KILLED)
        await it.until(lambda: not it["main"].is_serving)
        with pytest.raises(ModelLoadError, match="lost"):
            await leases._await_endpoint(lease)
        await it.until(lambda: it.loaded() == {"alpha"})


async def test_an_unload_that_comes_too_late_is_none(it: GatewayStage) -> None:
    """The model has ended by itself meanwhile, and somebody has it loaded anew."""
    it.models["alpha"] = FakeModel(load_s=0.1, takes={"RAM": GIB})
    async with it.running():
        await it.served("alpha")
        it.gauge.hangs = True
        await anyio.sleep(10.0)
        it.fleet.memory.scheduler.dismiss("main", "alpha", UnloadReason.EXPIRED)  # it waits for a reading
        it.hosts["main"].process.crash("alpha")
        client = it.client("alpha")
        await it.until(lambda: client.has_it, within_s=0.4)
        await anyio.sleep(60.0)
        assert it.loaded() == {"alpha"}
        assert it.fleet.memory.scheduler._moves._balances == {}


async def test_a_cancelled_load_that_its_router_goes_on_with_can_be_had(it: GatewayStage) -> None:
    """Its router did not answer when it was told to end it."""
    async with it.running():
        client = it.client("alpha")
        await it.until(lambda: it.story.of(ModelLoading))
        await anyio.sleep(0.1)
        process = it.hosts["main"].process
        process.is_silent = True
        client.give_up()
        await anyio.sleep(20.0)
        process.is_silent = False
        assert process.state("alpha") is ModelState.LOADED
        again = it.client("alpha")
        await it.until(lambda: again.is_answered, within_s=10.0)
        assert again.has_it, again.error


async def test_what_a_person_loads_while_it_leaves_is_there_again(it: GatewayStage) -> None:
    """Its place is not given away when the memory of the process before has come back."""
    it.gauge.devices.append(CARD)  # what was held on it seems never to come back
    it.gauge.total[CARD.id], it.gauge.used[CARD.id] = 24 * GIB, 0
    it.models["alpha"] = FakeModel(takes={"RAM": GIB, CARD.id: GIB})
    async with it.running():
        await it.served("alpha")
        admission = it.fleet.memory.scheduler.admission
        it.fleet.memory.scheduler.dismiss("main", "alpha")
        await it.until(lambda: it["main"].table.get("alpha").state is ModelState.UNLOADED)
        await it["main"].load("alpha")
        for _ in range(20):
            slot = admission.slot("main", "alpha")
            assert (slot.stage, slot.is_ours) == (Stage.LOADED, False)
            await anyio.sleep(0.5)


async def test_a_process_that_begins_while_we_do_not_run_is_found(it: GatewayStage, virtual_time: MockClock) -> None:
    """T2: its port is not given up for a time in which nobody looked."""
    it.models["alpha"] = FakeModel(load_s=0.0005, progress=(), takes={"RAM": GIB})
    async with it.running():
        client = it.client("alpha")
        while not it.loaded():  # its process is still being looked for then
            await anyio.sleep(0.0001)
        assert it["main"].table.get("alpha").port is None
        virtual_time.jump(8.0)
        await it.until(lambda: client.is_answered)
        again = it.client("alpha")
        await it.until(lambda: again.is_answered)
        assert again.has_it, again.error


async def test_settings_that_follow_each_other_at_once_are_all_followed(it: GatewayStage) -> None:
    """The last ones are in force, also when they are those of before."""
    async with it.running():
        before = it["main"].settings
        for memory in (MemoryBudget(6 * GIB), before.memory):
            routers = (replace(before, memory=memory),)
            await it.fleet.apply(FleetSettings(routers=routers, serve="gateway"))
        await anyio.sleep(1.0)
        assert it["main"].settings == before


async def test_a_load_that_is_given_up_keeps_no_router_from_being_renewed(it: GatewayStage) -> None:
    """A router that has lost sight of one model cannot be told to end the load of another: that would never end."""
    it.models["beta"] = FakeModel(load_s=1e8, progress=(0.0,), takes={"RAM": GIB})
    async with it.running():
        await it.served("alpha")
        client = it.client("beta")
        await it.until(lambda: len(it.story.of(ModelLoading)) == 2)
        it.hosts["main"].process.lose_sight_of("alpha")
        await it.until(lambda: it["main"].starts == 2, within_s=120.0)
        await it.until(lambda: it["main"].state is RouterState.READY)
        assert len([each for each in it.story.of(Warned) if "no progress" in each.text]) == 1
        await it.until(lambda: client.is_over)
