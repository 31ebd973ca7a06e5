"""Several routers side by side, on virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.gauge import fake_meter
from fakes.host import FakeHost
from fakes.machine import KILLED, FakeMachine, FakeModel, FakeStart, fake_models
from fakes.supervised import PATIENCE_S, Story
from fakes.watch import FakeWatch
from llamavisor.cause import Cause, Verdict
from llamavisor.downloads import Downloads
from llamavisor.errors import ModelNotFoundError, RouterNotFoundError, RouterNotReadyError
from llamavisor.events import Bus, RouterExited, RouterProbed, RouterRecovered, RouterSpawned, StraysKilled, Warned
from llamavisor.fleet import Fleet
from llamavisor.hub import Hub
from llamavisor.launch import ModelSource
from llamavisor.opening import sweep
from llamavisor.process import Leftovers
from llamavisor.router import Router
from llamavisor.settings import FleetSettings, RouterSettings
from llamavisor.states import RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

HOUR_S = 3600.0
NO_BINARY = Verdict(Cause.BAD_BINARY, "no llama-server was found", is_obstacle=True)


class FakeFleet:
    """A fleet whose hosts are fakes; `hosts` are those in use, by name."""

    def __init__(self, folder: Path) -> None:
        self.machine = FakeMachine()
        self.hosts: dict[str, FakeHost] = {}
        self.prepare: Callable[[FakeHost], None] = lambda host: None
        self.bus = Bus()
        self.story = Story(self.bus)
        self.watches: list[FakeWatch] = []
        self.fleet = Fleet(
            make_host=self._make_host,
            make_watch=self._make_watch,
            meter=fake_meter(self.bus, folder),
            downloads=Downloads(Hub({}), self.bus),
            bus=self.bus,
            jitter=lambda: 0.0,
        )
        self._folder = folder

    def __repr__(self) -> str:
        return f"<FakeFleet {self.fleet!r}>"

    def settings(self, name: str, port: int, **how: object) -> RouterSettings:
        """Settings of one router."""
        return RouterSettings(name=name, port=port, models_dir=self._folder, **how)

    def _make_watch(self, path: Path, link_dirs: Sequence[Path]) -> FakeWatch:
        self.watches.append(FakeWatch(path, link_dirs=link_dirs))
        return self.watches[-1]

    def _make_host(self, settings: RouterSettings, _: ModelSource) -> FakeHost:
        host = FakeHost(settings, folder=self._folder, machine=self.machine)
        host.models = fake_models(["alpha", "beta"])
        host.deliver = lambda specs: self.fleet[settings.name].want(specs)  # noqa: PLW0108 (it does not exist yet)
        self.prepare(host)
        self.hosts[settings.name] = host
        return host

    def __getitem__(self, name: str) -> Router:
        """The router of that name."""
        return self.fleet[name]

    @property
    def tasks(self) -> int:
        """How many tasks the fleet has under it, one for each router and each folder, and one for memory."""
        return len(self.fleet._tasks._nursery.child_tasks)

    async def all_ready(self) -> None:
        """Wait until every router is READY."""
        for router in self.fleet:
            await self.reaches(router.name, RouterState.READY)

    async def reaches(self, name: str, state: RouterState) -> None:
        """Wait until a router is in this state."""
        with anyio.fail_after(PATIENCE_S):
            await self.fleet[name].wait_until(lambda: self.fleet[name].state is state)

    @asynccontextmanager
    async def running(self, *settings: RouterSettings) -> AsyncIterator[None]:
        """Supervise these; at the end nothing may be left."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.fleet.run, FleetSettings(routers=settings))
            await anyio.sleep(1e-6)  # until it waits for something: the routers are there, and on their way up
            yield
            group.cancel_scope.cancel()
        assert self.machine.left == []


@pytest.fixture
def it(tmp_path: Path) -> FakeFleet:
    """A fleet on fakes, not yet running."""
    return FakeFleet(tmp_path)


@pytest.fixture
def two(it: FakeFleet) -> tuple[RouterSettings, RouterSettings]:
    """Settings of two routers, gpu0 and gpu1."""
    return it.settings("gpu0", 8081), it.settings("gpu1", 8082)


Two = tuple[RouterSettings, RouterSettings]


def told(routers: Sequence[RouterSettings]) -> FleetSettings:
    """Settings of a fleet of these routers."""
    return FleetSettings(routers=tuple(routers))


# --- side by side -----------------------------------------------------------------------------------------------------


