"""Loading and unloading the models of one supervised router, on virtual time."""

from __future__ import annotations

import math
from pathlib import Path

import anyio
import pytest

from fakes.host import FakeHost
from fakes.machine import FakeModel, FakeStart
from fakes.supervised import Waiter, supervised
from llamavisor.errors import (
    ApiError,
    ModelLoadError,
    ModelNotFoundError,
    ModelsMaxError,
)
from llamavisor.events import (
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelProgress,
    ModelUnloaded,
    UnloadReason,
    Warned,
)
from llamavisor.healing import LOAD_DEADLINE_S
from llamavisor.states import ModelState, RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

HOUR_S = 3600.0
FOREVER = FakeModel(load_s=math.inf, progress=())


# --- loading ----------------------------------------------------------------------------------------------------------


async def test_a_load_is_done_when_the_router_says_so(host: FakeHost) -> None:
    """A load returns when the model is loaded, not when the call that asked for it returns."""
    async with supervised(host) as it:
        await it.comes_up()
        began = anyio.current_time()
        assert await it.router.load("alpha")
        assert anyio.current_time() - began == pytest.approx(1.0, abs=0.01)
        model = it.router.table.get("alpha")
        assert model is not None
        assert (model.state, model.n_ctx) == (ModelState.LOADED, 4096)
        assert [loading.is_requested for loading in it.story.of(ModelLoading)] == [True]
        assert [progress.progress for progress in it.story.of(ModelProgress)] == [0.0, 1.0]
        assert [loaded.load_s for loaded in it.story.of(ModelLoaded)] == [pytest.approx(1.0, abs=0.01)]


async def test_the_child_of_a_model_is_known(host: FakeHost) -> None:
    """While a model has a process its pid and port are known, and no longer."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        model = it.router.table.get("alpha")
        assert model is not None
        assert model.pid == it.process.children["alpha"].pid
        assert model.port == it.process.children["alpha"].port
        await it.router.unload("alpha")
        assert (model.pid, model.port) == (None, None)


async def test_loading_what_is_loaded_does_nothing(host: FakeHost) -> None:
    """A second load answers that nothing had to be done, and asks the router for nothing."""
    async with supervised(host) as it:
        await it.comes_up()
        assert await it.router.load("alpha")
        assert not await it.router.load("alpha")
        assert it.process.loads == ["alpha"]


async def test_two_loads_of_a_model_share_one_call(host: FakeHost) -> None:
    """Everybody who asks for a model that is being loaded waits for the same load."""
    waiters = [Waiter() for _ in range(5)]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        for waiter in waiters:
            group.start_soon(waiter, it.router.load, "alpha")
            await anyio.sleep(0.15)
        await it.until(lambda: all(waiter.is_done for waiter in waiters))
        assert it.process.loads == ["alpha"]
        assert waiters[0].answer
        assert it.model("alpha") is ModelState.LOADED


async def test_loads_of_two_models_do_not_overlap_in_the_call(host: FakeHost) -> None:
    """Loads run side by side; the calls that ask for them come one after the other."""
    host.models |= {name: FakeModel(answer_s=0.5, load_s=10.0) for name in ("alpha", "beta")}
    waiters = [Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        began = anyio.current_time()
        group.start_soon(waiters[0], it.router.load, "alpha")
        group.start_soon(waiters[1], it.router.load, "beta")
        await it.until(lambda: all(waiter.is_done for waiter in waiters))
        took = sorted((waiter.done_at or 0.0) - began for waiter in waiters)
        assert took == pytest.approx([10.5, 11.0], abs=0.05)


async def test_a_load_waits_for_a_router_that_starts(host: FakeHost) -> None:
    """A load asked for during STARTING, or even BACKOFF, is done as soon as the router is up."""
    host.starts.append(FakeStart(ready_at=math.inf, ends_at=0.2))
    async with supervised(host) as it:
        it.router.start()
        assert await it.router.load("beta")
        assert it.spawns == 2
        assert it.model("beta") is ModelState.LOADED


async def test_a_load_of_an_unknown_model(host: FakeHost) -> None:
    """A model that the router does not list is refused at once, with the name and a hint."""
    async with supervised(host) as it:
        await it.comes_up()
        with pytest.raises(ModelNotFoundError, match="no model 'delta' on router main") as refused:
            await it.router.load("delta")
        assert "llamavisor models" in refused.value.hint
        with pytest.raises(ModelNotFoundError):
            await it.router.unload("delta")
        assert it.process.loads == it.process.unloads == []


async def test_unknown_models_asked_for_before_the_list_is_known(host: FakeHost) -> None:
    """Loads that waited for the router are all refused, or begun, as soon as it is up."""
    waiters = {name: Waiter() for name in ("delta", "epsilon", "alpha", "zeta")}
    async with supervised(host) as it, anyio.create_task_group() as group:
        it.router.start()
        await anyio.sleep(0.01)
        for name, waiter in waiters.items():
            group.start_soon(waiter, it.router.load, name)
        await it.reaches(RouterState.READY)
        await anyio.sleep(0.01)
        unknown = [waiters[name].error for name in ("delta", "epsilon", "zeta")]
        assert [type(error) for error in unknown] == [ModelNotFoundError] * 3
        assert it.model("alpha") is ModelState.LOADING
        await it.until(lambda: waiters["alpha"].is_done)


async def test_a_load_that_a_client_has_begun_is_joined(host: FakeHost) -> None:
    """A load of a model that is loading because of a client's request waits for it and calls nothing."""
    async with supervised(host) as it:
        await it.comes_up()
        it.process.load_for_client("alpha")
        await it.until(lambda: it.model("alpha") is ModelState.LOADING)
        assert not await it.router.load("alpha")
        assert it.process.loads == []
        assert [loading.is_requested for loading in it.story.of(ModelLoading)] == [False]


