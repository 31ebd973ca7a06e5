"""R3 to R5 and P7 on virtual time: memory that is short, does not come back, or of which nothing is known.

What takes minutes, or a machine that is really short of memory, is told here, with a gauge and a kernel that say what
the test says. Real processes and the numbers of the real kernel are in test_memory_processes.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GIB, Client, GatewayStage, models
from fakes.gauge import FakeGauge
from fakes.kernel import Kernel
from llamavisor import footprint
from llamavisor.admission import STUCK_S
from llamavisor.demands import DRAIN_AFTER_S, Why
from llamavisor.errors import DemandRefusedError
from llamavisor.events import (
    GaugeBack,
    GaugeFailed,
    MemoryEased,
    MemoryKill,
    MemoryShort,
    ModelQuarantined,
    ModelUnloaded,
    UnloadReason,
)
from llamavisor.gauge import Device
from llamavisor.meter import READ_EVERY_S
from llamavisor.penalty import FACTOR, LASTS_S
from llamavisor.quarantine import FIRST_S
from llamavisor.settings import MemoryBudget
from llamavisor.strain import CALM_AFTER_S, CALM_FLOORS, READINGS, RELIEF_S, floor_bytes

NAMES = ("alpha", "beta", "gamma", "delta", "omega")
GPU = Device("0000:01:00.0", "nvidia", "RTX 3090")
SHORT_S = (READINGS + 1) * READ_EVERY_S
"""After so long memory that is short is known to be."""
CALM_S = CALM_AFTER_S + 4 * READ_EVERY_S
"""After so long memory that is not short any more is known not to be."""


@pytest.fixture
def it(tmp_path: Path) -> GatewayStage:
    """Five models of 4 GiB each, not yet running; a router has room for two."""
    return GatewayStage(tmp_path, models(NAMES))


@pytest.fixture
def kernel(it: GatewayStage) -> Kernel:
    """What the kernel of that fleet tells; by itself it tells nothing."""
    return Kernel(it.meter._root)


def unloads(it: GatewayStage) -> list[tuple[str, UnloadReason]]:
    """Who has left, and why, in order."""
    return [(event.model, event.reason) for event in it.story.of(ModelUnloaded)]


async def refused(it: GatewayStage, model: str) -> DemandRefusedError:
    """Why a model is not to be had now; that is said at once."""
    client = it.client(model)
    await it.until(lambda: client.is_answered, within_s=1.0)
    assert isinstance(client.error, DemandRefusedError), client
    return client.error


async def had(it: GatewayStage, model: str, *, within_s: float = 60.0) -> Client:
    """Somebody who has a model."""
    client = it.client(model)
    await it.until(lambda: client.is_answered, within_s=within_s)
    assert client.has_it, client
    return client


async def visit(it: GatewayStage, model: str) -> float:
    """Somebody has a model, and leaves it at once; how long it took to have it."""
    client = await had(it, model)
    client.leave()
    await it.until(lambda: client.is_over, within_s=1.0)
    return client.waited_s


# --- R3: memory is short ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_r3_little_is_free(it: GatewayStage, virtual_time: object) -> None:
    """R3: who was idle for longest leaves, then nothing is loaded; who is leased or pinned stays; calm, all goes on.

    On virtual time with a gauge that the test sets: to make this machine short of memory would hurt its neighbours.
    """
    total = it.gauge.total["RAM"]
    floor = floor_bytes(total)
    async with it.running(it.router(memory=40 * GIB)):
        await it.served("beta", "alpha", "gamma")
        it.fleet.memory.pin("beta")
        holder = await had(it, "delta")
        it.gauge.used["RAM"] = total - floor + 1
        await it.until(lambda: it.story.of(MemoryShort), within_s=SHORT_S)
        await it.until(lambda: unloads(it), within_s=5.0)
        await anyio.sleep(RELIEF_S / 2)
        assert unloads(it) == [("alpha", UnloadReason.PRESSURE)], "no more than is needed, and never a pinned one"
        assert [short.is_refusing for short in it.story.of(MemoryShort)] == [False]
        assert (await had(it, "gamma")).waited_s < 0.01
        await it.until(lambda: len(it.story.of(MemoryShort)) == 2, within_s=2 * RELIEF_S)
        assert [short.is_refusing for short in it.story.of(MemoryShort)] == [False, True]
        error = await refused(it, "omega")
        assert error.reason == Why.STRAINED.value
        assert error.retry_after_s is not None
        assert 0 < error.retry_after_s <= CALM_AFTER_S
        assert (await had(it, "beta")).waited_s < 0.01, "what is loaded is used as ever"
        await anyio.sleep(300.0)
        assert it.loaded() == {"beta", "gamma", "delta"}, "all are pinned or leased"
        assert holder.has_it
        it.gauge.used["RAM"] = total - CALM_FLOORS * floor
        await it.until(lambda: it.story.of(MemoryEased), within_s=CALM_S)
        await had(it, "omega")


@pytest.mark.anyio
async def test_r3_no_flapping(it: GatewayStage, virtual_time: object) -> None:
    """R3: free memory that goes up and down around the floor is one shortage, and it is not one before it lasts.

    On virtual time, as above: it takes an hour.
    """
    total = it.gauge.total["RAM"]
    floor = floor_bytes(total)
    async with it.running():
        await it.served("alpha")
        for _ in range(20):  # a load that has just ended, say: two readings, and calm again
            it.gauge.used["RAM"] = total - floor // 2
            await anyio.sleep((READINGS - 1) * READ_EVERY_S)
            it.gauge.used["RAM"] = total - 4 * floor
            await anyio.sleep(2 * READ_EVERY_S)
        assert it.story.of(MemoryShort) == []
        for at in range(3600 // 20):  # now and then it looks well, but not for long
            free = (floor // 4, floor + floor // 4, CALM_FLOORS * floor)[at % 3]
            it.gauge.used["RAM"] = total - free
            await anyio.sleep(20.0)
        it.gauge.used["RAM"] = total - floor - floor // 2  # enough, and not enough to be calm
        await anyio.sleep(10 * CALM_AFTER_S)
        assert [short.is_refusing for short in it.story.of(MemoryShort)] == [False, True]
        assert it.story.of(MemoryEased) == []
        assert unloads(it) == [("alpha", UnloadReason.PRESSURE)]
        assert (await refused(it, "beta")).reason == Why.STRAINED.value
        it.gauge.used["RAM"] = total - 4 * floor
        await anyio.sleep(CALM_S)
        assert len(it.story.of(MemoryEased)) == 1
        await had(it, "beta")


@pytest.mark.anyio
async def test_r3_work_stands_still(it: GatewayStage, kernel: Kernel, virtual_time: object) -> None:
    """R3: when the kernel tells that work stands still for want of memory, that is a shortage although much is free.

    On virtual time with the kernel's file written by the test: the pressure of the whole machine is everybody's.
    """
    kernel.pressure(0.0)
    async with it.running():
        await it.served("alpha")
        holder = await had(it, "beta")
        kernel.pressure(60.0)
        await it.until(lambda: unloads(it), within_s=SHORT_S + 5.0)
        assert unloads(it) == [("alpha", UnloadReason.PRESSURE)]
        await anyio.sleep(2 * RELIEF_S)
        assert "stood still" in str(await refused(it, "gamma"))
        kernel.pressure(10.0)  # less than makes it short, more than makes it calm
        await anyio.sleep(10 * CALM_AFTER_S)
        assert (await refused(it, "gamma")).reason == Why.STRAINED.value
        kernel.pressure(0.0)
        await it.until(lambda: it.story.of(MemoryEased), within_s=CALM_S)
        assert holder.has_it
        await had(it, "gamma")


# --- R4: a victim that does not leave ---------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_r4_a_router_that_refuses_to_unload(it: GatewayStage, virtual_time: object) -> None:
    """R4: the next candidate leaves; who stayed can be used, and is not asked again for a while.

    On virtual time with a fake router: the real one unloads whatever it is told to.
    """
    it.models["alpha"].unload_refusal = (500, "not now")
    async with it.running():
        await it.served("alpha", "beta")
        process = it.hosts["main"].process
        assert await visit(it, "gamma") < 10.0
        assert it.loaded() == {"alpha", "gamma"}
        assert process.unloads == ["alpha", "beta"]
        assert await visit(it, "alpha") < 0.01
        await visit(it, "delta")
        assert it.loaded() == {"alpha", "delta"}
        assert process.unloads == ["alpha", "beta", "gamma"]


@pytest.mark.anyio
async def test_r4_nobody_can_be_unloaded(it: GatewayStage, virtual_time: object) -> None:
    """R4: if the router refuses to unload anybody, who waits is kept waiting, and served when it does unload.

    On virtual time, as above.
    """
    for name in ("alpha", "beta"):
        it.models[name].unload_refusal = (500, "not now")
    async with it.running():
        await it.served("alpha", "beta")
        client = it.client("gamma")
        await anyio.sleep(STUCK_S / 2)
        assert not client.is_answered
        for name in ("alpha", "beta"):
            it.hosts["main"].models[name].unload_refusal = None
        await it.until(lambda: client.has_it, within_s=STUCK_S)
        assert it.loaded() == {"beta", "gamma"}


@pytest.mark.anyio
async def test_r4_nobody_who_answers_is_chosen(it: GatewayStage, virtual_time: object) -> None:
    """R4: be it leased or seen to answer somebody who did not ask us, it stays for as long as that takes.

    On virtual time: it takes an hour, after which even closing models to new leases does not cut anybody off.
    """
    async with it.running():
        await it.served("alpha", "beta")
        process = it.hosts["main"].process
        process.busy.add("alpha")
        await anyio.sleep(5.0)
        await visit(it, "gamma")
        assert process.unloads == ["beta"]
        holder = await had(it, "gamma")
        waiting = it.client("delta")
        await anyio.sleep(DRAIN_AFTER_S + 60.0)
        assert process.unloads == ["beta"]
        assert holder.has_it
        assert not waiting.has_it
        holder.leave()
        later = it.client("delta")
        await it.until(lambda: later.is_answered)
        assert later.has_it, later
        assert process.unloads == ["beta", "gamma"]
        assert "alpha" in it.loaded()


@pytest.mark.anyio
async def test_r4_who_is_young_is_the_last_to_leave(it: GatewayStage, virtual_time: object) -> None:
    """R4: a model that has just been loaded leaves after older ones; if there are none it leaves at once.

    On virtual time: a model is young for a minute.
    """
    async with it.running():
        await it.served("alpha")
        await anyio.sleep(300.0)
        await it.served("beta", "alpha")  # alpha was used last, and beta is the younger
        await it.served("gamma")
        assert it.loaded() == {"beta", "gamma"}
        assert await visit(it, "delta") < 5.0, "there is nobody older, and nobody waits for that"
        assert it.loaded() == {"gamma", "delta"}


# --- R5: a gauge that fails -------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["unknown", "raises", "hangs"])
async def test_r5_budgets_are_kept_to(tmp_path: Path, virtual_time: object, how: str) -> None:
    """R5: with a card of which nothing is known the budget of RAM is kept to, and that is told once.

    On virtual time with a fake card: there is no NVIDIA driver here that could fail.
    """
    it = GatewayStage(tmp_path, models(NAMES, gib=4), gauge=FakeGauge(gpus=[GPU]))
    for model in it.models.values():
        model.takes = {**model.takes, GPU.id: 4 * GIB}
    it.devices["main"] = (footprint.Device("CUDA0", GPU.id, None),)
    router = replace(it.router(), memory=MemoryBudget(devices=(("RAM", 10 * GIB),)))
    it.gauge.used[GPU.id] = None
    async with it.running(router):
        await it.served("alpha", "beta", "gamma")
        assert it.loaded() == {"beta", "gamma"}
        it.gauge.used[GPU.id] = 0  # there is a driver, for a while
        await it.until(lambda: it.story.of(GaugeBack), within_s=10 * READ_EVERY_S)
        await anyio.sleep(60.0)  # what is known now may change what models are told
        before = unloads(it)
        match how:
            case "unknown":
                it.gauge.used[GPU.id] = None
            case "raises":
                it.gauge.failure = OSError("the driver is gone")
            case "hangs":
                it.gauge.hangs = True
        await anyio.sleep(300.0)
        assert unloads(it) == before, "what is not known any more changes nothing"
        for name in ("delta", "omega", "alpha"):
            assert await visit(it, name) < 10.0
        assert it.loaded() == {"omega", "alpha"}
        assert {reason for _, reason in unloads(it)[len(before) :]} == {UnloadReason.EVICTED}
        told = [event.device for event in it.story.of(GaugeFailed)]
        assert told.count(GPU.id) == 2
        assert told.count("RAM") == (0 if how == "unknown" else 1)
        devices = {device.id: device for device in it.fleet.memory.occupancy().devices}
        assert devices[GPU.id].used_bytes is None
        assert devices[GPU.id].reason


# --- P7: the kernel kills a child -------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_p7_what_is_learned_from_a_kill(it: GatewayStage, kernel: Kernel, virtual_time: object) -> None:
    """P7: who was killed is left alone for a while; then room is made for it, within a budget that is a tenth less.

    On virtual time, where the test raises the kernel's counter at the moment at which it ends the process: it takes ten
    minutes until that is forgotten. The real kernel is in test_memory_processes.py.
    """
    size = 8 * GIB + GIB // 4  # for two models; and less a tenth, for one
    async with it.running(it.router(memory=size)):
        await it.served("alpha", "beta")
        kernel.kills(4)
        it.hosts["main"].process.crash("beta")
        await it.until(lambda: unloads(it), within_s=1.0)
        assert unloads(it) == [("beta", UnloadReason.OOM)]
        assert [kill.kills for kill in it.story.of(MemoryKill)] == [1]
        assert it.fleet.memory.capacity.budget(it["main"]).bytes["RAM"] == int(FACTOR * size)
        error = await refused(it, "beta")
        assert error.reason == Why.QUARANTINED.value
        assert error.retry_after_s is not None
        assert error.retry_after_s == pytest.approx(FIRST_S, abs=2.0)
        assert "killed" in str(error)
        assert await visit(it, "alpha") < 0.01
        assert it.hosts["main"].process.loads == ["alpha", "beta"]
        assert [event.model for event in it.story.of(ModelQuarantined)] == ["beta"]
        await anyio.sleep(error.retry_after_s)
        await visit(it, "beta")
        assert it.loaded() == {"beta"}, "with a tenth less there is room for one"
        assert it.hosts["main"].process.unloads == ["alpha"]
        await anyio.sleep(LASTS_S)
        await visit(it, "alpha")
        assert it.loaded() == {"alpha", "beta"}
        assert it["main"].starts == 1


@pytest.mark.anyio
async def test_p7_a_kill_amid_a_load(it: GatewayStage, kernel: Kernel, virtual_time: object) -> None:
    """P7: who is killed while it loads is loaded once more when all who are idle have left, and then left alone.

    On virtual time, as above.
    """
    it.models["beta"] = replace(it.models["beta"], exit_code=1, load_s=5.0)
    async with it.running():
        await it.served("alpha")
        client = it.client("beta")
        await it.until(lambda: it.hosts["main"].process.loads == ["alpha", "beta"])
        assert it.loaded() == {"alpha"}
        await anyio.sleep(4.5)
        kernel.kills(4)
        await it.until(lambda: it.hosts["main"].process.loads == ["alpha", "beta", "beta"])
        assert it.loaded() == set()
        await anyio.sleep(4.5)
        kernel.kills(5)
        await it.until(lambda: client.is_answered)
        assert isinstance(client.error, DemandRefusedError)
        assert client.error.reason == Why.QUARANTINED.value
        assert it.hosts["main"].process.loads == ["alpha", "beta", "beta"]
        assert len(it.story.of(MemoryKill)) == 2
        await visit(it, "alpha")
