"""From a folder to what its routers serve: entries, rules and routers, on virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.gauge import fake_meter
from fakes.host import FakeHost
from fakes.machine import FakeMachine
from fakes.supervised import PATIENCE_S, Story
from fakes.watch import FakeWatch
from llamavisor.budgets import Allowance
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.cause import Cause
from llamavisor.downloads import Downloads
from llamavisor.errors import ModelNotFoundError
from llamavisor.events import Bus, EntryChanged, FolderBack, FolderStale, ModelAdded, ModelStale
from llamavisor.fleet import Fleet
from llamavisor.folder import Folder
from llamavisor.hub import Hub
from llamavisor.launch import ModelSource
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.settings import FleetSettings, MemoryBudget, RouterSettings
from llamavisor.states import Change, RouterState
from llamavisor.supply import Supply

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]


def entry(name: str, state: EntryState = EntryState.READY, *, content: int = 1, reason: str = "") -> Entry:
    """A model of one file."""
    file = ModelFile(f"/models/{name}.gguf", FileId(1, hash(name), 1000, content))
    return Entry(name=name, state=state, reason=reason, files=(file,))


class Stage:
    """A fleet of fake routers over fake folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = FakeMachine()
        self.watches: dict[Path, FakeWatch] = {}
        self.hosts: dict[str, FakeHost] = {}
        self.bus = Bus()
        self.story = Story(self.bus)
        self.fleet = Fleet(
            make_host=self._make_host,
            make_watch=self._make_watch,
            meter=fake_meter(self.bus, folder),
            downloads=Downloads(Hub({}), self.bus),
            bus=self.bus,
            jitter=lambda: 0.0,
        )

    def __repr__(self) -> str:
        return f"<Stage {self.fleet!r}>"

    def _make_watch(self, path: Path, _: Sequence[Path]) -> FakeWatch:
        return self.watches.setdefault(path, FakeWatch(path))

    def _make_host(self, settings: RouterSettings, source: ModelSource) -> FakeHost:
        host = FakeHost(settings, folder=self.folder, machine=self.machine)
        host.source = source
        self.hosts[settings.name] = host
        return host

    def settings(self, *routers: tuple[str, int, str], rules: Sequence[ModelRule] = ()) -> FleetSettings:
        """Routers as (name, port, folder)."""
        return FleetSettings(
            routers=tuple(
                RouterSettings(name=name, port=port, models_dir=self.folder / folder) for name, port, folder in routers
            ),
            rules=tuple(rules),
        )

    def watch(self, folder: str) -> FakeWatch:
        """The watch over that folder; before the fleet runs it may be filled already."""
        return self._make_watch(self.folder / folder, ())

    def models(self, router: str) -> list[str]:
        """What a router lists."""
        return [model.name for model in self.fleet[router].table]

    @asynccontextmanager
    async def running(self, settings: FleetSettings) -> AsyncIterator[None]:
        """Have the fleet run."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.fleet.run, settings)
            await anyio.sleep(1e-6)
            yield
            group.cancel_scope.cancel()
        assert self.machine.left == []

    async def until(self, router: str, condition: object) -> None:
        """Wait until it holds."""
        with anyio.fail_after(PATIENCE_S):
            await self.fleet[router].wait_until(condition)  # type: ignore[arg-type]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """An empty stage."""
    return Stage(tmp_path)


def rule(pattern: str, **settings: object) -> ModelRule:
    """A table of a configuration."""
    return ModelRule(pattern, f'[model."{pattern}"]', ModelSettings.model_validate(settings))


async def test_only_what_is_ready_is_served(stage: Stage) -> None:
    """A router is told of whole files only; what settles, is incomplete or invalid is told to people instead."""
    stage.watch("a").entries = {
        each.name: each
        for each in (
            entry("whole"),
            entry("half", EntryState.SETTLING, reason="it is being written"),
            entry("part", EntryState.INCOMPLETE, reason="part 2 of 3 is missing"),
            entry("junk", EntryState.INVALID, reason="not a GGUF file"),
        )
    }
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        assert stage.models("main") == ["whole"]
        assert {event.model for event in stage.story.of(EntryChanged)} == {"half", "part", "junk"}
        with pytest.raises(ModelNotFoundError, match="model part is incomplete: part 2 of 3 is missing"):
            stage.fleet.holder_of("part")
        stage.watch("a").put(entry("half"))
        await stage.until("main", lambda: "half" in stage.models("main"))
        assert await stage.fleet["main"].load("half")


async def test_routers_of_one_folder_and_of_two(stage: Stage) -> None:
    """Routers with one folder share its watch; each folder is looked at for itself."""
    stage.watch("a").entries = {"alpha": entry("alpha")}
    stage.watch("b").entries = {"beta": entry("beta")}
    async with stage.running(stage.settings(("one", 8081, "a"), ("two", 8082, "a"), ("three", 8083, "b"))):
        for name in ("one", "two", "three"):
            await stage.until(name, lambda name=name: stage.fleet[name].is_serving)
        assert [stage.models(name) for name in ("one", "two", "three")] == [["alpha"], ["alpha"], ["beta"]]
        assert [folder.path.name for folder in stage.fleet.folders] == ["a", "b"]


async def test_which_routers_may_hold_a_model(stage: Stage) -> None:
    """`router` in a model's table keeps it from the others, and a change of it moves the model."""
    stage.watch("a").entries = {name: entry(name) for name in ("alpha", "beta")}
    routers = ("one", 8081, "a"), ("two", 8082, "a")
    async with stage.running(stage.settings(*routers, rules=[rule("al*", router=("two",))])):
        for name in ("one", "two"):
            await stage.until(name, lambda name=name: stage.fleet[name].is_serving)
        assert [stage.models(name) for name in ("one", "two")] == [["beta"], ["alpha", "beta"]]
        applied = await stage.fleet.apply(stage.settings(*routers, rules=[rule("al*", router=("one",))]))
        assert (applied.routers, applied.models) == ((), ("alpha",))
        await stage.until("one", lambda: "alpha" in stage.models("one"))
        await stage.until("two", lambda: "alpha" not in stage.models("two"))
        assert len(stage.machine.processes) == 2


