"""`llamavisor demo`, the first thing that anybody runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import free_port

Run = Callable[..., subprocess.CompletedProcess[str]]
DEMO_TIMEOUT_S = 90.0
"""It takes five seconds; a busy machine takes longer."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the demo in a home of its own, and fails if it leaves a file behind; processes are looked for everywhere."""

    def run_demo(llama_server: object, *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        # Not in tmp_path: the name of a socket must be short.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", "llamavisord", "demo", "--llama-server", str(llama_server)],
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": folder, **(env or {})},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=DEMO_TIMEOUT_S,
            )
            assert os.listdir(folder) == []
        return done

    return run_demo


@pytest.mark.real
def test_story(run: Run, tmp_path: Path, llama_server: Path) -> None:
    """It chats, kills the router, and chats again, also for a user whose own configuration says something else."""
    config = tmp_path / ".config" / "llamavisor" / "llamavisor.toml"
    config.parent.mkdir(parents=True)
    routers = "".join(f'[[router]]\nname = "{name}"\nport = {free_port()}\n' for name in ("one", "two"))
    config.write_text(f'models_dir = "/nowhere"\n{routers}')
    # Root has no configuration at home: the variable makes it count for everybody.
    own = {"LLAMAVISOR_CONFIG": str(config), "LLAMAVISOR_PORT": "many", "LLAMAVISOR_SOCKET": "/nowhere/x.sock"}
    done = run(llama_server, env=own)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("alpha says: 'I am alpha'") == 2
    for said in ("made 3 tiny GGUF models", "kill -9", "alpha loaded again", "What to do next"):
        assert said in done.stdout


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"start_failures": -1, "start_line": "error: invalid argument: --x"}, "error: invalid argument: --x"),
        ({"model": {"load_failures": -1}}, "alpha"),
    ],
    ids=["start", "load"],
)
def test_broken_llama_server(
    run: Run, fake_llama_server: Callable[..., FakeLlamaServer], behaviour: dict[str, object], said: str
) -> None:
    """What goes wrong ends it with 1, with the reason and what the daemon has to say."""
    done = run(fake_llama_server(**behaviour))
    assert done.returncode == 1
    first, *log = done.stderr.splitlines()
    assert first.startswith("llamavisor demo: ")
    assert said in first
    assert any("ERROR" in line for line in log)


def test_missing_llama_server(run: Run) -> None:
    """Without a llama-server it says that, and what to do."""
    done = run("/nowhere/llama-server")
    assert done.returncode == 1
    assert "/nowhere/llama-server" in done.stderr.splitlines()[0]
