"""What it costs to know who is in memory and is used, and to exchange one model for another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
from report import Row, cpu_s, ms

from fakes.bare_router import BareRouter
from fakes.waiting import eventually
from gateway import Gateway
from llamavisor.launch import HTTP_THREADS
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon
from shapes import Shape, write_model

LOADED = 32
POLLING = 0.01
"""Of one core."""
WINDOW_S = 30.0
SETTLE_S = 5.0
"""What begins with a load, such as the first measurement of a model, is over by then."""
FEW, MANY = 3, 3_000
UNCHANGED = 1.25
"""Two daemons with the same models differ by up to a fifth."""
SWAPS = 15
SWAP_S = 0.1
SHAPE = Shape(vocabulary=48_000)
"""200 MiB of weights."""
ONE_MODEL = 330 * 2**20
"""Memory for one such model, and not for two."""


def measure(folder: Path, llama_server: Path) -> Iterator[Row]:
    """Polling, a large catalog, and a swap.

    Args:
        folder: a place for files, on a local file system; 500 MB.
        llama_server: the real one.
    """
    folder.mkdir()
    yield polling(folder / "polling", llama_server)
    yield catalog(folder / "catalog", llama_server)
    yield anyio.run(swap, folder / "swap", llama_server)


def polling(folder: Path, llama_server: Path) -> Row:
    """The CPU that the daemon takes more with so many loaded models than with none, real processes all of them."""
    models = tiny_models(folder, LOADED)
    with RunningDaemon(folder, models, llama_server, flags=["--models-max", "0"]) as daemon:
        eventually(lambda: len(daemon.models()) == LOADED, what="all models", within_s=60)
        daemon.wait_for_router("ready")
        time.sleep(SETTLE_S)
        idle = share(psutil.Process(daemon.pid))
        for name in daemon.models():
            status, told = daemon.call("POST", f"/control/v1/models/{name}/load?wait=60")
            assert status == 200, told
        time.sleep(SETTLE_S)
        busy = share(psutil.Process(daemon.pid))
        looked_at = sum(model["in_flight"] is not None for model in daemon.models().values())
    what = f"asking {LOADED} loaded models, CPU of one core"
    more = busy - idle
    return Row(what, f"{more:.2%}", f"{idle:.2%}", f"{POLLING:.2%}", more < POLLING and looked_at == LOADED)


def catalog(folder: Path, llama_server: Path) -> Row:
    """The CPU that an idle daemon takes with many models, over what one with few takes beside it at the same time.

    Their workers, which look at the folders, are measured by files (`models_folder`).
    """
    with ExitStack() as stack:
        processes = {}
        for count in (FEW, MANY):
            models = tiny_models(folder / str(count), count)
            daemon = stack.enter_context(RunningDaemon(folder / str(count), models, llama_server))
            eventually(lambda: len(daemon.models()) == count, what="all models", within_s=60)  # noqa: B023
            daemon.wait_for_router("ready")
            processes[count] = psutil.Process(daemon.pid)
        time.sleep(SETTLE_S)
        before = {count: cpu_s(process) for count, process in processes.items()}
        time.sleep(2 * WINDOW_S)
        few, many = ((cpu_s(processes[count]) - before[count]) / (2 * WINDOW_S) for count in (FEW, MANY))
    what = f"idle daemon with {MANY:,} models, CPU, over {FEW}"
    return Row(what, f"{many:.2%}", f"{few:.2%}", f"{UNCHANGED * few:.2%}", many <= UNCHANGED * few)


def tiny_models(folder: Path, count: int) -> Path:
    """A folder with so many models that are servable at once."""
    draft, models = folder / "tiny", folder / "models"
    models.mkdir(parents=True)
    write_tiny_model(draft, ["hello"])
    content = draft.read_bytes()
    for at in range(count):
        draft.write_bytes(content)
        draft.rename(models / f"m{at}.gguf")
    return models


def share(process: psutil.Process) -> float:
    """The share of one core that this takes from now on for a while."""
    before, began = cpu_s(process), time.monotonic()
    time.sleep(WINDOW_S)
    return (cpu_s(process) - before) / (time.monotonic() - began)


@dataclass(slots=True)
class Bare:
    """A router without us that exchanges its models as it is told to."""

    router: BareRouter

    def swap_s(self, there: str, wanted: str) -> float:
        """Seconds from the wish to unload one model until another is loaded."""
        with self.router.events() as events:
            began = time.perf_counter()
            for path, name, status in (("unload", there, "unloaded"), ("load", wanted, "loaded")):
                answer = self.router.call("POST", f"/models/{path}", {"model": name})
                assert answer.status == 200, answer
                events.wait_for_status(name, status)
            return time.perf_counter() - began


async def swap(folder: Path, llama_server: Path) -> Row:
    """A lease that has to drive out the only other model, over the same unload and load on a router without us.

    Both routers are told the same, so that their models' processes have as many threads to begin and to end.
    """
    models = folder / "models"
    models.mkdir(parents=True)
    for name in ("here", "there"):
        write_model(models / f"{name}.gguf", SHAPE, is_whole=True)
    gateway = Gateway(folder, models, llama_server, memory=ONE_MODEL)
    bare_s, ours_s = [], []
    async with gateway.running("here", "there"):
        preset = (folder / "state" / "routers" / "main" / "preset.ini").read_text(encoding="utf-8")
        threads = ("--threads-http", str(HTTP_THREADS))
        with BareRouter(llama_server, folder / "bare", models, preset=preset, arguments=threads) as router:
            bare = Bare(router)
            there, wanted = "here", "there"
            await anyio.to_thread.run_sync(router.load, there)
            await lease_s(gateway, there)
            for _ in range(SWAPS):
                bare_s.append(await anyio.to_thread.run_sync(bare.swap_s, there, wanted))
                ours_s.append(await lease_s(gateway, wanted))
                assert len(gateway.children) == 1
                there, wanted = wanted, there
    measured, yardstick = statistics.median(ours_s), statistics.median(bare_s)
    allowed = yardstick + SWAP_S
    return Row(
        "one model leaves for another, over doing so bare",
        ms(measured),
        ms(yardstick),
        ms(allowed),
        measured <= allowed,
    )


async def lease_s(gateway: Gateway, model: str) -> float:
    """Seconds until a lease is granted."""
    began = time.perf_counter()
    async with gateway.fleet.lease(model):
        return time.perf_counter() - began
