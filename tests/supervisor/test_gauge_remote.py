"""Asking drivers through a worker: what hangs, ends or talks nonsense is unknown, and is asked again later.

First on virtual time with a fake worker, then with real worker processes and a fake `pynvml` in them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from trio.testing import MockClock

from fakes.nvml import FakeNvml
from fakes.waiting import eventually
from llamavisor import procfs
from llamavisor.gauge import Device, MachineGauge, RamGauge, Reading, open_gauge
from llamavisor.gauge import machine as machine_module
from llamavisor.gauge import remote as remote_module
from llamavisor.gauge.device import RAM, unknown
from llamavisor.gauge.listed import ListedGauge
from llamavisor.gauge.nvidia import find_nvidia
from llamavisor.gauge.remote import ABSENT_S, ANSWER_S, GIVE_UP_S, KILL_WAIT_S, RESTART_S, RemoteGauge
from llamavisor.gauge.wire import Answer, encode_answer

pytestmark = pytest.mark.anyio

GIB = 1024**3
GPU = Device("0000:01:00.0", "nvidia", "NVIDIA GeForce RTX 3090", uuids=("GPU-1111",), rank=0)
OTHER = Device("0000:41:00.0", "nvidia", "NVIDIA GeForce RTX 3060", uuids=("GPU-2222",), rank=1)
FOUND = Device("0000:01:00.0", "nvidia", "NVIDIA GPU", rank=0)


def full(device: Device = GPU) -> Reading:
    """A reading that is known."""
    return Reading(device, 24 * GIB, 5 * GIB, 18 * GIB, 0.0)


class FakeWorker:
    """Answers each question by `reply`, which may return nothing: then it is silent until `say`."""

    def __init__(self, reply: Callable[[int], bytes | None]) -> None:
        self.reply = reply
        self.questions: list[int] = []
        self.is_killed = False
        self.is_stuck = False
        self.is_closed = False
        self._send, self._receive = anyio.create_memory_object_stream[bytes](100)
        self._gone = anyio.Event()

    def send_nowait(self, data: bytes) -> None:
        """As `WorkerProcess` does."""
        assert not self.is_closed
        self.questions.append(int(data))
        said = self.reply(self.questions[-1])
        if said is not None:
            self.say(said)

    def say(self, data: bytes) -> None:
        """Say this; nothing means that it ends."""
        self._send.send_nowait(data)
        if not data:
            self._gone.set()

    async def receive(self) -> bytes:
        """As `WorkerProcess` does."""
        return await self._receive.receive()

    def kill(self) -> None:
        """As `WorkerProcess` does; one that hangs in the kernel stays."""
        if self._gone.is_set():
            return
        self.is_killed = True
        if not self.is_stuck:
            self.say(b"")

    def let_go(self) -> None:
        """The kernel lets go of it."""
        self.say(b"")

    async def reap(self) -> str:
        """As `WorkerProcess` does."""
        await self._gone.wait()
        return "SIGKILL" if self.is_killed else "exit code 1"

    def close(self) -> None:
        """As `WorkerProcess` does."""
        assert not self.is_closed
        self.is_closed = True
        self._send.close()
        self._receive.close()


class Workers:
    """Starts fake workers; counts them."""

    def __init__(self, reply: Callable[[int], bytes | None] | None = None) -> None:
        self.started: list[FakeWorker] = []
        self.reply = reply or answered(full())
        self.error: OSError | None = None

    def start(self) -> FakeWorker:
        """Start one."""
        if self.error:
            raise self.error
        assert all(worker.is_closed for worker in self.started), "a second worker beside the first"
        self.started.append(FakeWorker(self._reply))
        return self.started[-1]

    def _reply(self, number: int) -> bytes | None:
        return self.reply(number)

    @property
    def last(self) -> FakeWorker:
        """The newest."""
        return self.started[-1]


def answered(*readings: Reading, failure: str = "", absent: bool = False) -> Callable[[int], bytes]:
    """Replies with this."""
    return lambda number: encode_answer(Answer(number, readings, failure, absent))


def silent(_number: int) -> None:
    """Replies nothing."""


def assert_unknown(readings: object, *devices: Device) -> str:
    """Exactly these devices are told, their numbers are None, and there is a reason; it."""
    assert isinstance(readings, list)
    assert [reading.device for reading in readings] == list(devices)
    for reading in readings:
        assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (None, None, None)
        assert reading.reason
    return str(readings[0].reason)


async def test_one_worker_answers_all_questions(virtual_time: MockClock) -> None:
    """A reading is as of the time when it was asked for."""
    workers = Workers()
    gauge = RemoteGauge("NVML", workers.start)
    for _ in range(3):
        await anyio.sleep(1)
        (reading,) = await gauge.read()
        assert (reading.device, reading.free_bytes, reading.at) == (GPU, 18 * GIB, anyio.current_time())
    assert len(workers.started) == 1
    assert workers.last.questions == [1, 2, 3]
    await gauge.aclose()
    assert workers.last.is_closed


async def test_a_worker_that_hangs_is_not_asked_again(virtual_time: MockClock) -> None:
    """Every read ends in time with its devices unknown; there is one question, and one worker."""
    workers = Workers()
    gauge = RemoteGauge("NVML", workers.start)
    await gauge.read()
    workers.reply = silent
    for _ in range(4):
        before = anyio.current_time()
        reason = assert_unknown(await gauge.read(), GPU)
        assert "does not answer" in reason
        assert anyio.current_time() - before == pytest.approx(ANSWER_S)
    assert workers.last.questions == [1, 2]
    assert not workers.last.is_killed
    await gauge.aclose()


async def test_a_worker_that_answers_late_counts_again(virtual_time: MockClock) -> None:
    """What it found so long ago does not: it is asked anew."""
    workers = Workers(silent)
    gauge = RemoteGauge("NVML", workers.start, find=lambda: [FOUND])
    assert_unknown(await gauge.read(), FOUND)
    workers.last.say(encode_answer(Answer(1, (unknown(GPU, 0.0, "old"),))))
    workers.reply = answered(full())
    (reading,) = await gauge.read()
    assert reading.is_known
    assert workers.last.questions == [1, 2]
    await gauge.aclose()


async def test_an_answer_may_come_in_pieces(virtual_time: MockClock) -> None:
    """Over several reads, even."""
    workers = Workers(silent)
    gauge = RemoteGauge("NVML", workers.start)
    line = answered(full())(1)
    await gauge.read()
    workers.last.say(line[:10])
    await gauge.read()
    workers.reply = answered(full(), full(OTHER))
    workers.last.say(line[10:])
    assert [reading.is_known for reading in await gauge.read()] == [True, True]
    await gauge.aclose()


async def test_a_worker_that_hangs_for_long_is_replaced(virtual_time: MockClock) -> None:
    """It is killed, and another one is asked."""
    workers = Workers()
    gauge = RemoteGauge("NVML", workers.start)
    await gauge.read()
    workers.reply = silent
    await gauge.read()
    await anyio.sleep(GIVE_UP_S)
    workers.reply = answered(full())
    (reading,) = await gauge.read()
    assert reading.is_known
    assert [worker.is_killed for worker in workers.started] == [True, False]
    await gauge.aclose()


async def test_a_worker_that_the_kernel_holds_is_not_joined_by_another(virtual_time: MockClock) -> None:
    """It would hang in the same place; once it has gone, the devices are known again."""
    workers = Workers()
    gauge = RemoteGauge("NVML", workers.start)
    await gauge.read()
    workers.reply = silent
    await gauge.read()
    workers.last.is_stuck = True
    await anyio.sleep(GIVE_UP_S)
    for _ in range(5):
        before = anyio.current_time()
        assert_unknown(await gauge.read(), GPU)
        assert anyio.current_time() - before == pytest.approx(KILL_WAIT_S)
        await anyio.sleep(GIVE_UP_S)
    assert len(workers.started) == 1
    workers.last.let_go()
    workers.reply = answered(full())
    assert [reading.is_known for reading in await gauge.read()] == [True]
    assert len(workers.started) == 2
    await gauge.aclose()


async def test_closing_does_not_wait_for_a_worker_that_the_kernel_holds(virtual_time: MockClock) -> None:
    """The daemon ends in time; even while a read waits."""
    workers = Workers(silent)
    gauge = RemoteGauge("NVML", workers.start)
    async with anyio.create_task_group() as group:
        group.start_soon(gauge.read)
        await anyio.sleep(0.5)
        workers.last.is_stuck = True
        await gauge.aclose()
        assert anyio.current_time() <= ANSWER_S + KILL_WAIT_S + 0.01
        assert workers.last.is_closed


async def test_closing_ends_a_read_that_waits(virtual_time: MockClock) -> None:
    """It is told at once that there is no answer, and nothing is left of the worker."""
    workers = Workers(silent)
    gauge = RemoteGauge("NVML", workers.start)
    async with anyio.create_task_group() as group:
        group.start_soon(gauge.read)
        await anyio.sleep(0.5)
        await gauge.aclose()
        assert anyio.current_time() == pytest.approx(0.5)
    assert workers.last.is_closed


async def test_a_worker_that_ends_is_replaced_and_not_at_once(virtual_time: MockClock) -> None:
    """One that crashes at every question must not be started every second."""
    workers = Workers()
    gauge = RemoteGauge("NVML", workers.start)
    await gauge.read()
    workers.reply = lambda _number: b""
    assert "ended (exit code 1)" in assert_unknown(await gauge.read(), GPU)
    assert workers.last.is_closed
    assert_unknown(await gauge.read(), GPU)
    assert len(workers.started) == 1
    workers.reply = answered(full())
    await anyio.sleep(RESTART_S)
    assert (await gauge.read())[0].is_known
    assert len(workers.started) == 2
    await gauge.aclose()


@pytest.mark.parametrize("said", [b"what?\n", answered(full())(77), b"x" * (2**20 + 1), b"{}\n"])
async def test_a_worker_that_makes_no_sense_is_killed(virtual_time: MockClock, said: bytes) -> None:
    """Nonsense, the answer to another question, or a line without an end."""
    workers = Workers(lambda _number: said)
    gauge = RemoteGauge("NVML", workers.start, find=lambda: [FOUND])
    if b"\n" not in said:
        workers.reply = silent
        async with anyio.create_task_group() as group:
            group.start_soon(gauge.read)
            await anyio.sleep(0.1)
            workers.last.say(said)
            workers.last.say(said)
    else:
        assert_unknown(await gauge.read(), FOUND)
    assert workers.last.is_killed
    workers.reply = answered(full())
    await anyio.sleep(RESTART_S)
    assert (await gauge.read())[0].is_known
    await gauge.aclose()


async def test_a_worker_that_cannot_be_started_makes_devices_unknown(virtual_time: MockClock) -> None:
    """Out of processes, say; it is tried again."""
    workers = Workers()
    workers.error = OSError(11, "Resource temporarily unavailable")
    gauge = RemoteGauge("NVML", workers.start, find=lambda: [FOUND])
    assert "Resource temporarily unavailable" in assert_unknown(await gauge.read(), FOUND)
    workers.error = None
    await anyio.sleep(RESTART_S)
    assert (await gauge.read())[0].is_known
    await gauge.aclose()


async def test_where_there_are_no_devices_nobody_is_asked_for_a_while(virtual_time: MockClock) -> None:
    """No worker is kept for them; a driver that is loaded later is found."""
    workers = Workers(answered(failure="NVML Shared Library Not Found", absent=True))
    gauge = RemoteGauge("NVML", workers.start)
    assert list(await gauge.read()) == []
    assert workers.last.is_closed
    await anyio.sleep(ABSENT_S - 1)
    assert list(await gauge.read()) == []
    assert len(workers.started) == 1
    workers.reply = answered(full())
    await anyio.sleep(1)
    assert (await gauge.read())[0].is_known
    await gauge.aclose()


@pytest.mark.parametrize("absent", [True, False])
async def test_devices_that_fail_are_not_devices_that_are_absent(virtual_time: MockClock, absent: bool) -> None:
    """What was there, or what the kernel says is there, is unknown, and is asked for again and again."""
    workers = Workers(answered(failure="NVML: no", absent=absent))
    gauge = RemoteGauge("NVML", workers.start, find=lambda: [FOUND])
    assert assert_unknown(await gauge.read(), FOUND) == "NVML: no"
    workers.reply = answered(full())
    assert (await gauge.read())[0].device == GPU
    workers.reply = answered(failure="NVML: no", absent=absent)
    assert assert_unknown(await gauge.read(), GPU) == "NVML: no"
    assert len(workers.started) == 1
    await gauge.aclose()


async def test_a_device_that_does_not_say_who_it_is_is_unknown(virtual_time: MockClock) -> None:
    """The others are known, in the places that they had before."""
    workers = Workers(answered(full(GPU), full(OTHER)))
    gauge = RemoteGauge("NVML", workers.start)
    await gauge.read()
    lost = Device(OTHER.id, "nvidia", OTHER.name, uuids=OTHER.uuids)
    workers.reply = answered(full(lost), failure="NVML: device 0: GPU is lost")
    fine, broken = await gauge.read()
    assert (fine.device, fine.is_known) == (OTHER, True)
    assert_unknown([broken], GPU)
    await gauge.aclose()


async def test_a_device_that_was_taken_out_is_gone(virtual_time: MockClock) -> None:
    """A MIG instance that was dissolved, say: all is well without it."""
    workers = Workers(answered(full(GPU), full(OTHER)))
    gauge = RemoteGauge("NVML", workers.start)
    await gauge.read()
    workers.reply = answered(full(GPU))
    for _ in range(2):
        assert [reading.device for reading in await gauge.read()] == [GPU]
    await gauge.aclose()


async def test_many_may_read_at_once(virtual_time: MockClock) -> None:
    """They take turns; while the worker hangs, all of them end in time."""
    workers = Workers()
    gauge = RemoteGauge("NVML", workers.start)
    told: list[bool] = []

    async def ask() -> None:
        told.append((await gauge.read())[0].is_known)

    for reply in (answered(full()), silent):
        workers.reply = reply
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
    assert told == [True] * 3 + [False] * 3
    assert anyio.current_time() == pytest.approx(ANSWER_S)
    assert workers.last.questions == [1, 2, 3, 4]
    await gauge.aclose()


async def test_a_read_that_is_cancelled_leaves_a_question_that_is_heard_later(virtual_time: MockClock) -> None:
    """Cancelling does not kill the worker."""
    workers = Workers(silent)
    gauge = RemoteGauge("NVML", workers.start)
    with anyio.move_on_after(0.1):
        await gauge.read()
    workers.last.say(answered(full())(1))
    workers.reply = answered(full())
    assert (await gauge.read())[0].is_known
    assert len(workers.started) == 1
    await gauge.aclose()


# Real worker processes


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A fake `pynvml` that worker processes will import."""
    fake = FakeNvml(tmp_path / "nvml")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(fake.folder), os.environ.get("PYTHONPATH")])))
    monkeypatch.setattr(remote_module, "RESTART_S", 0.0)
    return fake


