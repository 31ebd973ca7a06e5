"""What the real llama-server says of its models, under the daemon's scrape, and that a scrape disturbs nobody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes.bare_router import free_port
from fakes.waiting import eventually
from promtool import complaints
from running import RunningDaemon

pytestmark = pytest.mark.real

SLEEPY = """
[model.beta]
sleep_idle_seconds = 1
"""


def children(metrics: str) -> dict[str, dict[str, float]]:
    """What the processes say, by the name of the metric and the model; all of it of the router main."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name.startswith("llamacpp:"):
                assert sample.labels.keys() >= {"router", "model"}
                assert sample.labels["router"] == "main"
                found.setdefault(sample.name, {})[sample.labels["model"]] = sample.value
    return found


def says(daemon: RunningDaemon, **tokens: int) -> bool:
    """Whether these models have predicted so many tokens, or more."""
    predicted: Mapping[str, float] = children(daemon.metrics()).get("llamacpp:tokens_predicted_total", {})
    return predicted.keys() == tokens.keys() and all(predicted[model] >= least for model, least in tokens.items())


@pytest.mark.parametrize("serve", ["gateway", "router"])
def test_a_scrape_tells_what_llama_server_says_and_wakes_nobody(
    tmp_path: Path, models_dir: Path, llama_server: Path, serve: str
) -> None:
    """Counters with whose they are; no model is loaded or woken, and who leaves takes its series along."""
    port, metrics_port = free_port(), free_port()
    config = (
        f'serve = "{serve}"\nmodels_dir = "{models_dir}"\nport = {port}\n[metrics]\nport = {metrics_port}\n'
        f'[defaults]\nargs = ["--threads", "1"]\n{SLEEPY}'
    )
    daemon = RunningDaemon(tmp_path, models_dir, llama_server, config=config)
    daemon.port, daemon.metrics_port = port, metrics_port
    with daemon:
        daemon.wait_for_router("ready")
        assert "llamacpp:" not in daemon.metrics()
        for model in ("alpha", "beta"):
            assert daemon.chat(model) == f"I am {model}"
        eventually(lambda: says(daemon, alpha=3, beta=3), what="what was predicted")
        shown = children(daemon.metrics())
        assert shown["llamacpp:prompt_tokens_total"].keys() == {"alpha", "beta"}
        assert min(shown["llamacpp:prompt_tokens_total"].values()) > 0
        assert "llamacpp:n_tokens_max" in shown
        assert not any(name.endswith("_tokens_seconds") for name in shown)
        assert complaints(daemon.metrics()) == []

        daemon.wait_for_model("beta", "sleeping")
        told, pids = len(daemon.events()), {model: daemon.model(model)["pid"] for model in ("alpha", "beta")}
        for _ in range(20):
            assert says(daemon, alpha=3, beta=3)
        assert {model: daemon.model(model)["state"] for model in ("alpha", "beta", "gamma")} == {
            "alpha": "loaded",
            "beta": "sleeping",
            "gamma": "unloaded",
        }
        assert [event for event in daemon.events()[told:] if event["event"].startswith("Model")] == []
        assert {model: daemon.model(model)["pid"] for model in pids} == pids

        assert daemon.cli("unload", "alpha").returncode == 0
        assert children(daemon.metrics())["llamacpp:prompt_tokens_total"].keys() == {"beta"}
        assert daemon.cli("unload", "beta").returncode == 0
        assert "llamacpp:" not in daemon.metrics()
        assert daemon.chat("alpha") == "I am alpha"
        eventually(lambda: says(daemon, alpha=3), what="what its next process says")
        predicted = children(daemon.metrics())["llamacpp:tokens_predicted_total"]["alpha"]
        assert predicted <= shown["llamacpp:tokens_predicted_total"]["alpha"]  # begun anew