async def test_a_client_may_be_faster_than_a_queued_load(host: FakeHost) -> None:
    """A model that a client has loaded while our load of it waited in the queue is loaded, and stays so."""
    host.models["alpha"].answer_s = 5.0
    waiters = [Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiters[0], it.router.load, "alpha")
        await it.settle()
        group.start_soon(waiters[1], it.router.load, "beta")
        await it.settle()
        it.process.load_for_client("beta")
        await it.until(lambda: waiters[1].is_done)
        assert anyio.current_time() < 4.0
        await it.until(lambda: waiters[0].is_done)
        await anyio.sleep(HOUR_S)
        assert it.model("beta") is ModelState.LOADED
        assert it.process.loads == ["alpha"]
        assert it.process.unloads == []


async def test_a_client_may_be_faster_than_our_call(host: FakeHost) -> None:
    """The answer "model is already running" is no failure: the load is joined."""
    host.models["alpha"].answer_s = 0.5
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiter, it.router.load, "alpha")
        await it.settle()
        it.process.load_for_client("alpha")
        await it.until(lambda: waiter.is_done)
        assert waiter.error is None
        assert it.model("alpha") is ModelState.LOADED


async def test_a_waiter_that_leaves_does_not_cancel_the_load(host: FakeHost) -> None:
    """C11: the load goes on when the one who waits for it is cancelled."""
    async with supervised(host) as it:
        await it.comes_up()
        with anyio.move_on_after(0.1) as scope:
            await it.router.load("alpha")
        assert scope.cancelled_caught
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)


# --- loads that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_events", [True, False])
async def test_a_failed_load_says_why(host: FakeHost, has_events: bool) -> None:
    """The reason of a failed load is the first error that its process printed."""
    host.has_events = has_events
    prints = ("llama_model_load: error loading model: tensor is not within the file bounds", "exiting")
    host.models["alpha"] = FakeModel(load_s=0.5, exit_code=1, prints=prints)
    async with supervised(host) as it:
        await it.comes_up()
        with pytest.raises(ModelLoadError, match=r"^model alpha: .*not within the file bounds$"):
            await it.router.load("alpha")
        model = it.router.table.get("alpha")
        assert model is not None
        assert (model.state, model.error) == (ModelState.FAILED, prints[0])
        assert [failed.reason for failed in it.story.of(ModelLoadFailed)] == [prints[0]]
        host.models["alpha"].exit_code = 0
        assert await it.router.load("alpha")
        assert model.error is None