async def test_routers_run_side_by_side(it: FakeFleet, two: Two) -> None:
    """Every router of the configuration comes up, on its own port."""
    async with it.running(*two):
        await it.all_ready()
        assert [router.name for router in it.fleet] == ["gpu0", "gpu1"]
        assert sorted(process.host.settings.port for process in it.machine.alive) == [8081, 8082]


async def test_a_crash_of_one_leaves_the_other_alone(it: FakeFleet, two: Two) -> None:
    """One router's crash loop does not touch its neighbour, nor what is loaded there."""
    it.prepare = lambda host: setattr(host, "usual", FakeStart(ends_at=1.0 if host.settings.port == 8081 else 1e9))
    async with it.running(*two):
        await it.reaches("gpu1", RouterState.READY)
        await it["gpu1"].load("alpha")
        await anyio.sleep(HOUR_S)
        assert it["gpu0"].comeback.history.is_crash_loop
        assert it["gpu1"].state is RouterState.READY
        assert it["gpu1"].table.residents() == ["alpha"]
        assert it["gpu1"].starts == 1


async def test_the_fleet_is_ready_with_its_first_router(it: FakeFleet, two: Two) -> None:
    """The fleet is ready while at least one router serves."""
    it.prepare = lambda host: setattr(host, "obstacle", NO_BINARY if host.settings.port == 8081 else None)
    async with it.running(*two):
        assert not it.fleet.is_ready
        await it.reaches("gpu1", RouterState.READY)
        await it.reaches("gpu0", RouterState.FAILED)
        assert it.fleet.is_ready
        it["gpu1"].stop()
        await it.reaches("gpu1", RouterState.STOPPED)
        assert not it.fleet.is_ready


async def test_an_unknown_router(it: FakeFleet, two: Two) -> None:
    """A name that no router has is refused with the names that there are."""
    async with it.running(*two):
        with pytest.raises(RouterNotFoundError, match="no router 'gpu7'") as refused:
            _ = it.fleet["gpu7"]
        assert refused.value.hint == "the routers are: gpu0, gpu1"


async def test_shut_down_ends_all_side_by_side(it: FakeFleet, two: Two) -> None:
    """Two routers that take their time are stopped in the time of one, and a second shut_down hurries both."""
    it.prepare = lambda host: setattr(host, "usual", FakeStart(term_s=1e9))
    async with it.running(*two):
        await it.all_ready()
        began = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(it.fleet.shut_down)
            await anyio.sleep(2.0)
            await it.fleet.shut_down(grace_s=1.0)
        assert anyio.current_time() - began == pytest.approx(3.0, abs=0.2)
        assert it.machine.left == []


async def test_a_shut_down_right_after_the_start(it: FakeFleet, two: Two) -> None:
    """D6: a fleet that is told to end before its routers have even begun leaves nothing."""
    async with it.running(*two):
        await it.fleet.shut_down()
        assert it.machine.left == []
        await anyio.sleep(HOUR_S)
        assert it.machine.alive == []


# --- whom to ask for a model ------------------------------------------------------------------------------------------


async def test_a_model_is_asked_of_the_router_that_has_it(it: FakeFleet, two: Two) -> None:
    """The router on which a model is loaded, or loading, is its holder, however much it holds."""
    async with it.running(*two):
        await it.all_ready()
        await it["gpu1"].load("alpha")
        await it["gpu1"].load("beta")
        assert it.fleet.holder_of("alpha") is it["gpu1"]
        assert it.fleet.holder_of("alpha", router="gpu0") is it["gpu0"]


async def test_a_model_is_asked_of_the_emptiest_router(it: FakeFleet, two: Two) -> None:
    """A model that is loaded nowhere goes to the serving router with the fewest models."""
    async with it.running(*two):
        await it.all_ready()
        await it["gpu0"].load("alpha")
        assert it.fleet.holder_of("beta") is it["gpu1"]
        it["gpu1"].stop()
        await it.reaches("gpu1", RouterState.STOPPED)
        assert it.fleet.holder_of("beta") is it["gpu0"]


async def test_a_degraded_router_is_asked_last(it: FakeFleet, two: Two) -> None:
    """A router whose device is missing is not asked for a model that another can load."""
    it.prepare = lambda host: setattr(host, "invisible", ("CUDA0",) if host.settings.port == 8081 else ())
    async with it.running(*two):
        await it.reaches("gpu0", RouterState.DEGRADED)
        await it["gpu1"].load("alpha")
        assert it.fleet.holder_of("beta") is it["gpu1"]


