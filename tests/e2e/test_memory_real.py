"""Who stays in memory, on the real llama-server: a budget in RAM that holds two of five models, and clients of all."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import httpx
import pytest

from fakes.waiting import eventually
from gateway import Gateway
from llamavisor import gauge, procfs
from llamavisor.endpoint import Endpoint
from llamavisor.errors import DemandRefusedError
from llamavisor.events import DemandRefused, Event, ModelLoaded, ModelLoadFailed, ModelUnloaded, UnloadReason
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon
from shapes import Shape, write_model

pytestmark = [pytest.mark.anyio, pytest.mark.real, pytest.mark.timeout(180)]

_E = TypeVar("_E", bound=Event)
MIB = 1024 * 1024
MODELS = {"ada": 48_000, "bob": 50_000, "cyd": 52_000, "dan": 54_000, "eve": 56_000}
"""Names and vocabularies: each takes 200 to 240 MiB for its weights, and some 60 MiB besides."""
BUDGET = 630 * MIB
"""Any two of them, whatever they grow to, and no three."""
TOLERANCE, LEAST_TOLERANCE = 0.10, 64 * MIB
"""How far off an estimate may be (test_footprint_real.py)."""
CLIENTS, REQUESTS = 8, 6
SAMPLE_S = 0.02
LONG = 1500
"""Tokens of an answer that takes long enough for other models to come and go."""
ENDLESS = 7500
"""Nearly all of the context, and far more than is waited for."""
API_KEY = "secret-0123456789"


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the five models, and no trace of them afterwards: pytest would keep it."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocabulary in MODELS.items():
        write_model(folder / f"{name}.gguf", Shape(vocabulary=vocabulary), is_whole=True)
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture
def tiny_dir(tmp_path: Path) -> Path:
    """A folder with three tiny models that say "I am alpha", "I am beta" and "I am gamma"."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("alpha", "beta", "gamma"):
        write_tiny_model(folder / f"{name}.gguf", ["I", "am", name])
    return folder


@dataclass(slots=True)
class Watcher:
    """Sees all the while how much the processes of models have resident.

    Attributes:
        most_bytes: all of them together, at most.
        most_models: how many there were at most, those on their way in and out included.
        largest: the most that a single one had.
        samples: how often was looked.
    """

    gateway: Gateway
    most_bytes: int = 0
    most_models: int = 0
    largest: int = 0
    samples: int = 0

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await anyio.to_thread.run_sync(self._look)
            await anyio.sleep(SAMPLE_S)

    def _look(self) -> None:
        sizes = [memory.pss for pid in self.gateway.children if (memory := gauge.memory_of(pid)) is not None]
        known = [size for size in sizes if size is not None]
        assert len(known) == len(sizes), "the kernel does not split what is shared"
        self.samples += 1
        self.most_bytes = max(self.most_bytes, sum(known))
        self.most_models = max(self.most_models, len(known))
        self.largest = max(self.largest, *known, 0)


@dataclass(slots=True)
class Crowd:
    """Clients of a gateway, and how they fared.

    Attributes:
        answers: how many answers each model gave.
        failures: requests that did not get what they asked for.
    """

    gateway: Gateway
    http: httpx.AsyncClient
    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    async def ask(self, model: str, *, tokens: int = 8) -> None:
        """One request, as a gateway makes it."""
        try:
            async with self.gateway.fleet.lease(model) as endpoint:
                assert endpoint.model == model
                answer = await self.http.post(address(endpoint), headers=headers(endpoint), json=question(tokens))
                used = answer.json().get("usage", {}).get("completion_tokens")
                if answer.status_code == 200 and used == tokens:
                    self.answers[model] += 1
                else:
                    self.failures.append(f"{model}: {answer.status_code} {answer.text[:200]}")
        except Exception as error:  # noqa: BLE001 (whatever it is, it is a request that failed)
            self.failures.append(f"{model}: {error!r}")

    async def come(self, names: list[str], *, clients: int = CLIENTS, requests: int = REQUESTS) -> None:
        """Clients who ask all of these models in turn, each beginning with another one."""

        async def client(number: int) -> None:
            for turn in range(requests):
                await self.ask(names[(number + turn) % len(names)])

        async with anyio.create_task_group() as group:
            for number in range(clients):
                group.start_soon(client, number)