async def test_a_client_s_failed_load_says_why(host: FakeHost) -> None:
    """So does a load that a client's request began, though we hear of it later than the log."""
    host.models["alpha"] = FakeModel(load_s=0.5, exit_code=1, prints=("bad magic",))
    async with supervised(host) as it:
        await it.comes_up()
        it.process.print(*["a line of another time"] * 100)
        it.process.load_for_client("alpha")
        await it.until(lambda: it.model("alpha") is ModelState.FAILED)
        assert [failed.reason for failed in it.story.of(ModelLoadFailed)] == ["bad magic"]
        assert it.process.loads == []


async def test_a_failed_load_without_a_word(host: FakeHost) -> None:
    """A load whose process printed nothing of use still has a reason."""
    host.models["alpha"] = FakeModel(load_s=0.5, exit_code=1)
    async with supervised(host) as it:
        await it.comes_up()
        with pytest.raises(ModelLoadError, match="its process ended while it was loading"):
            await it.router.load("alpha")


async def test_an_old_reason_is_not_taken_for_a_new_one(host: FakeHost) -> None:
    """What an earlier load printed does not explain a later one."""
    host.models["alpha"] = FakeModel(load_s=0.5, exit_code=1, prints=("out of memory",))
    async with supervised(host) as it:
        await it.comes_up()
        with pytest.raises(ModelLoadError, match="out of memory"):
            await it.router.load("alpha")
        host.models["alpha"].prints = ()
        with pytest.raises(ModelLoadError, match="its process ended"):
            await it.router.load("alpha")


async def test_the_model_limit(host: FakeHost) -> None:
    """A load that the router refuses because no other model can leave is told from other failures."""
    host.models["alpha"].refusal = (500, "model limit reached, try again later")
    async with supervised(host) as it:
        await it.comes_up()
        with pytest.raises(ModelsMaxError, match="4 models are loaded and none of them can leave") as refused:
            await it.router.load("alpha")
        assert "models_max" in refused.value.hint
        host.models["alpha"].refusal = None
        assert await it.router.load("alpha")


async def test_a_load_that_the_router_refuses(host: FakeHost) -> None:
    """D4: any other refusal is a failed load with the router's own words."""
    host.models["alpha"].refusal = (500, "failed to spawn server instance")
    async with supervised(host) as it:
        await it.comes_up()
        with pytest.raises(ModelLoadError, match="failed to spawn server instance"):
            await it.router.load("alpha")
        assert it.model("alpha") is ModelState.FAILED
        assert len(it.story.of(ModelLoadFailed)) == 1


async def test_a_call_that_fails_after_its_model_was_loaded(host: FakeHost) -> None:
    """A load whose call breaks down although the model was loaded has succeeded."""
    host.models["alpha"].answer_s = 5.0
    host.models["alpha"].refusal = (500, "Failed to read connection")
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiter, it.router.load, "alpha")
        await it.settle()
        it.process.load_for_client("alpha")
        await it.until(lambda: waiter.is_done)
        assert waiter.error is None
        assert it.model("alpha") is ModelState.LOADED


async def test_a_call_that_fails_after_its_model_has(host: FakeHost) -> None:
    """When the model's own reason is known before the call breaks down, that is what people are told."""
    host.models["alpha"] = FakeModel(
        load_s=0.5, exit_code=1, prints=("bad magic",), answer_s=5.0, refusal=(500, "Failed to read connection")
    )
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiter, it.router.load, "alpha")
        await it.settle()
        it.process.load_for_client("alpha")
        await it.until(lambda: waiter.is_done)
        assert str(waiter.error) == "model alpha: bad magic"
        assert len(it.story.of(ModelLoadFailed)) == 1


