"""NVIDIA devices, as their driver tells of them through NVML (the package nvidia-ml-py, whose module is `pynvml`).

Everything here blocks, for as long as the driver likes: `llamavisor.gauge.worker` calls it in a process of its own.

Checked against nvidia-ml-py 13.615 and the NVML reference; where they differ between versions of the driver, that is
said below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from llamavisor.gauge.device import Device, Reading, is_integrated, parse_pci_id, pci_order, unknown

REINIT_S = 30.0
"""How soon NVML is begun anew after it failed: a lost GPU or a driver that was replaced shows only to a new session."""
_ABSENT = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")
_NOT_SUPPORTED = "NVMLError_NotSupported"
_MAX_DEVICES = 256
"""A driver that claims more is not believed."""


class AbsentError(Exception):
    """Raised when this machine has no devices of this kind, as opposed to devices that fail."""


class MemoryInfo(Protocol):
    """NVML's nvmlMemory_t."""

    total: int
    used: int
    free: int


class ProcessInfo(Protocol):
    """NVML's nvmlProcessInfo_t."""

    pid: int
    usedGpuMemory: int | None  # noqa: N815 (NVML's name)


class PciInfo(Protocol):
    """NVML's nvmlPciInfo_t."""

    busId: str | bytes  # noqa: N815 (NVML's name)


