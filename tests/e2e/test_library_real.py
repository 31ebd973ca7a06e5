"""The example of the library, run as it is on the real llama-server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

EXAMPLE = Path(__file__).parents[2] / "examples" / "chat.py"


def test_the_example_chats_with_a_model(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """It lists what is in the folder and prints what a model says; the next run, on the same state, does so too."""
    env = {**os.environ, "LLAMAVISOR_LLAMA_SERVER": str(llama_server)}
    argv = [sys.executable, str(EXAMPLE), str(models_dir), str(tmp_path / "state"), "beta"]
    for _ in range(2):
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stderr
        assert "gamma: ready" in done.stdout
        assert done.stdout.endswith("beta says: I am beta\n")
