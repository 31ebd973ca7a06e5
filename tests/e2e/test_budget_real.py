"""A memory budget on the real llama-server: what a model is told because of it, gets, and takes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest

from llamavisor import gauge, gguf, procfs
from llamavisor.api import RouterApi
from llamavisor.appraisal import Appraiser
from llamavisor.binary import ProbeCache
from llamavisor.budgets import Allowance, allow, limits
from llamavisor.catalog import Entry, EntryState, ModelFile
from llamavisor.cause import Verdict
from llamavisor.child import Child
from llamavisor.errors import ApiError
from llamavisor.footprint import RAM, FitParams, Source
from llamavisor.launch import Launch, Launcher
from llamavisor.ledger import Footprints
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.process import Process, Spawner
from llamavisor.sections import ModelSpec, specify
from llamavisor.settings import MemoryBudget, RouterSettings
from llamavisor.shelf import Offer
from llamavisor.states import ModelState
from shapes import Shape, file_id, write_model

pytestmark = [pytest.mark.anyio, pytest.mark.real, pytest.mark.timeout(120)]

MIB = 1024 * 1024
GIB = 1024 * MIB
BUDGET = MemoryBudget(4 * GIB)
MODELS_MAX = 4
SHAPE = Shape(layers=16, heads=16, heads_kv=8, head=128, forward=2048)
"""It keeps 64 KiB of a token: 8,192 of them are half a GiB, and half of what a budget of 4 GiB has for contexts."""
TOLERANCE = 0.10
LEAST_TOLERANCE = 64 * MIB
PROMPT_TOKENS = 600


class Known:
    """A model that is known without a folder."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    async def take(self) -> dict[str, ModelSpec] | Verdict:
        """What is known."""
        return {self._spec.name: self._spec}

    async def look_again(self) -> None:
        """Nothing changes."""


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A model, and no trace of it afterwards: pytest would keep it."""
    path = tmp_path / "model.gguf"
    write_model(path, SHAPE)
    yield path
    path.unlink()


async def test_a_model_fits_the_budget(model: Path, tmp_path: Path, llama_server: Path, free_port: int) -> None:
    """It gets the context that the budget allows, whoever trained it for more, and takes what was expected of it."""
    settings = RouterSettings(
        name="main",
        port=free_port,
        models_dir=tmp_path,
        models_max=MODELS_MAX,
        llama_server=str(llama_server),
        memory=BUDGET,
        autoload=False,
    )
    readings = await gauge.RamGauge().read()
    footprints = Footprints()
    spec = spec_of(model, allow(limits(BUDGET, (), readings), (), MODELS_MAX))
    launcher = Launcher(
        settings,
        spawner=Spawner("test"),
        state_dir=tmp_path / "state",
        log_dir=tmp_path / "logs",
        log_size_bytes=1_000_000,
        probes=ProbeCache(),
        source=Known(spec),
        environ=os.environ,
        appraiser=Appraiser(FitParams(), footprints),
    )
    assert await launcher.sight([gauge.RAM]) == ()
    launch = await launcher.prepare()
    assert isinstance(launch, Launch), launch
    offer = await launcher.write_offer(launch, launch.specs, kept={}, before=Offer())
    offered = offer.models["model"]
    assert offered.section == {
        "model": str(model),
        "threads": "1",
        "ctx-size": "8192",
        "cache-ram": "102",
    }
    expected = await launcher.appraise(launch, offered, ())
    assert expected is not None
    assert (expected.n_ctx, expected.is_ctx_ours, expected.warnings) == (8192, True, ())
    assert expected.footprint.source is Source.FIT_PARAMS
    assert expected.footprint.prompt_cache_bytes == 102 * MIB
    assert expected.footprint.parts[RAM]["context"] == 512 * MIB

    async with running(launcher, launch) as (process, api):
        await api.load("model")
        child = await loaded(launcher, process, api)
        (listed,) = await api.models()
        assert listed.n_ctx == 8192
        arguments = procfs.command_line(child.pid)
        assert procfs.option_value(arguments, "--ctx-size") == "8192"
        assert procfs.option_value(arguments, "--cache-ram") == "102"
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{child.port}", timeout=60, trust_env=False) as client:
            answer = await client.post("/completion", json={"prompt": [5] * PROMPT_TOKENS, "n_predict": 2})
            assert answer.status_code == 200, answer.text
        taken = gauge.memory_of(child.pid)
        assert taken is not None
        assert taken.pss is not None

    off = expected.footprint.bytes[RAM] - taken.pss
    assert abs(off) <= max(LEAST_TOLERANCE, TOLERANCE * taken.pss), f"{off / MIB:+.0f} MiB off {taken.pss / MIB:.0f}"
    assert taken.pss < 2 * GIB
    footprints.record(expected.key, {RAM: taken.pss})
    learned = await launcher.appraise(launch, offered, ())
    assert learned is not None
    assert (learned.footprint.source, learned.footprint.bytes) == (Source.MEASURED, {RAM: taken.pss})


def spec_of(model: Path, allowance: Allowance) -> ModelSpec:
    """What a router is to serve."""
    entry = Entry(
        name="model",
        state=EntryState.READY,
        files=(ModelFile(str(model), file_id(model)),),
        header=gguf.read(model),
    )
    base = (OptionLayer("[defaults]", ModelOptions(threads=1)),)
    found = specify(entry, (), router="main", base=base, allowance=allowance)
    assert found is not None
    return found


@asynccontextmanager
async def running(launcher: Launcher, launch: Launch) -> AsyncIterator[tuple[Process, RouterApi]]:
    """Have the router run."""
    process = await launcher.spawn(launch, autoload=True)
    try:
        with anyio.fail_after(30):
            while not await launcher.is_listening(process.pid, launch, log_mark=0):
                assert process.poll() is None, "\n".join(launcher.output.tail(20, since=0))
                await anyio.sleep(0.01)
        async with launcher.connect(launch) as api:
            with anyio.fail_after(30):
                while not await answers(api):  # it listens before it has read its models
                    await anyio.sleep(0.01)
            yield process, api
    finally:
        with anyio.CancelScope(shield=True):
            await process.terminate(grace_s=5)
            await process.clear()


async def answers(api: RouterApi) -> bool:
    """Whether the router takes orders."""
    try:
        await api.check_health(timeout_s=5)
    except ApiError:
        return False
    return True


async def loaded(launcher: Launcher, process: Process, api: RouterApi) -> Child:
    """The process of the model, once it is loaded."""
    with anyio.fail_after(60):
        while True:
            (listed,) = await api.models()
            if listed.state is ModelState.LOADED:
                break
            assert not listed.failed, "\n".join(launcher.output.tail(20, since=0))
            await anyio.sleep(0.05)
    child = await launcher.find_child(process.pid, "model")
    assert child is not None
    return child
