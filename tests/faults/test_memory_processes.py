"""R3 to R5 and P7 with real processes, and by the numbers of the real kernel.

The kernel's are those of a memory cgroup of its own, in which processes grow until it is full: this machine is never
short of memory. What takes minutes is told in test_memory.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import httpx
import pytest

from cgroups import NOT_HERE, MemoryGroup
from fakes import FakeLlamaServer
from fakes.fleet import GIB
from fakes.nvml import FakeNvml
from fakes.waiting import PATIENCE_S, eventually
from gateway import Gateway
from llamavisor import meter, strain
from llamavisor.demands import Why
from llamavisor.endpoint import Endpoint
from llamavisor.errors import DemandRefusedError
from llamavisor.events import Event, MemoryEased, MemoryKill, MemoryShort, ModelUnloaded, UnloadReason
from llamavisor.gauge import RamGauge
from llamavisor.gauge.cgroup import read_cgroup
from llamavisor.penalty import FACTOR
from llamavisor.strain import FLOOR_BYTES
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

MakeFake = Callable[..., FakeLlamaServer]
MIB = 2**20
GPU_ID = "0000:01:00.0"
QUICK_S = 8.0
"""Any command on a busy machine; less than a reading may take before it is given up."""


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """A memory cgroup in which a GiB is all there is."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(MemoryGroup(GIB))
        except OSError as error:
            pytest.skip(f"{NOT_HERE}: {error}")
        yield made


_E = TypeVar("_E", bound=Event)


@asynccontextmanager
async def gateway(
    folder: Path,
    models_dir: Path,
    llama_server: FakeLlamaServer,
    *,
    group: MemoryGroup | None = None,
    models_max: int = 0,
) -> AsyncIterator[Gateway]:
    """A gateway over real processes, which are in `group` if there is one; then that is all the memory there is."""
    path = llama_server.path if group is None else group.executable(folder / "llama-server", llama_server)
    made = Gateway(folder, models_dir, path, memory=GIB)
    (router,) = made._settings.routers
    made._settings = replace(made._settings, routers=(replace(router, models_max=models_max),))
    if group is not None:  # this process is not in it
        root = group.root(folder / "root")
        made.fleet.memory.capacity.meter._root = root
        made.fleet.memory.capacity.meter._gauge = RamGauge(root)
    async with made.running("alpha", "beta", "gamma"):
        yield made


def told(it: Gateway, kind: type[_E]) -> list[_E]:
    """The events of one kind."""
    return [event for event in it.events if isinstance(event, kind)]


def unloads(it: Gateway) -> list[tuple[str, UnloadReason]]:
    """Who has left, and why, in order."""
    return [(event.model, event.reason) for event in told(it, ModelUnloaded)]


def is_busy(it: Gateway, model: str) -> bool:
    """Whether those who decide know that a model answers somebody: they hear of it within two seconds."""
    slot = it.fleet.memory.scheduler.admission.slot("main", model)
    return slot is not None and slot.resident.is_busy


async def chat(endpoint: Endpoint) -> str:
    """What a model answers."""
    body = {"messages": [{"role": "user", "content": "hi"}]}
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=PATIENCE_S, trust_env=False) as client:
        answer = await client.post("/v1/chat/completions", json=body)
        return str(answer.json()["choices"][0]["message"]["content"]).strip()


