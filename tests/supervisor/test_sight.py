"""Which GPUs a router sees: names to physical devices, and how seldom its llama-server is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from llamavisor import gauge
from llamavisor.binary import Binary, Fingerprint
from llamavisor.errors import BinaryError
from llamavisor.footprint import RAM, Device
from llamavisor.gauge.listed import parse_devices
from llamavisor.helptext import parse_help
from llamavisor.sight import EMPTY_KEPT_S, KEPT_S, MAX_KNOWN, Sights, place

pytestmark = pytest.mark.anyio

MIB = 1024**2
PATH = Path("/opt/llama-server")
PCI = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
LINE = "  CUDA{}: NVIDIA GeForce RTX 3090 (24124 MiB, {} MiB free)\n"
TWO = "Available devices:\n" + LINE.format(0, 23000) + LINE.format(1, 500)
NONE = "Available devices:\n  (none)\n"
FIRST = gauge.Device("0000:01:00.0", "nvidia", "NVIDIA GeForce RTX 3090", uuids=("GPU-aaaa",), rank=0)
SECOND = gauge.Device("0000:02:00.0", "nvidia", "NVIDIA GeForce RTX 3090", uuids=("GPU-bbbb",), rank=1)
SPARK = gauge.Device("000f:01:00.0", "nvidia", "NVIDIA GB10", is_ram_shared=True, rank=0)


def ids(text: str, devices: tuple[gauge.Device, ...], env: Mapping[str, str] = PCI) -> dict[str, str]:
    """Physical ids by the router's names."""
    return {each.name: each.id for each in place(parse_devices(text, 0.0), env, (gauge.RAM, *devices), router="gpu1")}


def test_names_become_physical_devices() -> None:
    """Two routers that call different cards CUDA0 mean different devices, in the order of each; with what is free."""
    assert ids(TWO, (FIRST, SECOND)) == {"CUDA0": FIRST.id, "CUDA1": SECOND.id}
    one = "Available devices:\n" + LINE.format(0, 500)
    assert ids(one, (FIRST, SECOND), PCI | {"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA0": SECOND.id}
    turned = PCI | {"CUDA_VISIBLE_DEVICES": "GPU-bbbb,GPU-aaaa"}
    seen = place(parse_devices(TWO, 0.0), turned, (FIRST, SECOND), router="main")
    assert seen == (Device("CUDA0", SECOND.id, 23000 * MIB), Device("CUDA1", FIRST.id, 500 * MIB))


def test_memory_that_is_ram_is_ram() -> None:
    """Whether the gauge says so or only the product's name does; what the gauge says counts."""
    spark = "Available devices:\n  CUDA0: NVIDIA GB10 (122570 MiB, 100000 MiB free)\n"
    assert ids(spark, (SPARK,)) == {"CUDA0": RAM}
    assert ids(spark, ()) == {"CUDA0": RAM}
    assert ids(spark, (gauge.Device("0000:01:00.0", "nvidia", "NVIDIA GB10", rank=0),)) == {"CUDA0": "0000:01:00.0"}


def test_what_is_not_known_for_certain_has_an_id_of_its_own() -> None:
    """A device is never charged for what another one holds."""
    assert ids(TWO, ()) == {"CUDA0": "CUDA0@llama-server", "CUDA1": "CUDA1@llama-server"}
    # The gauge knows them from llama-server alone, and cannot tell which of them the UUID means.
    listed = tuple(each.device for each in parse_devices(TWO, 0.0))
    one = "Available devices:\n" + LINE.format(0, 500)
    assert ids(one, listed, PCI | {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}) == {"CUDA0": "CUDA0@gpu1"}


def binary(number: int = 1) -> Binary:
    """A build."""
    return Binary(PATH, "fake", None, parse_help(""), Fingerprint(PATH, (("llama-server", number, 0, 0),)))


class Asked:
    """A llama-server that is asked for its devices, and a clock."""

    def __init__(self) -> None:
        self.text = TWO
        self.error: Exception | None = None
        self.envs: list[Mapping[str, str]] = []
        self.now = 1000.0
        self.sights = Sights(self._ask, lambda: self.now)

    def _ask(self, path: Path, env: Mapping[str, str]) -> str:
        assert path == PATH
        self.envs.append(env)
        if self.error is not None:
            raise self.error
        return self.text

    async def look(self, env: Mapping[str, str] = PCI, *, build: int = 1) -> list[str] | None:
        """Names of the devices."""
        found = await self.sights.look(binary(build), env, (FIRST, SECOND), router="main")
        return None if found is None else [device.name for device in found]


async def test_it_is_asked_seldom() -> None:
    """A list holds for ten minutes, one without devices for one: a driver may load late."""
    asked = Asked()
    assert await asked.look() == await asked.look() == ["CUDA0", "CUDA1"]
    asked.now += KEPT_S - 1
    await asked.look()
    assert len(asked.envs) == 1
    asked.now += 1
    asked.text = NONE
    assert await asked.look() == []
    asked.now += EMPTY_KEPT_S - 1
    asked.text = TWO
    assert await asked.look() == []
    asked.now += 1
    assert await asked.look() == ["CUDA0", "CUDA1"]
    assert len(asked.envs) == 3


async def test_each_build_and_each_environment_is_asked() -> None:
    """What one router sees says nothing of what another one sees, and a new build may see more."""
    asked = Asked()
    other = PCI | {"CUDA_VISIBLE_DEVICES": "1"}
    for env in (PCI, other, PCI, other):
        await asked.look(env)
    await asked.look(build=2)
    assert asked.envs == [PCI, other, PCI]
    for number in range(MAX_KNOWN):
        await asked.look(build=10 + number)
    assert repr(asked.sights) == f"<Sights of {MAX_KNOWN}>"


@pytest.mark.parametrize("error", [BinaryError("did not end within 10 s"), OSError(2, "No such file")])
async def test_who_does_not_answer_is_unknown_and_not_without_devices(error: Exception) -> None:
    """A failure is no list; it is tried again after a minute, and takes nothing back that was known."""
    asked = Asked()
    asked.error = error
    assert await asked.look() is None
    assert await asked.look() is None
    assert len(asked.envs) == 1
    asked.now += EMPTY_KEPT_S
    asked.error = None
    assert await asked.look() == ["CUDA0", "CUDA1"]
    asked.now += KEPT_S
    asked.error = error
    assert await asked.look() == ["CUDA0", "CUDA1"]


async def test_libraries_of_the_cpu_are_no_gpus() -> None:
    """Some builds list them beside the GPUs."""
    asked = Asked()
    asked.text = "Available devices:\n  BLAS: OpenBLAS (0 MiB, 0 MiB free)\n" + LINE.format(0, 1)
    assert await asked.look() == ["CUDA0"]