def real_gauge(root: Path, *, answer_s: float = 30.0) -> RemoteGauge:
    """A gauge with real workers, which on a busy machine take their time to start."""
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    gauge = RemoteGauge.of("nvidia", root=root, env=env, find=lambda: find_nvidia(root))
    gauge._answer_s = answer_s
    return gauge


def worker_pids() -> list[int]:
    """The workers of this process that run."""
    running = [pid for pid in procfs.children(os.getpid()) if "llamavisor.gauge.worker" in procfs.command_line(pid)]
    return [pid for pid in running if (stat := procfs.stat(pid)) is not None and not stat.is_zombie]


async def test_a_real_worker_tells_what_nvml_says(nvml: FakeNvml, tmp_path: Path) -> None:
    """And nothing is left of it."""
    gauge = real_gauge(tmp_path)
    for _ in range(2):
        (reading,) = await gauge.read()
        assert (reading.device, reading.total_bytes, reading.free_bytes) == (GPU, 24 * GIB, 18 * GIB)
        assert reading.processes == {7: GIB}
    (pid,) = worker_pids()
    assert procfs.has_environment(pid, "PYTHONDONTWRITEBYTECODE=1")
    await gauge.aclose()
    assert worker_pids() == []


async def test_a_real_worker_that_crashes_is_replaced(nvml: FakeNvml, tmp_path: Path) -> None:
    """A crash of the foreign library is an unknown reading."""
    gauge = real_gauge(tmp_path)
    await gauge.read()
    nvml.fails("crash")
    assert "SIGABRT" in assert_unknown(await gauge.read(), GPU)
    nvml.works()
    assert (await gauge.read())[0].is_known
    await gauge.aclose()


