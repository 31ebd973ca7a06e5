"""The rules for Prometheus: that its own tools like them, that they speak of what there is, and that they hold live."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import pytest

from deploy import series
from deploy.promql import read
from deploy.tools import promtool, tool
from fakes.bare_router import free_port
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.cli.arguments import parse
from running import RunningDaemon

PROMETHEUS = series.DEPLOY / "prometheus"
RULES, ALERTS = series.rules("rules.yml"), series.rules("alerts.yml")
STORIES = series.written("prometheus/tests.yml")["tests"]
BACKOFF_S = 25.0
"""The fourth restart in a row waits for up to ten."""
BY_NAME = pytest.mark.parametrize("alert", [pytest.param(alert, id=alert["alert"]) for alert in ALERTS])


# --- what the files say -----------------------------------------------------------------------------------------------


def test_promtool_accepts_the_configuration() -> None:
    """The whole of it, rules included, which it finds beside itself."""
    said = promtool("check", "config", "--lint=all", "--lint-fatal", PROMETHEUS / "prometheus.yml")
    assert f"SUCCESS: {len(RULES)} rules found" in said
    assert f"SUCCESS: {len(ALERTS)} rules found" in said


def test_alerts_fire_when_they_should() -> None:
    """Each over made-up hours, in which counters begin anew and models vanish."""
    promtool("test", "rules", PROMETHEUS / "tests.yml")


@BY_NAME
def test_an_alert_is_tested_both_ways(alert: dict[str, Any]) -> None:
    """In one and the same story it fires at one time and does not at another."""
    name = f'alertname="{alert["alert"]}"'
    assert {True, False} in (
        {any(name in sample["labels"] for sample in check["exp_samples"]) for check in story["promql_expr_test"]}
        for story in STORIES
    )


@BY_NAME
def test_an_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    """Who is called learns how bad it is, what fails, and what to run next: a command that there is."""
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert "for" in alert
    assert set(alert["annotations"]) == {"summary", "description"}
    texts = " ".join(alert["annotations"].values())
    filled = re.sub(r"\{\{.*?\}\}", "x", texts)
    commands = [shlex.split(command) for command in re.findall(r"`(llamavisor\b[^`]*)`", filled)]
    assert commands
    for _, *words in commands:
        parse(words)


@pytest.mark.anyio
@pytest.mark.usefixtures("virtual_time")
class TestSeries:
    """What is named is there. On virtual time, because a registry that has everything needs a fleet."""

    async def test_rules_speak_of_series_that_there_are(self, tmp_path: Path) -> None:
        """Every series is in the daemon's registry or recorded by a rule, with every label that it is asked for."""
        known = series.recorded(await series.registered(tmp_path))
        assert [problem for rule in [*RULES, *ALERTS] for problem in read(rule["expr"]).problems(known)] == []

    async def test_annotations_speak_of_labels_that_there_are(self, tmp_path: Path) -> None:
        """No text for a person has a hole in it."""
        known = series.recorded(await series.registered(tmp_path))
        for alert in ALERTS:
            used = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
            assert used <= read(alert["expr"]).result(known), alert["alert"]

    async def test_what_there_is_not_is_seen(self, tmp_path: Path) -> None:
        """A wrong name and a wrong label are noticed in each place where one can stand."""
        known = await series.registered(tmp_path)
        for text in (
            "llamavisor_no_such_total",
            'rate(llamavisor_requests_total{colour="red"}[5m])',
            "sum by (colour) (llamavisor_model_state)",
            "sum by (state) (llamavisor_model_state / llamavisor_model_pinned)",
            "sum without (colour) (llamavisor_model_state)",
            "llamavisor_model_state * on (colour) llamavisor_model_pinned",
            "llamavisor_model_state_bucket",
            "llamavisor_requests",
        ):
            assert list(read(text).problems(known)), text
        good = (
            'sum by (model) (rate(llamavisor_requests_total{status=~"5.."}[5m] offset 1h)) and on (job) up > bool 1e3'
        )
        assert list(read(good).problems(known)) == []