async def test_models_of_different_folders(it: FakeFleet, two: Two) -> None:
    """A model that only one router lists is asked of that one; one that none lists is refused."""
    async with it.running(*two):
        await it.all_ready()
        it.hosts["gpu1"].models["delta"] = FakeModel()
        it.hosts["gpu1"].look()
        await it["gpu1"].wait_until(lambda: it["gpu1"].table.get("delta") is not None)
        assert it.fleet.holder_of("delta") is it["gpu1"]
        with pytest.raises(ModelNotFoundError, match="no model 'epsilon'"):
            it.fleet.holder_of("epsilon")
        with pytest.raises(RouterNotFoundError):
            it.fleet.holder_of("delta", router="gpu7")


async def test_a_model_asked_for_while_the_routers_start(it: FakeFleet, two: Two) -> None:
    """Before any list is known, a router that may come up is asked, and its answer waited for."""
    it.prepare = lambda host: setattr(host, "obstacle", NO_BINARY if host.settings.port == 8081 else None)
    async with it.running(*two):
        await it.reaches("gpu0", RouterState.FAILED)
        it["gpu1"].restart()
        await it.reaches("gpu1", RouterState.STARTING)
        assert await it.fleet.holder_of("alpha").load("alpha")
        assert it["gpu1"].table.residents() == ["alpha"]


async def test_the_only_router_says_why(it: FakeFleet) -> None:
    """With one router that is down, a load fails with the router's reason, not with an unknown model."""
    it.prepare = lambda host: setattr(host, "obstacle", NO_BINARY)
    async with it.running(it.settings("main", 8080)):
        await it.reaches("main", RouterState.FAILED)
        with pytest.raises(RouterNotReadyError, match="no llama-server was found"):
            await it.fleet.holder_of("alpha").load("alpha")


# --- a new configuration ----------------------------------------------------------------------------------------------


async def test_what_did_not_change_is_not_touched(it: FakeFleet, two: Two) -> None:
    """Decision 13: equal settings mean the same process with the same models; only the folder is looked at again."""
    async with it.running(*two):
        await it.all_ready()
        await it["gpu0"].load("alpha")
        before = list(it.machine.alive)
        assert (await it.fleet.apply(told(two))).routers == ()
        await it.fleet.look(within_s=10)
        assert it.machine.alive == before
        assert it["gpu0"].table.residents() == ["alpha"]
        assert [process.reloads for process in it.machine.alive] == [1, 1]
        assert it.watches[0].looks > 1


async def test_a_changed_router_is_restarted(it: FakeFleet, two: Two) -> None:
    """Only the router whose settings changed is restarted, and what was loaded is loaded again."""
    first, second = two
    async with it.running(*two):
        await it.all_ready()
        await it["gpu0"].load("alpha")
        await it["gpu1"].load("beta")
        assert (await it.fleet.apply(told([replace(first, models_max=2), second]))).routers == ("gpu0",)
        await it.reaches("gpu0", RouterState.STOPPING)
        with anyio.fail_after(PATIENCE_S):
            await it["gpu0"].wait_until(lambda: it.story.of(RouterRecovered) != [])
        assert it["gpu0"].settings.models_max == 2
        assert it["gpu0"].table.residents() == ["alpha"]
        assert (it["gpu0"].starts, it["gpu1"].starts) == (2, 1)
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)][2:] == [Cause.REQUESTED]


async def test_a_removed_router_is_gone(it: FakeFleet, two: Two) -> None:
    """A router that is no longer configured is ended, forgotten, and does nothing more."""
    async with it.running(*two):
        await it.all_ready()
        gone = it["gpu0"]
        assert (await it.fleet.apply(told(two[1:]))).routers == ("gpu0",)
        assert [router.name for router in it.fleet] == ["gpu1"]
        assert [process.host.settings.name for process in it.machine.alive] == ["gpu1"]
        said = len(it.story.all)
        await anyio.sleep(1)
        assert it.tasks == 3  # the other router, the folder, and the memory
        gone.start()
        await anyio.sleep(HOUR_S)
        assert len(it.machine.alive) == 1
        assert "gpu0" not in repr(it.story.all[said:])


async def test_a_router_is_replaced_by_one_on_its_port(it: FakeFleet, two: Two) -> None:
    """A new router may take the port of a removed one: that one is gone first."""
    it.prepare = lambda host: setattr(host, "usual", FakeStart(term_s=3.0))
    async with it.running(*two):
        await it.all_ready()
        assert set((await it.fleet.apply(told([it.settings("big", 8081), two[1]]))).routers) == {"gpu0", "big"}
        await it.reaches("big", RouterState.READY)
        assert len(it.story.of(RouterExited)) == 1


