"""D4: nothing piles up, however often a model comes and goes and the configuration is read again."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import psutil
import pytest
import trio.lowlevel

from fakes.bare_router import free_port
from fakes.fleet import GatewayStage, models
from fakes.waiting import eventually
from leaks import census
from llamavisor.settings import FleetSettings
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

NAMES = tuple(f"m{number}" for number in range(8))
CYCLES_S = 20.0
"""So long models come and go; a thousand times would take two minutes, that is done on virtual time."""
RELOADS = 100
PASSING = 10
"""So many objects of one kind may be on their way at any moment; what each load or reload leaves behind is more."""
MIB = 2**20

PROGRAM = """
import asyncio, json, os, signal, sys
sys.path.insert(0, {tests!r})
from leaks import census
from llamavisord.cli import main
from llamavisord.daemon import Daemon

async def tell(self):
    self.bus._kept.clear()  # bounded, and what is in it differs
    counted = {{**census(), "tasks": len(asyncio.all_tasks())}}
    with open({told!r} + ".new", "w") as file:
        json.dump(counted, file)
    os.rename({told!r} + ".new", {told!r})

Daemon.try_reload = tell  # what SIGHUP calls
raise SystemExit(main())
"""


@pytest.mark.real
def test_d4_loads_and_reloads_leak_nothing(tmp_path: Path, llama_server: Path) -> None:
    """D4: no descriptor, thread, process, task or entry of a table more after hundreds of loads and reloads."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in NAMES:
        write_tiny_model(folder / f"{name}.gguf", ["I", "am", name])
    config = f'port = {free_port()}\nmodels_dir = "{folder}"\nmodels_max = 0\n'
    config += '[metrics]\nenabled = false\n[defaults]\nargs = ["--threads", "1"]\n'
    told = tmp_path / "told.json"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parents[1]), told=str(told)))
    daemon = RunningDaemon(tmp_path, folder, llama_server, config=config)
    daemon.program = [sys.executable, str(program)]
    with daemon:
        daemon.wait_for_router("ready")
        process = psutil.Process(daemon.pid)

        def inside() -> Counter[str]:
            told.unlink(missing_ok=True)
            daemon.signal(1)
            eventually(told.exists)
            return Counter(json.loads(told.read_text()))

        def outside() -> Counter[str]:
            return Counter(files=process.num_fds(), processes=len(process.children(recursive=True)))

        come_and_go(daemon, 5.0)
        reload(daemon, 5)
        before, held, threads, size = inside(), outside(), process.num_threads(), process.memory_info().rss
        cycles = come_and_go(daemon, CYCLES_S)
        assert cycles > 4 * PASSING
        reload(daemon, RELOADS)
        # A connection that is kept alive for a moment may have been among what was held before.
        eventually(lambda: not outside() - held, what=f"no more held than before: {held}")
        assert process.num_threads() <= threads + 2  # idle workers come and go
        assert not grown(before, inside())
        assert process.memory_info().rss - size < 8 * MIB


def grown(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What there is more of."""
    return {name: more for name, more in (after - before).items() if more >= PASSING}


def come_and_go(daemon: RunningDaemon, for_s: float) -> int:
    """Load and unload all models side by side for so long; how often it was done."""
    until = time.monotonic() + for_s

    def keep(name: str) -> int:
        count = 0
        while time.monotonic() < until:
            for what in ("load", "unload"):
                assert daemon.call("POST", f"/control/v1/models/{name}/{what}?wait=true")[0] == 200
            count += 1
        return count

    with ThreadPoolExecutor(len(NAMES)) as clients:
        return sum(clients.map(keep, NAMES))


def reload(daemon: RunningDaemon, times: int) -> None:
    """Have it read its configuration again."""
    for _ in range(times):
        assert daemon.call("POST", "/control/v1/reload")[0] == 200


@pytest.mark.anyio
@pytest.mark.usefixtures("virtual_time")
async def test_d4_a_thousand_loads_and_a_hundred_reloads_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4: none of them leaves an object, a task, a process or an entry of a table behind.

    New names come all the time, of files and of routers: what is kept by name must go with whom it names.
    """
    monkeypatch.setattr("llamavisor.announcer.SEEN_MAX", 5)  # of files that have gone so many are remembered
    it = GatewayStage(tmp_path, models(["alpha", "beta"], gib=4, load_s=0.05))
    main = it.router()

    async def settled() -> Counter[str]:
        await it.fleet.apply(FleetSettings(routers=(main,), serve="gateway"))
        await anyio.sleep(120.0)
        for kept in (it.story.all, it.bus._kept):
            kept.clear()
        it.machine.processes = it.machine.alive  # the books of the fakes
        for books in (it.hosts, it.machine.written):
            for name in set(books) - {main.name}:
                del books[name]
        return census() + Counter(
            tasks=trio.lowlevel.current_statistics().tasks_living, processes=len(it.machine.alive)
        )

    async def cycle(name: str) -> None:
        await it.until(lambda: name in it["main"].shelf.wanted)
        async with it.fleet.lease(name, router="main"):
            pass
        assert await it.fleet.unload(it["main"], name)

    async def come_and_go(name: str, times: int) -> None:
        for count in range(times):
            await cycle(("alpha", "beta")[count % 2])
            if count % 10 == 0:  # a file and a router with names of their own come and go again
                it.put(f"{name}{count}")
                spare = it.router(f"{name}{count}")
                await it.fleet.apply(FleetSettings(routers=(main, spare), serve="gateway"))
                await cycle(f"{name}{count}")
                it.watches[0].remove(f"{name}{count}")
                await it.fleet.apply(FleetSettings(routers=(main,), serve="gateway"))

    async with it.running(main):
        await come_and_go("warm", 100)
        before = await settled()
        await come_and_go("more", 1000)
        assert not grown(before, await settled())
