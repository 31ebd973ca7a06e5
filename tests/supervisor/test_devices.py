"""GPUs that vanish under a router, and come back: noticed, told, and never left to the processor in silence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GIB, GatewayStage, models
from fakes.gauge import FakeGauge
from llamavisor import footprint
from llamavisor.devices import ASK_EVERY_S, LOOK_S, SUSPECT_AFTER_S
from llamavisor.events import ModelHung, RouterDegraded, RouterRestartScheduled, Warned
from llamavisor.gauge import Device
from llamavisor.states import RouterState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]

GPU = Device("0000:01:00.0", "nvidia", "RTX 3090")
SEEN = (footprint.Device("CUDA0", GPU.id, 24 * GIB),)
NOTICED_S = SUSPECT_AFTER_S + 2 * ASK_EVERY_S + 4 * LOOK_S


@pytest.fixture
def it(tmp_path: Path) -> GatewayStage:
    """A machine with one GPU, which the router sees."""
    stage = GatewayStage(tmp_path, models(["alpha"]), gauge=FakeGauge(gpus=[GPU]))
    stage.devices["main"] = SEEN
    return stage


async def test_a_gpu_vanishes_and_comes_back(it: GatewayStage) -> None:
    """What ran on it is tried and ended; its router is restarted, DEGRADED meanwhile, and restarted when it is back."""
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(30.0)
        host = it.hosts["main"]
        it.gauge.used[GPU.id], host.devices = None, ()
        host.process.children["alpha"].error = "CUDA error: unspecified launch failure"
        began = anyio.current_time()
        await it.until(lambda: it.story.of(ModelHung))
        assert SUSPECT_AFTER_S + ASK_EVERY_S <= anyio.current_time() - began <= NOTICED_S + ASK_EVERY_S
        await it.until(lambda: it["main"].starts == 2 and it["main"].state is RouterState.DEGRADED)
        assert "CUDA0 has vanished" in (it["main"].reason or "")
        assert [event.cause.value for event in it.story.of(RouterRestartScheduled)] == ["device"]
        await it.served("alpha")  # on the processor, as is told
        await anyio.sleep(1800.0)
        assert it["main"].starts == 2  # not again and again
        assert it.fleet.memory.devices.missing == {"main": ("CUDA0",)}
        it.gauge.used[GPU.id], host.devices = GIB, SEEN
        answered = it.client("alpha")
        await it.until(lambda: answered.has_it)
        await anyio.sleep(2 * NOTICED_S)
        assert (it["main"].starts, it.fleet.memory.devices.missing) == (2, {})  # somebody is answered
        answered.leave()
        await it.until(lambda: it["main"].starts == 3, within_s=30.0)
        await it.until(lambda: it["main"].state is RouterState.READY)


async def test_a_driver_that_is_being_replaced(it: GatewayStage) -> None:
    """A fresh llama-server sees nothing, and models that run go on: they are let be, and nothing more is loaded."""
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(30.0)
        it.gauge.used[GPU.id], it.hosts["main"].devices = None, ()
        await it.until(lambda: it.story.of(RouterDegraded))
        await anyio.sleep(1800.0)
        assert it["main"].starts == 1
        assert it.loaded() == {"alpha"}
        assert it.hosts["main"].process.children["alpha"].trials >= 1
        it.gauge.used[GPU.id], it.hosts["main"].devices = GIB, SEEN
        await it.until(lambda: it["main"].starts == 2, within_s=2 * NOTICED_S)
        await it.until(lambda: it.loaded() == {"alpha"})


async def test_the_first_of_two_gpus(tmp_path: Path) -> None:
    """llama-server counts anew when one is missing: the one that is named is the one that the gauge misses."""
    other = Device("0000:02:00.0", "nvidia", "RTX 3090")
    it = GatewayStage(tmp_path, models(["alpha"]), gauge=FakeGauge(gpus=[GPU, other]))
    both = footprint.Device("CUDA0", GPU.id, 24 * GIB), footprint.Device("CUDA1", other.id, 24 * GIB)
    it.devices["main"] = both
    async with it.running():
        await anyio.sleep(30.0)
        it.gauge.used[GPU.id], it.hosts["main"].devices = None, (footprint.Device("CUDA0", other.id, 24 * GIB),)
        await it.until(lambda: it.story.of(RouterDegraded))
        assert it.fleet.memory.devices.missing == {"main": ("CUDA0",)}


async def test_devices_that_the_gauge_cannot_read_are_not_suspected(it: GatewayStage) -> None:
    """One that the gauge never knew is not asked for again and again: that wakes all GPUs."""
    it.devices["main"] = (footprint.Device("Vulkan0", "Vulkan0@main", 24 * GIB),)
    async with it.running():
        host = it.hosts["main"]
        asked = []
        sight = host.sight

        async def counted(devices: Sequence[Device], *, is_fresh: bool = False) -> tuple[footprint.Device, ...] | None:
            asked.extend([1] * is_fresh)
            return await sight(devices)

        host.sight = counted  # type: ignore[method-assign]
        await anyio.sleep(3600.0)
        assert asked == []


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


@pytest.mark.parametrize(("sees", "is_told"), [(SEEN, False), ((), True), (None, False)])
async def test_a_llama_server_that_sees_no_gpu_is_told(
    it: GatewayStage, sees: tuple[footprint.Device, ...] | None, is_told: bool
) -> None:
    """A build without CUDA on a machine with a GPU runs on the processor; that is said, once, if it is known."""
    it.devices["main"] = sees  # type: ignore[assignment]
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(600.0)
        told = [event for event in it.story.of(Warned) if "sees no GPU" in event.text]
        assert len(told) == is_told
        assert it["main"].starts == 1
