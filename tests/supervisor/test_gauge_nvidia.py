"""NVIDIA devices through a fake NVML that follows the documented one: its names, its errors, its divided GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from llamavisor.gauge import Device, Reading
from llamavisor.gauge.nvidia import REINIT_S, AbsentError, NvidiaReader, find_nvidia

GIB = 1024**3
_T = TypeVar("_T")


class NVMLError(Exception):
    """As in pynvml: every error has a class of its own."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_NOT_SUPPORTED."""


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_NOT_FOUND."""


class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_NO_PERMISSION."""


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_GPU_IS_LOST."""


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_LIBRARY_NOT_FOUND."""


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_DRIVER_NOT_LOADED."""


class NVMLError_LibRmVersionMismatch(NVMLError):  # noqa: N801, N818
    """NVML_ERROR_LIB_RM_VERSION_MISMATCH."""


@dataclass
class Memory:
    """nvmlMemory_t."""

    total: int
    used: int
    free: int


@dataclass
class Process:
    """nvmlProcessInfo_t."""

    pid: int
    usedGpuMemory: int | None  # noqa: N815


@dataclass
class Pci:
    """nvmlPciInfo_t."""

    busId: str | bytes  # noqa: N815


@dataclass
class Gpu:
    """What stands behind a handle; an error in the place of an answer is raised."""

    bus_id: str | bytes = "00000000:01:00.0"
    uuid: str | bytes | NVMLError = "GPU-1111"
    name: str | bytes | NVMLError = "NVIDIA GeForce RTX 3090"
    memory: Memory | NVMLError = field(default_factory=lambda: Memory(24 * GIB, 5 * GIB, 18 * GIB))
    compute: list[Process] | NVMLError = field(default_factory=list)
    graphics: list[Process] | NVMLError = field(default_factory=list)
    mig: list[Gpu] | NVMLError | None = field(default_factory=lambda: NVMLError_NotSupported("Not Supported"))
    gpu_instance: int = 0
    compute_instance: int = 0
    handle: NVMLError | None = None


class FakeNvml:
    """Stands in for the module `pynvml`."""

    NVMLError = NVMLError

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = list(gpus)
        self.init: NVMLError | None = None
        self.count: NVMLError | None = None
        self.sessions = 0
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802, D102
        if self.init:
            raise self.init
        self.sessions += 1
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802, D102
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802, D102
        if self.count:
            raise self.count
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802, D102
        gpu = self.gpus[index]
        if gpu.handle:
            raise gpu.handle
        return gpu

    def nvmlDeviceGetPciInfo(self, handle: object) -> Pci:  # noqa: N802, D102
        return Pci(_gpu(handle).bus_id)

    def nvmlDeviceGetUUID(self, handle: object) -> str | bytes:  # noqa: N802, D102
        return _told(_gpu(handle).uuid)

    def nvmlDeviceGetName(self, handle: object) -> str | bytes:  # noqa: N802, D102
        return _told(_gpu(handle).name)

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Memory:  # noqa: N802, D102
        return _told(_gpu(handle).memory)

    def nvmlDeviceGetMigMode(self, handle: object) -> list[int]:  # noqa: N802, D102
        mig = _gpu(handle).mig
        return [0, 0] if mig is None else [1 if _told(mig) else 0, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object) -> int:  # noqa: N802, D102
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int) -> object:  # noqa: N802, D102
        mig = _gpu(handle).mig
        assert isinstance(mig, list)
        if index >= len(mig):
            raise NVMLError_NotFound("Not Found")
        return mig[index]

    def nvmlDeviceGetGpuInstanceId(self, handle: object) -> int:  # noqa: N802, D102
        return _gpu(handle).gpu_instance

    def nvmlDeviceGetComputeInstanceId(self, handle: object) -> int:  # noqa: N802, D102
        return _gpu(handle).compute_instance

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> Sequence[Process]:  # noqa: N802, D102
        return _told(_gpu(handle).compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object) -> Sequence[Process]:  # noqa: N802, D102
        return _told(_gpu(handle).graphics)


def _gpu(handle: object) -> Gpu:
    assert isinstance(handle, Gpu)
    return handle


def _told(answer: _T | NVMLError) -> _T:
    if isinstance(answer, NVMLError):
        raise answer
    return answer


def read(*gpus: Gpu) -> tuple[Reading, ...]:
    """Read these, which all say who they are."""
    readings, failure = NvidiaReader(FakeNvml(*gpus)).read(3.0)
    assert failure == ""
    return readings


def test_a_gpu_tells_its_memory() -> None:
    """Its id is its PCI id as sysfs writes it; the driver keeps some memory for itself."""
    (reading,) = read(Gpu("00000000:0A:00.0", "GPU-1111"))
    device = Device("0000:0a:00.0", "nvidia", "NVIDIA GeForce RTX 3090", uuids=("GPU-1111",), rank=0)
    assert reading == Reading(device, 24 * GIB, 5 * GIB, 18 * GIB, 3.0, processes={})


def test_bindings_that_tell_bytes_are_read_too() -> None:
    """Old versions of the package did."""
    (reading,) = read(Gpu(b"0000:01:00.0", b"GPU-1111", b"Tesla P40"))
    assert (reading.device.id, reading.device.name, reading.device.uuids) == (
        "0000:01:00.0",
        "Tesla P40",
        ("GPU-1111",),
    )


def test_places_are_in_the_order_of_the_bus() -> None:
    """NVML promises no order."""
    readings = read(Gpu("00000000:41:00.0"), Gpu("00000000:01:00.0"), Gpu("00010000:00:00.0"))
    assert [(reading.device.id, reading.device.rank) for reading in readings] == [
        ("0000:01:00.0", 0),
        ("0000:41:00.0", 1),
        ("10000:00:00.0", 2),
    ]


def test_processes_are_told_once_with_the_most_they_have() -> None:
    """Who computes and draws is listed twice; a number that the driver does not tell is None."""
    gpu = Gpu(compute=[Process(7, 3 * GIB), Process(8, None)], graphics=[Process(7, 2 * GIB), Process(9, 0)])
    assert read(gpu)[0].processes == {7: 3 * GIB, 8: None, 9: 0}


@pytest.mark.parametrize("error", [NVMLError_NoPermission("no"), NVMLError_NotSupported("no")])
def test_processes_that_are_not_told_are_unknown(error: NVMLError) -> None:
    """The memory is still known."""
    reading = read(Gpu(compute=error, graphics=error))[0]
    assert reading.processes is None
    assert reading.free_bytes == 18 * GIB


def test_a_gpu_that_has_no_memory_to_tell_of_shares_ram() -> None:
    """As GB10 does; what processes have there is told all the same."""
    gpu = Gpu("0000000F:01:00.0", name="NVIDIA GB10", memory=NVMLError_NotSupported("no"), compute=[Process(7, GIB)])
    (reading,) = read(gpu)
    assert reading.device.is_ram_shared
    assert reading.device.memory_id == "RAM"
    assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (None, None, None)
    assert (reading.reason, reading.processes) == ("its memory is RAM", {7: GIB})


def test_a_jetson_that_tells_all_of_ram_shares_it() -> None:
    """Else the machine would look twice as large as it is."""
    (reading,) = read(Gpu(name="NVIDIA Thor", memory=Memory(128 * GIB, 1, 2)))
    assert reading.device.is_ram_shared
    assert reading.total_bytes is None


@pytest.mark.parametrize("error", [NVMLError_GpuIsLost("GPU is lost"), NVMLError("Unknown Error")])
def test_a_gpu_whose_memory_fails_is_unknown(error: NVMLError) -> None:
    """The other one is not affected, and neither is zero."""
    broken, fine = read(Gpu("0:01:00.0", memory=error), Gpu("0:02:00.0"))
    assert (broken.total_bytes, broken.used_bytes, broken.free_bytes) == (None, None, None)
    assert broken.device.id == "0000:01:00.0"
    assert not broken.device.is_ram_shared
    assert str(error) in broken.reason
    assert fine.is_known


def test_a_gpu_that_tells_zero_bytes_is_unknown() -> None:
    """No GPU has no memory."""
    (reading,) = read(Gpu(memory=Memory(0, 0, 0)))
    assert reading.total_bytes is None
    assert reading.reason


def test_a_gpu_that_does_not_say_who_it_is_is_reported_as_missing() -> None:
    """Then nobody has a place, for who stands where is not certain."""
    readings, failure = NvidiaReader(
        FakeNvml(Gpu("0:01:00.0", handle=NVMLError_GpuIsLost("GPU is lost")), Gpu("0:02:00.0"))
    ).read(0.0)
    assert [(reading.device.id, reading.device.rank) for reading in readings] == [("0000:02:00.0", None)]
    assert "GPU is lost" in failure


def test_when_no_gpu_says_who_it_is_reading_fails() -> None:
    """That is not the same as having none."""
    with pytest.raises(OSError, match="GPU is lost"):
        read(Gpu(handle=NVMLError_GpuIsLost("GPU is lost")))
    assert read() == ()


def test_a_divided_gpu_is_its_instances() -> None:
    """Each with its own memory and both its names; the GPU itself would count their memory again."""
    mig = [
        Gpu(uuid="MIG-aaaa", name="A100 MIG 3g.20gb", memory=Memory(20 * GIB, 1, 2), gpu_instance=1),
        Gpu(uuid="MIG-bbbb", name="A100 MIG 1g.5gb", memory=Memory(5 * GIB, 1, 2), gpu_instance=9),
    ]
    readings = read(Gpu("0:01:00.0", "GPU-1111", mig=mig, memory=Memory(40 * GIB, 0, 0)), Gpu("0:02:00.0"))
    by_id = {reading.device.id: reading for reading in readings}
    assert list(by_id) == ["0000:02:00.0", "MIG-aaaa", "MIG-bbbb"]
    assert by_id["MIG-bbbb"].total_bytes == 5 * GIB
    assert by_id["MIG-bbbb"].device.uuids == ("MIG-bbbb", "MIG-GPU-1111/9/0")
    assert by_id["MIG-bbbb"].device.rank is None


def test_compute_instances_of_one_memory_are_one_device() -> None:
    """With the names of both."""
    mig = [Gpu(uuid="MIG-aaaa", gpu_instance=1), Gpu(uuid="MIG-bbbb", gpu_instance=1, compute_instance=1)]
    (reading,) = read(Gpu(mig=mig))
    assert reading.device.id == "MIG-aaaa"
    assert reading.device.uuids == ("MIG-aaaa", "MIG-GPU-1111/1/0", "MIG-bbbb", "MIG-GPU-1111/1/1")


def test_an_instance_that_does_not_support_telling_its_memory_is_not_ram() -> None:
    """Only a whole GPU can be one that shares RAM."""
    (reading,) = read(Gpu(mig=[Gpu(uuid="MIG-aaaa", memory=NVMLError_NotSupported("Not Supported"))]))
    assert not reading.device.is_ram_shared
    assert reading.total_bytes is None


def test_a_gpu_that_could_be_divided_and_is_not_is_a_gpu() -> None:
    """MIG that is switched off changes nothing."""
    assert read(Gpu(mig=None))[0].is_known


@pytest.mark.parametrize("error", [NVMLError_LibraryNotFound("x"), NVMLError_DriverNotLoaded("x")])
def test_without_a_driver_there_are_no_devices(error: NVMLError) -> None:
    """That is absent, not failed."""
    nvml = FakeNvml()
    nvml.init = error
    with pytest.raises(AbsentError):
        NvidiaReader(nvml).read(0.0)


def test_a_driver_that_was_replaced_is_a_failure() -> None:
    """An upgrade without a reboot leaves the devices there and silent."""
    nvml = FakeNvml()
    nvml.init = NVMLError_LibRmVersionMismatch("RM has detected an NVML/RM version mismatch.")
    with pytest.raises(OSError, match="version mismatch"):
        NvidiaReader(nvml).read(0.0)


def _lost_memory(nvml: FakeNvml) -> None:
    nvml.gpus[0].memory = NVMLError_GpuIsLost("GPU is lost")


def _lost_count(nvml: FakeNvml) -> None:
    nvml.count = NVMLError("Unknown Error")


def _lost_handle(nvml: FakeNvml) -> None:
    nvml.gpus[0].handle = NVMLError_GpuIsLost("GPU is lost")


@pytest.mark.parametrize("lose", [_lost_memory, _lost_count, _lost_handle])
def test_after_a_failure_a_new_session_is_begun_and_not_too_often(lose: Callable[[FakeNvml], None]) -> None:
    """A GPU that was reset is found again only by a new session."""
    now = 100.0
    nvml = FakeNvml(Gpu())
    reader = NvidiaReader(nvml, clock=lambda: now)

    def ask() -> bool:
        try:
            return reader.read(0.0)[0][0].is_known
        except OSError:
            return False

    assert ask()
    assert ask()
    assert nvml.sessions == 1
    lose(nvml)
    assert not ask()
    now += REINIT_S
    assert not ask()
    assert not ask()
    assert nvml.sessions == 2
    nvml.count, nvml.gpus = None, [Gpu()]
    now += REINIT_S
    assert ask()
    assert (nvml.sessions, nvml.open) == (3, 1)
    now += REINIT_S
    assert ask()
    reader.close()
    assert (nvml.sessions, nvml.open) == (3, 0)


def test_gpus_are_found_without_asking_the_driver(tmp_path: Path) -> None:
    """By the names of folders; in a container that may not use them there are none."""
    for name in ("0000:41:00.0", "0000:01:00.0", "rubbish"):
        (tmp_path / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)
    assert find_nvidia(tmp_path) == ()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert [(device.id, device.rank) for device in find_nvidia(tmp_path)] == [("0000:01:00.0", 0), ("0000:41:00.0", 1)]
