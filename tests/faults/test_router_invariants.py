"""What holds for a supervised router whatever happens in whatever order, on virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from fakes.host import FakeHost
from fakes.machine import KILLED, FakeModel, FakeStart, fake_models
from fakes.supervised import Supervised, supervised
from llamavisor.errors import LlamavisorError
from llamavisor.settings import RouterSettings
from llamavisor.states import HAS_CHILD, ModelState, RouterState

QUIET_S = 400.0
"""After so long without anything new everything has come to rest: the longest backoff and every deadline are over."""

MODELS = ("alpha", "beta", "gamma")
PAUSES_S = st.sampled_from([0.0, 0.0, 0.001, 0.0125, 0.05, 0.3, 1.2, 4.0, 12.0])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the output files go."""
    return tmp_path_factory.mktemp("routers")


def _on_virtual_time(main: Callable[[], Awaitable[None]], *instruments: trio.abc.Instrument) -> None:
    options = {"clock": MockClock(autojump_threshold=0), "instruments": instruments}
    anyio.run(main, backend="trio", backend_options=options)


def _host(folder: Path, *, has_events: bool = True, **usual: object) -> FakeHost:
    host = FakeHost(RouterSettings(name="main", models_dir=folder), folder=folder, has_events=has_events)
    host.usual = FakeStart(**usual)
    host.models = fake_models(MODELS)
    return host


# --- start, stop, restart ---------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    wishes=st.lists(st.tuples(st.sampled_from(["start", "stop", "restart", "crash"]), PAUSES_S), max_size=12),
    term_s=st.sampled_from([0.0, 0.02, 3.0, 1000.0]),
    clear_s=st.sampled_from([0.0, 0.01, 2.0]),
    ready_at=st.sampled_from([0.0, 0.05, 5.0]),
)
def test_c10_the_last_wish_wins(
    folder: Path, wishes: list[tuple[str, float]], term_s: float, clear_s: float, ready_at: float
) -> None:
    """C10: whatever is wished for in whatever haste, the last wish is fulfilled, with never two processes at once."""

    async def main() -> None:
        host = _host(folder, term_s=term_s, clear_s=clear_s, ready_at=ready_at)
        async with supervised(host) as it:
            for wish, pause_s in wishes:
                if wish != "crash":
                    getattr(it.router, wish)()
                elif host.machine.alive:
                    it.process.end(KILLED)
                await anyio.sleep(pause_s)
            await anyio.sleep(QUIET_S)
            last = next((wish for wish, _ in reversed(wishes) if wish != "crash"), "stop")
            if last == "stop":
                assert (it.router.state, host.machine.left) == (RouterState.STOPPED, [])
            else:
                assert (it.router.state, len(host.machine.alive)) == (RouterState.READY, 1)
            assert (it.router.life.then, it.router.comeback.retry_at) == (None, None)

    _on_virtual_time(main)


@settings(max_examples=40, deadline=None)
@given(wishes=st.lists(st.sampled_from(["start", "stop", "restart"]), min_size=1, max_size=8), at_s=PAUSES_S)
def test_c10_wishes_of_many_at_once(folder: Path, wishes: list[str], at_s: float) -> None:
    """C10: wishes that come together are taken one after the other, and a shut_down beside them ends it all."""

    async def main() -> None:
        host = _host(folder, term_s=0.5)
        async with supervised(host) as it:

            async def wish_for(wish: str) -> None:
                await anyio.sleep(at_s)
                getattr(it.router, wish)()

            async with anyio.create_task_group() as group:
                it.router.start()
                for wish in wishes:
                    group.start_soon(wish_for, wish)
            await anyio.sleep(at_s)
            await it.router.shut_down()
            assert (it.router.state, host.machine.left) == (RouterState.STOPPED, [])
            await anyio.sleep(QUIET_S)
            assert host.machine.alive == []

    _on_virtual_time(main)


# --- models -----------------------------------------------------------------------------------------------------------

DEEDS = st.one_of(
    st.tuples(st.sampled_from(["load", "unload", "client", "evict", "crash"]), st.sampled_from(MODELS)),
    st.tuples(st.sampled_from(["kill", "cut", "rescan", "restart"]), st.just("")),
)