@pytest.mark.real
def test_llama_cpp_says_what_rules_take_from_it(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """What is recorded of `llamacpp:` is what a model says; not the averages that every reader starts anew."""
    named = series.own_of_llama_cpp(rule["expr"] for rule in [*RULES, *ALERTS])
    assert named
    assert named <= series.said_by_a_model(llama_server, tmp_path, models_dir)


# --- live -------------------------------------------------------------------------------------------------------------


class Prometheus:
    """A true Prometheus with our files; a context manager that ends it.

    It looks at another port than the one that we ship, and four times a second: what takes it minutes takes the test
    seconds. Rules and alerts are those that we ship, to the letter.

    Args:
        folder: for its files and its data.
        target: the port of the daemon's metrics.
    """

    def __init__(self, folder: Path, target: int) -> None:
        self.port = free_port()
        folder.mkdir()
        for name in ("rules.yml", "alerts.yml"):
            shutil.copy(PROMETHEUS / name, folder)
        text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
        text, ports = re.subn(r"127\.0\.0\.1:9155", f"127.0.0.1:{target}", text)
        text, intervals = re.subn(r"(scrape|evaluation)_interval: 15s", r"\1_interval: 250ms", text)
        assert (ports, intervals) == (1, 2)
        (folder / "prometheus.yml").write_text(text, encoding="utf-8")
        self._log = folder / "log"
        self._argv = [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
        self._argv += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}"]
        self._popen: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Prometheus on {self.port}>"

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            eventually(self._is_ready, what="a Prometheus that is ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._end()

    def ask(self, path: str) -> Any:
        """The data of an answer of its API."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", f"/api/v1/{path}")
            answer = json.loads(connection.getresponse().read())
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """What it finds now."""
        return list(self.ask(f"query?{urlencode({'query': text})}")["result"])

    def rules(self) -> list[dict[str, Any]]:
        """All its rules, with how their last evaluation went."""
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> dict[str, dict[str, Any]]:
        """The alerts that fire, by their names; there may be one of each."""
        alerts = [alert for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"]
        found = {alert["labels"]["alertname"]: alert for alert in alerts}
        assert len(found) == len(alerts)
        return found

    def _is_ready(self) -> bool:
        assert self._popen is not None
        assert self._popen.poll() is None or pytest.fail(self._log.read_text(encoding="utf-8"))
        try:
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
                connection.request("GET", "/-/ready")
                return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False

    def _end(self) -> None:
        assert self._popen is not None
        self._popen.terminate()
        try:
            self._popen.wait(PATIENCE_S)
        finally:
            self._popen.kill()
            self._popen.wait()


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon whose router is up."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        yield running


@pytest.mark.real
@pytest.mark.timeout(60)
def test_prometheus_tells_of_a_router_that_is_killed_again_and_again(tmp_path: Path, daemon: RunningDaemon) -> None:
    """A true Prometheus reads a true daemon: rules and panels work, and of all alerts the one that is true fires."""
    with Prometheus(tmp_path / "prometheus", daemon.metrics_port) as prometheus:
        daemon.chat("alpha")

        def is_looked_at() -> bool:
            targets = [target["health"] for target in prometheus.ask("targets")["activeTargets"]]
            return targets == ["up"] and all(rule["health"] != "unknown" for rule in prometheus.rules())

        eventually(is_looked_at, what="a target that is up and rules that were evaluated")
        assert prometheus.firing() == {}

        for _ in range(4):  # three more than the one with which the counter begins
            kill_router(daemon)
        eventually(prometheus.firing, what="an alert")

        (name, alert), *others = prometheus.firing().items()
        assert (name, alert["labels"]["router"], others) == ("LlamavisorRouterRestarts", "main", [])
        assert (
            alert["annotations"]["summary"]
            == f"Router main on 127.0.0.1:{daemon.metrics_port} restarts again and again"
        )
        assert "`llamavisor logs main`" in alert["annotations"]["description"]
        assert {(rule["name"], rule["health"], rule.get("lastError")) for rule in prometheus.rules()} == {
            (rule.get("record") or rule["alert"], "ok", None) for rule in [*RULES, *ALERTS]
        }
        assert prometheus.query("model:llamavisor_requests:rate5m")
        for text in series.shown():
            prometheus.query(text)  # fails if it cannot be evaluated


def kill_router(daemon: RunningDaemon) -> None:
    """Kill it once it is up, and wait until another is there."""
    killed = daemon.wait_for_router("ready")["pid"]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: daemon.router()["pid"] not in {None, killed}, what="another router", within_s=BACKOFF_S)
