"""What a router is to serve and what it has been told: new files, changed ones, gone ones, on virtual time."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.host import FakeHost
from fakes.machine import FakeModel, FakeStart, fake_models
from fakes.supervised import Supervised, supervised
from llamavisor.errors import ApiError, ModelNotFoundError, RouterNotReadyError
from llamavisor.events import ModelAdded, ModelRemoved, ModelStale, ModelUnloaded, ModelWithheld, UnloadReason, Warned
from llamavisor.settings import RouterSettings
from llamavisor.states import Change, ModelState, RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

REFUSAL = (500, "alias 'x' for model 'y' conflicts with existing model name")


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A host with three models."""
    host = FakeHost(RouterSettings(name="main", models_dir=tmp_path, models_max=0), folder=tmp_path)
    host.models = fake_models(("alpha", "beta", "gamma"), load_s=0.1)
    return host


async def up_with(it: Supervised, *loaded: str) -> None:
    """Have the router up, and these models loaded."""
    await it.comes_up()
    for name in loaded:
        await it.router.load(name)


def names(it: Supervised) -> list[str]:
    """What the router lists."""
    return [model.name for model in it.router.table]


async def test_a_new_file_is_served_and_nothing_else_is_touched(host: FakeHost) -> None:
    """A model that appears is told to the router by a reload; a model that is loaded goes on, in the same process."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        child = it.process.children["alpha"]
        host.models["delta"] = FakeModel(load_s=0.1)
        host.look()
        await it.until(lambda: "delta" in names(it))
        assert await it.router.load("delta")
        assert not child.ended.is_set()
        assert (it.process.reloads, it.spawns) == (1, 1)
        assert [event.model for event in it.story.of(ModelAdded)][-1] == "delta"


async def test_what_did_not_change_is_not_told_again(host: FakeHost) -> None:
    """A look that finds everything as it was costs the router nothing."""
    async with supervised(host) as it:
        await up_with(it)
        for _ in range(5):
            host.look()
            await it.settle()
        assert it.process.reloads == 0


async def test_how_long_a_model_stays_is_not_told_to_the_router(host: FakeHost) -> None:
    """Another time to live, or a pin, is wanted from then on and leaves nothing to be told, loaded or not."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        it.router.want({name: replace(spec, ttl_s=5.0, is_pinned=True) for name, spec in host.specs().items()})
        await it.settle()
        shelf = it.router.shelf
        assert {(spec.ttl_s, spec.is_pinned) for spec in shelf.wanted.values()} == {(5.0, True)}
        assert not any(shelf.is_pending(name) for name in shelf.wanted)
        await anyio.sleep(60)
        assert (it.process.reloads, it.process.unloads) == (0, [])
        assert it.story.of(ModelStale) == []


