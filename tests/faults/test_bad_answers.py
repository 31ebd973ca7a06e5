"""H4 to H6: a llama-server that answers "not yet" for ever, answers rubbish, or floods its log; a fake one does so."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.host import FakeHost
from fakes.machine import FakeStart
from fakes.supervised import supervised
from fakes.waiting import eventually
from llamavisor.cause import Cause
from llamavisor.events import RouterReady, RouterSpawned
from llamavisor.generation import START_DEADLINE_S
from llamavisor.states import RouterState
from running import RunningDaemon, config_of, start_with

Fake = Callable[..., FakeLlamaServer]
Start = Callable[..., RunningDaemon]
MIB = 2**20
GROWS_BYTES = 100e6
"""By how much a daemon may grow that is answered a gigabyte again and again: it takes 64 MiB of an answer at most."""


# --- H4: not ready for long -------------------------------------------------------------------------------------------


def test_h4_503_until_the_deadline(start: Start) -> None:
    """H4: a router that answers 503 stays STARTING, with that as its reason, is ended at its deadline and tried again.

    With a deadline of six seconds, and for ten minutes only if nobody would end it.
    """
    daemon = start(unready_s=600)
    start_with(daemon, "import llamavisor.generation as generation; generation.START_DEADLINE_S = 6.0")
    with daemon:
        spawned = daemon.wait_for_event("RouterSpawned")
        until, is_told = time.monotonic() + 2, False
        while time.monotonic() < until or not is_told:
            router = daemon.router()
            assert (router["state"], router["pid"]) == ("starting", spawned["pid"]), router["reason"]
            is_told |= any(words in (router["reason"] or "") for words in ("503", "Loading model"))
            time.sleep(0.05)
        assert daemon.call("GET", "/readyz")[0] == 503
        exited = daemon.wait_for_event("RouterExited")
        assert 6.0 <= exited["time"] - spawned["time"] < 10.0
        assert "not ready within 6 s" in daemon.wait_for_router("backoff")["reason"]
        again = daemon.wait_for_event("RouterSpawned", lambda event: event["pid"] != spawned["pid"])
        assert again["cause"] == "start_timeout"
        assert daemon.events("RouterReady") == []
        counted = 'llamavisor_router_restarts_total{reason="start_timeout",router="main"} 1.0'
        eventually(lambda: counted in daemon.metrics(), what="a count")


@pytest.mark.anyio
async def test_h4_a_router_that_never_answers_is_overdue(host: FakeHost, virtual_time: object) -> None:
    """H4: the deadline is a minute and ten milliseconds for each model; then it is ended, and tried after a backoff."""
    host.starts.append(FakeStart(ready_at=600.0, term_s=3.0))
    async with supervised(host) as it:
        it.router.start()
        await it.until(lambda: it.router.process is not None)
        began = anyio.current_time()
        await anyio.sleep(1.0)
        assert it.router.reason == "it does not answer yet: All connection attempts failed"
        await it.reaches(RouterState.STOPPING)
        assert anyio.current_time() - began == pytest.approx(START_DEADLINE_S + 0.03, abs=0.02)
        assert it.story.of(RouterReady) == []
        await it.reaches(RouterState.BACKOFF)
        assert it.router.reason == "not ready within 60 s"
        assert it.router.comeback.history.failures == 1
        await it.reaches(RouterState.READY)
        assert [spawned.cause for spawned in it.story.of(RouterSpawned)] == [None, Cause.START_TIMEOUT]


# --- H5: rubbish ------------------------------------------------------------------------------------------------------

HTML: dict[str, object] = {"status": 200, "type": "text/html", "body": "<p>" * 1000}
ENDLESS = HTML | {"repeat": 300_000}
"""Nearly a gigabyte."""
GARBAGE: dict[str, object] = {"status": 200, "body": '[{"status": '}
PROBE = "import llamavisor.generation as generation; generation.PROBE_INTERVAL_S = 0.5"


def growth(daemon: RunningDaemon, *, over_s: float, state: str) -> float:
    """By how many bytes a daemon grew at most, while its router had to stay in `state`."""
    process = psutil.Process(daemon.pid)
    before = most = process.memory_info().rss
    until = time.monotonic() + over_s
    while time.monotonic() < until:
        most = max(most, process.memory_info().rss)
        assert daemon.router()["state"] == state
        time.sleep(0.02)
    return most - before


def probe_failures(daemon: RunningDaemon) -> float:
    """How many probes of its router have failed."""
    (told,) = [line for line in daemon.metrics().splitlines() if line.startswith("llamavisor_router_probe_failures")]
    return float(told.rpartition(" ")[2])


@pytest.mark.parametrize("path", ["/props", "/models"])
@pytest.mark.parametrize("answer", [ENDLESS, GARBAGE], ids=["endless", "garbage"])
def test_h5_rubbish_while_it_starts(start: Start, path: str, answer: dict[str, object]) -> None:
    """H5: a router that never says what it is stays STARTING, says why, and costs the daemon no memory."""
    with start(answers={path: answer}) as daemon:
        daemon.wait_for_event("RouterSpawned")
        assert growth(daemon, over_s=3 if answer is ENDLESS else 1, state="starting") < GROWS_BYTES
        eventually(lambda: path in (daemon.router()["reason"] or ""), what="what is wrong with it")
        assert daemon.router()["state"] == "starting"
        assert daemon.events("RouterReady") == []


@pytest.mark.parametrize("answer", [HTML, ENDLESS, GARBAGE], ids=["html", "endless", "garbage"])
def test_h5_rubbish_instead_of_health(start: Start, answer: dict[str, object]) -> None:
    """H5: that is a failed probe, a router that gives it is DEGRADED, and costs the daemon no memory."""
    daemon = start(answers={"/health": answer})
    start_with(daemon, PROBE)
    with daemon:
        daemon.wait_for_router("degraded")
        assert growth(daemon, over_s=3 if answer is ENDLESS else 1, state="degraded") < GROWS_BYTES
        assert "/health" in daemon.router()["reason"]
        eventually(lambda: probe_failures(daemon) > 2, what="a third probe that fails")
        assert daemon.chat("alpha")


# --- H6: a flood ------------------------------------------------------------------------------------------------------


@contextmanager
def watched(folder: Path, pattern: str) -> Iterator[list[int]]:
    """How much room the files of a folder take, looked at again and again while the block runs."""
    sizes: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            sizes.append(sum(path.stat().st_size for path in folder.glob(pattern)))

    thread = threading.Thread(target=look, name="disk")
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


@contextmanager
def following_logs(daemon: RunningDaemon) -> Iterator[psutil.Process]:
    """`llamavisor logs -f`, whose output nobody wants."""
    argv = [sys.executable, "-m", "llamavisord", "logs", "--follow"]
    env = {**daemon.env, "LLAMAVISOR_SOCKET": str(daemon.socket)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL) as follower:
        try:
            yield psutil.Process(follower.pid)
        finally:
            follower.send_signal(signal.SIGINT)


def test_h6_a_flood_of_lines(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """H6: the log is rotated at its cap, the disk use is bounded, who follows it costs little, and models answer."""
    flood = fake_llama_server(log_lines_per_s=20_000)
    daemon = RunningDaemon(tmp_path, models_dir, flood, config="")
    daemon.config.write_text(f'log_size = "1MiB"\n{config_of(models_dir, daemon.port)}', encoding="utf-8")
    with daemon:
        daemon.wait_for_router("ready")
        log = Path(daemon.router()["log_file"])
        process = psutil.Process(daemon.pid)
        with following_logs(daemon) as follower, watched(log.parent, f"{log.name}*") as sizes:
            eventually(lambda: daemon.events("LogRotated"), what="a log that was rotated")
            before = process.memory_info().rss
            eventually(lambda: len(daemon.events("LogRotated")) > 4, what="one that was so more often than is kept")
            assert daemon.chat("alpha")
            assert process.memory_info().rss - before < 20e6
            assert follower.memory_info().rss < 100e6
            assert daemon.cli("logs", "--lines", "5").returncode == 0
        files = [f"{log.name}{rotated}" for rotated in ("", ".1", ".2")]
        assert sorted(path.name for path in log.parent.glob(f"{log.name}*")) == files
        assert all((log.parent / name).stat().st_size <= MIB + 65536 for name in files[1:])
    # The current one may grow by what is printed between two looks, which is nearly three MiB a second.
    assert max(sizes) < 3 * MIB + 2 * 3 * MIB


def test_h6_a_line_without_an_end(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """H6: a line of 100 MB is cut to the cap within seconds, costs no memory, and neither router nor model blocks."""
    giant = fake_llama_server(log_giant_line_bytes=100_000_000)
    daemon = RunningDaemon(tmp_path, models_dir, giant, config="")
    daemon.config.write_text(f'log_size = "1MiB"\n{config_of(models_dir, daemon.port)}', encoding="utf-8")
    with daemon:
        process = psutil.Process(daemon.pid)
        before = process.memory_info().rss
        daemon.wait_for_router("ready")
        with following_logs(daemon) as follower:
            assert daemon.cli("logs", "--lines", "5").returncode == 0
            log = Path(daemon.router()["log_file"])
            # On a busy machine it is looked at amid the line, and cut more than once.
            assert daemon.wait_for_event("LogRotated")["size_bytes"] > MIB
            eventually(lambda: sum(path.stat().st_size for path in log.parent.glob(f"{log.name}*")) < 3 * MIB)
            assert daemon.chat("alpha")
            assert follower.memory_info().rss < 100e6
        assert process.memory_info().rss - before < 50e6
