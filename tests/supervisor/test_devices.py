"""GPUs that vanish under a router, and come back: noticed, told, and never left to the processor in silence."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from fakes.fleet import GIB, GatewayStage, models
from fakes.gauge import FakeGauge
from llamavisor import footprint
from llamavisor.devices import ASK_EVERY_S, LOOK_S, SUSPECT_AFTER_S
from llamavisor.events import ModelLoaded, RouterDegraded, RouterExited, RouterRestartScheduled, Warned
from llamavisor.gauge import Device
from llamavisor.renewal import DRAIN_S
from llamavisor.states import RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

GPU = Device("0000:01:00.0", "nvidia", "RTX 3090")
SEEN = (footprint.Device("CUDA0", GPU.id, 24 * GIB),)
NOTICED_S = SUSPECT_AFTER_S + ASK_EVERY_S + 2 * LOOK_S


@pytest.fixture
def it(tmp_path: Path) -> GatewayStage:
    """A machine with one GPU, which the router sees."""
    stage = GatewayStage(tmp_path, models(["alpha"]), gauge=FakeGauge(gpus=[GPU]))
    stage.devices["main"] = SEEN
    return stage


async def test_a_gpu_vanishes_and_comes_back(it: GatewayStage) -> None:
    """Its router is restarted without it, is DEGRADED meanwhile, and is restarted once more when it is back."""
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(30.0)
        host = it.hosts["main"]
        it.gauge.used[GPU.id], host.devices = None, ()
        began = anyio.current_time()
        await it.until(lambda: it.story.of(RouterExited))
        assert SUSPECT_AFTER_S <= anyio.current_time() - began <= NOTICED_S
        await it.until(lambda: it["main"].is_serving and len(it.story.of(ModelLoaded)) == 2)
        await it.until(lambda: it["main"].state is RouterState.DEGRADED)
        assert "CUDA0 has vanished" in (it["main"].reason or "")
        assert [event.cause.value for event in it.story.of(RouterRestartScheduled)] == ["device"]
        await anyio.sleep(1800.0)
        assert it["main"].starts == 2  # not again and again
        assert it.fleet.memory.devices.missing == {"main": ("CUDA0",)}
        it.gauge.used[GPU.id], host.devices = GIB, SEEN
        await it.until(lambda: it["main"].starts == 3, within_s=NOTICED_S)
        await it.until(lambda: it["main"].state is RouterState.READY)
        assert it.fleet.memory.devices.missing == {}


async def test_a_driver_that_is_silent_has_lost_nothing(it: GatewayStage) -> None:
    """While llama-server sees the device, or cannot be asked, nothing is done."""
    async with it.running():
        await it.served("alpha")
        it.gauge.used[GPU.id] = None
        await anyio.sleep(600.0)
        it.hosts["main"].devices = None
        await anyio.sleep(600.0)
        assert it["main"].starts == 1
        assert it.story.of(RouterDegraded) == []


async def test_who_is_answered_has_a_moment(it: GatewayStage) -> None:
    """Models on other devices go on to answer for a while."""
    async with it.running():
        client = it.client("alpha")
        await it.until(lambda: client.has_it)
        it.gauge.used[GPU.id], it.hosts["main"].devices = None, ()
        await it.until(lambda: it.story.of(RouterDegraded))
        began = anyio.current_time()
        await it.until(lambda: it.story.of(RouterExited))
        assert DRAIN_S - 2.0 <= anyio.current_time() - began <= DRAIN_S + 2.0
        client.leave()


@pytest.mark.parametrize("sees", [True, False])
async def test_a_llama_server_that_sees_no_gpu_is_told(it: GatewayStage, sees: bool) -> None:
    """A build without CUDA on a machine with a GPU runs on the processor; that is said, once."""
    it.devices["main"] = SEEN if sees else ()
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(600.0)
        told = [event for event in it.story.of(Warned) if "sees no GPU" in event.text]
        assert len(told) == (0 if sees else 1)
        assert it["main"].starts == 1
