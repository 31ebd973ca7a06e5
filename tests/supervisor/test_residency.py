"""How the models of one supervised router are known: by events, by lists, after a rescan, on virtual time."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import anyio
import pytest

from fakes.host import FakeHost, FakeUsage
from fakes.machine import KILLED, FakeModel
from fakes.supervised import supervised
from llamavisor.errors import ModelLoadError
from llamavisor.events import ModelLoaded, ModelLoadFailed, ModelLoading, Warned
from llamavisor.states import ModelState, RouterState
from llamavisor.usage import Usage

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

HOUR_S = 3600.0


# --- what is heard ----------------------------------------------------------------------------------------------------


async def test_without_an_event_stream_the_list_is_read(host: FakeHost) -> None:
    """With a build that has no event stream, loads, clients' loads, evictions and sleep are seen all the same."""
    host.has_events = False
    async with supervised(host) as it:
        await it.comes_up()
        assert await it.router.load("alpha")
        assert it.model("alpha") is ModelState.LOADED
        it.process.load_for_client("beta")
        await it.until(lambda: it.model("beta") is ModelState.LOADED, within_s=3.0)
        it.process.evict("alpha")
        await it.until(lambda: it.model("alpha") is ModelState.UNLOADED, within_s=1.5)
        assert await it.router.unload("beta")
        it.process.states["gamma"] = ModelState.SLEEPING
        await it.until(lambda: it.model("gamma") is ModelState.SLEEPING, within_s=1.5)


async def test_what_happens_while_the_stream_is_cut_is_seen(host: FakeHost) -> None:
    """After a reconnect of the event stream the state is read anew."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.load("alpha")
        it.process.cut_streams()
        it.process.evict("alpha")
        it.process.load_for_client("beta")
        await it.until(lambda: it.model("alpha") is ModelState.UNLOADED, within_s=1.0)
        await it.until(lambda: it.model("beta") is ModelState.LOADED, within_s=3.0)
        assert len(it.process.listeners) == 1


async def test_what_is_not_understood_leads_to_the_list(host: FakeHost) -> None:
    """An event that this version does not understand is a hint to read the list."""
    async with supervised(host) as it:
        await it.comes_up()
        await it.settle()
        it.process.listed["delta"] = FakeModel()
        await it.settle()
        assert it.router.table.get("delta") is None
        it.process.say_something_new()
        await it.until(lambda: it.router.table.get("delta"), within_s=1.0)


@pytest.mark.parametrize("exit_code", [0, 1])
async def test_a_load_right_after_a_reload_is_told_once(host: FakeHost, exit_code: int) -> None:
    """The list that a reload leads to does not overtake the events of a load that follows at once."""
    host.models["delta"] = FakeModel(load_s=0.1, exit_code=exit_code)
    async with supervised(host) as it:
        await it.comes_up()
        await it.router.rescan()
        with suppress(ModelLoadError):
            await it.router.load("delta")
        state = it.model("delta")
        assert state is (ModelState.FAILED if exit_code else ModelState.LOADED)
        for _ in range(100):
            await anyio.sleep(0.01)
            assert it.model("delta") is state
        told = (ModelLoading, ModelLoaded, ModelLoadFailed)
        assert [type(event) for _, event in it.story.all if isinstance(event, told)] == [
            ModelLoading,
            ModelLoadFailed if exit_code else ModelLoaded,
        ]


async def test_a_build_without_a_stream_is_told_once(host: FakeHost) -> None:
    """That the list is read instead of the stream is a warning, once."""
    host.has_events = False
    async with supervised(host) as it:
        await it.comes_up()
        await anyio.sleep(HOUR_S)
        assert [warned.subject for warned in it.story.of(Warned)] == ["router main"]
        assert "its list is read every second" in it.story.of(Warned)[0].text


async def test_a_rescan_during_a_start_and_through_a_crash(host: FakeHost) -> None:
    """A rescan waits for a router that starts; one whose router dies is done, for the next reads everything anew."""
    async with supervised(host) as it:
        it.router.start()
        await anyio.sleep(0.01)
        await it.router.rescan()
        assert it.process.reloads == 1
        async with anyio.create_task_group() as group:
            group.start_soon(it.router.rescan)
            await anyio.sleep(0.0005)
            it.process.end(KILLED)
            await it.reaches(RouterState.BACKOFF)


async def test_all_models_are_asked_at_once(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy models are is read every second, of all of them at the same moment, whenever each was loaded."""
    asked: list[float] = []
    read = FakeUsage.read

    async def noted(self: FakeUsage) -> Usage:
        asked.append(anyio.current_time())
        return await read(self)

    monkeypatch.setattr(FakeUsage, "read", noted)
    async with supervised(host) as it:
        await it.comes_up()
        for name in ("alpha", "beta"):
            await it.router.load(name)
            await anyio.sleep(0.3)
        asked.clear()
        await anyio.sleep(3.0)
    moments = sorted({round(at, 3) for at in asked})
    assert len(asked) == 2 * len(moments)
    assert [round(after - before, 3) for before, after in pairwise(moments)] == [1.0, 1.0]