async def test_a_file_that_has_gone_is_dropped_unless_it_is_loaded(host: FakeHost) -> None:
    """A model without its file leaves the list; one that is loaded serves on until it is unloaded, and leaves then."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        del host.models["alpha"], host.models["beta"]
        host.look()
        await it.until(lambda: "beta" not in names(it))
        await anyio.sleep(100)
        assert it.model("alpha") is ModelState.LOADED
        assert it.story.of(ModelStale)[-1].change is Change.GONE
        host.models["delta"] = FakeModel()
        host.look()
        await it.until(lambda: "delta" in names(it))
        assert it.model("alpha") is ModelState.LOADED
        await it.router.unload("alpha")
        await it.until(lambda: "alpha" not in names(it))
        await it.settle()
        assert [event.model for event in it.story.of(ModelRemoved)] == ["beta", "alpha"]
        with pytest.raises(ModelNotFoundError):
            await it.router.load("alpha")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"inode": 2}, Change.REPLACED),
        ({"content": 2}, Change.OVERWRITTEN),
        ({"options": ("[model.alpha]",)}, Change.OPTIONS),
    ],
    ids=["replaced", "overwritten", "options"],
)
async def test_a_stale_model_is_loaded_anew_when_it_is_idle(
    host: FakeHost, change: dict[str, object], expected: Change
) -> None:
    """A loaded model that has changed finishes its answers, and is then unloaded, told anew and loaded again."""
    async with supervised(host) as it:
        await up_with(it, "alpha", "beta")
        other = it.process.children["beta"]
        it.process.busy.add("alpha")
        await anyio.sleep(2)
        for key, value in change.items():
            setattr(host.models["alpha"], key, value)
        host.look()
        await anyio.sleep(60)
        assert it.process.unloads == []
        assert [event.change for event in it.story.of(ModelStale)] == [expected]
        it.process.busy.clear()
        await it.until(lambda: not list(it.router.shelf.stale(it.router.table)), within_s=10)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED, within_s=10)
        assert it.process.unloads == ["alpha"]
        assert it.process.loads == ["alpha", "beta", "alpha"]
        assert not other.ended.is_set()
        assert it.story.of(ModelUnloaded)[-1].reason is UnloadReason.REFRESHED
        assert it.router.shelf.offer.models["alpha"].spec == host.specs()["alpha"]


@pytest.mark.parametrize(("policy", "loads"), [("unload", ["alpha"]), ("keep", ["alpha"])])
async def test_the_policy_for_an_overwritten_file(host: FakeHost, policy: str, loads: list[str]) -> None:
    """A model that is overwritten in place is only unloaded, or left alone, if the configuration says so."""
    async with supervised(host) as it:
        host.deliver = lambda specs: it.router.want(specs, on_overwrite=policy)  # type: ignore[arg-type]
        await up_with(it, "alpha")
        host.models["alpha"].content = 2
        host.look()
        await anyio.sleep(60)
        assert it.process.loads == loads
        assert it.model("alpha") is (ModelState.LOADED if policy == "keep" else ModelState.UNLOADED)


async def test_a_model_that_has_just_begun_to_answer_is_not_unloaded(host: FakeHost) -> None:
    """What is known of a model may be a second old: right before the unload it is asked once more."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        await anyio.sleep(10.5)
        it.process.busy.add("alpha")
        host.models["alpha"].inode = 2
        host.look()
        await anyio.sleep(60)
        assert it.process.unloads == []
        assert it.model("alpha") is ModelState.LOADED
        it.process.busy.clear()
        await it.until(lambda: it.process.loads == ["alpha", "alpha"], within_s=10)


async def test_a_model_that_answers_short_requests_is_not_unloaded_between_two(host: FakeHost) -> None:
    """A model that answers nobody at this moment, but has worked since it was last asked, is in use."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        await anyio.sleep(10.5)
        it.process.work["alpha"] = 5.0  # since the last look, half a second ago
        host.models["alpha"].inode = 2
        host.look()
        await anyio.sleep(1)
        assert it.process.unloads == []
        await it.until(lambda: it.process.loads == ["alpha", "alpha"], within_s=30)


async def test_a_stale_model_that_could_not_come_back_is_left_alone(host: FakeHost) -> None:
    """A model whose table names a file that has gone meanwhile is not unloaded for a change: it would be withheld."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        host.withholds["alpha"] = "chat_template /t.jinja is not there"
        host.models["alpha"].inode = 2
        host.look()
        await anyio.sleep(600)
        assert it.process.unloads == []
        assert it.model("alpha") is ModelState.LOADED
        del host.withholds["alpha"]
        await it.until(lambda: it.process.loads == ["alpha", "alpha"], within_s=30)


async def test_a_name_that_a_running_model_holds_is_told_as_soon_as_that_leaves(host: FakeHost) -> None:
    """What waits for the name or the alias of a model that runs is told as soon as that runs no more."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        host.waits_for = frozenset({"alpha"})
        host.models["delta"] = FakeModel()
        host.look()
        await it.until(lambda: "delta" in names(it))
        reloads = it.process.reloads
        await anyio.sleep(5)
        assert it.process.reloads == reloads
        host.waits_for = frozenset()
        host.models["foo"] = FakeModel()
        await it.router.unload("alpha")
        await it.until(lambda: not it.router.shelf.offer.waits_for, within_s=5)


async def test_a_model_that_says_nothing_any_more_is_not_idle(host: FakeHost) -> None:
    """A model that was idle and has stopped telling is not taken to be idle still."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        await anyio.sleep(10)
        it.process.children["alpha"].port = 1  # nobody answers where it is asked
        it.process.children["alpha"].is_working = True
        await anyio.sleep(3)
        host.models["alpha"].inode = 2
        host.look()
        await anyio.sleep(60)
        assert it.process.unloads == []


