"""A month of traffic in virtual time: what staying in memory by bytes brings over a cap on the count of models.

A discrete-event simulation of one card. The yardstick is the LRU of llama-server's own router: at most `models_max`
models, whatever their sizes. Whoever sets that number has two ways to find it. The safe one is as many of the largest
models as fit together; it never runs out of memory. The hopeful one is as many as fit of the average size; at times it
asks for memory that is not there, which the simulation lets it have, and counts.

All else is the same for all: demands wait in one line, first come first served; demands for one model share a load;
who asks for a model that is loaded never waits; who is busy is never unloaded; one load at a time, limited by the disk.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from report import Row, median_s

from llamavisor.eviction import Budget, Demand, Plan, Refusal, Resident, choose

GB = 10**9
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
MONTH_S = 30 * DAY_S
CARD = "0000:01:00.0"
CARD_BYTES = 24 * GB
DISK_BYTES_PER_S = 2 * GB
START_S = 1.0
"""What a load takes beside reading the file."""
UNLOAD_S = 0.5
"""Until the processes of all victims have ended and their memory has come back."""
NIGHT_H = 2.0
"""When the nightly batch begins."""
SLACK = 0.005
"""How much more misses, loads and waiting count as no worse. It matters where all models are of one size: there bytes
say nothing, and what is left are the details of last use and of `min_residency`, worth 0.3 % either way."""
MODELS, GPUS = 1_000, 8
DECISION_S = 0.001


def measure(length_s: float = MONTH_S) -> Iterator[Row]:
    """The policy against its yardsticks on every trace, then how long one decision takes."""
    for trace in traces(length_s):
        yield from compare(trace)
    seconds = decision_s()
    what = f"one decision over {MODELS} models on {GPUS} GPUs, median"
    yield Row(what, f"{seconds * 1000:.2f} ms", "", f"{DECISION_S * 1000:.0f} ms", seconds < DECISION_S)


def compare(trace: Trace) -> Iterator[Row]:
    """One trace under the policy; the yardstick is the count that is safe, in the last line the one that is not."""
    ours = Card(trace, by_bytes).run()
    safe = Card(trace, by_count(trace.safe_count)).run()
    hopeful = Card(trace, by_count(trace.hopeful_count)).run()
    name, count = trace.name, trace.hopeful_count
    is_sound = not ours.overdrawn and not ours.unserved
    least = 1 - (1 - safe.hit_rate) * (1 + SLACK)
    found, yardstick = f"{ours.hit_rate:.2%}", f"{safe.hit_rate:.2%}"
    yield Row(f"{name}: found loaded", found, yardstick, f"{least:.2%}", is_sound and ours.hit_rate >= least)
    for what, measured, before, unit in (
        ("loads", ours.loads, safe.loads, ".0f"),
        ("mean wait, s", ours.mean_wait_s, safe.mean_wait_s, ".3f"),
        ("95 % wait at most, s", ours.p95_wait_s, safe.p95_wait_s, ".2f"),
    ):
        most = before * (1 + SLACK)
        row = (f"{measured:{unit}}", f"{before:{unit}}", f"{most:{unit}}")
        yield Row(f"{name}: {what}", *row, is_sound and measured <= most)
    beyond = hopeful.overdrawn / hopeful.loads
    text = f"  over a cap of {count}, {beyond:.0%} of its loads beyond memory"
    yield Row(text, found, f"{hopeful.hit_rate:.2%}", "", is_sound)


def decision_s(runs: int = 101) -> float:
    """How long one decision takes that has to find victims on all devices, the median in seconds.

    Nine of ten models are on one card, the tenth is spread over all; all take RAM.
    """
    rng = random.Random(4)
    gpus = [f"0000:{at:02x}:00.0" for at in range(GPUS)]
    residents = [
        Resident(
            f"model{at}",
            {gpu: rng.randint(GB, 20 * GB) for gpu in ([rng.choice(gpus)] if at % 10 else gpus)} | {"RAM": GB},
            last_used=rng.random() * DAY_S,
            loaded_at=0.0,
            reload_cost_s=rng.random() * 10,
            in_flight=int(at % 20 == 0),
            is_pinned=at % 50 == 0,
        )
        for at in range(MODELS)
    ]
    full = {gpu: sum(each.bytes.get(gpu, 0) for each in residents) for gpu in [*gpus, "RAM"]}
    budget, demand = Budget(full, MODELS), Demand("another", dict.fromkeys(gpus, 10 * GB) | {"RAM": GB})

    def decide() -> Plan | Refusal:
        return choose(residents, budget, demand, now=DAY_S)

    outcome = decide()
    assert isinstance(outcome, Plan)
    assert len(outcome.victims) > 1
    return median_s(decide, runs)


class Request(NamedTuple):
    """Somebody asks for a model and keeps it busy for a while."""

    at: float
    model: str
    service_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Models and the requests for them, in the order of time."""

    name: str
    sizes: Mapping[str, int]
    requests: Sequence[Request]

    @property
    def safe_count(self) -> int:
        """How many models always fit: of the largest."""
        return sum(total <= CARD_BYTES for total in accumulate(sorted(self.sizes.values(), reverse=True)))

    @property
    def hopeful_count(self) -> int:
        """How many models of the average size fit."""
        return int(CARD_BYTES // statistics.mean(self.sizes.values()))


@dataclass(slots=True)
class Loaded:
    """A model in the card's memory, or on its way there."""

    name: str
    size: int
    loaded_at: float = math.inf
    asked_at: float = 0.0
    used_at: float = 0.0
    in_flight: int = 0
    is_loading: bool = True


Policy = Callable[[Mapping[str, Loaded], str, int, float], tuple[str, ...] | None]
"""(who is loaded, whom is asked for, its bytes, now) -> whom to unload, None to ask again when a request has ended."""


def by_bytes(loaded: Mapping[str, Loaded], name: str, size: int, now: float) -> tuple[str, ...] | None:
    """Llamavisor's policy."""
    residents = [
        Resident(
            each.name,
            {CARD: each.size},
            last_used=each.used_at,
            loaded_at=each.loaded_at,
            reload_cost_s=load_s(each.size),
            in_flight=each.in_flight,
            is_loading=each.is_loading,
        )
        for each in loaded.values()
    ]
    outcome = choose(residents, Budget({CARD: CARD_BYTES}), Demand(name, {CARD: size}), now=now)
    return outcome.names if isinstance(outcome, Plan) else None


def by_count(models_max: int) -> Policy:
    """The policy of llama-server's router: the last request, or the load, is the last use; who is busy stays."""

    def decide(loaded: Mapping[str, Loaded], name: str, size: int, now: float) -> tuple[str, ...] | None:
        too_many = len(loaded) + 1 - models_max
        idle = sorted((each.asked_at, each.name) for each in loaded.values() if not each.in_flight)
        if too_many > len(idle):
            return None
        return tuple(name for _, name in idle[: max(too_many, 0)])

    return decide


def load_s(size: int) -> float:
    """How long a model of so many bytes takes to load."""
    return size / DISK_BYTES_PER_S + START_S


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a trace.

    Attributes:
        hit_rate: the share of requests that found their model loaded.
        loads: how many loads there were.
        mean_wait_s: how long requests waited for their model on average, those that did not wait included.
        p95_wait_s: how long 95 % of the requests waited at most.
        overdrawn: how many of the loads asked for more memory than there is.
        unserved: how many requests were still waiting when all was over.
    """

    hit_rate: float
    loads: int
    mean_wait_s: float
    p95_wait_s: float
    overdrawn: int
    unserved: int


class Card:
    """One card under one policy, from the first request to the last answer."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        self._trace = trace
        self._policy = policy
        self._loaded: dict[str, Loaded] = {}
        self._line: deque[str] = deque()  # models that are waited for, first come first served
        self._waiting: dict[str, list[Request]] = {}
        self._is_loading = False
        self._ends: list[tuple[float, int, str]] = []  # of requests; and of loads, with a -1 to come first
        self._waits: list[float] = []
        self._hits = self._loads = self._overdrawn = 0

    def __repr__(self) -> str:
        return f"<Card {sorted(self._loaded)} waiting {list(self._line)}>"

    def run(self) -> Result:
        """Play the trace."""
        for request in self._trace.requests:
            while self._ends and self._ends[0][0] <= request.at:
                self._end(*heapq.heappop(self._ends))
            self._arrive(request)
        while self._ends:
            self._end(*heapq.heappop(self._ends))
        waits = sorted(self._waits)
        return Result(
            hit_rate=self._hits / len(self._trace.requests),
            loads=self._loads,
            mean_wait_s=statistics.fmean(waits),
            p95_wait_s=waits[math.ceil(0.95 * len(waits)) - 1],
            overdrawn=self._overdrawn,
            unserved=len(self._trace.requests) - len(waits),
        )

    def _arrive(self, request: Request) -> None:
        there = self._loaded.get(request.model)
        if there is not None and not there.is_loading:
            self._hits += 1
            self._serve(there, request, request.at)
            return
        if request.model not in self._waiting:
            self._waiting[request.model] = []
            self._line.append(request.model)
        self._waiting[request.model].append(request)
        self._load_next(request.at)

    def _serve(self, there: Loaded, request: Request, now: float) -> None:
        there.in_flight += 1
        there.asked_at = there.used_at = now
        self._waits.append(now - request.at)
        heapq.heappush(self._ends, (now + request.service_s, 0, there.name))

    def _end(self, now: float, what: int, name: str) -> None:
        there = self._loaded[name]
        if what == 0:
            there.in_flight -= 1
            there.used_at = now
        else:
            self._is_loading = there.is_loading = False
            there.loaded_at = now
            for request in self._waiting.pop(name):
                self._serve(there, request, now)
        if not there.in_flight or what:
            self._load_next(now)

    def _load_next(self, now: float) -> None:
        """Begin to load the first in line, if it can be."""
        if self._is_loading or not self._line:
            return
        name = self._line[0]
        size = self._trace.sizes[name]
        victims = self._policy(self._loaded, name, size, now)
        if victims is None:
            return
        self._line.popleft()
        for each in victims:
            assert not self._loaded.pop(each).in_flight
        self._loaded[name] = Loaded(name, size, asked_at=now, used_at=now)
        self._is_loading = True
        self._loads += 1
        self._overdrawn += sum(each.size for each in self._loaded.values()) > CARD_BYTES
        heapq.heappush(self._ends, (now + (UNLOAD_S if victims else 0.0) + load_s(size), -1, name))


# --- traffic ----------------------------------------------------------------------------------------------------------


def traces(length_s: float = MONTH_S, seed: int = 4) -> Iterator[Trace]:
    """The traffic of so long, the same for the same seed."""
    for make in (popular, bursts, agents, days, one_huge, alike):
        yield make(random.Random(f"{make.__name__} {seed}"), length_s)


def popular(rng: random.Random, length_s: float) -> Trace:
    """Thirty models, the popularity of which follows Zipf's law, asked for independently."""
    sizes = some_models(rng, 30)
    pick = zipf(rng, sizes)
    return Trace("popularity", sizes, [Request(at, pick(), service(rng)) for at in poisson(rng, length_s, 45.0)])


def bursts(rng: random.Random, length_s: float) -> Trace:
    """Conversations: one model is asked again and again for a while; several people at a time."""
    sizes = some_models(rng, 24)
    pick = zipf(rng, sizes)
    requests = []
    for began in poisson(rng, length_s, 600.0):
        model, at = pick(), began
        for _ in range(rng.randint(5, 25)):
            requests.append(Request(at, model, service(rng)))
            at += requests[-1].service_s + rng.expovariate(1 / 20)
    return Trace("bursts", sizes, sorted(requests))


def agents(rng: random.Random, length_s: float) -> Trace:
    """Agents that go back and forth between two or three models without a pause, at times two of them at once."""
    sizes = some_models(rng, 12)
    pick = zipf(rng, sizes)
    requests = []
    for began in poisson(rng, length_s, 1800.0):
        team, at = list(dict.fromkeys(pick() for _ in range(3))), began
        for turn in range(rng.randint(10, 60)):
            requests.append(Request(at, team[turn % len(team)], service(rng)))
            at += requests[-1].service_s + rng.expovariate(1 / 8)
    return Trace("agents", sizes, sorted(requests))


def days(rng: random.Random, length_s: float) -> Trace:
    """People by day, hardly any by night; and at night a batch that goes through all models, one after the other."""
    sizes = some_models(rng, 20)
    pick = zipf(rng, sizes)
    requests = [
        Request(at, pick(), service(rng))
        for at in poisson(rng, length_s, 25.0)
        if rng.random() < 0.5 - 0.48 * math.cos(2 * math.pi * at / DAY_S)
    ]
    for day in range(int(length_s // DAY_S)):
        at = day * DAY_S + NIGHT_H * HOUR_S
        for model in sorted(sizes):
            for _ in range(20):
                requests.append(Request(at, model, service(rng)))
                at += requests[-1].service_s + 1.0
    return Trace("days and nightly batch", sizes, sorted(requests))


def one_huge(rng: random.Random, length_s: float) -> Trace:
    """One model that takes most of the card, for one request of twenty, and many small ones."""
    small = {f"small{at:02}": rng.randint(GB // 2, 2 * GB) for at in range(20)}
    pick = zipf(rng, small)
    requests = [
        Request(at, "huge" if rng.random() < 0.05 else pick(), service(rng)) for at in poisson(rng, length_s, 45.0)
    ]
    return Trace("one huge, many small", {**small, "huge": 20 * GB}, requests)


def alike(rng: random.Random, length_s: float) -> Trace:
    """Models of one size, in conversations and one by one: bytes say no more than the count does."""
    sizes = {f"m{at:02}": CARD_BYTES // 4 for at in range(10)}
    pick = zipf(rng, sizes)
    requests = [Request(at, pick(), service(rng)) for at in poisson(rng, length_s, 120.0)]
    for began in poisson(rng, length_s, 1200.0):
        model, at = pick(), began
        for _ in range(rng.randint(5, 25)):
            requests.append(Request(at, model, service(rng)))
            at += requests[-1].service_s + rng.expovariate(1 / 20)
    return Trace("all of one size", sizes, sorted(requests))


def some_models(rng: random.Random, count: int) -> dict[str, int]:
    """So many models of the sizes that people have: 0.5 to 11 GB, most of them about 4."""
    return {f"m{at:02}": int(min(max(rng.lognormvariate(1.4, 0.8), 0.5), 11.0) * GB) for at in range(count)}


def zipf(rng: random.Random, sizes: Mapping[str, int]) -> Callable[[], str]:
    """A way to pick models of which the n-th most popular is asked for with a weight of 1/n."""
    names = list(sizes)
    rng.shuffle(names)
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(names))))
    return lambda: rng.choices(names, cum_weights=weights)[0]


def poisson(rng: random.Random, length_s: float, mean_s: float) -> Iterator[float]:
    """Times independent of each other, so far apart on average."""
    at = rng.expovariate(1 / mean_s)
    while at < length_s:
        yield at
        at += rng.expovariate(1 / mean_s)


def service(rng: random.Random) -> float:
    """How long an answer takes: 8 s on average, some of them much longer."""
    return rng.lognormvariate(1.6, 1.0)