async def test_a_table_touches_only_its_own_model(stage: Stage) -> None:
    """A changed table reloads the one model that it is about, when that is idle; no router is restarted."""
    stage.watch("a").entries = {name: entry(name) for name in ("alpha", "beta")}
    router = ("main", 8081, "a")
    async with stage.running(stage.settings(router)):
        await stage.until("main", lambda: stage.fleet.is_ready)
        for name in ("alpha", "beta"):
            await stage.fleet["main"].load(name)
        (process,) = stage.machine.alive
        other = process.children["beta"]
        applied = await stage.fleet.apply(stage.settings(router, rules=[rule("alpha", ctx_size=512)]))
        assert (applied.routers, applied.models) == ((), ("alpha",))
        await stage.until("main", lambda: process.loads == ["alpha", "beta", "alpha"])
        assert stage.machine.alive == [process]
        assert not other.ended.is_set()
        assert [event.model for event in stage.story.of(ModelStale)] == ["alpha"]


async def test_a_folder_that_is_missing(stage: Stage) -> None:
    """A folder that was never there stops the router with the reason; it comes up by itself once it is there."""
    watch = stage.watch("a")
    watch.is_hanging = True
    async with stage.running(stage.settings(("main", 8081, "a"))):
        watch.look(problem="does not exist")
        await stage.until("main", lambda: stage.fleet["main"].state is RouterState.FAILED)
        verdict = stage.fleet["main"].comeback.verdict
        assert verdict is not None
        assert verdict.cause is Cause.MODELS_DIR
        assert verdict.reason.endswith("a does not exist")
        watch.is_hanging = False
        watch.put(entry("alpha"))
        await stage.until("main", lambda: stage.fleet.is_ready)