@dataclass(slots=True)
class Stream:
    """An answer that comes token by token.

    Attributes:
        pieces: how many tokens have come.
        reason: why it ended, as the model says.
        is_done: whether it came to its end.
        error: why it broke off.
        pid: who answers.
        meanwhile: how often each model left to make room from its beginning to its end.
    """

    pieces: int = 0
    reason: str | None = None
    is_done: bool = False
    error: str = ""
    pid: int = 0
    meanwhile: Counter[str] = field(default_factory=Counter)
    began: anyio.Event = field(default_factory=anyio.Event)

    async def run(self, gateway: Gateway, http: httpx.AsyncClient, model: str, tokens: int) -> None:
        """Lease the model, and read all of the answer."""
        async with gateway.fleet.lease(model) as endpoint:
            there = gateway.router.table.get(model)
            self.pid = (there.pid if there is not None else None) or 0
            body = question(tokens) | {"stream": True}
            before = len(gateway.events)
            try:
                async with http.stream("POST", address(endpoint), headers=headers(endpoint), json=body) as answer:
                    assert answer.status_code == 200
                    async for line in answer.aiter_lines():
                        self._take(line)
            except httpx.HTTPError as error:
                await gateway.fleet.leases.has_ended(endpoint)  # else the dead process may be leased again at once
                self.error = repr(error)
            self.meanwhile = evicted(gateway, since=before)

    def _take(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.is_done = True
            return
        (choice,) = json.loads(line[6:])["choices"]
        if choice["delta"].get("content"):
            self.pieces += 1
            self.began.set()
        self.reason = choice["finish_reason"] or self.reason


def address(endpoint: Endpoint) -> str:
    """Where a model is asked."""
    return f"{endpoint.url}/v1/chat/completions"


def headers(endpoint: Endpoint) -> dict[str, str]:
    """What a model wants to be told with that."""
    return {} if endpoint.api_key is None else {"Authorization": f"Bearer {endpoint.api_key}"}


def question(tokens: int) -> dict[str, Any]:
    """A request for an answer of so many tokens."""
    messages = [{"role": "user", "content": "hello " * 20}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def crowded(gateway: Gateway) -> AsyncIterator[tuple[Crowd, Watcher]]:
    """The gateway runs and is watched; at the end nobody waits for it, or has anything of it."""
    watcher = Watcher(gateway)
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http, gateway.running(*MODELS):
        async with anyio.create_task_group() as group:
            group.start_soon(watcher.run)
            yield Crowd(gateway, http), watcher
            group.cancel_scope.cancel()
        occupancy = gateway.fleet.memory.occupancy()
        assert occupancy.queues == ()
        assert [each.leases for each in occupancy.occupants if each.leases] == []
    assert watcher.samples > 50


def evicted(gateway: Gateway, since: int = 0) -> Counter[str]:
    """How often each model left to make room."""
    return Counter(
        event.model
        for event in gateway.events[since:]
        if isinstance(event, ModelUnloaded) and event.reason is UnloadReason.EVICTED
    )


def told(gateway: Gateway, kind: type[_E]) -> list[_E]:
    """What happened of this kind."""
    return [event for event in gateway.events if isinstance(event, kind)]


def within_budget(watcher: Watcher) -> bool:
    """Whether what was resident never exceeded the budget by more than one estimate may be off."""
    return watcher.most_bytes <= BUDGET + max(LEAST_TOLERANCE, TOLERANCE * watcher.largest)


@pytest.fixture
def gateway(tmp_path: Path, models_dir: Path, llama_server: Path) -> Gateway:
    """A gateway to the five models with memory for two, which wants a key."""
    return Gateway(tmp_path, models_dir, llama_server, memory=BUDGET, api_key=API_KEY)


async def test_no_request_fails_and_no_budget_is_exceeded(gateway: Gateway) -> None:
    """Five models in the memory of two: all are served to all, by turns, and memory holds."""
    async with crowded(gateway) as (crowd, watcher):
        await crowd.come(list(MODELS))
        await crowd.come(list(MODELS), clients=1, requests=len(MODELS))  # who is left of the crowd leaves now
        assert crowd.failures == []
        assert crowd.answers.total() == CLIENTS * REQUESTS + len(MODELS)
        assert evicted(gateway).keys() == MODELS.keys()
        assert (told(gateway, ModelLoadFailed), told(gateway, DemandRefused)) == ([], [])
        assert within_budget(watcher), f"{watcher.most_bytes / MIB:.0f} MiB of {BUDGET / MIB:.0f}"
        assert watcher.most_models == 2
        assert watcher.most_bytes > BUDGET / 2, "a budget that is never filled proves nothing"
        assert 3 * watcher.largest > BUDGET + LEAST_TOLERANCE, "a third model would not have shown"


async def test_a_stream_is_never_cut(gateway: Gateway) -> None:
    """A model that is answering stays, however long that takes, while all others come and go for the rest."""
    async with crowded(gateway) as (crowd, watcher), anyio.create_task_group() as group:
        stream = Stream()
        group.start_soon(stream.run, gateway, crowd.http, "ada", LONG)
        with anyio.fail_after(30):
            await stream.began.wait()
        others = [name for name in MODELS if name != "ada"]
        while stream.reason is None and not stream.error:
            await crowd.come(others, clients=4, requests=1)
        assert crowd.failures == []
        assert within_budget(watcher)
    assert (stream.pieces, stream.reason, stream.error, stream.is_done) == (LONG, "length", "", True)
    assert stream.meanwhile.total() >= 3, "hardly anybody came and went"
    assert "ada" not in stream.meanwhile


async def test_a_killed_model_harms_nobody_else(gateway: Gateway) -> None:
    """Who was being answered by a killed process has lost; nobody else notices, and the model is to be had again."""
    async with crowded(gateway) as (crowd, watcher), anyio.create_task_group() as group:
        stream = Stream()
        group.start_soon(stream.run, gateway, crowd.http, "ada", ENDLESS)
        with anyio.fail_after(30):
            await stream.began.wait()
        others = [name for name in MODELS if name != "ada"]
        group.start_soon(lambda: crowd.come(others, clients=4, requests=4))
        with anyio.fail_after(60):
            while crowd.answers.total() < 4:
                await anyio.sleep(0.01)
        killed = stream.pid
        assert "ada" in procfs.command_line(killed)
        os.kill(killed, signal.SIGKILL)
        with anyio.fail_after(30):
            while not stream.error:
                await anyio.sleep(0.01)
        assert not stream.is_done
        await crowd.come(["ada"], clients=3, requests=1)
        assert crowd.answers["ada"] == 3, crowd.failures
        crashed = [event.model for event in told(gateway, ModelUnloaded) if event.reason is UnloadReason.CRASHED]
        assert crashed == ["ada"]
    assert crowd.failures == []
    assert crowd.answers.total() == 4 * 4 + 3
    assert within_budget(watcher)


async def test_more_than_all_of_it_is_refused_or_has_all_of_it(
    tmp_path: Path, models_dir: Path, llama_server: Path
) -> None:
    """A model beyond the budget has all of it to itself; while that is not to be had it is refused, not squeezed in."""
    gateway = Gateway(tmp_path, models_dir, llama_server, memory=200 * MIB)
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http, gateway.running(*MODELS):
        crowd = Crowd(gateway, http)
        await crowd.come(["ada", "bob"], clients=2, requests=2)
        assert crowd.failures == []
        assert len(gateway.children) == 1
        loads = Counter(event.model for event in told(gateway, ModelLoaded))
        assert loads.keys() == {"ada", "bob"}
        assert evicted(gateway).total() == loads.total() - 1
        gateway.fleet.memory.pin("ada")
        await crowd.ask("ada")
        with pytest.raises(DemandRefusedError, match="ada"):
            async with gateway.fleet.lease("bob"):
                pass


# --- with serve = "router" --------------------------------------------------------------------------------------------


def config(models_dir: Path, port: int, *lines: str) -> str:
    """A configuration of one router, without metrics; these lines are of its models' tables."""
    tables = "\n".join(lines)
    return f"""
models_dir = "{models_dir}"
port = {port}
memory = "2GiB"
[metrics]
enabled = false
[defaults]
threads = 1
{tables}
"""


def ps(daemon: RunningDaemon) -> dict[str, dict[str, Any]]:
    """The models in memory by name, as `ps --json` shows them."""
    shown = daemon.cli("ps", "--json")
    assert shown.returncode == 0, shown.stderr
    return {model["model"]: model for model in json.loads(shown.stdout)["models"]}


def test_ttl_ends_the_idle_and_spares_the_pinned(
    tmp_path: Path, tiny_dir: Path, llama_server: Path, free_port: int
) -> None:
    """A model that nobody has asked for two seconds leaves with its process; a pinned one stays, idle for longer."""
    tables = config(tiny_dir, free_port, 'ttl = "2s"', '[model."beta"]', "pin = true")
    with RunningDaemon(tmp_path, tiny_dir, llama_server, config=tables) as daemon:
        daemon.wait_for_router("ready")
        for name in ("beta", "alpha"):
            assert daemon.chat(name, port=free_port) == f"I am {name}"
        child = eventually(lambda: daemon.model("alpha")["pid"], what="the pid of alpha")
        unloaded = daemon.wait_for_event("ModelUnloaded")
        assert (unloaded["model"], unloaded["reason"]) == ("alpha", "expired")
        eventually(lambda: procfs.identify(child) is None, what="the end of alpha's process")
        loaded = daemon.wait_for_event("ModelLoaded", lambda event: event["model"] == "alpha")
        assert unloaded["time"] - loaded["time"] >= 2.0
        (beta,) = ps(daemon).values()
        assert (beta["model"], beta["state"], beta["pinned"]) == ("beta", "loaded", True)
        assert (beta["ttl_s"], beta["ttl_left_s"]) == (2.0, None)
        assert beta["idle_s"] > 2.0
        assert daemon.cli("unpin", "beta").returncode == 0
        daemon.wait_for_event("ModelUnloaded", lambda event: event["model"] == "beta")
        assert daemon.chat("beta", port=free_port) == "I am beta"


def test_pins_outlive_the_daemon(tmp_path: Path, tiny_dir: Path, llama_server: Path, free_port: int) -> None:
    """What people have pinned and unpinned holds after a restart, whatever the configuration says."""
    tables = config(tiny_dir, free_port, 'ttl = "1s"', '[model."beta"]', "pin = true")
    with RunningDaemon(tmp_path, tiny_dir, llama_server, config=tables) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("pin", "alpha").returncode == 0
        assert daemon.cli("unpin", "beta").returncode == 0
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        daemon.start()
        eventually(daemon.is_live, what="a daemon that answers")
        daemon.wait_for_router("ready")
        for name in ("alpha", "beta"):
            assert daemon.chat(name, port=free_port) == f"I am {name}"
        daemon.wait_for_event("ModelUnloaded", lambda event: event["model"] == "beta")
        (alpha,) = ps(daemon).values()
        assert (alpha["model"], alpha["pinned"]) == ("alpha", True)


def test_ps_tells_what_a_model_takes(tmp_path: Path, models_dir: Path, llama_server: Path, free_port: int) -> None:
    """Expected and measured bytes are those of the process, and a context that nobody chose is shown as ours."""
    tables = config(models_dir, free_port, '[model."ada"]', "ctx_size = 8192")
    with RunningDaemon(tmp_path, models_dir, llama_server, config=tables) as daemon:
        daemon.wait_for_router("ready")
        assert ps(daemon) == {}
        taken = {}
        for name in ("ada", "bob"):
            daemon.chat(name, port=free_port)
            child = eventually(lambda name=name: daemon.model(name)["pid"], what="the pid of its process")
            eventually(lambda name=name: ps(daemon)[name]["measured_bytes"], what="a measurement")
            memory, shown = gauge.memory_of(child), ps(daemon)[name]
            assert memory is not None
            assert memory.pss is not None
            assert abs(shown["measured_bytes"]["RAM"] - memory.pss) <= TOLERANCE * memory.pss
            given = procfs.option_value(procfs.command_line(child), "--ctx-size")
            assert (str(shown["n_ctx"]), shown["n_ctx_asked"]) == (given, shown["n_ctx"])
            taken[name] = shown, shown["expected_bytes"]["RAM"] - shown["growth_bytes"] - memory.pss
        ada, off = taken["ada"]
        assert abs(off) <= max(LEAST_TOLERANCE, TOLERANCE * ada["measured_bytes"]["RAM"]), f"{off / MIB:+.0f} MiB off"
        bob, off = taken["bob"]
        assert off >= -LEAST_TOLERANCE  # of a large context a short question does not touch all that is set aside
        assert (ada["n_ctx_ours"], bob["n_ctx_ours"]) == (False, True)
        assert bob["n_ctx"] > 8192
        text = daemon.cli("ps").stdout
        assert f" {bob['n_ctx']} (ours) " in text
        assert " 8192 (ours) " not in text


def test_a_dry_run_names_who_was_used_least_recently(
    tmp_path: Path, models_dir: Path, llama_server: Path, free_port: int
) -> None:
    """`evict --dry-run` says who would go for a third model, by use and not by load; nobody goes."""
    tables = config(models_dir, free_port, "ctx_size = 8192").replace("2GiB", f"{BUDGET}")
    with RunningDaemon(tmp_path, models_dir, llama_server, config=tables) as daemon:
        daemon.wait_for_router("ready")

        def victims() -> list[str]:
            shown = daemon.cli("evict", "--dry-run", "cyd", "--json")
            assert shown.returncode == 0, shown.stderr
            return [victim["model"] for victim in json.loads(shown.stdout)["victims"]]

        assert victims() == []
        for name in ("ada", "bob"):
            assert daemon.cli("load", name).returncode == 0
        assert victims() == ["ada"]
        eventually(lambda: ps(daemon)["ada"]["in_flight"] == 0, what="a first look at its use")
        daemon.chat("ada", port=free_port)
        eventually(lambda: victims() == ["bob"], what="the use of ada")
        assert ps(daemon).keys() == {"ada", "bob"}
        assert daemon.events("ModelUnloaded") == []


def test_a_shorter_context_is_told_and_a_share_of_one_is_none(
    tmp_path: Path, tiny_dir: Path, llama_server: Path, free_port: int
) -> None:
    """A model that gets less context than it was to have says so; the share of a slot is what it was to have."""
    tables = [
        *("ctx_size = 4096", '[model."alpha"]', 'args = ["--override-kv", "llama.context_length=int:512"]'),
        *('[model."beta"]', "parallel = 4", '[model."gamma"]', "parallel = 4", 'args = ["--kv-unified"]'),
    ]
    with RunningDaemon(tmp_path, tiny_dir, llama_server, config=config(tiny_dir, free_port, *tables)) as daemon:
        daemon.wait_for_router("ready")
        for name in ("beta", "gamma", "alpha"):
            assert daemon.cli("load", name).returncode == 0
        told = daemon.wait_for_event("ContextShrunk")
        assert (told["model"], told["asked"], told["got"]) == ("alpha", 4096, 512)
        shown = {name: (model["n_ctx"], model["n_ctx_asked"]) for name, model in ps(daemon).items()}
        assert shown == {"alpha": (512, 4096), "beta": (1024, 1024), "gamma": (4096, 4096)}
        assert "512 of 4096" in daemon.cli("ps").stdout
        (warning,) = (text for text in daemon.status()["warnings"] if "context" in text)
        assert "model alpha has 512 tokens of context" in warning
        assert len(daemon.events("ContextShrunk")) == 1
