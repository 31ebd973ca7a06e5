"""Devices that only llama-server knows, by what `llama-server --list-devices` says of them.

The last resort: it takes a process that initialises every GPU, seconds of work and some hundred MiB of each for a
moment, and it does not say which physical device it means. The ids are its own names, as "CUDA0@llama-server": the
first CUDA device when none is hidden and CUDA_DEVICE_ORDER is PCI_BUS_ID, which is how it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import anyio

from llamavisor.capture import capture
from llamavisor.errors import BinaryError
from llamavisor.gauge.device import Device, Kind, Reading, is_integrated, unknown
from llamavisor.threads import run_in_thread

SUFFIX = "@llama-server"
KEPT_S = 30.0
"""How long a listing is believed, and how long after a failure nobody asks again."""
COVERED_S = 600.0
"""How long one is believed that had nothing to add."""
TIMEOUT_S = 10.0
_MIB = 1024 * 1024
_LINE = re.compile(
    r"^[ \t]+([A-Za-z][\w.\-]{0,63}): ([^\r\n]*) \(([0-9]{1,9}) MiB, ([0-9]{1,9}) MiB free\)[ \t]*\r?$",
    re.MULTILINE | re.ASCII,
)
HIDING = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("GGML_VK_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR", "ZE_AFFINITY_MASK"),
)
"""Variables that keep devices from a process, or put them into another order."""
_NVIDIA = re.compile(r"NVIDIA|GeForce|Quadro|Tesla", re.IGNORECASE)
_AMD = re.compile(r"\bAMD\b|Radeon|RADV", re.IGNORECASE)
_NUMBER = re.compile(r"\d+$", re.ASCII)

Ask = Callable[[Path, Mapping[str, str]], str]


def ask_llama_server(path: Path, env: Mapping[str, str]) -> str:
    """What `--list-devices` says. Blocks for up to `TIMEOUT_S` and kills it then.

    Raises:
        BinaryError: it gives no answer.
        OSError: it cannot be started.
    """
    said = capture((str(path), "--list-devices"), env, timeout_s=TIMEOUT_S)
    if said.returncode != 0:
        raise BinaryError(f"{path} --list-devices ended with status {said.returncode}")
    return said.stdout


class ListedGauge:
    """Reads devices by asking llama-server for its list, seldom.

    Args:
        path: the llama-server.
        env: the environment that a router would have; what hides devices from it is taken out.
        ask: gets the list; blocking, and bounded in time by itself.
        kept_s: how long a list is believed.
    """

    def __init__(
        self, path: Path, env: Mapping[str, str], *, ask: Ask = ask_llama_server, kept_s: float = KEPT_S
    ) -> None:
        self._path = path
        self._env = {name: value for name, value in env.items() if name not in HIDING}
        self._env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        self._ask = ask
        self._kept_s = kept_s
        self._readings: tuple[Reading, ...] = ()
        self._asked_at: float | None = None
        self._lock = anyio.Lock()

    def __repr__(self) -> str:
        return f"<ListedGauge {self._path} {len(self._readings)} devices>"

    async def read(self) -> Sequence[Reading]:
        """Every device, as of at most `kept_s` seconds ago; may take several seconds."""
        return await self.read_beyond(())

    async def read_beyond(self, kinds: Collection[Kind]) -> Sequence[Reading]:
        """Likewise those devices only that are of none of these kinds, which somebody else reads and knows better."""
        async with self._lock:
            beyond = [reading for reading in self._readings if reading.device.kind not in kinds]
            # Asked again less often where there was nothing to learn: it costs every GPU some memory for a moment.
            kept_s = self._kept_s if beyond else max(self._kept_s, COVERED_S)
            if self._asked_at is None or anyio.current_time() - self._asked_at >= kept_s:
                await self._list()
        return [reading for reading in self._readings if reading.device.kind not in kinds]

    async def aclose(self) -> None:
        """There is nothing to let go of: the process lives no longer than the question."""

    async def _list(self) -> None:
        at = anyio.current_time()
        try:
            text = await run_in_thread(partial(self._ask, self._path, self._env))
        except (BinaryError, OSError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            self._readings = tuple(unknown(reading.device, at, reason) for reading in self._readings)
        else:
            listed = parse_devices(text, at)
            names = {reading.device.id for reading in listed}
            gone = [reading.device for reading in self._readings if reading.device.id not in names]
            self._readings = (*listed, *(unknown(device, at, "llama-server no longer lists it") for device in gone))
        self._asked_at = anyio.current_time()


def parse_devices(text: str, at: float) -> tuple[Reading, ...]:
    """The devices of a list, such as `  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)`.

    A backend that cannot tell the memory says 0 MiB: that is unknown. Nothing free of a memory that has a size is full.
    """
    found: dict[str, Reading] = {}
    for name, description, total_mib, free_mib in _LINE.findall(text):
        device = _device(name, description)
        total, free = int(total_mib) * _MIB, int(free_mib) * _MIB
        if total == 0:
            reading = unknown(device, at, "llama-server cannot tell its memory")
        else:  # where memory is shared with RAM, swap may be counted as free
            reading = Reading(device, total, max(0, total - free), min(free, total), at)
        found.setdefault(device.id, reading)
    return tuple(found.values())


def _device(name: str, description: str) -> Device:
    number = _NUMBER.search(name)
    backend = name[: number.start()] if number else name
    shared = is_integrated(description)
    device = Device(f"{name}{SUFFIX}", _kind(backend, description), description or name, shared)
    if backend in {"CUDA", "ROCm"} and number and len(number[0]) <= 4:
        return replace(device, rank=int(number[0]))
    return device


def _kind(backend: str, description: str) -> Literal["nvidia", "amd", "other"]:
    if backend == "CUDA" or (backend != "ROCm" and _NVIDIA.search(description)):
        return "nvidia"
    if backend == "ROCm" or _AMD.search(description):
        return "amd"
    return "other"
