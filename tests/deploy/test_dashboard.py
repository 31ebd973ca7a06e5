"""The dashboard for Grafana: made of what stands beside it, of series that there are, and laid out without a gap."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import series
from deploy.promql import read
from deploy.tools import promtool

GRAFANA = series.DEPLOY / "grafana"
TEXT = (GRAFANA / "llamavisor.json").read_text(encoding="utf-8")
DASHBOARD = json.loads(TEXT)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
_OF_GRAFANA = {"__rate_interval", "__range"}


def targets() -> Iterator[dict[str, Any]]:
    """Every query of every panel."""
    for panel in PANELS:
        yield from panel["targets"]


def test_it_is_what_the_script_makes() -> None:
    """Who changes panels.toml runs the script; who changes the dashboard itself is told where it is made."""
    made = subprocess.run([sys.executable, GRAFANA / "dashboard.py"], capture_output=True, text=True, check=True)
    assert made.stdout == TEXT, "run: python deploy/grafana/dashboard.py > deploy/grafana/llamavisor.json"


@pytest.mark.anyio
@pytest.mark.usefixtures("virtual_time")
async def test_it_shows_series_that_there_are(tmp_path: Path) -> None:
    """Every series of a panel or a variable is in the registry or recorded, with each label that names or groups it."""
    known = series.recorded(await series.registered(tmp_path), series.shown())
    for target, text in zip(targets(), series.shown(), strict=True):
        query = read(text)
        assert list(query.problems(known)) == []
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= query.result(known), target
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            query, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            assert list(read(query).problems(known)) == []
            assert label in read(query).result(known)


@pytest.mark.real
def test_llama_cpp_says_what_is_shown_of_it(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """What is shown of `llamacpp:` is what a model says of itself."""
    named = series.own_of_llama_cpp(series.shown())
    assert named
    assert named <= series.said_by_a_model(llama_server, tmp_path, models_dir)


def test_prometheus_understands_its_queries(tmp_path: Path) -> None:
    """Each of them is well-formed, to Prometheus's own parser."""
    queries = [{"record": f"query:{at}", "expr": text} for at, text in enumerate(series.shown())]
    rules = tmp_path / "queries.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": queries}]}), encoding="utf-8")
    assert f"{len(queries)} rules found" in promtool("check", "rules", rules)


def test_it_asks_the_source_and_the_daemons_that_are_chosen() -> None:
    """Every panel asks the chosen data source, with variables that there are, about the chosen daemons."""
    for panel in PANELS:
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in targets():
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*VARIABLES, *_OF_GRAFANA}
    for text in series.shown():
        assert all("instance" in labels for _, labels in read(text).selected), text
    assert list(VARIABLES) == ["datasource", "instance", "router", "model"]


def test_no_panel_lies_on_another() -> None:
    """Every panel has a number, a title and a place of its own, on the grid."""
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    places = [panel["gridPos"] for panel in every]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_grafana_is_told_of_both() -> None:
    """Its provisioning has one data source, which looks as often as Prometheus reads, and one folder of dashboards."""
    (source,) = series.written("grafana/provisioning/datasources/llamavisor.yml")["datasources"]
    (provider,) = series.written("grafana/provisioning/dashboards/llamavisor.yml")["providers"]
    prometheus = series.written("prometheus/prometheus.yml")
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert provider["options"]["path"]