@asynccontextmanager
async def streaming(endpoint: Endpoint) -> AsyncIterator[AsyncIterator[str]]:
    """The words of an answer, as they come."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with (
        httpx.AsyncClient(base_url=endpoint.url, timeout=PATIENCE_S, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):

        async def words() -> AsyncIterator[str]:
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and (word := json.loads(line[6:])["choices"][0]["delta"].get("content")):
                    yield word.strip()

        yield words()


async def happens(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    with anyio.fail_after(PATIENCE_S):
        while not condition():
            await anyio.sleep(0.01)


@contextmanager
def hog(group: MemoryGroup, size: int) -> Iterator[None]:
    """A stranger in the group takes so much memory, until the block ends."""
    code = "import sys; taken = b'x' * int(sys.argv[1]); print(flush=True); sys.stdin.read()"
    argv = [*group.launcher, sys.executable, "-c", code, str(size)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "it has ended"
        yield


# --- R3: memory is short ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_r3_a_stranger_takes_the_memory(
    tmp_path: Path,
    models_dir: Path,
    fake_llama_server: MakeFake,
    group: MemoryGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R3: by the numbers of a real kernel who is idle leaves, then nothing is loaded until the stranger has gone.

    In a memory cgroup, with stand-ins for llama-server and shorter times; the true ones are told in test_memory.py.
    """
    for module, name, value in ((meter, "READ_EVERY_S", 0.2), (strain, "RELIEF_S", 1.0), (strain, "CALM_AFTER_S", 1.0)):
        monkeypatch.setattr(module, name, value)
    async with gateway(tmp_path, models_dir, fake_llama_server(), group=group) as it, AsyncExitStack() as stack:
        async with it.fleet.lease("alpha"):
            pass
        beta = await stack.enter_async_context(it.fleet.lease("beta"))
        room = read_cgroup(tmp_path / "root").room_bytes
        assert room is not None
        with hog(group, room - FLOOR_BYTES // 2):
            await happens(lambda: told(it, ModelUnloaded))
            assert unloads(it) == [("alpha", UnloadReason.PRESSURE)]
            await happens(lambda: [short for short in told(it, MemoryShort) if short.is_refusing])
            assert "MiB should be" in told(it, MemoryShort)[0].detail
            with pytest.raises(DemandRefusedError) as error:
                await stack.enter_async_context(it.fleet.lease("gamma"))
            assert error.value.reason == Why.STRAINED.value
            assert error.value.retry_after_s is not None
            assert await chat(beta) == "I am beta"
        await happens(lambda: told(it, MemoryEased))
        gamma = await stack.enter_async_context(it.fleet.lease("gamma"))
        assert await chat(gamma) == "I am gamma"
        assert told(it, MemoryKill) == []


# --- R4: a victim that does not leave ---------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_r4_a_stream_of_a_real_process(tmp_path: Path, models_dir: Path, fake_llama_server: MakeFake) -> None:
    """R4: who streams an answer to somebody without a lease is seen to be busy by its own numbers, and stays.

    A stand-in for llama-server: it speaks as slowly as it is told to, and so for as long as is needed.
    """
    write_tiny_model(models_dir / "alpha.gguf", ["on", "and"], loop=True)
    fake = fake_llama_server(models={"alpha": {"token_s": 0.02}})
    async with gateway(tmp_path, models_dir, fake, models_max=2) as it:
        async with it.fleet.lease("alpha") as endpoint:
            pass
        async with streaming(endpoint) as words:
            await anext(words)
            await happens(lambda: is_busy(it, "alpha"))
            for name in ("beta", "gamma", "beta"):  # alpha is the least recently used
                async with it.fleet.lease(name) as other:
                    assert await chat(other) == f"I am {name}"
            assert unloads(it) == [("beta", UnloadReason.EVICTED), ("gamma", UnloadReason.EVICTED)]
            for _ in range(10):
                assert await anext(words) in {"on", "and"}
        await happens(lambda: not is_busy(it, "alpha"))
        async with it.fleet.lease("beta"), it.fleet.lease("gamma"):
            assert [model for model, _ in unloads(it)] == ["beta", "gamma", "alpha"]


# --- R5: a gauge that fails -------------------------------------------------------------------------------------------


HURRIED = """
import sys
from llamavisor import meter
from llamavisor.gauge import remote
from llamavisord.cli import main
meter.READ_EVERY_S = remote.RESTART_S = 0.2
sys.exit(main())
"""
"""A daemon that asks for memory more often than others."""
CARD = "CUDA0: NVIDIA GeForce RTX 3090 (24576 MiB, 18000 MiB free)"


@pytest.mark.parametrize("how", ["raise", "hang", "crash"])
def test_r5_under_a_daemon(
    tmp_path: Path, models_dir: Path, fake_llama_server: MakeFake, how: Literal["raise", "hang", "crash"]
) -> None:
    """R5: a driver that fails, hangs or kills who asks it costs the numbers of its card and nothing else.

    In the place of NVIDIA's library, of which there is none here, in a real process that asks it.
    """
    nvml = FakeNvml(tmp_path / "nvml")
    nvml.fails(how)
    config = f'models_dir = "{models_dir}"\nport = %d\nmemory = {{RAM = "1GiB"}}\n[metrics]\nenabled = false\n'
    env = {"PYTHONPATH": str(nvml.folder)}
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(devices=[CARD]), config="", env=env)
    daemon.config.write_text(config % daemon.port, encoding="utf-8")
    daemon.program = [sys.executable, "-c", HURRIED]
    with daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        assert devices(daemon)["RAM"]["budget_bytes"] == GIB
        nvml.works()
        eventually(lambda: devices(daemon).get(GPU_ID, {}).get("used_bytes"), what="a card that tells")
        nvml.fails(how)
        daemon.wait_for_event("GaugeFailed", lambda event: event["device"] == GPU_ID)
        for command in ("ps", "status"):
            began = time.monotonic()
            answer = daemon.cli(command)
            assert answer.returncode == 0
            assert time.monotonic() - began < QUICK_S
        assert "unknown" in answer.stdout
        assert devices(daemon)[GPU_ID]["used_bytes"] is None
        assert devices(daemon)["RAM"]["budget_bytes"] == GIB
        assert daemon.cli("load", "beta").returncode == 0
        assert daemon.chat("beta") == "I am beta"
        assert [event["device"] for event in daemon.events("GaugeFailed")].count(GPU_ID) == 1
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert time.monotonic() - began < QUICK_S


