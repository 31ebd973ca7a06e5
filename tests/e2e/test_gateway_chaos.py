"""Clients keep asking while models and routers are killed, and none of them is sent away without need.

`LLAMAVISOR_CHAOS_S=120 pytest -s tests/e2e/test_gateway_chaos.py` is the whole of it; by default it is shorter.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import anyio
import anyio.to_thread
import httpx
import pytest

from asking import LONG, SHORT, Ask, End, Ended
from fakes.bare_router import free_port
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real

CHAOS_S = float(os.environ.get("LLAMAVISOR_CHAOS_S", "40"))
CLIENTS = 10
CHILD_EVERY_S = 5.0
ROUTER_EVERY_S = 20.0
REQUEST_S = 45.0
"""No request takes longer, whatever happens to it: longer is a hang."""
SETTLE_S = 6.0
"""By then every model has been asked how busy it is, and children have closed the connections that nobody used."""
PAUSE_S = 0.02
"""Between two requests of a client, so that the machine also gets to restart what was killed."""
MODELS = ("m0", "m1", "m2", "m3")


@dataclass
class Tally:
    """What became of all requests.

    Attributes:
        ended: how many ended how, by kind of request.
        slowest_s: the longest of each kind.
        again: requests that were sent to a second process, as their answers tell.
        wrong: what must not happen, one line each.
        kills: what was killed how often.
    """

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest_s: dict[str, float] = field(default_factory=dict)
    again: int = 0
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """A table."""
        lines = [f"{'':20}{'whole':>8}{'broken':>8}{'wrong':>8}{'slowest':>10}"]
        for kind in sorted(self.slowest_s):
            counts = "".join(f"{self.ended[kind, how]:8}" for how in ("whole", "broken", "wrong"))
            lines.append(f"{kind:20}{counts}{self.slowest_s[kind]:9.2f}s")
        routers = self.kills["router"]
        models = self.kills.total() - routers
        return "\n".join([*lines, f"killed: {models} models, {routers} routers; sent again and answered: {self.again}"])


def _asks(model: str) -> list[Ask]:
    return [Ask(model, tokens, is_stream=is_stream) for tokens in (SHORT, LONG) for is_stream in (False, True)]


@pytest.fixture
def daemon(tmp_path: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A gateway over models that go on for ever, with room for all of them."""
    models = tmp_path / "models"
    models.mkdir()
    for name in MODELS:
        write_tiny_model(models / f"{name}.gguf", ["I", "am", name], loop=True, n_layer=60)
    port = free_port()
    config = f"""
serve = "gateway"
port = {port}
models_dir = "{models}"
models_max = 0
[defaults]
threads = 1
"""
    with RunningDaemon(tmp_path, models, llama_server, config=config + f"[metrics]\nport = {free_port()}\n") as running:
        running.port = port
        running.wait_for_router("ready")
        yield running


async def _ask(client: httpx.AsyncClient, ask: Ask, tally: Tally) -> None:
    """Send one request, and judge its answer: here nobody may be sent away."""
    began = time.monotonic()
    ended = Ended(End.WRONG, why="a hang")
    with anyio.move_on_after(REQUEST_S):
        try:
            ended = await ask.send(client)
        except httpx.HTTPError as error:
            ended = Ended(End.WRONG, why=repr(error))
    took_s = time.monotonic() - began
    how = "wrong" if ended.how is End.REFUSED else ended.how.value
    tally.again += ended.was_sent_again
    tally.ended[ask.kind, how] += 1
    tally.slowest_s[ask.kind] = max(tally.slowest_s.get(ask.kind, 0.0), took_s)
    if how == "wrong":
        tally.wrong.append(f"{ask.kind} of {ask.model} after {took_s:.2f} s: {ended.why}")