async def test_what_a_foreign_library_raises_is_a_reason(nvml: FakeNvml, tmp_path: Path) -> None:
    """Whatever it is; the worker goes on."""
    gauge = real_gauge(tmp_path)
    (first,) = await gauge.read()
    before = worker_pids()
    nvml.fails("raise")
    assert "not an NVMLError" in assert_unknown(await gauge.read(), first.device)
    nvml.works()
    assert (await gauge.read())[0].is_known
    assert worker_pids() == before
    await gauge.aclose()


async def test_a_real_worker_that_hangs_is_waited_for(nvml: FakeNvml, tmp_path: Path) -> None:
    """It answers when the driver does, and is the same process as before."""
    gauge = real_gauge(tmp_path)
    await gauge.read()
    before = worker_pids()
    nvml.fails("hang")
    gauge._answer_s = 0.2
    for _ in range(2):
        assert_unknown(await gauge.read(), GPU)
    nvml.works()
    gauge._answer_s = 30.0
    assert (await gauge.read())[0].is_known
    assert worker_pids() == before
    await gauge.aclose()


async def test_a_real_worker_that_hangs_does_not_keep_the_daemon(nvml: FakeNvml, tmp_path: Path) -> None:
    """It is killed where it hangs."""
    nvml.fails("hang")
    gauge = real_gauge(tmp_path, answer_s=0.2)
    assert list(await gauge.read()) == []
    assert len(worker_pids()) == 1
    await gauge.aclose()
    eventually(lambda: not worker_pids(), what="end of the worker")