class Nvml(Protocol):
    """What we call of `pynvml`; its errors are subclasses of its NVMLError."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: D102, N802 (as in NVML)
    def nvmlShutdown(self) -> None: ...  # noqa: D102, N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...  # noqa: D102, N802
    def nvmlDeviceGetPciInfo(self, handle: object, /) -> PciInfo: ...  # noqa: D102, N802
    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes: ...  # noqa: D102, N802
    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes: ...  # noqa: D102, N802
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> MemoryInfo: ...  # noqa: D102, N802
    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]: ...  # noqa: D102, N802
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object, /) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int, /) -> object: ...  # noqa: D102, N802
    def nvmlDeviceGetGpuInstanceId(self, handle: object, /) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetComputeInstanceId(self, handle: object, /) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetComputeRunningProcesses(self, handle: object, /) -> Sequence[ProcessInfo]: ...  # noqa: D102, N802
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object, /) -> Sequence[ProcessInfo]: ...  # noqa: D102, N802


@dataclass(frozen=True, slots=True)
class _Found:
    """A device and what to ask NVML about it with; no handle where NVML gave none."""

    device: Device
    handle: object


class NvidiaReader:
    """Reads all NVIDIA devices, over one NVML session that it keeps.

    Args:
        nvml: the module `pynvml`.
        clock: in seconds, never going back.
    """

    def __init__(self, nvml: Nvml, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        self._is_open = False
        self._has_failed = False
        self._opened_at = -REINIT_S

    def __repr__(self) -> str:
        return f"<NvidiaReader {'open' if self._is_open else 'closed'}{' failed' if self._has_failed else ''}>"

    def read(self, at: float) -> tuple[tuple[Reading, ...], str]:
        """Every device, or each of its MIG instances instead; those that fail with numbers that are unknown.

        Returns:
            The readings, and which devices are not among them because NVML does not even say who they are; empty if all
            are there. Which place a device has among the others is not known then.

        Raises:
            AbsentError: there is no NVIDIA driver here.
            OSError: NVML does not work at all.
        """
        self._open()
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as exc:
            self._has_failed = True
            raise _translate(exc) from exc
        readings: list[Reading] = []
        failures: list[str] = []
        for index in range(min(count, _MAX_DEVICES)):
            try:
                found = list(self._identify(index))
            except self._nvml.NVMLError as exc:
                self._has_failed = True
                failures.append(f"NVML: device {index}: {exc}")
            else:
                readings += [self._read_one(each, at) for each in found]
        failure = "; ".join(failures)
        if failure and not readings:
            raise OSError(failure)
        return (tuple(readings) if failure else _ranked(readings)), failure

    def close(self) -> None:
        """End the session."""
        if self._is_open:
            self._is_open = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                return  # it ended by itself

    def _open(self) -> None:
        """Begin a session, or begin it anew when the last one failed some time ago."""
        now = self._clock()
        if self._is_open and self._has_failed and now - self._opened_at >= REINIT_S:
            self.close()
        if self._is_open:
            return
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as exc:
            raise _translate(exc) from exc
        self._is_open, self._has_failed, self._opened_at = True, False, now

    def _identify(self, index: int) -> Iterator[_Found]:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        bus_id = _decode(nvml.nvmlDeviceGetPciInfo(handle).busId)
        pci_id = parse_pci_id(bus_id)
        uuid = self._optional(nvml.nvmlDeviceGetUUID, handle)
        name = self._optional(nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"
        if self._is_mig(handle):
            yield from self._instances(handle, name, uuid)
            return
        known_id = pci_id or uuid
        if known_id is not None:
            yield _Found(Device(known_id, "nvidia", name, is_integrated(name), (uuid,) if uuid else ()), handle)

    def _is_mig(self, handle: object) -> bool:
        try:
            return self._nvml.nvmlDeviceGetMigMode(handle)[0] == 1
        except self._nvml.NVMLError:  # most GPUs cannot be divided
            return False

    def _instances(self, handle: object, name: str, parent_uuid: str | None) -> Iterator[_Found]:
        """The MIG instances of a GPU; those that share the memory of one GPU instance are one device with two UUIDs."""
        nvml = self._nvml
        by_memory: dict[int, _Found] = {}
        for index in range(min(nvml.nvmlDeviceGetMaxMigDeviceCount(handle), _MAX_DEVICES)):
            try:
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                gpu_instance = nvml.nvmlDeviceGetGpuInstanceId(instance)
                compute_instance = nvml.nvmlDeviceGetComputeInstanceId(instance)
                uuid = _decode(nvml.nvmlDeviceGetUUID(instance))
            except nvml.NVMLError as exc:
                if type(exc).__name__ in {"NVMLError_NotFound", "NVMLError_InvalidArgument"}:
                    continue  # the count is how many there may be
                raise
            uuids = [uuid]
            if parent_uuid is not None:  # what drivers before R470 called it; CUDA still takes it
                uuids.append(f"MIG-{parent_uuid}/{gpu_instance}/{compute_instance}")
            known = by_memory.get(gpu_instance)
            if known is not None:
                device = replace(known.device, uuids=tuple(dict.fromkeys([*known.device.uuids, *uuids])))
                by_memory[gpu_instance] = _Found(device, known.handle)
                continue
            label = self._optional(nvml.nvmlDeviceGetName, instance) or name
            device = Device(uuid, "nvidia", label, uuids=tuple(dict.fromkeys(uuids)))
            by_memory[gpu_instance] = _Found(device, instance)
        yield from by_memory.values()

    def _read_one(self, found: _Found, at: float) -> Reading:
        nvml, device = self._nvml, found.device
        processes = self._processes(found.handle)
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(found.handle)
        except nvml.NVMLError as exc:
            if type(exc).__name__ == _NOT_SUPPORTED and not device.id.startswith("MIG-"):
                # A GPU that works and has no memory to tell of uses RAM: so does GB10 (DGX Spark).
                shared = replace(device, is_ram_shared=True)
                return replace(unknown(shared, at, "its memory is RAM"), processes=processes)
            self._has_failed = True
            return replace(unknown(device, at, f"NVML: {exc}"), processes=processes)
        if memory.total <= 0:
            return replace(unknown(device, at, "NVML tells of no memory"), processes=processes)
        if device.is_ram_shared:  # Jetsons tell all of RAM, which then looks as if there were twice as much
            return replace(unknown(device, at, "its memory is RAM"), processes=processes)
        return Reading(device, memory.total, memory.used, memory.free, at, processes=processes)

    def _processes(self, handle: object) -> dict[int, int | None] | None:
        """Bytes by pid, of those that compute and those that draw (Vulkan); some do both and are told twice."""
        found: dict[int, int | None] = {}
        is_told = False
        for ask in (self._nvml.nvmlDeviceGetComputeRunningProcesses, self._nvml.nvmlDeviceGetGraphicsRunningProcesses):
            try:
                listed = ask(handle)
            except self._nvml.NVMLError:  # not allowed to see, not supported
                continue
            is_told = True
            for process in listed:
                sizes = [size for size in (found.get(process.pid), process.usedGpuMemory) if size is not None]
                found[process.pid] = max(sizes, default=None)
        return found if is_told else None

    def _optional(self, ask: Callable[[object], str | bytes], handle: object) -> str | None:
        try:
            return _decode(ask(handle)) or None
        except self._nvml.NVMLError:
            return None


def find_nvidia(root: Path) -> tuple[Device, ...]:
    """The NVIDIA GPUs that this process may use, by what the driver has put into /proc; asks no GPU anything.

    For when NVML does not answer: better a device with unknown memory than none. Their names and UUIDs are not known.
    """
    if not (root / "dev/nvidiactl").exists():  # a container without GPUs still sees those of its host
        return ()
    try:
        names = [entry.name for entry in (root / "proc/driver/nvidia/gpus").iterdir()]
    except OSError:
        return ()
    found = sorted(filter(None, map(parse_pci_id, names)), key=pci_order)
    return tuple(Device(pci_id, "nvidia", "NVIDIA GPU", rank=rank) for rank, pci_id in enumerate(found))


def _ranked(readings: Sequence[Reading]) -> tuple[Reading, ...]:
    """In the order of CUDA_DEVICE_ORDER=PCI_BUS_ID. A MIG instance has no place of its own in it."""
    ordered = sorted(readings, key=lambda reading: pci_order(reading.device.id))
    return tuple(
        reading
        if parse_pci_id(reading.device.id) is None
        else replace(reading, device=replace(reading.device, rank=rank))
        for rank, reading in enumerate(ordered)
    )


def _translate(exc: Exception) -> AbsentError | OSError:
    return AbsentError(str(exc)) if type(exc).__name__ in _ABSENT else OSError(f"NVML: {exc}")


def _decode(text: str | bytes) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text
