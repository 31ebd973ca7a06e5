"""`make bench`: the numbers that llamavisor is measured by, each against its yardstick in the same run.

Nothing here is a test: machines are shared and noisy. Run it on a quiet machine; what counts are the ratios.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

import gateway_bench
import gguf_header
import models_folder
import pulling
import recovery
import residency_simulation
import resident_models
from report import Row, cpu_s, ms, show

from conftest import find_llama_server
from fakes.bare_router import BareRouter
from llamavisord.cli.program import COMPLETE
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

RUNS = 7
STABLE_S = 10.5
"""A router that has been READY for 10 s is restarted at once; before that the backoff would be measured."""
IDLE_S = 60.0
TAB_S = 0.15
OVER_S = 1.0
"""A restart is over by then."""


def main() -> None:
    """Measure everything, or the parts that are named, and print one table."""
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only this: {', '.join(PARTS)}")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part of it: {', '.join(unknown)}")
    llama_server = find_llama_server()
    if llama_server is None:
        sys.exit("no llama-server: run `make bench`, which builds one")
    print(f"# llamavisor bench: {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}; {llama_server}")
    if os.getloadavg()[0] > 0.5:
        print("# the machine is not quiet: the ratios hold, the absolute times are too long")
    print(f"{'what':<52} {'measured':>12} {'yardstick':>12} {'allowed':>12}")
    with tempfile.TemporaryDirectory(prefix="llamavisor-bench-") as folder:
        models_dir = Path(folder) / "models"
        models_dir.mkdir()
        for name in ("alpha", "beta", "gamma"):
            write_tiny_model(models_dir / f"{name}.gguf", ["I", "am", name])
        for part in parts:
            for each in PARTS[part](Path(folder), models_dir, llama_server):
                show(each)


def measure_restart(folder: Path, models_dir: Path, llama_server: Path) -> Iterator[Row]:
    """From the SIGKILL of the router until it is READY again, over a bare start of the same llama-server."""
    bare = []
    for run in range(RUNS):
        router = BareRouter(llama_server, folder / f"bare{run}", models_dir)
        began = time.monotonic()
        router.start()
        wait_for_health(router.port)
        bare.append(time.monotonic() - began)
        router.stop()
    restarts = []
    state = folder / "restart"
    state.mkdir()
    with RunningDaemon(state, models_dir, llama_server) as daemon:
        for _ in range(RUNS):
            before = daemon.wait_for_router("ready")["pid"]
            last = daemon.status()["event_id"]
            time.sleep(STABLE_S)
            killed = time.time()
            os.kill(before, signal.SIGKILL)
            time.sleep(OVER_S)  # asking all the time would be measured too; the events carry their times
            ready = daemon.wait_for_event("RouterReady", lambda event: event["id"] > last)  # noqa: B023
            restarts.append(ready["time"] - killed)
    yardstick, measured = statistics.median(bare), statistics.median(restarts)
    allowed = 1.15 * yardstick + 0.05
    yield Row("SIGKILL of the router to READY", ms(measured), ms(yardstick), ms(allowed), measured <= allowed)


def wait_for_health(port: int) -> None:
    """Ask until the server answers, as often as llamavisor does."""
    import httpx  # noqa: PLC0415 (only this measurement needs it)

    with httpx.Client(trust_env=False) as client:

        def answers() -> bool:
            try:
                return client.get(f"http://127.0.0.1:{port}/health").status_code == 200
            except httpx.HTTPError:
                return False

        while not answers():
            time.sleep(0.003)


def measure_status(folder: Path, models_dir: Path, llama_server: Path) -> Iterator[Row]:
    """The wall time of `llamavisor status`, over the start of Python itself, and what a Tab waits for."""
    state = folder / "status"
    state.mkdir()
    with RunningDaemon(state, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        command = Path(sys.executable).with_name("llamavisor")
        env = {**daemon.env, "LLAMAVISOR_SOCKET": str(daemon.socket)}
        run = partial(subprocess.run, env=env, stdout=subprocess.DEVNULL, check=True)
        status = median_of(lambda: run([command, "status"]))
        names = median_of(lambda: run([command, COMPLETE, "models"]))
    python = median_of(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    allowed = min(0.15, 3 * python + 0.06)
    yield Row("llamavisor status, over python3 -c pass", ms(status), ms(python), ms(allowed), status <= allowed)
    yield Row("names of models for a Tab in a shell", ms(names), ms(python), ms(TAB_S), names < TAB_S)


def measure_idle(folder: Path, models_dir: Path, llama_server: Path) -> Iterator[Row]:
    """What the daemon itself takes while nothing happens, with one router and three models."""
    state = folder / "idle"
    state.mkdir()
    with RunningDaemon(state, models_dir, llama_server) as daemon:
        daemon.wait_for_router("ready")
        process = psutil.Process(daemon.pid)
        worker = next(child for child in process.children() if "llamavisor.watch.worker" in child.cmdline())
        before, began = cpu_s(process, worker), time.monotonic()
        time.sleep(IDLE_S)
        share = (cpu_s(process, worker) - before) / (time.monotonic() - began)
        resident, beside = process.memory_info().rss, worker.memory_info().rss
    yield Row(f"idle daemon and worker, CPU of one core, {IDLE_S:.0f} s", f"{share:.2%}", "", "0.50%", share < 0.005)
    yield Row("idle daemon, resident", f"{resident / 1e6:.0f} MB", "", "80 MB", resident < 80e6)
    yield Row("the worker that looks at its folder, resident", f"{beside / 1e6:.0f} MB", "", "", is_good=True)


def median_of(work: Callable[[], object]) -> float:
    """The median wall time in seconds of several runs, after one to warm up."""
    times = []
    work()
    for _ in range(3 * RUNS):
        began = time.monotonic()
        work()
        times.append(time.monotonic() - began)
    return statistics.median(times)


PARTS: Mapping[str, Callable[[Path, Path, Path], Iterable[Row]]] = {
    "restart": measure_restart,
    "recovery": lambda folder, _, llama_server: recovery.measure(folder / "recovery", llama_server),
    "status": measure_status,
    "idle": measure_idle,
    "header": lambda folder, *_: gguf_header.measure(folder),
    "folder": lambda folder, _, llama_server: models_folder.measure(folder, llama_server),
    "residents": lambda folder, _, llama_server: resident_models.measure(folder / "residents", llama_server),
    "pull": lambda folder, _, llama_server: pulling.measure(folder / "pull", llama_server),
    "simulation": lambda *_: residency_simulation.measure(),
    "gateway": lambda folder, _, llama_server: gateway_bench.measure(folder / "gateway", llama_server),
}


if __name__ == "__main__":
    main()
