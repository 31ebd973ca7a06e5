"""Devices as llama-server lists them: what is read from its list, and how seldom it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.errors import BinaryError
from llamavisor.gauge import listed as listed_module
from llamavisor.gauge.listed import COVERED_S, KEPT_S, ListedGauge, ask_llama_server, parse_devices

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
LIST = """\
ggml_cuda_init: found 2 CUDA devices (Total VRAM: 48248 MiB):
  Device 0: NVIDIA GeForce RTX 3090, compute capability 8.6, VMM: yes, VRAM: 24124 MiB
Available devices:
  CUDA0: NVIDIA GeForce RTX 3090 (24124 MiB, 23800 MiB free)
  CUDA1: NVIDIA GeForce RTX 3060 (12044 MiB, 0 MiB free)
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24000 MiB free)
  Vulkan1: Intel(R) UHD Graphics 770 (ADL-S GT1) (31000 MiB, 30000 MiB free)
  OpenCL0: QUALCOMM Adreno(TM) (0 MiB, 0 MiB free)
"""


def test_a_list_is_read() -> None:
    """A device of size zero is unknown; one with nothing free is full."""
    readings = {reading.device.id: reading for reading in parse_devices(LIST, 4.0)}
    assert list(readings) == [f"{name}@llama-server" for name in ("CUDA0", "CUDA1", "Vulkan0", "Vulkan1", "OpenCL0")]
    first = readings["CUDA0@llama-server"]
    assert (first.total_bytes, first.free_bytes, first.used_bytes) == (24124 * MIB, 23800 * MIB, 324 * MIB)
    assert (first.device.kind, first.device.name, first.device.rank) == ("nvidia", "NVIDIA GeForce RTX 3090", 0)
    assert readings["CUDA1@llama-server"].free_bytes == 0
    assert readings["CUDA1@llama-server"].device.rank == 1
    assert [reading.device.kind for reading in readings.values()] == ["nvidia", "nvidia", "amd", "other", "other"]
    assert [reading.device.is_ram_shared for reading in readings.values()] == [False, False, False, True, False]
    unknown = readings["OpenCL0@llama-server"]
    assert (unknown.total_bytes, unknown.used_bytes, unknown.free_bytes) == (None, None, None)
    assert unknown.reason


@pytest.mark.parametrize("text", ["", "Available devices:\n  (none)\n", "CUDA0: x (1 MiB, 1 MiB free)\n"])
def test_a_list_without_devices_has_none(text: str) -> None:
    """A device stands on a line of its own that begins with a blank."""
    assert parse_devices(text, 0.0) == ()


def test_more_free_than_there_is_is_all_of_it() -> None:
    """With memory that is RAM, llama.cpp counts swap as free."""
    (reading,) = parse_devices("  CUDA0: NVIDIA GB10 (100 MiB, 120 MiB free)\n", 0.0)
    assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (100 * MIB, 0, 100 * MIB)
    assert reading.device.is_ram_shared


@given(
    st.text()
    | st.lists(
        st.tuples(st.text(), st.text(), st.integers(0), st.integers(0)).map(
            lambda parts: f"  {parts[0]}: {parts[1]} ({parts[2]} MiB, {parts[3]} MiB free)"
        )
    ).map("\n".join)
)
def test_any_text_is_a_list(text: str) -> None:
    """Nothing raises; no device has a size of zero, and each is there once."""
    readings = parse_devices(text, 0.0)
    assert all(reading.total_bytes is None or reading.total_bytes > 0 for reading in readings)
    assert len({reading.device.id for reading in readings}) == len(readings)


class FakeServer:
    """Answers as it is told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.answer: str | Exception = LIST
        self.asked = 0
        self.env: Mapping[str, str] = {}

    def ask(self, path: Path, env: Mapping[str, str]) -> str:
        """Stands in for `ask_llama_server`."""
        self.asked += 1
        self.env = env
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Clock:
    """The time of the gauge; a thread works in between, so trio's clock will not do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(listed_module.anyio, "current_time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still."""
    return Clock(monkeypatch)


async def test_a_list_is_believed_for_a_while(clock: Clock) -> None:
    """It says of which time it is; those who ask at once share one answer."""
    server = FakeServer()
    gauge = ListedGauge(Path("/llama-server"), {}, ask=server.ask)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(gauge.read)
    clock.now += KEPT_S - 1
    assert {reading.at for reading in await gauge.read()} == {1000.0}
    assert server.asked == 1
    clock.now += 1
    assert {reading.at for reading in await gauge.read()} == {clock.now}
    assert server.asked == 2
    await gauge.aclose()


async def test_it_is_asked_in_an_environment_that_hides_nothing() -> None:
    """So that its names mean physical devices, in the order of the bus."""
    server = FakeServer()
    env = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "HIP_VISIBLE_DEVICES": "0",
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    }
    await ListedGauge(Path("/llama-server"), env, ask=server.ask).read()
    assert server.env == {"PATH": "/bin", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize("error", [BinaryError("it did not end"), OSError(2, "No such file or directory")])
async def test_a_server_that_fails_makes_its_devices_unknown(clock: Clock, error: Exception) -> None:
    """It is not asked again at once, and is believed when it answers again."""
    server = FakeServer()
    gauge = ListedGauge(Path("/llama-server"), {}, ask=server.ask)
    known = await gauge.read()
    server.answer = error
    clock.now += KEPT_S
    for _ in range(2):
        readings = await gauge.read()
        assert [reading.device for reading in readings] == [reading.device for reading in known]
        assert all(reading.total_bytes is None and reading.reason for reading in readings)
    assert server.asked == 2
    server.answer = LIST
    clock.now += KEPT_S
    assert (await gauge.read())[0].is_known


async def test_a_device_that_is_no_longer_listed_is_unknown(clock: Clock) -> None:
    """It may come back."""
    server = FakeServer()
    gauge = ListedGauge(Path("/llama-server"), {}, ask=server.ask)
    count = len(await gauge.read())
    server.answer = "Available devices:\n  (none)\n"
    clock.now += KEPT_S
    readings = await gauge.read()
    assert len(readings) == count
    assert all(reading.total_bytes is None for reading in readings)


async def test_what_others_read_is_left_to_them(clock: Clock) -> None:
    """With nothing left to learn it is hardly ever asked."""
    server = FakeServer()
    gauge = ListedGauge(Path("/llama-server"), {}, ask=server.ask)
    beyond = await gauge.read_beyond({"nvidia", "ram"})
    assert [reading.device.id.partition("@")[0] for reading in beyond] == ["Vulkan0", "Vulkan1", "OpenCL0"]
    clock.now += KEPT_S
    assert await gauge.read_beyond({"nvidia", "amd", "other"}) == []
    assert server.asked == 1
    clock.now += COVERED_S
    await gauge.read_beyond({"nvidia", "amd", "other"})
    assert server.asked == 2


def test_the_real_llama_server_is_asked(llama_server: Path) -> None:
    """What it says can be read: of a build for the CPU, that there is nothing."""
    said = ask_llama_server(llama_server, {"PATH": "/usr/bin:/bin"})
    assert "Available devices:" in said
    named = said.partition("Available devices:")[2].splitlines()[1:]
    assert len(parse_devices(said, 0.0)) == sum(": " in line for line in named)


def test_a_server_that_refuses_is_an_error(tmp_path: Path) -> None:
    """Its output is then no list."""
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho '  CUDA0: x (1 MiB, 1 MiB free)'\nexit 3\n")
    server.chmod(0o755)
    with pytest.raises(BinaryError, match="status 3"):
        ask_llama_server(server, {})
