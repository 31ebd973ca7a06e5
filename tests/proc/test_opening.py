"""A fleet opened by the library alone, without a daemon: real processes, on asyncio and on trio."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from fakes import FakeLlamaServer
from llamavisor import fleet as fleet_module
from llamavisor.endpoint import Endpoint
from llamavisor.errors import ModelInUseError, ModelNotFoundError, RouterNotReadyError
from llamavisor.events import Bus, ModelLoaded, ModelUnloaded
from llamavisor.fleet import Fleet
from llamavisor.lock import AlreadyRunningError
from llamavisor.settings import FleetSettings, RouterSettings

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(models_dir: Path, fake_llama_server: Callable[..., FakeLlamaServer]) -> FleetSettings:
    """One router on a fake llama-server, with the models alpha, beta and gamma."""
    return FleetSettings(routers=(RouterSettings(models_dir=models_dir, llama_server=str(fake_llama_server().path)),))


async def chat(endpoint: Endpoint) -> str:
    """What a model answers."""
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(
            f"{endpoint.url}/v1/chat/completions",
            headers={"Authorization": f"Bearer {endpoint.api_key}"},
            json={"model": endpoint.model, "messages": [{"role": "user", "content": "hi"}]},
        )
        return str(answer.json()["choices"][0]["message"]["content"]).strip()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_fleet_lists_inspects_leases_and_removes(settings: FleetSettings, tmp_path: Path) -> None:
    """All that a program does with models it does in one block, and when that ends nothing runs any more."""
    async with Fleet.open(settings, state_dir=tmp_path / "state") as fleet:
        assert [entry.name for entry in fleet.storage.models()] == ["alpha", "beta", "gamma"]
        header = fleet.storage.model("alpha").header
        assert header is not None
        assert header.architecture == "llama"
        async with fleet.lease("alpha") as endpoint:
            assert await chat(endpoint) == "I am alpha"
            with pytest.raises(ModelInUseError):
                await fleet.storage.remove("alpha")
        removed = await fleet.storage.remove("alpha", force=True)
        assert [file.rel for file in removed.files] == ["alpha.gguf"]
        with pytest.raises(ModelNotFoundError):
            fleet.storage.model("alpha")
        process = fleet["main"].process
        assert process is not None
    assert not Path(f"/proc/{process.pid}").exists()


async def test_what_the_block_raises_comes_out_as_it_is(settings: FleetSettings, tmp_path: Path) -> None:
    """A program catches its own errors by their own names, not in a group, and the fleet has ended by then."""
    pids: list[int] = []

    async def fail() -> None:
        async with Fleet.open(settings, state_dir=tmp_path / "state") as fleet:
            pids.extend(router.process.pid for router in fleet if router.process is not None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()


async def test_a_state_folder_has_one_fleet(settings: FleetSettings, tmp_path: Path) -> None:
    """A second one on the same folder is refused, and has harmed nothing of the first."""
    async with Fleet.open(settings, state_dir=tmp_path / "state") as fleet:
        with pytest.raises(AlreadyRunningError):
            await Fleet.open(settings, state_dir=tmp_path / "state").__aenter__()
        async with fleet.lease("alpha") as endpoint:
            assert await chat(endpoint) == "I am alpha"


async def test_what_was_said_is_known_to_the_next_fleet(settings: FleetSettings, tmp_path: Path) -> None:
    """A pin outlives its fleet."""
    async with Fleet.open(settings, state_dir=tmp_path / "state") as fleet:
        assert fleet.memory.pin("beta")
    async with Fleet.open(settings, state_dir=tmp_path / "state") as fleet:
        assert not fleet.memory.pin("beta")


async def test_children_of_others_are_theirs_to_wait_for(
    settings: FleetSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that has processes of its own gets their exit codes, however late it asks for them."""
    monkeypatch.setattr(fleet_module, "REAP_INTERVAL_S", 0.001)
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    async with Fleet.open(settings, state_dir=tmp_path / "state") as fleet:
        async with fleet.lease("alpha"):
            pass
        assert child.wait() == 3


async def test_events_are_heard_on_a_bus_of_ones_own(settings: FleetSettings, tmp_path: Path) -> None:
    """Whoever brings a bus hears on it what happens to models, to the end."""
    bus, heard = Bus(), []
    bus.listen(lambda published: heard.append(type(published.event)))
    async with Fleet.open(settings, state_dir=tmp_path / "state", bus=bus) as fleet, fleet.lease("alpha"):
        assert ModelLoaded in heard
    assert ModelUnloaded in heard


async def test_without_a_llama_server_a_lease_says_why(models_dir: Path, tmp_path: Path) -> None:
    """The fleet opens, lists what there is, and refuses leases with the reason."""
    router = RouterSettings(models_dir=models_dir, llama_server=str(tmp_path / "nothing"))
    async with Fleet.open(FleetSettings(routers=(router,)), state_dir=tmp_path / "state") as fleet:
        assert len(fleet.storage.models()) == 3
        with pytest.raises(RouterNotReadyError, match=r"nothing.*No such file or directory"):
            async with fleet.lease("alpha"):
                pass
