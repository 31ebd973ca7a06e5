"""Real processes and real signals: start, end, what is left behind, and whose it is."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from llamavisor import procfs
from llamavisor.errors import SpawnError
from llamavisor.process import ExitStatus, Process, Spawner, become_subreaper

pytestmark = pytest.mark.anyio

ENV = {"PATH": os.environ["PATH"]}
DEADLINE_S = 30.0
POLITE = """
import signal, sys, time
signal.signal(15, lambda *_: sys.exit(7))
print('up', flush=True)
time.sleep(60)
"""
GRANDCHILD = """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print('child', os.getpid(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.fixture
def anyio_backend() -> str:
    """These tests wait for the real world."""
    return "asyncio"


@pytest.fixture(autouse=True)
def subreaper() -> None:
    """Orphans of what a test starts come to the test process, as they come to the daemon."""
    become_subreaper()


@pytest.fixture
def spawner() -> Spawner:
    """A spawner with an instance of its own."""
    return Spawner(f"test-{os.getpid()}-{time.monotonic_ns()}")


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Processes that the test started and that must not outlive it."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()


async def spawn(spawner: Spawner, code: str, output: Path, started: list[Process]) -> Process:
    """Start a Python program of our own."""
    process = await spawner.spawn([sys.executable, "-I", "-S", "-c", code], env=ENV, output=output)
    started.append(process)
    return process


async def finish(process: Process) -> ExitStatus:
    """Wait for the end and clean up."""
    with anyio.fail_after(DEADLINE_S):
        status = await process.wait()
        await process.clear()
    return status


async def until_printed(output: Path, text: str) -> None:
    """Wait until the program says something."""
    with anyio.fail_after(DEADLINE_S):
        while not output.exists() or text not in output.read_text():
            await anyio.sleep(0.005)


async def test_exit_code_is_told(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """A program that ends by itself is known by its exit code, and its output is in the file."""
    process = await spawn(spawner, "print('hello'); raise SystemExit(3)", tmp_path / "log", started)
    assert await finish(process) == ExitStatus(code=3)
    assert "hello" in (tmp_path / "log").read_text()


async def test_signal_is_told_quickly(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """A killed program is known by its signal, long before a second has passed."""
    process = await spawn(spawner, "import time; print('up', flush=True); time.sleep(60)", tmp_path / "log", started)
    await until_printed(tmp_path / "log", "up")
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    assert await finish(process) == ExitStatus(signal=signal.SIGKILL)
    assert time.monotonic() - began < 1.0
    assert str(process.status) == "SIGKILL"


async def test_clean_room(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """The program leads its own session, has no input, dumps no core, dies with us, and inherits no descriptor."""
    code = (
        "import os, resource, ctypes, signal; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n));"
        "print(os.getsid(0) == os.getpid(), os.readlink('/proc/self/fd/0'), resource.getrlimit(resource.RLIMIT_CORE),"
        "n.value == signal.SIGTERM, open('/proc/self/coredump_filter').read().strip(),"
        "sorted(os.listdir('/proc/self/fd')))"
    )
    process = await spawn(spawner, code, tmp_path / "log", started)
    assert await finish(process) == ExitStatus(code=0)
    told = (tmp_path / "log").read_text().strip()
    assert told == "True /dev/null (0, 0) True 00000000 ['0', '1', '2', '3']"  # 3 is the listdir itself


async def test_environment_is_only_ours(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """The program sees what it was given and our two markers, nothing of the daemon's own environment."""
    process = await spawn(spawner, "import os; print(sorted(os.environ))", tmp_path / "log", started)
    await finish(process)
    names = (tmp_path / "log").read_text()
    assert names.strip() == "['LC_CTYPE', 'LLAMAVISOR_INSTANCE', 'LLAMAVISOR_SPAWN', 'PATH']"


async def test_missing_program_is_permanent(spawner: Spawner, tmp_path: Path) -> None:
    """P5: a program that is not there is told as such, and trying again unchanged is pointless."""
    with pytest.raises(SpawnError, match="No such file") as caught:
        await spawner.spawn([str(tmp_path / "nothing")], env=ENV, output=tmp_path / "log")
    assert caught.value.is_permanent


async def test_unexecutable_program_is_permanent(spawner: Spawner, tmp_path: Path) -> None:
    """P5: a file that no kernel can execute is told as such."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF but not really")
    program.chmod(0o755)
    with pytest.raises(SpawnError, match="Exec format error") as caught:
        await spawner.spawn([str(program)], env=ENV, output=tmp_path / "log")
    assert caught.value.is_permanent


async def test_no_descriptors_left_is_transient(spawner: Spawner, tmp_path: Path) -> None:
    """R2: with every descriptor in use a start fails for now, not for good."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    lowest_free = next(number for number in range(len(used) + 1) if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(SpawnError, match="Too many open files") as caught:
            await spawner.spawn(["/bin/true"], env=ENV, output=tmp_path / "log")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not caught.value.is_permanent


async def test_log_that_cannot_be_written_is_transient(spawner: Spawner, tmp_path: Path) -> None:
    """R1: a log that cannot be written is told by its own name, and not given up: disks get room again."""
    (tmp_path / "log").mkdir()
    with pytest.raises(SpawnError, match=f"cannot write the log {tmp_path}/log") as caught:
        await spawner.spawn(["/bin/true"], env=ENV, output=tmp_path / "log")
    assert not caught.value.is_permanent


async def test_log_is_ours_alone(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """What llama-server prints may hold what people ask: nobody else can read it."""
    await finish(await spawn(spawner, "pass", tmp_path / "log", started))
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


async def test_polite_end(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """A program that heeds SIGTERM ends by itself."""
    process = await spawn(spawner, POLITE, tmp_path / "log", started)
    await until_printed(tmp_path / "log", "up")
    assert await process.terminate(grace_s=DEADLINE_S)
    assert process.status == ExitStatus(code=7)
    await process.clear()


async def test_stubborn_program_is_killed(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """P8: a program that ignores SIGTERM is killed when its grace is over."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = await spawn(spawner, code, tmp_path / "log", started)
    await until_printed(tmp_path / "log", "up")
    assert not await process.terminate(grace_s=0.1)
    assert process.status == ExitStatus(signal=signal.SIGKILL)
    await process.clear()


async def test_stopped_program_hears_sigterm(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """A program that was stopped is continued, so that it can heed SIGTERM."""
    process = await spawn(spawner, POLITE, tmp_path / "log", started)
    await until_printed(tmp_path / "log", "up")
    os.kill(process.pid, signal.SIGSTOP)
    assert await process.terminate(grace_s=DEADLINE_S)
    assert process.status == ExitStatus(code=7)
    await process.clear()


FORK = """
import os, time
if os.fork() == 0:
    {before}
    print('child', os.getpid(), flush=True)
    time.sleep(60)
"""


def child_of(output: Path) -> int:
    """The pid that the forked child printed."""
    return int(output.read_text().split("child")[1].split()[0])


@pytest.mark.parametrize(("before", "escaped"), [("pass", False), ("os.setsid()", True)])
async def test_nothing_is_left_behind(
    spawner: Spawner, tmp_path: Path, started: list[Process], before: str, escaped: bool
) -> None:
    """P9: children that outlive the program are killed and reaped, even those in a session of their own."""
    code = FORK.format(before=before) + "time.sleep(60)\n"
    process = await spawn(spawner, code, tmp_path / "log", started)
    await until_printed(tmp_path / "log", "child")
    child = procfs.identify(child_of(tmp_path / "log"))
    assert child is not None
    os.kill(process.pid, signal.SIGKILL)
    with anyio.fail_after(DEADLINE_S):
        await process.wait()
        leftovers = await process.clear()
    assert leftovers.killed == ((child.pid,) if escaped else ())
    assert leftovers.survivors == ()
    assert not child.is_current


async def test_neighbours_are_not_touched(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """P10: cleaning up after one program leaves another one of ours alone, and so does a sweep of another instance."""
    sleeper = "import time; print('up', flush=True); time.sleep(60)"
    neighbour = await spawn(spawner, sleeper, tmp_path / "neighbour", started)
    process = await spawn(spawner, "pass", tmp_path / "log", started)
    await until_printed(tmp_path / "neighbour", "up")
    await finish(process)
    assert (await Spawner("somebody else").sweep()).killed == ()
    assert neighbour.poll() is None
    neighbour.kill()
    await finish(neighbour)


async def test_left_overs_of_an_earlier_daemon_are_swept(
    spawner: Spawner, tmp_path: Path, started: list[Process]
) -> None:
    """D5: a new daemon of the same installation kills what the last one left, wherever it has gone."""
    process = await spawn(spawner, FORK.format(before="os.setsid()") + "time.sleep(60)\n", tmp_path / "log", started)
    await until_printed(tmp_path / "log", "child")
    child = child_of(tmp_path / "log")
    leftovers = await Spawner(spawner.instance).sweep()
    assert set(leftovers.killed) == {process.pid, child}
    assert leftovers.survivors == ()
    await finish(process)
    with anyio.fail_after(DEADLINE_S):
        while child not in spawner.reap_orphans():  # it came to us, as it would come to the next daemon's init
            await anyio.sleep(0.01)


async def test_orphans_are_reaped_one_by_one(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """P12: an orphan that ended is reaped on the second look, and no exit status of our own children is stolen."""
    with (tmp_path / "log").open("wb") as log:
        program = subprocess.Popen([sys.executable, "-I", "-S", "-c", GRANDCHILD], stdout=log)
    own = await spawn(spawner, "raise SystemExit(5)", tmp_path / "own", started)
    program.wait(DEADLINE_S)
    with anyio.fail_after(DEADLINE_S):
        reaped: list[int] = []
        while not reaped:
            reaped += spawner.reap_orphans()
            await anyio.sleep(0.01)
    assert reaped == [child_of(tmp_path / "log")]
    assert await finish(own) == ExitStatus(code=5)


async def test_daemon_death_ends_the_program(tmp_path: Path) -> None:
    """When the process that spawned dies without a word, the kernel sends the program SIGTERM."""
    code = f"""
import anyio, os
from pathlib import Path
from llamavisor.process import Spawner
async def main():
    argv = [{sys.executable!r}, "-I", "-S", "-c", "import time; time.sleep(60)"]
    process = await Spawner("x").spawn(argv, env={{}}, output=Path({str(tmp_path / "log")!r}))
    print(process.pid, flush=True)
    os.kill(os.getpid(), 9)
anyio.run(main)
"""
    become_subreaper()
    daemon = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, timeout=DEADLINE_S)
    pid = int(daemon.stdout)
    with anyio.fail_after(DEADLINE_S):
        while (info := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)) is None:
            await anyio.sleep(0.01)
    assert (info.si_code, info.si_status) == (os.CLD_KILLED, signal.SIGTERM)


async def test_identity_outlives_nothing(spawner: Spawner, tmp_path: Path, started: list[Process]) -> None:
    """A pid with its start time means one process: after its end the identity is no longer current."""
    process = await spawn(spawner, "pass", tmp_path / "log", started)
    identity = process.identity
    assert identity.is_current
    await finish(process)
    assert not identity.is_current