async def test_an_unload_by_a_person_does_not_wait_for_idleness(host: FakeHost) -> None:
    """While a stale model is asked whether it is idle, a person's word still counts."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        it.process.busy.add("alpha")
        host.models["alpha"].inode = 2
        host.look()
        assert await it.router.unload("alpha")
        assert it.model("alpha") is ModelState.UNLOADED


async def test_a_model_that_runs_is_never_withheld(host: FakeHost) -> None:
    """A file that a table names vanishes: its model, which runs and has not changed, is left alone by every reload."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        host.withholds["alpha"] = "chat_template /t.jinja is not there"
        host.models["delta"] = FakeModel()
        host.look()
        await it.until(lambda: "delta" in names(it))
        assert it.model("alpha") is ModelState.LOADED
        await it.router.unload("alpha")


async def test_what_a_client_has_loaded_meanwhile_is_kept(host: FakeHost) -> None:
    """A model that a client has loaded while a reload is being written is left out of it after all."""
    async with supervised(host) as it:
        await up_with(it)
        host.models["alpha"].options = ("[model.alpha]",)
        host.while_writing = lambda: it.process.load_for_client("alpha")
        host.look()
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)
        await it.until(lambda: it.process.loads == ["alpha"], within_s=30)  # it was idle, and is loaded anew
        assert not it.process.failed


async def test_a_refresh_pushes_nobody_out(tmp_path: Path) -> None:
    """A model that was unloaded for its options is not loaded again when a client has filled its place meanwhile."""
    host = FakeHost(RouterSettings(name="main", models_dir=tmp_path, models_max=1), folder=tmp_path)
    host.models = fake_models(("alpha", "beta"), load_s=0.1)
    async with supervised(host) as it:
        await up_with(it, "alpha")
        await anyio.sleep(5)
        host.models["alpha"].options = ("[model.alpha]",)
        host.while_writing = lambda: it.process.load_for_client("beta")
        host.look()
        await it.until(lambda: it.process.unloads == ["alpha"])
        await anyio.sleep(60)
        assert it.model("beta") is ModelState.LOADED
        assert it.process.loads == ["alpha"]


async def test_a_model_that_is_not_for_this_router_any_more(host: FakeHost) -> None:
    """A model whose table moves it to another router is unloaded when it is idle, and told as that."""
    async with supervised(host) as it:
        await up_with(it, "alpha", "beta")
        it.process.busy.add("alpha")
        rest = {name: spec for name, spec in host.specs().items() if name != "alpha"}
        host.deliver = lambda _: it.router.want(rest, {"alpha": Change.MOVED})
        host.look()
        await anyio.sleep(60)
        assert it.process.unloads == []
        assert "not for this router" in it.story.of(ModelStale)[-1].message()
        it.process.busy.clear()
        await it.until(lambda: "alpha" not in names(it))
        assert it.model("beta") is ModelState.LOADED