def devices(daemon: RunningDaemon) -> dict[str, dict[str, Any]]:
    """What the status says of each device."""
    return {device["id"]: device for device in daemon.status()["memory"]["devices"]}


# --- P7: the kernel kills a child -------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_p7_the_kernel_kills_a_child(
    tmp_path: Path, models_dir: Path, fake_llama_server: MakeFake, group: MemoryGroup
) -> None:
    """P7: a child that grows beyond a memory cgroup's limit is told as killed for memory, and not loaded again at once.

    By the real kernel, with stand-ins for llama-server; what follows within minutes is told in test_memory.py.
    """
    fake = fake_llama_server(models={"alpha": {"grow_mib": GIB // MIB}})
    async with gateway(tmp_path, models_dir, fake, group=group) as it, AsyncExitStack() as stack:
        beta = await stack.enter_async_context(it.fleet.lease("beta"))
        budget = it.fleet.memory.capacity.budget(it.router).bytes["RAM"]
        assert budget is not None
        async with it.fleet.lease("alpha") as alpha:
            with pytest.raises(httpx.HTTPError):
                await chat(alpha)
            await happens(lambda: told(it, ModelUnloaded))
        assert unloads(it) == [("alpha", UnloadReason.OOM)]
        assert [event.kills for event in told(it, MemoryKill)] == [1]
        assert it.fleet.memory.capacity.budget(it.router).bytes["RAM"] == int(FACTOR * budget)
        with pytest.raises(DemandRefusedError, match="killed") as error:
            await stack.enter_async_context(it.fleet.lease("alpha"))
        assert error.value.reason == Why.QUARANTINED.value
        gamma = await stack.enter_async_context(it.fleet.lease("gamma"))
        assert (await chat(beta), await chat(gamma)) == ("I am beta", "I am gamma")
        assert (len(fake.starts()), len(fake.model_starts())) == (1, 3)


def test_p7_under_a_daemon(tmp_path: Path, models_dir: Path, fake_llama_server: MakeFake, group: MemoryGroup) -> None:
    """P7: the daemon, which is in that cgroup itself, tells and counts what the kernel did, and others serve on.

    With `serve = "router"`, so nothing is kept to; a model that has been killed is left alone all the same.
    """
    fake = fake_llama_server(models={"alpha": {"grow_mib": GIB // MIB}})
    daemon = RunningDaemon(tmp_path, models_dir, fake)
    daemon.launcher = group.launcher
    with daemon:
        daemon.wait_for_router("ready")
        for name in ("alpha", "beta"):
            assert daemon.cli("load", name).returncode == 0
        beta = daemon.model("beta")["pid"]
        with suppress(AssertionError, HTTPException, OSError):  # whatever a client gets from a process that has died
            daemon.chat("alpha")
        unloaded = daemon.wait_for_event("ModelUnloaded")
        assert (unloaded["model"], unloaded["reason"]) == ("alpha", "oom")
        assert [event["kills"] for event in daemon.events("MemoryKill")] == [1]
        assert daemon.chat("beta") == "I am beta"
        counted = daemon.metrics()
        assert 'llamavisor_model_unloads_total{model="alpha",reason="oom",router="main"} 1.0' in counted
        assert "llamavisor_memory_oom_kills_total 1.0" in counted
        alpha = daemon.model("alpha")
        assert "want of memory" in alpha["problem"], alpha
        assert len(fake.model_starts()) == 2
        assert (daemon.model("beta")["pid"], daemon.router()["restarts"]) == (beta, 0)