async def _kill_children(daemon: RunningDaemon, tally: Tally) -> None:
    """Kill a model every few seconds, the one that is answering most of those that were killed least."""
    while True:
        await anyio.sleep(CHILD_EVERY_S)
        name, pid = await anyio.to_thread.run_sync(_busiest, daemon, tally)
        if pid is not None and _kill(pid):
            tally.kills[name] += 1


def _busiest(daemon: RunningDaemon, tally: Tally) -> tuple[str, int | None]:
    occupants = [each for each in daemon.call("GET", "/control/v1/ps")[1]["models"] if each["state"] == "loaded"]
    occupants.sort(key=lambda each: (-tally.kills[each["model"]], each["leases"]))
    name = occupants[-1]["model"] if occupants else ""
    return name, daemon.model(name)["pid"] if name else None


async def _kill_routers(daemon: RunningDaemon, tally: Tally) -> None:
    """Kill the router every now and then."""
    await anyio.sleep(CHILD_EVERY_S / 2)  # never together with a child
    while True:
        pid = (await anyio.to_thread.run_sync(daemon.router))["pid"]
        if pid is not None and _kill(pid):
            tally.kills["router"] += 1
        await anyio.sleep(ROUTER_EVERY_S)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # it was faster
        return False
    return True


async def _client(client: httpx.AsyncClient, seed: int, until: float, tally: Tally) -> None:
    choose = Random(seed)
    while time.monotonic() < until:
        await _ask(client, choose.choice(_asks(choose.choice(MODELS))), tally)
        await anyio.sleep(PAUSE_S)


def _held(daemon: RunningDaemon) -> Counter[str]:
    """The descriptors and processes that the daemon holds when no request is left in it, by their kind."""
    status, ps = daemon.call("GET", "/control/v1/ps")
    assert status == 200, ps
    busy = [*(each for each in ps["models"] if each["leases"] or each["in_flight"]), *ps["queues"]]
    assert not busy, busy
    held = Counter(process.name() for process in daemon.processes())
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            held[re.sub(r"[0-9]+", "N", str(link.readlink()))] += 1
    return held


@pytest.mark.anyio
@pytest.mark.timeout(CHAOS_S + 3 * REQUEST_S)
async def test_nobody_notices_who_need_not(daemon: RunningDaemon) -> None:
    """Who had no data yet gets a whole answer, broken streams say so and end, nothing hangs and nothing leaks."""
    tally = Tally()
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    url = f"http://127.0.0.1:{daemon.port}"

    async def ask_each(client: httpx.AsyncClient) -> None:
        for model in MODELS:
            for ask in _asks(model):
                await _ask(client, ask, tally)

    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_S, limits=limits, trust_env=False) as client:
        await ask_each(client)
    assert not tally.wrong
    await anyio.sleep(SETTLE_S)
    before = eventually(lambda: _held(daemon), what="a daemon at rest")

    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_S, limits=limits, trust_env=False) as client:
        async with anyio.create_task_group() as killing:
            killing.start_soon(_kill_children, daemon, tally)
            killing.start_soon(_kill_routers, daemon, tally)
            async with anyio.create_task_group() as asking:
                for seed in range(CLIENTS):
                    asking.start_soon(_client, client, seed, time.monotonic() + CHAOS_S, tally)
            killing.cancel_scope.cancel()
        await ask_each(client)

    print(f"\n{tally}")
    assert not tally.wrong, f"{len(tally.wrong)} of {tally.ended.total()}:\n" + "\n".join(tally.wrong[:40])
    assert tally.kills["router"] >= CHAOS_S // ROUTER_EVERY_S
    assert tally.kills.total() - tally.kills["router"] >= CHAOS_S // CHILD_EVERY_S // 2
    assert tally.ended["long stream", "broken"] > 0

    def has_no_more_than_before() -> bool:
        more = _held(daemon) - before
        assert not more, more
        return True

    eventually(has_no_more_than_before, what="a daemon that holds what it held")
    assert "Traceback" not in daemon.log.read_text(encoding="utf-8")