@pytest.mark.parametrize(("policy", "unloads"), [("reload", []), ("unload", ["alpha"]), ("keep", [])])
async def test_a_file_that_is_no_longer_fit(host: FakeHost, policy: str, unloads: list[str]) -> None:
    """A file that is overwritten with junk: the model is unloaded if that is wanted, and never loaded from it."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        rest = {name: spec for name, spec in host.specs().items() if name != "alpha"}
        host.deliver = lambda _: it.router.want(rest, {"alpha": Change.OVERWRITTEN}, on_overwrite=policy)  # type: ignore[arg-type]
        host.look()
        await anyio.sleep(60)
        assert (it.process.unloads, it.process.loads) == (unloads, ["alpha"])
        assert "overwritten in place" in it.story.of(ModelStale)[-1].message()


async def test_load_on_start_after_a_start_that_failed(host: FakeHost) -> None:
    """What is to be loaded on start is loaded when the router comes up at last."""
    host.models["alpha"].load_on_start = True
    host.starts.extend([FakeStart(ready_at=math.inf, ends_at=0.1)] * 2)
    async with supervised(host) as it:
        it.router.start()
        await it.reaches(RouterState.READY)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)


async def test_a_model_of_which_nothing_is_known_is_not_idle(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model does not say whether it is busy, it is not unloaded for a change."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        it.process.children["alpha"].port = 1  # nobody answers there
        await it.router.unload("alpha")
        monkeypatch.setattr("llamavisor.generation.USAGE_INTERVAL_S", 1e9)
        await it.router.load("alpha")
        host.models["alpha"].inode = 2
        host.look()
        await anyio.sleep(600)
        assert it.process.unloads == ["alpha"]


async def test_a_refused_reload_is_healed(host: FakeHost) -> None:
    """D3: after a refused reload the last good state is read again; it is tried once more when something changes."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        good = host.written
        host.reload_refusals.append(REFUSAL)
        host.models["delta"] = FakeModel()
        host.look()
        await it.until(lambda: it.process.reloads == 2)
        await it.settle()
        assert host.written is good
        assert "delta" not in names(it)
        assert it.router.state is RouterState.READY
        assert any("conflicts" in event.text for event in it.story.of(Warned))
        assert it.process.reloads == 2
        host.models["epsilon"] = FakeModel()
        host.look()
        await it.until(lambda: {"delta", "epsilon"} <= set(names(it)))


async def test_a_refused_reload_is_tried_again_after_a_while(host: FakeHost) -> None:
    """What was refused once is not forgotten."""
    async with supervised(host) as it:
        await up_with(it)
        host.reload_refusals.append(REFUSAL)
        host.models["delta"] = FakeModel()
        host.look()
        await it.until(lambda: "delta" in names(it), within_s=65)


async def test_a_router_that_cannot_be_healed_is_restarted_when_nobody_is_answered(host: FakeHost) -> None:
    """A router that refuses even its last good state loads nothing more, and is restarted when it answers nobody."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        it.process.busy.add("alpha")
        host.reload_refusals = deque([REFUSAL, (500, "still reloading")])
        host.models["delta"] = FakeModel(load_s=0.1)
        host.look()
        await it.reaches(RouterState.DEGRADED)
        await anyio.sleep(100)
        assert it.spawns == 1
        with pytest.raises(RouterNotReadyError, match="it refused a reload"):
            await it.router.load("beta")
        it.process.busy.clear()
        await it.until(lambda: it.spawns == 2, within_s=10)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)
        assert await it.router.load("delta")


async def test_a_build_that_reads_nothing_again_is_restarted(host: FakeHost) -> None:
    """Where a reload changes nothing, the router is restarted when nobody is being answered."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        it.process.is_deaf = True
        host.models["delta"] = FakeModel()
        host.look()
        await it.until(lambda: it.spawns == 2, within_s=20)
        await it.until(lambda: it.router.is_serving and it.model("alpha") is ModelState.LOADED)
        assert "delta" in names(it)


