"""What of models and processes outlives the daemon: sections of the ledger, whole, damaged and out of date."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GIB, GatewayStage, models
from fakes.host import FakeHost
from fakes.machine import FakeMachine, FakeModel
from fakes.supervised import supervised
from llamavisor.catalog import FileId
from llamavisor.events import (
    Bus,
    DaemonStopping,
    Event,
    ModelLoaded,
    ModelLoadFailed,
    ModelRemoved,
    ModelUnloaded,
    RouterRecovered,
    RouterStateChanged,
    UnloadReason,
)
from llamavisor.ledger import Section
from llamavisor.messages import Recalled
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.procfs import Identity
from llamavisor.quarantine import FIRST_S, MAX_S, Quarantine
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.residents import Residents
from llamavisor.sections import ModelSpec
from llamavisor.settings import RouterSettings
from llamavisor.started import Started
from llamavisor.states import ModelState, RouterState
from llamavisord.lives import Lives

FILES = (FileId(1, 2, 1000, 3),)
SPEC = ModelSpec(name="alpha", path="/models/alpha.gguf", files=FILES)


def through_file(written: Section, read: Section) -> str:
    """What one daemon writes, and the next one reads."""
    return read.load(json.loads(json.dumps(written.dump())), 0.0)


def loaded(model: str, router: str = "main") -> Event:
    """It can be used."""
    return ModelLoaded(router=router, model=model, load_s=1.0)


def unloaded(model: str, reason: UnloadReason, router: str = "main") -> Event:
    """It cannot be used any more."""
    return ModelUnloaded(router=router, model=model, reason=reason)


# --- who was resident -------------------------------------------------------------------------------------------------


def heard(*events: Event) -> tuple[str, ...]:
    """Who is resident on "main" after these events, for the next daemon."""
    bus = Bus()
    residents = Residents(bus)
    for event in events:
        bus.publish(event)
    again = Residents(Bus())
    assert through_file(residents, again) == ""
    return again.of("main")


def test_who_was_loaded_last_is_first() -> None:
    """They are loaded again in that order; what has left is not."""
    events = [loaded("a"), loaded("b"), loaded("c"), loaded("a"), loaded("x", "other")]
    assert heard(*events) == ("a", "c", "b")
    assert heard(*events, unloaded("c", UnloadReason.EVICTED)) == ("a", "b")
    assert heard(*events, unloaded("c", UnloadReason.CRASHED)) == ("a", "b")
    assert heard(*events, ModelLoadFailed(router="main", model="c", reason="broken")) == ("a", "b")
    assert heard(unloaded("c", UnloadReason.EVICTED)) == ()


def test_the_end_of_a_router_keeps_its_models_wanted() -> None:
    """Until it has come back without some of them, or a person stops it."""
    events = [loaded("a"), loaded("b"), unloaded("a", UnloadReason.ROUTER), unloaded("b", UnloadReason.ROUTER)]
    assert heard(*events) == ("b", "a")
    again = [ModelLoaded(router="main", model=name, load_s=1.0, is_again=True) for name in ("b", "a")]
    assert heard(*events, *again) == ("b", "a")
    assert heard(*events, ModelRemoved(router="main", model="a")) == ("b",)
    stopped = RouterStateChanged(router="main", old=RouterState.STOPPING, new=RouterState.STOPPED)
    assert heard(*events, stopped) == ()


def test_the_end_of_the_daemon_forgets_nothing() -> None:
    """What leaves because the daemon ends is wanted again."""
    stopped = RouterStateChanged(router="main", old=RouterState.STOPPING, new=RouterState.STOPPED)
    events = [loaded("a"), DaemonStopping(reason="SIGTERM"), unloaded("a", UnloadReason.REQUESTED), stopped]
    assert heard(*events) == ("a",)


@pytest.mark.parametrize("raw", [None, [], "x", {"main": "x", "b": 1}, {"main": [1, None]}])
def test_damaged_residents(raw: object) -> None:
    """Whatever the file says, nothing is raised and nobody is resident."""
    residents = Residents(Bus())
    assert isinstance(residents.load(raw, 0.0), str)
    assert residents.of("main") == ()


# --- who was left alone -----------------------------------------------------------------------------------------------


class Clocks:
    """A monotonic clock that begins anew with every boot, and a wall clock."""

    def __init__(self, mono: float, wall: float) -> None:
        self.mono, self.wall = mono, wall

    def records(self) -> QuarantineRecords:
        """Records that go by these."""
        return QuarantineRecords(clock=lambda: self.mono, wall=lambda: self.wall)


def recalled(clocks: Clocks, spec: ModelSpec | None = SPEC) -> list[Quarantine]:
    """What the next daemon makes of a failure 10 s before its start, by its own clocks."""
    then = Clocks(5000.0, 1_000_000.0)
    records, again = then.records(), clocks.records()
    records.note(Quarantine("main", "alpha", until=5000.0 + 120.0, failures=3, reason="broken"), SPEC)
    assert through_file(records, again) == ""
    return again.recall(lambda _: spec)


def test_a_quarantine_goes_on_after_a_restart() -> None:
    """With what was left of it, on whatever monotonic clock, once the model is known."""
    assert recalled(Clocks(7.0, 1_000_010.0)) == [Quarantine("main", "alpha", 117.0, 3, "broken")]
    assert recalled(Clocks(7.0, 1_000_010.0), None) == []
    assert recalled(Clocks(7.0, 1_000_200.0)) == [Quarantine("main", "alpha", 7.0, 3, "broken")]
    assert recalled(Clocks(7.0, 1_001_000.0)) == []  # so long after that its failures do not count


def test_a_wrong_clock_leaves_nobody_alone_for_ever() -> None:
    """T1: a clock that was set back by a year makes half an hour of it."""
    assert recalled(Clocks(7.0, 1000.0)) == [Quarantine("main", "alpha", 7.0 + MAX_S, 3, "broken")]


@pytest.mark.parametrize(
    "change",
    [
        {"files": (FileId(1, 2, 1000, 4),)},
        {"layers": (OptionLayer("[model.alpha]", ModelOptions(ctx_size=512)),)},
        {"path": "/models/other.gguf"},
    ],
)
def test_another_model_of_that_name_is_not_left_alone(change: dict[str, object]) -> None:
    """A file or options that have changed while no daemon ran clear it."""
    assert recalled(Clocks(7.0, 1_000_010.0), dataclasses.replace(SPEC, **change)) == []  # type: ignore[arg-type]


def test_records_are_bounded_and_forgotten() -> None:
    """A model that is another one now is not remembered."""
    records = Clocks(0.0, 0.0).records()
    for number in range(1500):
        records.note(Quarantine("main", f"m{number}", until=30.0, failures=1, reason="x" * 5000), SPEC)
    assert isinstance(dumped := records.dump(), list)
    assert (len(dumped), len(dumped[0]["reason"])) == (1000, 500)
    records.forget("m1499")
    assert len(records.dump()) == 999  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [None, {}, [1, "x", {"router": "main"}], [{"router": 1, "model": 2}]])
def test_damaged_records(raw: object) -> None:
    """Whatever the file says, nothing is raised and nobody is left alone."""
    records = QuarantineRecords()
    assert isinstance(records.load(raw, 0.0), str)
    assert records.recall(lambda _: SPEC) == []


# --- what was started, and how often ----------------------------------------------------------------------------------


def test_what_was_started_and_not_reaped() -> None:
    """A process that was reaped is not looked for again."""
    started, again = Started(), Started()
    one, other = Identity(10, 100, "boot"), Identity(11, 101, "boot")
    started.add(one)
    started.add(other)
    started.remove(one)
    assert through_file(started, again) == ""
    assert again.before == (other,)
    assert again.dump() == []


@pytest.mark.parametrize("raw", [None, {}, [1, {"pid": "x"}], [{"pid": 1, "start_ticks": 1, "boot_id": "b"}]])
def test_damaged_processes(raw: object) -> None:
    """Whatever the file says, nobody is taken for ours; init least of all."""
    started = Started()
    assert started.load(raw, 0.0) != ""
    assert started.before == ()


def test_lives_and_deaths() -> None:
    """A daemon that has not said that it ends was cut short."""
    first, second, third = Lives(), Lives(), Lives()
    assert through_file(first, second) == ""
    assert (second.starts, second.deaths) == (2, 1)
    second.end()
    assert through_file(second, third) == ""
    assert (third.starts, third.deaths) == (3, 1)
    assert Lives().load({"starts": -1, "deaths": True}, 0.0) != ""


# --- in a fleet -------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_what_an_earlier_daemon_had_is_loaded_again(tmp_path: Path, virtual_time: object) -> None:
    """In its order, beside what is to be loaded on start; what is not there any more is said to be missing."""
    host = FakeHost(RouterSettings(name="main", models_dir=tmp_path), folder=tmp_path, machine=FakeMachine())
    host.models = {name: FakeModel() for name in ("alpha", "beta", "gamma")}
    host.models["gamma"].load_on_start = True
    async with supervised(host) as it:
        it.router.tell(Recalled(("beta", "gone", "alpha")))
        await it.comes_up()
        await it.until(lambda: it.story.of(RouterRecovered))
        assert [event.model for event in it.story.of(ModelLoaded)] == ["gamma", "beta", "alpha"]
        recovered = it.story.of(RouterRecovered)[0]
        assert (recovered.models, recovered.missing) == (("beta", "alpha"), ("gone",))
        it.router.stop()
        await it.reaches(RouterState.STOPPED)
        await it.comes_up()
        await anyio.sleep(10.0)
        assert it.model("beta") is ModelState.UNLOADED


@pytest.mark.anyio
async def test_a_model_that_an_earlier_daemon_left_alone_is_refused(tmp_path: Path, virtual_time: object) -> None:
    """And tried again when its time is over; a person's word is enough as before."""
    kinds = models(["alpha"]) | {"broken": FakeModel(exit_code=1, takes={"RAM": GIB}, prints=("no such tensor",))}
    first, second = (QuarantineRecords(clock=anyio.current_time, wall=anyio.current_time) for _ in range(2))
    it = GatewayStage(tmp_path, kinds, records=first)
    async with it.running():
        client = it.client("broken")
        await it.until(lambda: client.is_answered)
        assert "no such tensor" in str(client.error)
    assert through_file(first, second) == ""
    it = GatewayStage(tmp_path, kinds, records=second)
    async with it.running():
        client = it.client("broken")
        await it.until(lambda: client.is_answered)
        assert "no such tensor" in str(client.error)
        assert it.hosts["main"].process.loads == []
        await anyio.sleep(FIRST_S)
        client = it.client("broken")
        await it.until(lambda: client.is_answered)
        assert it.hosts["main"].process.loads == ["broken"]
