"""What the gateway costs, over the child itself and beside everything else that can stand before it.

Beside it stand the router's own hop, nginx (where it is installed), and a minimal reverse proxy on Go's standard
library. Each round asks all of them, one after the other, so that what else the machine does meets them alike; what is
told of one is the median over the rounds. Most is measured before a scripted child, which answers evenly after 5 ms: a
true one differs from answer to answer by more than a hop takes.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from gateway_load import Flow, Latency, Order, Yardsticks
from gateway_targets import DIRECT, GATEWAY, GO, NEVER, ROUTER, Target, before_scripted, before_true
from report import Row

_T = TypeVar("_T", Latency, Flow)

ROUNDS, STREAM_ROUNDS = 5, 3
IDLE_S = 10.0
"""For so long nobody asks anybody, before they are measured."""
REQUESTS_S, STREAMS_S = 2.0, 6.0
"""How long one target is asked in one round; streams that have begun by then are read to their ends."""
SMALL: Order = {"think_ms": 5, "max_tokens": 1}
STREAM: Order = {"think_ms": 5, "events": 200, "per_s": 100}
"""As a small model on a GPU writes. At full speed events would pile up and be read together, which no model does."""
TRUE_STREAM: Order = {"max_tokens": 3}
FEW, MANY = 16, 64
OVER_GO_S = 0.0002
ADDED_S = 0.001
REQUEST_CPU, CHUNK_CPU = 1.3, 0.7
"""What the gateway may take, as a multiple of what Go takes."""
HELD = 1_000
SETTLE_S = 3.0
"""What was sent has been taken in by then."""
HELD_BYTES = {"waiting requests": 40e6, "open streams": 40e6}
"""What so many may take; their bodies are of 1 KiB."""
FOR_EVER: Order = {"think_ms": 3_600_000}
SLOWLY: Order = {"stream": True, "events": 10_000, "per_s": 1}


class Rounds(Generic[_T]):
    """What the clients of each target saw in each round, and what CPU it took beyond what it takes by itself.

    Args:
        targets: who is asked, in this order, in every round.
        count: how many rounds.
        ask: asks one of them for a while.
    """

    def __init__(self, targets: Mapping[str, Target], count: int, ask: Callable[[Target], _T]) -> None:
        self._seen: dict[str, list[_T]] = {name: [] for name in targets}
        self._cpu_s: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(count):
            for name, target in targets.items():
                began, before = time.monotonic(), target.cpu_s()
                seen = ask(target)
                self._seen[name].append(seen)
                by_itself = target.idle_load * (time.monotonic() - began)
                self._cpu_s[name].append((target.cpu_s() - before - by_itself) / seen.count)

    def __repr__(self) -> str:
        return f"<Rounds of {list(self._seen)}>"

    def direct(self, value: Callable[[_T], float]) -> float:
        """The median of something without any hop."""
        return statistics.median(map(value, self._seen[DIRECT]))

    def added(self, value: Callable[[_T], float]) -> dict[str, float]:
        """By how much each hop raises something, over what it is in the same round without one."""
        direct = list(map(value, self._seen[DIRECT]))
        return {
            name: statistics.median(value(one) - base for one, base in zip(seen, direct, strict=True))
            for name, seen in self._seen.items()
            if name != DIRECT
        }

    def cpu_s(self, many: int) -> dict[str, float]:
        """The CPU that each hop takes for so many answers or events."""
        return {name: statistics.median(cpu) * many for name, cpu in self._cpu_s.items() if name != DIRECT}


def measure(folder: Path, llama_server: Path) -> Iterator[Row]:
    """Latency, CPU, streams, and memory: eight minutes.

    Args:
        folder: a place for files, on a local file system; 100 MB.
        llama_server: the real one.
    """
    folder.mkdir()
    if shutil.which("nginx") is None:
        print("# nginx, a yardstick of the gateway, is not installed (Debian: apt-get install nginx-light): left out")
    yardsticks = Yardsticks(folder)
    with before_scripted(folder / "scripted", llama_server, yardsticks) as targets:
        yield from at_rest(targets)
        yield from small_requests(targets, yardsticks)
        for streams in (FEW, MANY):
            yield from chunks(targets, yardsticks, streams)
    with before_true(folder / "true", llama_server, yardsticks) as targets:
        yield from true_child(targets, yardsticks)
    for name, orders in (
        ("waiting requests", {GO: FOR_EVER, GATEWAY: {"model": NEVER}}),
        ("open streams", {GO: SLOWLY, GATEWAY: SLOWLY}),
    ):
        with before_scripted(folder / name.replace(" ", "-"), llama_server, yardsticks) as targets:
            taken = {which: held_bytes(targets[which], yardsticks, order) for which, order in orders.items()}
        yield from compared(f"memory of {HELD:,} {name}", taken, HELD_BYTES[name], GO, mb)


def at_rest(targets: Mapping[str, Target]) -> Iterator[Row]:
    """The CPU that each takes while nobody asks: llamavisor watches routers, which is no cost of a request or a chunk.

    It is noted, and taken off what follows; of the others there is next to nothing to take off.
    """
    before = {name: target.cpu_s() for name, target in targets.items()}
    time.sleep(IDLE_S)
    for name, target in targets.items():
        target.idle_load = (target.cpu_s() - before[name]) / IDLE_S
        if name != DIRECT:
            yield Row(f"CPU while nobody asks, of one core: {name}", f"{target.idle_load:.1%}", "", "", is_good=True)


def small_requests(targets: Mapping[str, Target], yardsticks: Yardsticks) -> Iterator[Row]:
    """The time that a hop adds to a small answer, and the CPU that it takes."""
    for clients in (1, 8):
        rounds = Rounds(targets, ROUNDS, lambda target: small(target, yardsticks, clients))  # noqa: B023
        yield from latencies(f"small request, {clients} at once", rounds)
    cpu = rounds.cpu_s(1_000)
    yield from compared("CPU of 1,000 small requests", cpu, REQUEST_CPU * cpu[GO], GO, s)


def small(target: Target, yardsticks: Yardsticks, clients: int) -> Latency:
    """Small requests, for a while."""
    return yardsticks.requests(target.port, clients=clients, for_s=REQUESTS_S, order=SMALL)


def latencies(what: str, rounds: Rounds[Latency]) -> Iterator[Row]:
    """What a hop adds to the time of an answer: the gateway less than the router, and hardly more than Go."""
    added = rounds.added(lambda seen: seen.median_s)
    yield Row(f"{what}, direct", ms(rounds.direct(lambda seen: seen.median_s)), "", "", is_good=True)
    yield from compared(f"{what}, added", added, min(added[ROUTER], added[GO] + OVER_GO_S), ROUTER, ms)


def chunks(targets: Mapping[str, Target], yardsticks: Yardsticks, streams: int) -> Iterator[Row]:
    """The CPU that a hop takes for streams and, with few of them, by how much their events are late and uneven."""
    rounds = Rounds(
        targets,
        STREAM_ROUNDS,
        lambda target: yardsticks.streams(target.port, clients=streams, for_s=STREAMS_S, order=STREAM),
    )
    cpu = rounds.cpu_s(100_000)
    yield from compared(f"CPU of 100,000 chunks, {streams} streams", cpu, CHUNK_CPU * cpu[GO], GO, s)
    if streams == FEW:
        first, jitter = rounds.added(lambda seen: seen.first_s), rounds.added(lambda seen: seen.jitter_s)
        yield from compared(f"time to first token, {streams} streams, added", first, ADDED_S, GO, ms)
        yield from compared(f"jitter p99, {streams} streams, added", jitter, ADDED_S, GO, ms)


def true_child(targets: Mapping[str, Target], yardsticks: Yardsticks) -> Iterator[Row]:
    """The same before a true child, one request at a time: it takes the CPU that more of them would need."""
    yield from latencies("true child", Rounds(targets, ROUNDS, lambda target: small(target, yardsticks, 1)))
    rounds = Rounds(
        targets,
        ROUNDS,
        lambda target: yardsticks.streams(target.port, clients=1, for_s=REQUESTS_S, order=TRUE_STREAM),
    )
    first = rounds.added(lambda seen: seen.first_s)
    yield from compared("true child, time to first token, added", first, ADDED_S, ROUTER, ms)


def held_bytes(target: Target, yardsticks: Yardsticks, order: Order) -> float:
    """By how much a target grows while so many requests are under way."""
    yardsticks.requests(target.port, clients=8, for_s=REQUESTS_S, order=SMALL)
    before = target.memory_bytes()
    with yardsticks.held(target.port, clients=HELD, order=order):
        time.sleep(SETTLE_S)
        return target.memory_bytes() - before


def compared(
    what: str, found: Mapping[str, float], allowed: float, yardstick: str, unit: Callable[[float], str]
) -> Iterator[Row]:
    """A line for each; only the gateway is held to what is allowed."""
    for name, value in found.items():
        if name == GATEWAY:
            yield Row(f"{what}: {name}", unit(value), unit(found[yardstick]), unit(allowed), value <= allowed)
        else:
            yield Row(f"{what}: {name}", unit(value), "", "", is_good=True)


def ms(seconds: float) -> str:
    """Seconds as milliseconds, finer than those of the other measurements."""
    return f"{seconds * 1e3:.2f} ms"


def s(seconds: float) -> str:
    """Seconds as they are."""
    return f"{seconds:.3f} s"


def mb(size: float) -> str:
    """Bytes as megabytes."""
    return f"{size / 1e6:.1f} MB"
