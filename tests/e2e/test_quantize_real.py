"""`quantize` with the true llama-quantize, and its result on the true llama-server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fakes.waiting import eventually
from llamavisor import gguf
from llamavisor.quantizer import NAME, Quantizer
from llamavisord.completions.outline import outline
from llamavisord.exit_codes import ExitCode
from running import RunningDaemon

pytestmark = pytest.mark.real


def test_a_model_is_quantized_and_served(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """It is smaller, of the type that was asked for, and says the same as its source."""
    if not llama_server.with_name(NAME).is_file():
        pytest.skip(f"this build of llama-server comes without {NAME}")
    with RunningDaemon(tmp_path, models_dir, llama_server) as daemon:
        daemon.wait_for_gateway()
        for type_ in ("F16", "Q8_0"):
            done = daemon.cli("quantize", "alpha", type_, "--threads", "1")
            assert (done.returncode, done.stderr) == (0, "")
            made = models_dir / f"alpha-{type_}.gguf"
            assert done.stdout.startswith(f"{made}: {type_}, ")
            assert gguf.read(made).quantization == type_
            assert made.stat().st_size < (models_dir / "alpha.gguf").stat().st_size
            eventually(lambda name=made.stem: name in daemon.models(), what=f"model {made.stem}")
            assert daemon.chat(made.stem) == "I am alpha"
        again = daemon.cli("quantize", "alpha-Q8_0", "Q4_0")
        assert (again.returncode, "--allow-requantize" in again.stderr) == (ExitCode.FAILED, True)
        near = daemon.cli("quantize", "alpha", "Q4_K_N")
        assert (near.returncode, "Did you mean Q4_K" in near.stderr) == (ExitCode.USAGE, True)
        lossy = daemon.cli("quantize", "alpha-Q8_0", "Q4_0", "--allow-requantize")
        assert (lossy.returncode, gguf.read(models_dir / "alpha-Q4_0.gguf").quantization) == (0, "Q4_0")
    assert not [path for path in models_dir.iterdir() if path.name.startswith(".")]


def test_every_type_that_is_offered_for_completion_is_known_to_the_tool(llama_server: Path) -> None:
    """What a Tab offers is no dead end."""
    if not llama_server.with_name(NAME).is_file():
        pytest.skip(f"this build of llama-server comes without {NAME}")
    [command] = [each for each in outline() if each.path == ("quantize",)]
    offered = command.values[1].words
    assert "Q4_K_M" in offered
    assert not set(offered) - set(Quantizer(llama_server, os.environ).types)
