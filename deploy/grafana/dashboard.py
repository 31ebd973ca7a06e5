"""Makes the dashboard of panels.toml: `python deploy/grafana/dashboard.py > deploy/grafana/llamavisor.json`.

What is shown stands there; what Grafana wants to be told about every panel beyond that stands here.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = Path(__file__).with_name("panels.toml")
WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DAEMON, _ROUTER, _MODEL = 'instance=~"$instance"', 'router=~"$router"', 'model=~"$model"'
SHORT = {
    "<daemon>": _DAEMON,
    "<router>": f"{_DAEMON}, {_ROUTER}",
    "<model>": f"{_DAEMON}, {_MODEL}",
    "<router, model>": f"{_DAEMON}, {_ROUTER}, {_MODEL}",
    "<step>": "$__rate_interval",
}


def dashboard(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole of it, as Grafana 11 and newer read it."""
    return {
        "uid": "llamavisor",
        "title": "llamavisor",
        "description": "Routers, models, requests and memory of llamavisor. Needs its recording rules (rules.yml).",
        "tags": ["llamavisor", "llama.cpp"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # the same moment is marked in all panels
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": list(_variables())},
        "annotations": {"list": []},
        "panels": list(_laid_out(rows)),
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}
    for name, query, everything in (
        ("instance", "label_values(llamavisor_build_info, instance)", None),
        ("router", "label_values(llamavisor_router_state{<daemon>}, router)", None),
        # Everything is more than the list: models that are only asked for, and requests that name none.
        ("model", "label_values(llamavisor_model_state{<router>}, model)", ".*"),
    ):
        yield {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": _expanded(query), "refId": name},
            "refresh": 2,  # whenever the time range changes: models come and go
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": everything,
            "current": {"text": ["All"], "value": ["$__all"]},
        }


def _laid_out(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row with its panels, from left to right and from top to bottom."""
    number = y = 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": row["title"], "collapsed": False, "panels": [], "gridPos": place}
        x, y, tallest = 0, y + 1, 0
        for panel in row["panel"]:
            width, height = panel.get("width", 8), panel.get("height", 7)
            if x + width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            yield {"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **_shown(panel)}
            x, tallest = x + width, max(tallest, height)
        y += tallest


def _shown(panel: Mapping[str, Any]) -> dict[str, Any]:
    kind, unit = panel.get("kind", "timeseries"), panel.get("unit", "short")
    defaults: dict[str, Any] = {"unit": unit, "color": {"mode": "palette-classic"}}
    match kind:
        case "timeseries":
            is_stacked = panel.get("stacked", False)
            stacking = {"mode": "normal" if is_stacked else "none", "group": "A"}
            defaults["custom"] = {"fillOpacity": 30 if is_stacked else 5, "stacking": stacking, "showPoints": "auto"}
            defaults["min"] = 0
            legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
            options = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        case "stat":
            options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        case "bargauge":
            options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal", "displayMode": "basic"}
        case "state-timeline":
            options = {"mergeValues": True, "showValue": "never", "legend": {"showLegend": False}}
        case "heatmap":
            options = {"calculate": False, "yAxis": {"unit": unit}, "color": {"mode": "scheme", "scheme": "Blues"}}
        case _:
            raise ValueError(f"{panel['title']}: panels of the kind {kind!r} are not known here")
    if words := panel.get("words"):
        shown = {number: {"text": text, "color": color} for number, (text, color) in words.items()}
        defaults["mappings"] = [{"type": "value", "options": shown}]
    if limits := panel.get("limits"):
        steps = zip((None, *limits), ("green", "yellow", "red"), strict=True)
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"value": at, "color": color} for at, color in steps]}
        defaults["color"] = {"mode": "thresholds"}
    return {
        "type": kind,
        "title": panel["title"],
        "description": panel.get("about", ""),
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": DATASOURCE,
                "expr": _expanded(expression),
                "legendFormat": name,
                "format": "heatmap" if kind == "heatmap" else "time_series",
                "instant": kind == "bargauge",
                "range": kind != "bargauge",
            }
            for at, (name, expression) in enumerate(panel["queries"])
        ],
    }


def _expanded(expression: str) -> str:
    for short, whole in SHORT.items():
        expression = expression.replace(short, whole)
    return expression


if __name__ == "__main__":
    json.dump(dashboard(tomllib.loads(PANELS.read_text(encoding="utf-8"))["row"]), sys.stdout, indent=1)
    sys.stdout.write("\n")
