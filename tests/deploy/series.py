"""The series that there are: those of the daemon's own registry, and those that our rules record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.metrics import MetricWrapperBase

from daemon.stage import Stage, entry
from deploy.promql import read
from fakes.bare_router import BareRouter
from fakes.waiting import PATIENCE_S
from llamavisord.drain import Drain
from llamavisord.exposition import Exposition
from llamavisord.traffic import Traffic

DEPLOY = Path(__file__).parents[2] / "deploy"
LLAMA_CPP = "llamacpp:"
"""What models say of themselves begins so; a test asks a true one whether it says it."""
_STARTED_ANEW = frozenset({"llamacpp:prompt_tokens_seconds", "llamacpp:predicted_tokens_seconds"})
_SUFFIXES = {
    "counter": {"_total": ()},
    "gauge": {"": ()},
    "info": {"_info": ()},
    "histogram": {"_bucket": ("le",), "_sum": (), "_count": ()},
}
_OF_EVERY_TARGET = frozenset({"job", "instance"})


async def registered(folder: Path) -> dict[str, set[str]]:
    """The labels of each series that a daemon with everything exposes, as Prometheus has them."""
    stage = Stage(folder)
    stage.put(entry("alpha"))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        daemon.traffic = Traffic(Drain(stage.bus), held_bytes=lambda: 0, connections=lambda: 0)
        exposition = Exposition(daemon)
        families = {"up": set(_OF_EVERY_TARGET), "ALERTS": {"alertname", "alertstate", *_OF_EVERY_TARGET}}
        for collector in exposition.registry._collector_to_names:
            # What counts does not tell its labels before it has counted something; what is read at the scrape does.
            own = collector._labelnames if isinstance(collector, MetricWrapperBase) else ()
            for family in collector.collect():
                labels = {*own, *getattr(family, "_labelnames", ())}
                labels |= {label for sample in family.samples for label in sample.labels} - {"le"}
                for suffix, more in _SUFFIXES[family.type].items():
                    families[family.name + suffix] = {*labels, *more, *_OF_EVERY_TARGET}
    return families


def recorded(known: dict[str, set[str]], shown: Iterable[str] = ()) -> dict[str, set[str]]:
    """Those, what llama.cpp says of a model in these queries and in our rules, and what our rules make of it all."""
    queries = {rule["record"]: (rule["expr"], rule.get("labels", {})) for rule in rules("rules.yml")}
    of_models = own_of_llama_cpp([*shown, *(text for text, _ in queries.values())])
    known = known | {name: {"router", "model", *_OF_EVERY_TARGET} for name in of_models}
    for name, (text, labels) in queries.items():  # in their order: one may be made of another
        known[name] = read(text).result(known) | set(labels)
    return known


def rules(name: str) -> list[dict[str, Any]]:
    """All rules of one of our files."""
    return [rule for group in written(f"prometheus/{name}")["groups"] for rule in group["rules"]]


def written(path: str) -> Any:
    """What one of our files of YAML says."""
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def shown() -> list[str]:
    """Every query of the dashboard, as Grafana sends it while everything is chosen."""
    panels = json.loads((DEPLOY / "grafana/llamavisor.json").read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [re.sub(r"\$\w+", ".*", re.sub(r"\$__\w+", "5m", query)) for query in queries]


def own_of_llama_cpp(texts: Iterable[str]) -> set[str]:
    """What these queries take of what models say of themselves."""
    return {name for text in texts for name in read(text).series if name.startswith(LLAMA_CPP)}


def said_by_a_model(llama_server: Path, folder: Path, models_dir: Path) -> set[str]:
    """What a true model says of itself, without the averages that every reader starts anew: those are not exposed."""
    with BareRouter(llama_server, folder / "router", models_dir) as router:
        process = router.load("alpha")
        with closing(HTTPConnection("127.0.0.1", process.port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode("utf-8")
    return set(re.findall(rf"^{LLAMA_CPP}\w+", text, re.MULTILINE)) - _STARTED_ANEW