async def test_a_real_worker_that_is_stopped_is_replaced(
    nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while; a signal that means the daemon does not end it."""
    gauge = real_gauge(tmp_path)
    await gauge.read()
    (pid,) = worker_pids()
    os.kill(pid, signal.SIGTERM)
    assert (await gauge.read())[0].is_known
    assert worker_pids() == [pid]
    os.kill(pid, signal.SIGSTOP)
    gauge._answer_s = 0.2
    assert_unknown(await gauge.read(), GPU)
    monkeypatch.setattr(remote_module, "GIVE_UP_S", 0.0)
    gauge._answer_s = 30.0
    (reading,) = await gauge.read()
    assert reading.is_known
    assert worker_pids() != [pid]
    await gauge.aclose()


async def test_without_a_driver_no_worker_is_kept(nvml: FakeNvml, tmp_path: Path) -> None:
    """There are no devices then; if the kernel knows some they are unknown."""
    nvml.fails("absent")
    gauge = real_gauge(tmp_path)
    assert list(await gauge.read()) == []
    assert repr(gauge) == "<RemoteGauge NVML absent>"
    assert worker_pids() == []
    await gauge.aclose()
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    gauge = real_gauge(tmp_path)
    assert_unknown(await gauge.read(), FOUND)
    await gauge.aclose()


# All gauges of a machine


async def test_a_machine_is_read_at_once(virtual_time: MockClock) -> None:
    """RAM is known while a GPU hangs, and all of it takes no longer than the GPU; a device is there once."""

    class Slow:
        async def read(self) -> list[Reading]:
            await anyio.sleep(2)
            return [unknown(GPU, 0.0, "slow"), full(OTHER)]

        async def aclose(self) -> None:
            pass

    class Ram(Slow):
        async def read(self) -> list[Reading]:
            return [full(RAM), full(OTHER)]

    gauge = MachineGauge([Ram(), Slow(), Slow()])
    readings = await gauge.read()
    assert [reading.device for reading in readings] == [RAM, OTHER, GPU]
    assert anyio.current_time() == pytest.approx(2)
    await gauge.aclose()


async def test_llama_server_is_asked_for_what_is_left(tmp_path: Path) -> None:
    """A card that NVML reads is not read a second time under another name."""

    def ask(_path: Path, _env: object) -> str:
        return "  CUDA0: x (1 MiB, 1 MiB free)\n  Vulkan0: Intel(R) Arc(TM) A770 Graphics (DG2) (2 MiB, 1 MiB free)\n"

    listed = ListedGauge(tmp_path, {}, ask=ask)
    workers = Workers()
    gauge = MachineGauge([RamGauge(), RemoteGauge("NVML", workers.start)], listed=listed)
    assert [reading.device.id for reading in await gauge.read()] == ["RAM", GPU.id, "Vulkan0@llama-server"]
    await gauge.aclose()


async def test_this_machine_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RAM is always there; what is not installed, or not in /sys, is not asked."""
    monkeypatch.setattr(machine_module, "has_nvml", lambda: False)
    gauge = open_gauge({}, root=tmp_path)
    assert [reading.device.id for reading in await gauge.read()] == ["RAM"]
    await gauge.aclose()
    gauge = open_gauge({})
    assert (await gauge.read())[0].is_known
    await gauge.aclose()


async def test_what_a_machine_has_is_asked(nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nvidia-ml-py installed and an AMD card in /sys, both are read by workers of their own."""
    monkeypatch.setattr(machine_module, "has_nvml", lambda: True)
    device = tmp_path / "sys/devices/0000:03:00.0"
    device.mkdir(parents=True)
    (tmp_path / "sys/class/drm/card0").mkdir(parents=True)
    (tmp_path / "sys/class/drm/card0/device").symlink_to(device)
    said = {"vendor": "0x1002", "mem_busy_percent": 0, "mem_info_vram_total": 24 * GIB, "mem_info_vram_used": GIB}
    for name, text in said.items():
        (device / name).write_text(f"{text}\n")
    (tmp_path / "proc/meminfo").parent.mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1024 kB\nMemAvailable: 1000 kB\n")
    gauge = open_gauge({}, root=tmp_path)
    readings: dict[str, Reading] = {}
    while len(readings) < 3 or not all(reading.is_known for reading in readings.values()):  # workers start slowly
        readings = {reading.device.id: reading for reading in await gauge.read()}
    assert list(readings) == ["RAM", "0000:01:00.0", "0000:03:00.0"]
    assert readings["0000:01:00.0"].free_bytes == 18 * GIB
    assert readings["0000:03:00.0"].free_bytes == 23 * GIB
    assert len(worker_pids()) == 2
    await gauge.aclose()
    assert worker_pids() == []
