"""Sampling defaults of a configuration on the true llama-server."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fakes.waiting import PATIENCE_S
from running import RunningDaemon, config_of

pytestmark = pytest.mark.real


def test_a_model_samples_as_its_tables_say(
    tmp_path: Path, models_dir: Path, llama_server: Path, free_port: int
) -> None:
    """What its own table says wins over the defaults; another model has the defaults alone, and requests go first."""
    tables = """
[defaults]
threads = 1
temperature = 0.25
top_k = 7
[model.alpha]
temperature = 1.5
top_p = 0.5
min_p = 0.125
repeat_penalty = 1.25
max_tokens = 2
"""
    config = config_of(models_dir, free_port, "")
    daemon = RunningDaemon(tmp_path, models_dir, llama_server, config=config + tables)
    with daemon:
        daemon.wait_for_gateway()
        assert daemon.chat("alpha", port=free_port) == "I am"  # /props does not tell of max_tokens
        assert daemon.chat("beta", port=free_port) == "I am beta"
        assert sampling(free_port, "alpha") == pytest.approx(
            {"temperature": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repeat_penalty": 1.25}
        )
        beta = sampling(free_port, "beta")
        assert (beta["temperature"], beta["top_k"]) == (0.25, 7)
        long = daemon.cli("run", "alpha", "who?", "--max-tokens", "9")
        assert (long.returncode, long.stdout) == (0, " I am alpha\n")


def sampling(port: int, model: str) -> dict[str, float]:
    """What a loaded model says of itself, asked through the gateway."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", f"/props?model={model}")
        params = json.loads(connection.getresponse().read())["default_generation_settings"]["params"]
    return {key: params[key] for key in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")}
