"""What models may take of each device: what is written, what follows from what there is, and what they are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor import gauge
from llamavisor.budgets import Allowance, GpuAllowance, Limit, allow, limits, reserve, unseen
from llamavisor.footprint import RAM, Device
from llamavisor.gauge import Reading
from llamavisor.settings import MemoryBudget

MIB = 1024**2
GIB = 1024**3
A = Device("CUDA0", "0000:01:00.0")
B = Device("CUDA1", "0000:02:00.0")
SHARED = Device("CUDA0", RAM)
NOWHERE = Device("CUDA0", "CUDA0@llama-server")


def reading(device: str, total: int | None, *, high: int | None = None, shared: bool = False) -> Reading:
    """What there is of a device, of which nothing is taken."""
    kind = "ram" if device == RAM else "nvidia"
    return Reading(gauge.Device(device, kind, device, shared), total, 0, total, 0.0, high_bytes=high)


READINGS = (reading(RAM, 64 * GIB), reading(A.id, 24 * GIB), reading(B.id, 80 * GIB))
AUTO_RAM = Limit(64 * GIB, 64 * GIB - int(6.4 * GIB), is_auto=True)
AUTO_A = Limit(24 * GIB, 24 * GIB - int(1.2 * GIB), is_auto=True)
AUTO_B = Limit(80 * GIB, 76 * GIB, is_auto=True)


@pytest.mark.parametrize(
    ("memory", "devices", "expected"),
    [
        (MemoryBudget(), (), {RAM: AUTO_RAM}),
        (MemoryBudget(), (A, B), {RAM: AUTO_RAM, A.id: AUTO_A, B.id: AUTO_B}),
        (MemoryBudget(22 * GIB), (), {RAM: Limit(64 * GIB, 22 * GIB, is_auto=False)}),
        (
            MemoryBudget(22 * GIB),
            (A, B),
            {
                RAM: AUTO_RAM,
                A.id: Limit(24 * GIB, 22 * GIB, is_auto=False),
                B.id: Limit(80 * GIB, 22 * GIB, is_auto=False),
            },
        ),
        (
            MemoryBudget(devices=(("cuda1", 7 * GIB), ("RAM", GIB), ("CUDA7", 1))),
            (A, B),
            {
                RAM: Limit(64 * GIB, GIB, is_auto=False),
                A.id: AUTO_A,
                B.id: Limit(80 * GIB, 7 * GIB, is_auto=False),
            },
        ),
        (
            MemoryBudget(22 * GIB, devices=(("CUDA1", 7 * GIB),)),
            (A, B),
            {
                RAM: AUTO_RAM,
                A.id: Limit(24 * GIB, 22 * GIB, is_auto=False),
                B.id: Limit(80 * GIB, 7 * GIB, is_auto=False),
            },
        ),
    ],
    ids=["auto", "auto-gpus", "ram", "each-gpu", "named", "named-and-each"],
)
def test_what_is_written_and_what_follows(
    memory: MemoryBudget, devices: tuple[Device, ...], expected: dict[str, Limit]
) -> None:
    """A size is of each GPU, of RAM without any; names are of single devices; the rest is less a reserve."""
    assert limits(memory, devices, READINGS) == expected


def test_nothing_is_promised_that_is_not_there() -> None:
    """A budget above what there is, is what there is; of what is unknown only a written budget is known."""
    assert limits(MemoryBudget(100 * GIB), (A,), READINGS)[A.id] == Limit(24 * GIB, 24 * GIB, is_auto=False)
    for readings in ((), (reading(RAM, None), reading(A.id, None))):
        assert limits(MemoryBudget(), (A,), readings) == dict.fromkeys((RAM, A.id), Limit(None, None, is_auto=True))
        assert limits(MemoryBudget(GIB), (A,), readings)[A.id] == Limit(None, GIB, is_auto=False)


def test_memory_that_is_ram_counts_once() -> None:
    """A GPU without memory of its own is RAM, by whatever name it is meant; of two names the smaller budget counts."""
    there = (*READINGS, reading("0000:05:00.0", 32 * GIB, shared=True))
    assert limits(MemoryBudget(), (SHARED,), there) == {RAM: AUTO_RAM}
    assert limits(MemoryBudget(8 * GIB), (SHARED,), there) == {RAM: Limit(64 * GIB, 8 * GIB, is_auto=False)}
    named = MemoryBudget(devices=(("RAM", 8 * GIB), ("CUDA0", 6 * GIB)))
    assert limits(named, (SHARED,), there) == {RAM: Limit(64 * GIB, 6 * GIB, is_auto=False)}
    beside = Device("Vulkan0", RAM)
    assert limits(MemoryBudget(8 * GIB), (A, beside), there)[RAM] == AUTO_RAM


@pytest.mark.parametrize(
    ("total", "ram", "gpu"),
    [(64 * GIB, int(6.4 * GIB), int(3.2 * GIB)), (8 * GIB, GIB, 512 * MIB), (GIB, 256 * MIB, 256 * MIB), (0, 0, 0)],
)
def test_reserves(total: int, ram: int, gpu: int) -> None:
    """A share, no less than some hundred MiB, and never more than a quarter."""
    assert (reserve(total, of_ram=True), reserve(total, of_ram=False)) == (ram, gpu)


def test_others_are_given_way() -> None:
    """What others hold lowers an automatic budget once it is more than the reserve; a written one is as it is."""
    gpu = 24 * GIB
    kept = reserve(gpu, of_ram=False)
    assert limits(MemoryBudget(), (A,), READINGS, foreign={A.id: kept // 4})[A.id].bytes == gpu - kept
    assert limits(MemoryBudget(), (A,), READINGS, foreign={A.id: 4 * GIB})[A.id].bytes == 20 * GIB - kept // 2
    assert limits(MemoryBudget(), (A,), READINGS, foreign={A.id: 99 * GIB})[A.id].bytes == 0
    assert limits(MemoryBudget(GIB), (A,), READINGS, foreign={A.id: 99 * GIB})[A.id].bytes == GIB


def test_a_soft_limit_of_the_kernel_is_kept_to() -> None:
    """Above memory.high everything becomes slow: an automatic budget stays below it, of a total that is what it is."""
    (limit,) = limits(MemoryBudget(), (), (reading(RAM, 64 * GIB, high=8 * GIB),)).values()
    assert limit == Limit(64 * GIB, 7 * GIB, is_auto=True)


@given(
    st.none() | st.integers(0, 10**13),
    st.lists(st.tuples(st.sampled_from(["RAM", "CUDA0", "CUDA1", "X"]), st.integers(0, 10**13)), max_size=3),
    st.none() | st.integers(0, 10**13),
    st.integers(0, 10**13),
)
def test_no_limit_is_beyond_what_there_is(
    size: int | None, named: list[tuple[str, int]], total: int | None, foreign: int
) -> None:
    """Whatever is written and whoever is there: from 0 to the total, and unknown only where nothing is known."""
    memory = MemoryBudget(size, tuple(named))
    readings = (reading(RAM, total), reading(A.id, total))
    for limit in limits(memory, (A, B, SHARED), readings, foreign={RAM: foreign, A.id: foreign}).values():
        assert limit.total is not None or limit.bytes is None or not limit.is_auto
        if limit.total is not None:
            assert limit.bytes is not None
            assert 0 <= limit.bytes <= limit.total


def test_names_without_a_device_are_told() -> None:
    """A budget for a device that the router does not see holds for nothing, and that can be said."""
    memory = MemoryBudget(devices=(("cuda0", 1), ("CUDA7", 1), ("ram", 1)))
    assert unseen(memory, (A,)) == ("CUDA7",)
    assert unseen(memory, ()) == ("cuda0", "CUDA7")


def test_what_models_are_told() -> None:
    """Totals and budgets of the GPUs in the router's order; what is free plays no part, so that nothing is reloaded."""
    devices = (B, A, NOWHERE)
    found = limits(MemoryBudget(devices=(("CUDA1", 7 * GIB),)), devices, READINGS)
    told = allow(found, devices, 3)
    assert told == Allowance(
        AUTO_RAM.bytes,
        (
            GpuAllowance("CUDA1", B.id, 80 * GIB, 7 * GIB),
            GpuAllowance("CUDA0", A.id, 24 * GIB, AUTO_A.bytes),
            GpuAllowance("CUDA0", NOWHERE.id, None, None),
        ),
        3,
    )
    busy = tuple(Device(device.name, device.id, 5) for device in devices)
    assert hash(allow(found, busy, 3)) == hash(told)
    assert allow({}, (), 0) == Allowance(None)