async def test_two_routers_exchange_their_ports(it: FakeFleet, two: Two) -> None:
    """Two routers that exchange their ports are both up again by themselves."""
    first, second = two
    async with it.running(*two):
        await it.all_ready()
        await it.fleet.apply(told([replace(first, port=8082), replace(second, port=8081)]))
        await anyio.sleep(60.0)
        assert [router.state for router in it.fleet] == [RouterState.READY] * 2
        assert {process.host.settings.name: process.host.settings.port for process in it.machine.alive} == {
            "gpu0": 8082,
            "gpu1": 8081,
        }


async def test_a_reload_during_a_backoff(it: FakeFleet, two: Two) -> None:
    """D3: new settings reach a router in BACKOFF at once; a router that was stopped by hand stays down."""
    first, second = two
    async with it.running(*two):
        await it.all_ready()
        it["gpu1"].stop()
        await it.reaches("gpu1", RouterState.STOPPED)
        it.hosts["gpu0"].usual = FakeStart(ready_at=1e9, ends_at=0.1)
        it.hosts["gpu0"].process.end(KILLED)
        await anyio.sleep(20.0)
        assert it["gpu0"].state is RouterState.BACKOFF
        await it.fleet.apply(told([replace(first, models_max=1), replace(second, models_max=1)]))
        await it.reaches("gpu0", RouterState.READY)
        await anyio.sleep(HOUR_S)
        assert it["gpu1"].state is RouterState.STOPPED
        assert len(it.machine.alive) == 1


async def test_a_configuration_that_could_not_start_is_told_before_it_is_applied(it: FakeFleet, two: Two) -> None:
    """A check names the routers that could not be started, and touches nothing; a port of our own is no obstacle."""
    first, second = two
    async with it.running(*two):
        await it.all_ready()
        said = len(it.story.all)
        it.prepare = lambda host: setattr(host, "obstacle", NO_BINARY if host.settings.llama_server else None)
        bad = it.settings("big", 8083, llama_server="/no")
        assert await it.fleet.check(told([replace(first, llama_server="/no"), second, bad])) == [
            "router gpu0: no llama-server was found",
            "router big: no llama-server was found",
        ]
        assert await it.fleet.check(told([replace(first, port=8082), replace(second, port=8081)])) == []
        assert await it.fleet.check(told(two)) == []
        assert (len(it.machine.processes), [router.name for router in it.fleet]) == (2, ["gpu0", "gpu1"])
        assert [event for _, event in it.story.all[said:] if not isinstance(event, RouterProbed)] == []


async def test_a_rescan_that_fails_is_a_warning(it: FakeFleet, two: Two) -> None:
    """A reload goes on when a router will not look for new files, and says so."""
    async with it.running(*two):
        await it.all_ready()
        it.hosts["gpu0"].reload_refusals.append((500, "option 'x' not recognized"))
        (problem,) = await it.fleet.look(within_s=10)
        assert problem.startswith("router gpu0: ")
        assert problem in [warned.text for warned in it.story.of(Warned)]
        assert it.machine.at(8082).reloads == 1


# --- what is left behind ----------------------------------------------------------------------------------------------


class FakeSpawner:
    """Reaps and sweeps nothing, and keeps count of it."""

    def __init__(self, found: Leftovers | None = None) -> None:
        self.reaped = 0
        self._found = found or Leftovers()

    def reap_orphans(self) -> list[int]:
        """Count."""
        self.reaped += 1
        return []

    async def sweep(self) -> Leftovers:
        """What an earlier daemon is said to have left."""
        return self._found


async def test_orphans_are_reaped_every_second(tmp_path: Path) -> None:
    """P12: while the fleet runs, what was handed to it is reaped once a second."""
    spawner = FakeSpawner()
    fleet = Fleet(
        make_host=lambda settings, source: pytest.fail("no router"),
        make_watch=lambda path, link_dirs: pytest.fail("no folder"),
        meter=fake_meter(Bus(), tmp_path),
        downloads=Downloads(Hub({}), Bus()),
        spawner=spawner,
        bus=Bus(),
    )
    with anyio.move_on_after(10.5):
        await fleet.run(told([]))
    assert spawner.reaped == 11


@pytest.mark.parametrize("found", [Leftovers(killed=(7,)), Leftovers(survivors=(8,)), Leftovers()])
async def test_what_an_earlier_daemon_left_is_told(found: Leftovers) -> None:
    """D5: a sweep that killed something, or could not, is an event; one that found nothing is not."""
    bus = Bus()
    story = Story(bus)
    await sweep(FakeSpawner(found), bus)
    expected = [StraysKilled(router=None, pids=found.killed, survivors=found.survivors)]
    assert story.of(StraysKilled) == (expected if found != Leftovers() else [])