async def test_a_load_without_progress_is_cancelled(host: FakeHost) -> None:
    """A load that makes no progress for its deadline is unloaded, and said once."""
    host.models["alpha"] = FOREVER
    async with supervised(host) as it:
        await it.comes_up()
        began = anyio.current_time()
        with pytest.raises(ModelLoadError):
            await it.router.load("alpha")
        assert anyio.current_time() - began == pytest.approx(LOAD_DEADLINE_S, abs=2.5)
        assert it.process.unloads == ["alpha"]
        assert [warned.subject for warned in it.story.of(Warned)] == ["model alpha"]
        assert it.model("alpha") is ModelState.UNLOADED
        host.models["alpha"] = it.process.listed["alpha"] = FakeModel()
        assert await it.router.load("alpha")


async def test_a_cancelled_load_is_said_once_while_another_call_is_under_way(host: FakeHost) -> None:
    """The warning is not repeated while the unload has to wait for its turn."""
    host.models["alpha"] = FOREVER
    host.models["beta"].answer_s = 30.0
    waiters = [Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiters[0], it.router.load, "alpha")
        await anyio.sleep(LOAD_DEADLINE_S - 10.0)
        group.start_soon(waiters[1], it.router.load, "beta")
        await it.until(lambda: all(waiter.is_done for waiter in waiters))
        assert len(it.story.of(Warned)) == 1
        assert it.model("beta") is ModelState.LOADED


async def test_a_slow_load_with_progress_is_left_alone(host: FakeHost) -> None:
    """A load may take ten minutes, as long as it goes on."""
    host.models["alpha"] = FakeModel(load_s=600.0, progress=tuple(at / 20 for at in range(20)))
    async with supervised(host) as it:
        await it.comes_up()
        assert await it.router.load("alpha")
        assert it.process.unloads == []


async def test_a_big_file_has_more_time(host: FakeHost, tmp_path: Path) -> None:
    """The deadline of a load grows by a second for every 100 MB of its file."""
    path = tmp_path / "big.gguf"
    with path.open("wb") as file:
        file.truncate(10_000_000_000)  # a hole: it needs no room
    host.models["alpha"] = FakeModel(load_s=150.0, progress=(), path=path)
    async with supervised(host) as it:
        await it.comes_up()
        assert await it.router.load("alpha")


# --- unloading --------------------------------------------------------------------------------------------------------


async def test_an_unload_is_done_when_the_model_has_gone(host: FakeHost) -> None:
    """An unload returns when the model's process has ended, and its reason is that somebody asked."""
    host.models["alpha"].unload_s = 3.0
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        child, began = it.process.children["alpha"], anyio.current_time()
        assert await it.router.unload("alpha")
        assert anyio.current_time() - began == pytest.approx(3.0, abs=0.05)
        assert child.ended.is_set()
        assert [unloaded.reason for unloaded in it.story.of(ModelUnloaded)] == [UnloadReason.REQUESTED]
        assert it.model("alpha") is ModelState.UNLOADED


async def test_unloading_what_is_not_loaded_does_nothing(host: FakeHost) -> None:
    """An unload of an unloaded model answers that nothing had to be done."""
    async with supervised(host) as it:
        await it.comes_up()
        assert not await it.router.unload("alpha")
        assert it.process.unloads == []


async def test_an_unload_cancels_a_load(host: FakeHost) -> None:
    """A load that is under way ends with the unload: who waited for it is told, and the model did not fail."""
    host.models["alpha"] = FakeModel(load_s=100.0, progress=tuple(at / 1000 for at in range(1000)), unload_s=3.0)
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiter, it.router.load, "alpha")
        await anyio.sleep(10.0)
        assert await it.router.unload("alpha")
        await it.until(lambda: waiter.is_done)
        assert isinstance(waiter.error, ModelLoadError)
        assert "unloaded before it was loaded" in str(waiter.error)
        assert it.model("alpha") is ModelState.UNLOADED
        assert it.story.of(ModelLoadFailed) == []
        assert [unloaded.reason for unloaded in it.story.of(ModelUnloaded)] == [UnloadReason.REQUESTED]