async def test_files_that_cannot_be_written_leave_the_router_alone(host: FakeHost) -> None:
    """R1: with a full disk the router goes on with what it knows, told once there is room; it warns once an hour."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        host.offer_error = OSError("No space left on device")
        host.models["delta"] = FakeModel()
        host.look()
        await anyio.sleep(200)
        assert it.process.reloads == 0
        assert it.model("alpha") is ModelState.LOADED
        assert len(it.story.of(Warned)) == 1
        await anyio.sleep(3600)
        assert len(it.story.of(Warned)) == 2
        host.offer_error = None
        await it.until(lambda: "delta" in names(it), within_s=40)


async def test_a_withheld_model_is_looked_at_again(host: FakeHost) -> None:
    """A model that is withheld for a file that is missing is served once the file has come."""
    host.withholds["beta"] = "mmproj /models/eyes.gguf is not there"
    async with supervised(host) as it:
        await up_with(it)
        assert names(it) == ["alpha", "gamma"]
        await anyio.sleep(100)
        assert [event.model for event in it.story.of(ModelWithheld)] == ["beta"]
        assert it.process.reloads == 0, "the router opens every file in a reload, for nothing"
        del host.withholds["beta"]
        await it.until(lambda: "beta" in names(it), within_s=40)


async def test_a_rescan_is_made_although_nothing_changed(host: FakeHost) -> None:
    """Who asks for a reload gets one; it stops nothing."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        await it.router.rescan()
        assert it.process.reloads == 1
        host.reload_refusals.append(REFUSAL)
        with pytest.raises(ApiError, match="conflicts"):
            await it.router.rescan()


async def test_load_on_start(host: FakeHost) -> None:
    """What is to be loaded on start is loaded on every fresh start, as far as there is room, and not after a crash."""
    for name in ("beta", "gamma"):
        host.models[name].load_on_start = True
    async with supervised(host) as it:
        await up_with(it)
        await it.until(lambda: it.model("beta") is it.model("gamma") is ModelState.LOADED)
        await it.router.unload("gamma")
        await anyio.sleep(60)
        it.router.restart()
        await it.until(lambda: it.spawns == 2 and it.model("beta") is ModelState.LOADED)
        assert it.process.loads == ["beta"]
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        it.router.start()
        await it.until(lambda: it.router.is_serving and it.model("gamma") is ModelState.LOADED)
        assert it.process.loads == ["beta", "gamma"]


async def test_load_on_start_beyond_the_cap(tmp_path: Path) -> None:
    """No more is loaded on start than models_max allows, and a warning names what is left out."""
    host = FakeHost(RouterSettings(name="main", models_dir=tmp_path, models_max=1), folder=tmp_path)
    host.models = fake_models(("alpha", "beta"), load_s=0.1, load_on_start=True)
    async with supervised(host) as it:
        await up_with(it)
        await it.until(lambda: it.model("alpha") is ModelState.LOADED)
        await anyio.sleep(10)
        assert it.process.loads == ["alpha"]
        assert any("beta left out" in event.text for event in it.story.of(Warned))


async def test_a_crash_of_a_model_whose_file_was_cut_off(host: FakeHost) -> None:
    """F4: a model that crashes after its file was cut off is told as that, and is not loaded again by itself."""
    async with supervised(host) as it:
        await up_with(it, "alpha")
        await anyio.sleep(60)
        del host.models["alpha"]  # not fit to be served any more
        it.process.crash("alpha")
        await it.until(lambda: it.story.of(ModelUnloaded))
        assert it.story.of(ModelUnloaded)[-1].reason is UnloadReason.FILE_CHANGED
        await anyio.sleep(10)
        assert it.process.loads == ["alpha"]
        assert "alpha" not in names(it)


async def test_a_router_that_loses_sight_of_a_model(host: FakeHost) -> None:
    """F15: while a router calls a dead process loaded, it gets nothing that needs a stop; idle it is restarted."""
    async with supervised(host) as it:
        await up_with(it, "alpha", "beta")
        it.process.busy.add("beta")
        await anyio.sleep(20)
        it.process.lose_sight_of("alpha")
        await it.reaches(RouterState.DEGRADED, within_s=5)
        assert "alpha has ended" in (it.router.reason or "")
        host.models["delta"] = FakeModel(load_s=0.1)
        host.look()
        with pytest.raises(RouterNotReadyError):
            await it.router.load("gamma")
        with pytest.raises(RouterNotReadyError):
            await it.router.unload("alpha")
        await anyio.sleep(100)
        assert (it.process.reloads, it.process.unloads, it.spawns) == (0, [], 1)
        it.process.busy.clear()
        await it.until(lambda: it.spawns == 2, within_s=10)
        await it.until(lambda: it.router.is_serving and it.model("alpha") is it.model("beta") is ModelState.LOADED)
        assert "delta" in names(it)