@settings(max_examples=80, deadline=None)
@given(
    deeds=st.lists(st.tuples(DEEDS, PAUSES_S), max_size=15),
    has_events=st.booleans(),
    alpha=st.builds(
        FakeModel,
        load_s=st.sampled_from([0.0, 0.2, 3.0]),
        exit_code=st.sampled_from([0, 0, 1]),
        answer_s=st.sampled_from([0.001, 0.5, 2.0]),
        unload_s=st.sampled_from([0.0, 0.1, 3.0]),
    ),
)
def test_x2_what_we_know_is_what_is(
    folder: Path, deeds: list[tuple[tuple[str, str], float]], has_events: bool, alpha: FakeModel
) -> None:
    """X2: after any sequence of deeds of ours, of clients and of fate, nobody waits for ever and the table is right."""

    async def main() -> None:
        host = _host(folder, has_events=has_events)
        host.models["alpha"] = alpha
        waiting = []

        async def ask(work: Callable[..., Awaitable[object]], *args: str) -> None:
            waiting.append(args)
            with suppress(LlamavisorError):
                await work(*args)
            waiting.remove(args)

        async with supervised(host) as it, anyio.create_task_group() as group:
            await it.comes_up()
            for (deed, model), pause_s in deeds:
                process = host.machine.at(8080)
                if deed in ("load", "unload"):
                    group.start_soon(ask, getattr(it.router, deed), model)
                elif deed == "rescan":
                    group.start_soon(ask, it.router.rescan)
                elif deed == "restart":
                    it.router.restart()
                elif process is not None and process.is_listening:
                    _befall(process_of=it, deed=deed, model=model)
                await anyio.sleep(pause_s)
            await anyio.sleep(QUIET_S)
            assert waiting == []
            assert it.router.state is RouterState.READY
            for model in MODELS:
                is_loaded = it.process.state(model) is ModelState.LOADED
                assert (it.model(model) is ModelState.LOADED) == is_loaded, it.story
                assert is_loaded or it.model(model) not in HAS_CHILD, it.story
            assert it.router._residency._operations.current is None

    _on_virtual_time(main)


def _befall(*, process_of: Supervised, deed: str, model: str) -> None:
    """What clients and bad luck do, as far as it is possible now."""
    process = process_of.process
    if deed == "kill":
        process.end(KILLED)
    elif deed == "cut":
        process.cut_streams()
    elif deed == "client" and process.state(model) is ModelState.UNLOADED:
        process.load_for_client(model)
    elif deed in ("evict", "crash") and process.state(model) is ModelState.LOADED:
        getattr(process, deed)(model)


# --- cancellation -----------------------------------------------------------------------------------------------------


class _CancelAtStep(trio.abc.Instrument):
    """Cancels at the k-th step of any task; counts the steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.steps = 0
        self.scope: anyio.CancelScope | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count, and cancel when it is time."""
        if self.scope is not None:
            self.steps += 1
            if self.steps == self.step:
                self.scope.cancel()


async def _a_full_life(it: Supervised) -> None:
    """Everything that a router does, in a hurry."""
    it.router.start()
    await it.router.load("alpha")
    async with anyio.create_task_group() as group:
        group.start_soon(it.router.load, "beta")
        group.start_soon(it.router.rescan)
    await it.router.unload("alpha")
    it.process.end(KILLED)
    await it.until(lambda: it.router.starts == 2)
    await it.until(lambda: it.router.is_serving and it.model("beta") is ModelState.LOADED)
    it.router.restart()
    await it.router.load("gamma")
    await it.router.shut_down()


async def _a_change_of_mind(it: Supervised) -> None:
    """Other settings, a stop, and a start."""
    await it.comes_up()
    it.router.reconfigure(it.host)
    await it.until(lambda: it.router.starts == 2)
    await it.reaches(RouterState.READY)
    it.router.stop()
    await it.reaches(RouterState.STOPPED)
    it.router.start()
    await it.reaches(RouterState.READY)


LIVES = [_a_full_life, _a_change_of_mind]


def _steps_of(life: Callable[[Supervised], Awaitable[None]], folder: Path) -> int:
    instrument = _CancelAtStep(0)

    async def main() -> None:
        async with supervised(_host(folder)) as it:
            with anyio.CancelScope() as instrument.scope:
                await life(it)
            instrument.scope = None

    _on_virtual_time(main, instrument)
    return instrument.steps


@pytest.mark.parametrize("life", LIVES)
def test_x1_cancelled_at_any_step_nothing_is_left(folder: Path, life: Callable[[Supervised], Awaitable[None]]) -> None:
    """X1: whenever the supervision is cancelled, no process is left, and never were there two at once."""
    last = _steps_of(life, folder)
    assert last > 60, last
    for step in range(1, last):
        host = _host(folder, clear_s=0.2)
        instrument = _CancelAtStep(step)

        async def main(host: FakeHost = host, instrument: _CancelAtStep = instrument) -> None:
            with anyio.CancelScope() as instrument.scope:
                async with supervised(host) as it:
                    await life(it)

        _on_virtual_time(main, instrument)
        assert host.machine.left == [], f"cancelled at step {step}"


@pytest.mark.parametrize("life", LIVES)
def test_x1_a_client_cancelled_at_any_step_disturbs_nobody(
    folder: Path, life: Callable[[Supervised], Awaitable[None]]
) -> None:
    """X1: whenever somebody who asks a router is cancelled, the router goes on and does what others ask."""
    last = _steps_of(life, folder)
    for step in range(1, last, 3):
        instrument = _CancelAtStep(step)

        async def main(instrument: _CancelAtStep = instrument) -> None:
            async with supervised(_host(folder)) as it:
                with anyio.CancelScope() as instrument.scope:
                    await life(it)
                await it.settle()  # a load on a router that was just killed may fail with it
                if it.has_ended:
                    return
                it.router.start()
                with anyio.fail_after(QUIET_S):
                    await it.router.load("gamma")
                    assert it.model("gamma") is ModelState.LOADED
                    await it.router.shut_down()

        _on_virtual_time(main, instrument)