async def test_a_folder_that_does_not_answer(stage: Stage) -> None:
    """F14: a folder that hangs from the beginning stops its router alone; others serve, and ending takes no time."""
    stage.watch("a").is_hanging = True
    stage.watch("b").entries = {"beta": entry("beta")}
    async with stage.running(stage.settings(("dead", 8081, "a"), ("main", 8082, "b"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.until("dead", lambda: stage.fleet["dead"].state is RouterState.FAILED)
        assert "does not answer" in (stage.fleet["dead"].reason or "")


async def test_a_folder_that_hangs_is_waited_for_once(stage: Stage) -> None:
    """F14: the end of a model waits a moment for a look at its file, and not again until that has come back."""
    stage.watch("a").entries = {"alpha": entry("alpha")}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        stage.watch("a").is_hanging = True
        source = stage.hosts["main"].source
        assert source is not None
        waits = []
        for _ in range(3):
            began = anyio.current_time()
            await source.look_again()
            waits.append(anyio.current_time() - began)
        assert waits[0] == pytest.approx(1.0, abs=0.1)
        assert waits[1:] == [0.0, 0.0]
        stage.watch("a").is_hanging = False
        stage.watch("a").look()
        began = anyio.current_time()
        await source.look_again()
        assert anyio.current_time() - began < 0.5


async def test_a_folder_that_vanishes_later(stage: Stage) -> None:
    """F7: what is known of a folder stays when it cannot be looked at, through a restart of the router too."""
    stage.watch("a").entries = {"alpha": entry("alpha")}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        stage.watch("a").look(problem="cannot be read: Stale file handle")
        assert stage.fleet.folders[0].catalog.stale
        stage.fleet["main"].restart()
        await stage.until("main", lambda: len(stage.machine.processes) == 2 and stage.fleet.is_ready)
        await stage.until("main", lambda: stage.fleet["main"].table.residents() == ["alpha"])
        stage.watch("a").look()
        assert not stage.fleet.folders[0].catalog.stale
        assert len(stage.story.of(FolderStale)) == len(stage.story.of(FolderBack)) == 1


async def test_a_new_worker_that_sees_nothing_is_not_believed_at_once(stage: Stage) -> None:
    """F7: a worker that was started anew over an empty mount does not make everything vanish with one look."""
    watch = stage.watch("a")
    watch.entries = {"alpha": entry("alpha")}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        watch._told, watch.entries = None, {}
        watch.look()
        await anyio.sleep(1)
        assert stage.models("main") == ["alpha"]
        watch.look()
        await stage.until("main", lambda: stage.models("main") == [])


async def test_a_new_worker_that_sees_the_same(stage: Stage) -> None:
    """A worker that is started anew tells everything again; what is the same is not told to a router again."""
    watch = stage.watch("a")
    watch.entries = {name: entry(name) for name in ("alpha", "beta")}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        watch._told = None
        del watch.entries["beta"]
        watch.look()
        await stage.until("main", lambda: stage.models("main") == ["alpha"])
        assert stage.machine.alive[0].reloads == 1


async def test_a_model_that_has_gone_is_remembered_while_it_is_loaded(stage: Stage) -> None:
    """F6: the catalog shows a loaded model without its file as gone, and forgets it once it is unloaded."""
    watch = stage.watch("a")
    watch.entries = {name: entry(name) for name in ("alpha", "beta")}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        watch.remove("alpha")
        await anyio.sleep(10)
        catalog = stage.fleet.folders[0].catalog
        assert catalog.entries["alpha"].state is EntryState.GONE
        assert stage.fleet["main"].table.residents() == ["alpha"]
        await stage.fleet["main"].unload("alpha")
        await stage.until("main", lambda: "alpha" not in stage.models("main"))
        watch.put(entry("gamma"))
        await anyio.sleep(1)
        assert "alpha" not in catalog.entries


async def test_how_long_a_new_model_took(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time from a file's last change to its model's being servable is told for files that came while we ran."""
    now = 1_000_000.0
    monkeypatch.setattr("llamavisor.announcer.time.time", lambda: now)
    stage.watch("a").entries = {"old": replace(entry("old"), changed_at=now - 60)}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        now += 100
        stage.watch("a").put(replace(entry("new"), changed_at=now - 2.5))
        await stage.until("main", lambda: "new" in stage.models("main"))
        await anyio.sleep(1)
        assert {event.model: event.wait_s for event in stage.story.of(ModelAdded)} == {"old": None, "new": 2.5}


async def test_thousands_of_models_at_once(stage: Stage) -> None:
    """However many models are told at once, each is served; the router reads them in one reload."""
    async with stage.running(stage.settings(("main", 8081, "a"))):
        stage.watch("a").look()
        await stage.until("main", lambda: stage.fleet.is_ready)
        stage.watch("a").put(*(entry(f"model{at}") for at in range(2000)))
        await stage.until("main", lambda: len(stage.models("main")) == 2000)
        assert stage.machine.alive[0].reloads == 1


async def test_a_table_of_all_models_restarts_no_router(stage: Stage) -> None:
    """An edit of [defaults] is told to each model when it is idle; who is being answered notices nothing."""
    stage.watch("a").entries = {name: entry(name) for name in ("alpha", "beta")}
    before = stage.settings(("main", 8081, "a"))
    layer = OptionLayer("[defaults]", ModelOptions(ctx_size=512))
    after = replace(before, routers=(replace(before.routers[0], layers=(layer,)),))
    async with stage.running(before):
        await stage.until("main", lambda: stage.fleet.is_ready)
        for name in ("alpha", "beta"):
            await stage.fleet["main"].load(name)
        (process,) = stage.machine.alive
        process.busy.add("alpha")
        await anyio.sleep(3)
        applied = await stage.fleet.apply(after)
        assert (applied.routers, applied.models) == ((), ("alpha", "beta"))
        await stage.until("main", lambda: process.loads == ["alpha", "beta", "beta"])
        await anyio.sleep(100)
        assert stage.machine.alive == [process]
        assert process.unloads == ["beta"]
        process.busy.clear()
        await stage.until("main", lambda: process.loads[-1] == "alpha" and len(process.loads) == 4)
        assert stage.fleet["main"].settings.layers == (layer,)


async def test_how_long_a_model_stays_is_known_at_once_and_loads_nothing(stage: Stage) -> None:
    """An edit of ttl or pin reaches the router's shelf, for loaded models too, and no model is loaded anew for it."""
    stage.watch("a").entries = {name: entry(name) for name in ("alpha", "beta")}
    router = ("main", 8081, "a")
    async with stage.running(stage.settings(router)):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        (process,) = stage.machine.alive
        shelf = stage.fleet["main"].shelf
        steps: list[tuple[dict[str, object], float | None, bool]] = [
            ({"ttl": 60}, 60.0, False),
            ({"ttl": 60, "pin": True}, 60.0, True),
            ({"ttl": "2m", "pin": True}, 120.0, True),
            ({"ttl": 0}, None, False),
        ]
        for said, ttl_s, is_pinned in steps:
            settings = stage.settings(router, rules=[rule("alpha", **said)])
            applied = await stage.fleet.apply(settings)
            assert (applied.routers, applied.models) == ((), ("alpha",))
            await anyio.sleep(1)
            assert (shelf.wanted["alpha"].ttl_s, shelf.wanted["alpha"].is_pinned) == (ttl_s, is_pinned)
            assert (await stage.fleet.apply(settings)).models == ()
        await anyio.sleep(100)
        assert stage.story.of(ModelStale) == []
        assert (process.loads, process.unloads, process.reloads) == (["alpha"], [], 0)
        assert stage.machine.alive == [process]


async def test_how_long_all_models_stay_loads_nothing(stage: Stage) -> None:
    """A ttl in [defaults] is another table of the router: its process and its models go on as they are."""
    stage.watch("a").entries = {name: entry(name) for name in ("alpha", "beta")}
    before = stage.settings(("main", 8081, "a"))
    layer = OptionLayer("[defaults]", ModelOptions(ttl=600))
    after = replace(before, routers=(replace(before.routers[0], layers=(layer,)),))
    async with stage.running(before):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        (process,) = stage.machine.alive
        shelf = stage.fleet["main"].shelf
        applied = await stage.fleet.apply(after)
        assert (applied.routers, applied.models) == ((), ("alpha", "beta"))
        await stage.until("main", lambda: {spec.ttl_s for spec in shelf.wanted.values()} == {600.0})
        stage.watch("a").put(replace(entry("beta"), changed_at=5.0))
        await anyio.sleep(100)
        assert shelf.wanted["beta"].ttl_s == 600.0
        assert stage.story.of(ModelStale) == []
        assert (process.loads, process.unloads, process.reloads) == (["alpha"], [], 0)


async def test_a_budget_restarts_no_router(stage: Stage) -> None:
    """What models may take of memory is for us to know; who loads them is on the router's command line."""
    stage.watch("a").entries = {"alpha": entry("alpha")}
    before = stage.settings(("main", 8081, "a"))
    (router,) = before.routers
    budget = MemoryBudget(devices=(("CUDA0", 22 << 30),))
    async with stage.running(before):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        (process,) = stage.machine.alive
        applied = await stage.fleet.apply(replace(before, routers=(replace(router, memory=budget),)))
        assert (applied.routers, applied.models) == ((), ())
        await stage.until("main", lambda: stage.fleet["main"].settings.memory == budget)
        await anyio.sleep(100)
        assert stage.machine.alive == [process]
        assert process.loads == ["alpha"]
        other = replace(router, memory=budget, autoload=False)
        assert (await stage.fleet.apply(replace(before, routers=(other,)))).routers == ("main",)
        await stage.until("main", lambda: len(stage.machine.processes) == 2 and stage.fleet.is_ready)


async def test_another_allowance_is_news_of_every_model(tmp_path: Path) -> None:
    """What budgets come to is told of all models at once, and the same again is no news."""
    watch, told = FakeWatch(tmp_path), []
    watch.entries = {name: entry(name) for name in ("alpha", "beta")}
    folder = Folder(tmp_path, (), watch=watch, held=set, bus=Bus())
    small, large = Allowance(1, (), 4), Allowance(2, (), 4)
    supply = Supply(folder, "main", (), allowance=small, deliver=lambda specs, _: told.append(specs))
    folder.listeners.append(supply)
    async with anyio.create_task_group() as group:
        group.start_soon(folder.run)
        await folder.answered.wait()
        assert {spec.allowance for spec in told[-1].values()} == {small}
        assert await supply.follow((), (), small) == ()
        assert len(told) == 1
        assert await supply.follow((), (), large) == ("alpha", "beta")
        watch.put(entry("gamma"))
        assert {name: spec.allowance for name, spec in told[-1].items()} == dict.fromkeys(
            ("alpha", "beta", "gamma"), large
        )
        group.cancel_scope.cancel()


async def test_what_a_routers_own_process_is_told_needs_a_restart(stage: Stage) -> None:
    """Options of the listener are on the command line: a change of them restarts the router, with its models."""
    stage.watch("a").entries = {"alpha": entry("alpha")}
    before = stage.settings(("main", 8081, "a"))
    layer = OptionLayer("[defaults]", ModelOptions(args=("--cors-origins", "*")))
    async with stage.running(before):
        await stage.until("main", lambda: stage.fleet.is_ready)
        applied = await stage.fleet.apply(replace(before, routers=(replace(before.routers[0], layers=(layer,)),)))
        assert applied.routers == ("main",)
        await stage.until("main", lambda: len(stage.machine.processes) == 2 and stage.fleet.is_ready)


async def test_a_new_watch_of_the_same_folder_takes_nothing_away(stage: Stage) -> None:
    """Other link_dirs mean another watch: until it has looked, everything stays as it was."""
    watch = stage.watch("a")
    watch.entries = {"alpha": entry("alpha")}
    before = stage.settings(("main", 8081, "a"))
    async with stage.running(before):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        watch.is_hanging = True
        stage.watches.clear()
        stage.watch("a").is_hanging = True
        await stage.fleet.apply(replace(before, link_dirs=(Path("/mnt"),)))
        await anyio.sleep(10)
        assert stage.models("main") == ["alpha"]
        assert stage.story.of(ModelStale) == []
        stage.watch("a").is_hanging = False
        stage.watch("a").put(entry("alpha"), entry("beta"))
        await stage.until("main", lambda: stage.models("main") == ["alpha", "beta"])
        assert stage.story.of(ModelStale) == []


@pytest.mark.parametrize(
    ("now", "change"),
    [
        (entry("alpha", EntryState.INVALID, content=2, reason="no GGUF"), Change.OVERWRITTEN),
        (entry("alpha", EntryState.INVALID, reason="part 2 is missing"), Change.GONE),
    ],
    ids=["overwritten", "otherwise unfit"],
)
async def test_why_a_loaded_model_is_not_served_any_more(stage: Stage, now: Entry, change: Change) -> None:
    """A file that was overwritten with junk is told from one that has gone."""
    stage.watch("a").entries = {"alpha": entry("alpha")}
    async with stage.running(stage.settings(("main", 8081, "a"))):
        await stage.until("main", lambda: stage.fleet.is_ready)
        await stage.fleet["main"].load("alpha")
        stage.watch("a").put(now)
        await anyio.sleep(5)
        assert [event.change for event in stage.story.of(ModelStale)] == [change]