async def test_an_unload_withdraws_a_load_that_has_not_begun(host: FakeHost) -> None:
    """A load that still waits for its turn is never begun."""
    host.models["alpha"].answer_s = 5.0
    waiters = [Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiters[0], it.router.load, "alpha")
        await it.settle()
        group.start_soon(waiters[1], it.router.load, "beta")
        await it.settle()
        assert not await it.router.unload("beta")
        await it.settle()
        assert isinstance(waiters[1].error, ModelLoadError)
        await it.until(lambda: waiters[0].is_done)
        assert it.process.loads == ["alpha"]


async def test_a_load_right_after_an_unload(host: FakeHost) -> None:
    """A load of a model that is leaving begins when it has gone, and does not hold up others."""
    host.models["alpha"].unload_s = 3.0
    waiters = [Waiter(), Waiter(), Waiter()]
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        await it.router.load("alpha")
        group.start_soon(waiters[0], it.router.unload, "alpha")
        await it.settle()
        group.start_soon(waiters[1], it.router.load, "alpha")
        group.start_soon(waiters[2], it.router.load, "beta")
        await it.until(lambda: waiters[2].is_done, within_s=2.0)
        assert it.model("alpha") is ModelState.UNLOADING
        await it.until(lambda: waiters[1].is_done)
        assert (waiters[0].answer, waiters[1].answer) == (True, True)
        assert it.model("alpha") is ModelState.LOADED


async def test_an_unload_that_the_router_refuses(host: FakeHost) -> None:
    """A refused unload is reported, and the model is what it was."""
    host.models["alpha"].unload_refusal = (500, "something went wrong")
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        with pytest.raises(ApiError, match="something went wrong"):
            await it.router.unload("alpha")
        assert it.model("alpha") is ModelState.LOADED


async def test_a_refused_cancellation_leaves_the_load_alone(host: FakeHost) -> None:
    """A model whose load could not be cancelled is still loading, not loaded."""
    host.models["alpha"] = FakeModel(load_s=20.0, progress=(), unload_refusal=(500, "something went wrong"))
    waiter = Waiter()
    async with supervised(host) as it, anyio.create_task_group() as group:
        await it.comes_up()
        group.start_soon(waiter, it.router.load, "alpha")
        await anyio.sleep(5.0)
        with pytest.raises(ApiError):
            await it.router.unload("alpha")
        assert it.model("alpha") is ModelState.LOADING
        assert not waiter.is_done
        await it.until(lambda: waiter.is_done)
        assert (waiter.answer, it.model("alpha")) == (True, ModelState.LOADED)


async def test_the_router_makes_room(host: FakeHost) -> None:
    """A model that the router unloads by its own choice is gone, did not fail, and is not loaded again."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await anyio.sleep(60.0)
        it.process.evict("alpha")
        await anyio.sleep(HOUR_S)
        assert it.model("alpha") is ModelState.UNLOADED
        assert [unloaded.reason for unloaded in it.story.of(ModelUnloaded)] == [UnloadReason.EVICTED]
        assert it.process.loads == ["alpha"]


async def test_a_busy_model_that_its_router_kills_did_not_crash(host: FakeHost) -> None:
    """A model that its router unloads and has to kill ends with an error code, and is not loaded again for that."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        await anyio.sleep(60.0)
        it.process.print("0.06.639.072 I srv  force-killing model instance name=alpha after timeout")
        it.process.crash("alpha")
        await anyio.sleep(HOUR_S)
        assert [unloaded.reason for unloaded in it.story.of(ModelUnloaded)] == [UnloadReason.EVICTED]
        assert it.model("alpha") is ModelState.UNLOADED
        assert it.process.loads == ["alpha"]
