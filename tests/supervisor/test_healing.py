"""Routers and models that hang, on virtual time: who is ended, when, by whom, and who is left alone (H1, H2, H3)."""

from __future__ import annotations

import math
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GatewayStage, models
from fakes.host import FakeHost
from fakes.machine import ANSWER_S, FakeMachine, FakeModel
from fakes.supervised import Supervised, Waiter, supervised
from llamavisor.errors import LlamavisorError
from llamavisor.events import (
    ModelHung,
    ModelLoaded,
    ModelQuarantined,
    ModelUnloaded,
    RouterDegraded,
    RouterExited,
    RouterHung,
    RouterReady,
    RouterRestartScheduled,
    UnloadReason,
)
from llamavisor.generation import AFTERMATH_S
from llamavisor.healing import LOAD_DEADLINE_S
from llamavisor.health import KILL_AFTER_S, MODEL_MAX_S, RESTART_AFTER_S, ROUTER_MAX_S
from llamavisor.messages import Suspected
from llamavisor.options import HANG_AFTER_S
from llamavisor.settings import RouterSettings
from llamavisor.states import ModelState, RouterState
from llamavisor.usage import READ_TIMEOUT_S

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

LATE_S = 2 * READ_TIMEOUT_S + 2.0
"""How much later than it could be a hang may be found."""


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A host with two models."""
    host = FakeHost(RouterSettings(name="main", models_dir=tmp_path), folder=tmp_path, machine=FakeMachine())
    host.models = {"alpha": FakeModel(load_s=1.0), "beta": FakeModel(load_s=1.0)}
    return host


async def up(it: Supervised, *names: str) -> None:
    """The router is up, these models have served for a while, and the router has been READY for long."""
    await it.comes_up()
    for name in names:
        await it.router.load(name)
    await anyio.sleep(30.0)


# --- routers ----------------------------------------------------------------------------------------------------------


async def test_a_router_that_is_silent_and_does_nothing_is_restarted(host: FakeHost) -> None:
    """H1: after a minute, and not before; what was loaded comes back, and the cause is told."""
    async with supervised(host) as it:
        await up(it, "alpha")
        it.process.is_silent, it.process.script.term_s = True, 60.0  # SIGTERM does not reach it either
        began = anyio.current_time()
        await it.until(lambda: it.story.of(RouterHung))
        assert HANG_AFTER_S <= anyio.current_time() - began <= HANG_AFTER_S + 20.0
        await it.until(lambda: len(it.story.of(ModelLoaded)) == 2)
        assert anyio.current_time() - began < HANG_AFTER_S + 40.0
        assert [event.cause.value for event in it.story.of(RouterRestartScheduled)] == ["hung"]
        assert it.story.of(RouterRestartScheduled)[0].delay_s == 0.0
        assert len(it.story.of(RouterHung)) == 1
        assert (it.spawns, it.router.restarts) == (2, 1)


async def test_a_router_that_says_it_is_well_and_answers_nothing_else_is_hung(host: FakeHost) -> None:
    """A router that has locked itself up answers /health: once something else was asked in vain it is asked more."""
    async with supervised(host) as it:
        await up(it)
        it.process.is_locked = True
        await anyio.sleep(600.0)
        assert it.spawns == 1  # nobody wants anything of it
        waiter = Waiter()
        async with anyio.create_task_group() as group:
            group.start_soon(waiter, it.router.load, "alpha")
            await it.until(lambda: it.spawns == 2, within_s=200.0)
        assert "no answer" in str(waiter.error)
        await it.reaches(RouterState.READY)
        assert await it.router.load("alpha")
        assert len(it.story.of(RouterHung)) == 1


async def test_a_router_that_works_is_left_alone_for_long(host: FakeHost) -> None:
    """H3: a router that is silent and busy is DEGRADED, and given up only when it has been so for ten minutes."""
    async with supervised(host) as it:
        await up(it)
        it.process.is_silent = it.process.is_working = True
        await anyio.sleep(ROUTER_MAX_S - 60.0)
        assert (it.router.state, it.spawns) == (RouterState.DEGRADED, 1)
        it.process.is_silent = False
        await it.reaches(RouterState.READY)
        it.process.is_silent = True
        await it.until(lambda: it.spawns == 2)
        assert it.story.of(RouterHung)[0].silent_s >= ROUTER_MAX_S


async def test_a_router_that_is_continued_in_time_goes_on(host: FakeHost) -> None:
    """H1: a minute of silence is borne, whoever caused it."""
    async with supervised(host) as it:
        await up(it, "alpha")
        for _ in range(5):
            it.process.is_silent = True
            await anyio.sleep(HANG_AFTER_S - 10.0)
            it.process.is_silent = False
            await anyio.sleep(30.0)
        assert (it.spawns, it.story.of(RouterHung)) == (1, [])
        assert it.story.of(RouterDegraded)


async def test_a_router_that_hangs_again_and_again_is_restarted_ever_more_seldom(host: FakeHost) -> None:
    """Healing cannot thrash: one that is of no use after its start counts as one that did not come up."""
    async with supervised(host) as it:
        await it.comes_up()
        for _ in range(9):
            it.process.is_silent = True
            spawns = it.spawns
            await it.until(lambda: it.spawns > spawns)  # noqa: B023
            await it.reaches(RouterState.READY)
        delays = [event.delay_s for event in it.story.of(RouterRestartScheduled)]
        assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


# --- models -----------------------------------------------------------------------------------------------------------


async def test_a_model_that_hangs_is_ended_alone(host: FakeHost) -> None:
    """H2: its router ends it, and it is loaded again; the other model and the router notice nothing."""
    async with supervised(host) as it:
        await up(it, "alpha", "beta")
        pid = it.process.children["beta"].pid
        it.process.children["alpha"].is_hung = True
        began = anyio.current_time()
        await it.until(lambda: it.story.of(ModelHung))
        assert HANG_AFTER_S <= anyio.current_time() - began <= HANG_AFTER_S + LATE_S
        await it.until(lambda: len(it.story.of(ModelLoaded)) == 3)
        assert [event.reason for event in it.story.of(ModelUnloaded)] == [UnloadReason.UNRESPONSIVE]
        assert (it.process.unloads, it.spawns, it.process.children["beta"].pid) == (["alpha"], 1, pid)
        await anyio.sleep(600.0)
        assert len(it.story.of(ModelHung)) == 1


async def test_a_model_that_works_is_left_alone_for_long(host: FakeHost) -> None:
    """H3: a prompt that takes minutes, between which nothing is said, is not killed; half an hour of silence is."""
    async with supervised(host) as it:
        await up(it, "alpha")
        it.process.children["alpha"].is_hung = it.process.children["alpha"].is_working = True
        await anyio.sleep(MODEL_MAX_S - 60.0)
        assert it.story.of(ModelHung) == []
        it.process.children["alpha"].is_hung = False
        await anyio.sleep(60.0)
        it.process.children["alpha"].is_hung = True
        await it.until(lambda: it.story.of(ModelHung))
        assert it.story.of(ModelHung)[0].silent_s >= MODEL_MAX_S


async def test_a_sleeping_model_is_never_woken_by_suspicion(host: FakeHost) -> None:
    """A sleeping model is not tried; but one that does not answer after its health hangs like any other."""
    async with supervised(host) as it:
        await up(it, "alpha")
        child = it.process.children["alpha"]
        it.process._tell("alpha", ModelState.SLEEPING)
        await it.settle()
        it.router.tell(Suspected("alpha"))
        await anyio.sleep(600.0)
        assert (it.story.of(ModelHung), child.trials) == ([], 0)
        child.is_hung = True
        await it.until(lambda: it.story.of(ModelHung), within_s=HANG_AFTER_S + LATE_S)
        assert child.trials == 0


async def test_a_sleeping_model_that_takes_no_connections(host: FakeHost) -> None:
    """Somebody has sent it SIGTERM: whoever finds that out has it ended."""
    async with supervised(host) as it:
        await up(it, "alpha")
        it.process._tell("alpha", ModelState.SLEEPING)
        await it.settle()
        it.router.tell(Suspected("alpha", it.process.children["alpha"].port))
        await it.until(lambda: it.story.of(ModelUnloaded), within_s=5.0)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)


async def test_a_load_has_a_deadline_of_its_own(host: FakeHost) -> None:
    """A model that loads for long is not asked; one that stands still is ended, by its pid if need be."""
    host.models["beta"] = FakeModel(load_s=900.0, progress=tuple(each / 100 for each in range(100)))
    host.models["alpha"] = FakeModel(load_s=math.inf, progress=())
    async with supervised(host) as it:
        await up(it, "beta")
        assert it.model("beta") is ModelState.LOADED
        it.process.obeys_unloads = False
        async with anyio.create_task_group() as group:
            group.start_soon(Waiter(), it.router.load, "alpha")
            await it.until(lambda: "alpha" in it.process.children)
            child = it.process.children["alpha"]
            await it.until(child.ended.is_set, within_s=LOAD_DEADLINE_S + KILL_AFTER_S + 5.0)
        assert it.story.of(ModelHung) == []


async def test_a_model_that_is_silent_because_it_computes_is_not_tried_to_death(host: FakeHost) -> None:
    """H3: suspicion of errors does not count while it says nothing: a trial would wait behind a long prompt."""
    async with supervised(host) as it:
        await up(it, "alpha")
        child = it.process.children["alpha"]
        child.is_hung = child.is_working = True
        for _ in range(600):
            it.router.tell(Suspected("alpha"))
            await anyio.sleep(1.0)
        assert it.story.of(ModelHung) == []


async def test_a_restart_by_a_person_forgets_that_it_hung(host: FakeHost) -> None:
    """A fresh process is not ended for what the last one was."""
    async with supervised(host) as it:
        await up(it)
        it.process.is_silent = True
        it.process.script.term_s = 1.0
        await it.until(lambda: it.story.of(RouterHung))
        it.router.restart()
        await it.until(lambda: it.spawns == 2)
        await it.reaches(RouterState.READY)
        await anyio.sleep(600.0)
        assert it.spawns == 2


async def test_a_router_that_answers_again_stays_closed_for_other_reasons(host: FakeHost) -> None:
    """A llama-server that was replaced loads nothing, whatever else happens to it meanwhile."""
    async with supervised(host) as it:
        await up(it, "alpha")
        it.process.busy.add("alpha")
        host.build += 1
        await it.until(lambda: it.router.is_closed)
        it.process.is_silent = it.process.is_working = True
        await anyio.sleep(120.0)
        it.process.is_silent = False
        await anyio.sleep(60.0)
        with pytest.raises(LlamavisorError):
            await it.router.load("beta")
        assert it.spawns == 1


async def test_who_lacks_descriptors_takes_nobody_for_hung(host: FakeHost) -> None:
    """R2: what cannot be asked, and cannot be looked at, is not judged."""
    async with supervised(host) as it:
        await up(it, "alpha")
        it.process.is_silent = it.process.is_unseen = True
        child = it.process.children["alpha"]
        child.is_hung = child.is_unseen = True
        await anyio.sleep(1800.0)
        assert (it.story.of(ModelHung), it.story.of(RouterHung), it.spawns) == ([], [], 1)


async def test_a_router_that_does_not_end_a_hung_model(host: FakeHost) -> None:
    """H2: what its router does not end is killed by its pid."""
    async with supervised(host) as it:
        await up(it, "alpha", "beta")
        it.process.obeys_unloads = False
        child = it.process.children["alpha"]
        child.is_hung = True
        await it.until(lambda: it.story.of(ModelHung))
        found = anyio.current_time()
        await it.until(lambda: it.model("alpha") is not ModelState.UNLOADING and child.ended.is_set())
        assert anyio.current_time() - found == pytest.approx(KILL_AFTER_S, abs=2.0)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)
        assert (it.spawns, it.model("beta")) == (1, ModelState.LOADED)


async def test_a_router_whose_hung_model_nobody_can_end(host: FakeHost) -> None:
    """H2: the router is restarted only if nothing else helps, and when nobody else is being answered."""
    async with supervised(host) as it:
        await up(it, "alpha", "beta")
        it.process.obeys_unloads = False
        it.process.busy.add("beta")
        it.process.children["alpha"].is_hung = it.process.children["alpha"].is_unkillable = True
        await it.until(lambda: it.story.of(ModelHung))
        await anyio.sleep(RESTART_AFTER_S + 60.0)
        assert (it.router.state, it.spawns) == (RouterState.DEGRADED, 1)
        it.process.busy.clear()
        await it.until(lambda: it.spawns == 2, within_s=30.0)
        await it.until(lambda: it.model("beta") is ModelState.LOADED)


# --- with leases ------------------------------------------------------------------------------------------------------


async def test_who_waits_for_a_hung_model_is_served_by_its_next_process(tmp_path: Path) -> None:
    """H2: leases on a hung model do not keep it; the next demand has it loaded anew. A second hang is told apart."""
    it = GatewayStage(tmp_path, models(["alpha", "beta"]))
    async with it.running():
        await it.served("alpha", "beta")
        await anyio.sleep(30.0)
        stuck = it.client("alpha")
        await it.until(lambda: stuck.has_it)
        it.hosts["main"].process.children["alpha"].is_hung = True
        await it.until(lambda: it.story.of(ModelUnloaded))
        again = it.client("alpha")
        await it.until(lambda: again.is_answered)
        assert again.has_it
        assert again.port != stuck.port
        stuck.leave()
        again.leave()
        assert it.story.of(ModelQuarantined) == []
        await anyio.sleep(30.0)
        it.hosts["main"].process.children["alpha"].is_hung = True
        await it.until(lambda: len(it.story.of(ModelUnloaded)) == 2)
        refused = it.client("alpha")
        await it.until(lambda: refused.is_answered)
        assert "has hung 2 times" in str(refused.error)
        assert it.loaded() == {"beta"}
        await anyio.sleep(31.0)
        await it.served("alpha")  # it is tried again
        assert len(it.story.of(RouterReady)) == 1


async def test_a_hung_router_lets_its_models_answer_for_a_while(tmp_path: Path) -> None:
    """H1: models answer without their router: who is being answered has half a minute more."""
    it = GatewayStage(tmp_path, models(["alpha"]))
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(30.0)
        answered = it.client("alpha")
        await it.until(lambda: answered.has_it)
        it.hosts["main"].process.is_silent = True
        await it.until(lambda: it.story.of(RouterHung))
        await anyio.sleep(25.0)
        assert it.story.of(RouterExited) == []
        answered.leave()
        await it.until(lambda: it.story.of(RouterExited), within_s=3.0)
        await it.until(lambda: it.loaded() == {"alpha"})
        answered = it.client("alpha")
        await it.until(lambda: answered.has_it)
        it.hosts["main"].process.is_silent = True
        await it.until(lambda: len(it.story.of(RouterHung)) == 2)
        began = anyio.current_time()
        await it.until(lambda: len(it.story.of(RouterExited)) == 2)
        assert 29.0 <= anyio.current_time() - began <= 45.0
        answered.leave()


async def test_a_model_that_answers_nothing_but_errors(tmp_path: Path) -> None:
    """On suspicion it is asked for one token, at most once a minute; one that cannot even do that is ended."""
    it = GatewayStage(tmp_path, models(["alpha", "beta"]))
    async with it.running():
        await it.served("alpha", "beta")
        await anyio.sleep(30.0)
        child = it.hosts["main"].process.children["alpha"]

        async def fails(times: int) -> None:
            for _ in range(times):
                endpoint = await it.fleet.leases.acquire("alpha")
                it.fleet.leases.release(endpoint, has_failed=True)

        await fails(2)
        await it.served("alpha")
        await fails(2)
        await anyio.sleep(120.0)
        assert child.trials == 0  # not three in a row
        await fails(3)
        await anyio.sleep(600.0)
        assert child.trials == 1  # it works, whatever its clients have asked
        await it.served("alpha")
        await anyio.sleep(120.0)
        trials = child.trials
        child.error = "CUDA error"
        await fails(3)
        await it.until(lambda: it.story.of(ModelHung))
        assert "CUDA error" in it.story.of(ModelHung)[0].reason
        assert child.trials == trials + 2
        await it.until(lambda: it.story.of(ModelUnloaded))
        await it.until(lambda: it.loaded() == {"alpha", "beta"})
        assert [event.reason for event in it.story.of(ModelUnloaded)] == [UnloadReason.UNRESPONSIVE]


async def test_a_model_with_work_that_does_not_get_on(tmp_path: Path) -> None:
    """A model that answers, has requests for a minute and does nothing is tried; if it works it is left alone."""
    it = GatewayStage(tmp_path, models(["alpha"]))
    async with it.running():
        await it.served("alpha")
        process = it.hosts["main"].process
        process.busy.add("alpha")
        await anyio.sleep(HANG_AFTER_S / 2)
        assert process.children["alpha"].trials == 0
        await anyio.sleep(HANG_AFTER_S)
        assert process.children["alpha"].trials == 1
        assert it.story.of(ModelHung) == []
        process.children["alpha"].error = "no answer within 30 s"
        await it.until(lambda: it.story.of(ModelHung), within_s=180.0)


async def test_a_list_that_is_older_than_what_was_told_hides_nobody(host: FakeHost) -> None:
    """A list is read right after a process has ended: its next one may be loaded while the answer is on its way."""
    async with supervised(host) as it:
        await up(it, "alpha")
        host.models["alpha"].load_s = AFTERMATH_S + 1.5 * ANSWER_S  # of the answer, whose way takes twice as long
        it.process.crash("alpha", exit_code=0)
        it.process.load_for_client("alpha")
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)
        it.process.children["alpha"].is_hung = True
        await it.until(lambda: it.story.of(ModelHung), within_s=HANG_AFTER_S + LATE_S)
