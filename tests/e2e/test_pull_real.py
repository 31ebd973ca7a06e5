"""A model from the Hub on the true llama-server: pulled, seen, asked, removed, by the command line alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from conftest import MODELS
from fakes.hub_server import HubFile, HubServer, Repository
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real


def test_a_model_is_pulled_asked_and_removed(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """While another one answers: nothing is restarted, and what was pulled answers at once, until it is gone."""
    write_tiny_model(tmp_path / "new", ["I", "am", "pulled"])
    files = {"New-F32.gguf": HubFile((tmp_path / "new").read_bytes()), "config.json": HubFile(b"{}", is_lfs=False)}
    with HubServer({"user/New-GGUF": Repository(files)}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        with RunningDaemon(tmp_path, models_dir, llama_server, env=env) as daemon:
            daemon.wait_for_gateway()
            assert daemon.chat("alpha") == "I am alpha"
            listed = daemon.cli("pull", "user/New-GGUF", "--list").stdout
            assert "* is what is pulled: F32" in listed
            done = daemon.cli("pull", "user/New-GGUF")
            assert (done.returncode, done.stderr) == (0, "")
            assert daemon.chat("New-F32") == "I am pulled"
            assert daemon.cli("run", "New-F32", "hi").stdout.strip() == "I am pulled"
            assert daemon.cli("rm", "New-F32", "--yes", "--force").returncode == 0
            assert not (models_dir / "New-F32.gguf").exists()
            eventually(lambda: "New-F32" not in daemon.models(), what="a list without it")
            assert daemon.model("alpha")["state"] == "loaded"
            assert daemon.spawns == 1
            again = daemon.cli("pull", "user/New-GGUF", "--name", "other")
            assert again.returncode == 0, again.stderr
            assert daemon.chat("other") == "I am pulled"


def test_a_model_in_parts_is_pulled_as_one(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """The true llama-server loads what llama.cpp's own tool has split, under one name."""
    split = llama_server.with_name("llama-gguf-split")
    if not split.is_file():
        pytest.skip(f"this build of llama-server comes without {split.name}")
    write_tiny_model(tmp_path / "whole", ["in", "parts"], n_layer=4)
    made = tmp_path / "made"
    made.mkdir()
    cut = [split, "--split", "--split-max-tensors", "16", tmp_path / "whole", made / "Big-F32"]
    subprocess.run(cut, check=True, capture_output=True, timeout=PATIENCE_S)
    parts = {f"F32/{path.name}": HubFile(path.read_bytes()) for path in made.iterdir()}
    assert len(parts) == 3
    with (
        HubServer({"user/big": Repository(parts)}) as hub,
        RunningDaemon(tmp_path, models_dir, llama_server, env={"HF_ENDPOINT": hub.url}) as daemon,
    ):
        daemon.wait_for_gateway()
        assert daemon.cli("pull", "user/big").returncode == 0
        assert daemon.chat("Big-F32") == "in parts"
        assert daemon.cli("rm", "Big-F32", "--yes", "--force").returncode == 0
    assert {path.name for path in models_dir.iterdir() if not path.name.startswith(".")} == {
        f"{name}.gguf" for name in MODELS
    }
