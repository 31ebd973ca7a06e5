"""The example of the library, run as it is on the real llama-server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.bare_router import free_port
from fakes.hub_server import Fault, HubFile, HubServer, Repository
from hub_folder import MANY, MIB, SECRET, hub_of_models, until
from llamavisor.errors import RouterNotFoundError
from llamavisor.fleet import Fleet
from llamavisor.hub import Spec
from llamavisor.settings import FleetSettings, RouterSettings
from llamavisord.tiny_model import write_tiny_model

pytestmark = pytest.mark.real

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat.py"


def call_example(folder: Path, llama_server: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The example as a person in this folder calls it."""
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *words],
        env={**os.environ, "LLAMAVISOR_LLAMA_SERVER": str(llama_server), **env},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def run_example(models_dir: Path, folder: Path, model: str, llama_server: Path, **env: str) -> str:
    """What it prints, in a folder in which it has its state; both are named as a person there would."""
    done = call_example(folder, llama_server, os.path.relpath(models_dir, folder), "state", model, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_chats_with_a_model(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """It lists what is in the folder and prints what a model says; the next run, on the same state, does so too."""
    for _ in range(2):
        said = run_example(models_dir, tmp_path, "beta", llama_server)
        assert "gamma: ready" in said
        assert said.endswith("beta says: I am beta\n")


def test_the_example_ends_with_a_sentence(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """Without arguments with how it is called, else with what is wrong: no traceback."""
    (tmp_path / "empty").mkdir()
    for words, told in (
        ([], "chat.py MODELS_DIR STATE_DIR"),
        ([str(tmp_path / "empty"), "state"], "holds no model"),
        ([str(models_dir), "state", "nobody"], "no model 'nobody'"),
    ):
        done = call_example(tmp_path, llama_server, *words)
        assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr


def test_the_example_pulls_a_model(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """One of the Hub is brought into the folder, listed and asked; the next run finds it there and brings nothing."""
    write_tiny_model(tmp_path / "new", ["I", "am", "pulled"])
    files = {"New-F32.gguf": HubFile((tmp_path / "new").read_bytes())}
    with HubServer({"user/New-GGUF": Repository(files)}) as hub:
        for _ in range(2):
            said = run_example(models_dir, tmp_path, "user/New-GGUF:F32", llama_server, HF_ENDPOINT=hub.url)
            assert said.startswith(f"New-F32 is at {models_dir / 'New-F32.gguf'}\n")
            assert "New-F32: ready" in said
            assert said.endswith("New-F32 says: I am pulled\n")
        assert len(hub.downloads()) == 1


@pytest.mark.anyio
async def test_a_fleet_goes_on_with_what_an_earlier_one_was_pulling(
    tmp_path: Path, models_dir: Path, llama_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a block cuts a pull off; the next one goes on with it, and asks the Hub for no byte twice."""
    other = tmp_path / "other"
    other.mkdir()
    routers = tuple(
        RouterSettings(name=name, port=free_port(), models_dir=folder, llama_server=str(llama_server))
        for name, folder in (("one", models_dir), ("two", other))
    )
    with hub_of_models(tmp_path) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        hub.faults = [Fault(stall_after=2_000_000)]
        async with Fleet.open(FleetSettings(routers=routers), state_dir=tmp_path / "state") as fleet:
            with pytest.raises(RouterNotFoundError):
                await fleet.pull("user/big", router="three")
            pull = await fleet.pull("user/big", router="two")
            assert await fleet.pull(Spec(repository="user/big"), router="two") is pull
            await until(lambda: pull.done_bytes > MIB)
        assert not list(other.glob("*.gguf"))
        hub.asked.clear()
        async with Fleet.open(FleetSettings(routers=routers), state_dir=tmp_path / "state") as fleet:
            await until((other / "Big-Q4_K_M.gguf").exists)  # nobody has asked for it again
            assert await (await fleet.pull("user/big", router="two")).wait() == other / "Big-Q4_K_M.gguf"
        assert sum(asked.sent[0] for asked in hub.downloads()) < MANY - MIB
        assert not (models_dir / "Big-Q4_K_M.gguf").exists()


def test_who_pulls_nothing_waits_for_no_client_of_the_hub() -> None:
    """The library is imported without huggingface_hub, which takes half a second."""
    code = "import sys, llamavisor.fleet, llamavisor.opening; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
