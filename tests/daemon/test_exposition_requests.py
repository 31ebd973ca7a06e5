"""Metrics of requests: what is counted, for whom, and what is forgotten."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from daemon.stage import Stage, entry
from fakes.request import ended
from llamavisor.events import RequestEnded, RequestOutcome
from llamavisord.daemon import Daemon
from llamavisord.drain import Drain
from llamavisord.exposition import Exposition
from llamavisord.exposition_label import OTHER, ModelLabel
from llamavisord.exposition_requests import RequestCounts
from llamavisord.traffic import Traffic
from promtool import complaints

asynchronous = [pytest.mark.anyio, pytest.mark.usefixtures("virtual_time")]
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(registry: CollectorRegistry) -> Series:
    """What Prometheus makes of it: the value of each series by its name and its labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    """The value of one series; without labels, of the only one of its name."""
    if labels:
        return series[f"llamavisor_{name}", tuple(sorted(labels.items()))]
    (found,) = (value for (each, _), value in series.items() if each == f"llamavisor_{name}")
    return found


class Counted:
    """Counts requests for models of which the names are known."""

    def __init__(self, *models: str, room: int = 200) -> None:
        self.models = set(models)
        self.routers = ["main"]
        self.label = ModelLabel(self._is_known, room=room)
        self.counts = RequestCounts(is_known=self._is_known, label=self.label, routers=lambda: self.routers)
        self.registry = CollectorRegistry()
        self.registry.register(self.counts)

    def _is_known(self, model: str) -> bool:
        return model in self.models

    def forget_vanished(self) -> None:
        """What every scrape does first."""
        self.label.forget_vanished()
        self.counts.forget_vanished()

    def count(self, *events: RequestEnded) -> Series:
        """What is shown after these."""
        for event in events:
            self.counts.count(event)
        return read(self.registry)


def test_requests_are_counted_by_what_became_of_them() -> None:
    """By model, router, route and status."""
    shown = Counted("alpha", "beta").count(
        ended(),
        ended(duration_s=3.0),
        ended(status=503, router=None, outcome=RequestOutcome.REFUSED),
        ended(route="embeddings", model="beta"),
        ended(route="models", model=None, router=None),
    )
    counted = {key: number for (name, key), number in shown.items() if name == "llamavisor_requests_total"}
    assert counted == {
        (("model", model), ("route", route), ("router", router), ("status", status)): number
        for model, route, router, status, number in (
            ("alpha", "chat/completions", "main", "200", 2),
            ("alpha", "chat/completions", "", "503", 1),
            ("beta", "embeddings", "main", "200", 1),
            ("", "models", "", "200", 1),
        )
    }


def test_times_are_where_they_belong() -> None:
    """A bucket holds what is at most its bound; what has no data has no time to them, without a model none queues."""
    shown = Counted("alpha").count(
        ended(duration_s=1.0, first_data_s=0.25, queue_s=0.0),
        ended(duration_s=1.001, first_data_s=None, queue_s=400.0),
        ended(duration_s=1000.0, first_data_s=0.2501, queue_s=700.0),
        ended(model=None, router=None, duration_s=0.001, first_data_s=0.001),
    )
    of = {"model": "alpha", "route": "chat/completions"}
    duration = [value(shown, "request_duration_seconds_bucket", le=le, **of) for le in ("0.5", "1.0", "2.5", "600.0")]
    assert duration == [0, 1, 2, 2]
    assert value(shown, "request_duration_seconds_bucket", le="+Inf", **of) == 3
    assert value(shown, "request_duration_seconds_count", **of) == 3
    assert value(shown, "request_duration_seconds_sum", **of) == pytest.approx(1002.001)
    first = [value(shown, "request_first_data_seconds_bucket", le=le, **of) for le in ("0.1", "0.25", "0.5", "+Inf")]
    assert first == [0, 1, 2, 2]
    queue = [value(shown, "request_queue_seconds_bucket", le=le, **of) for le in ("0.005", "600.0", "+Inf")]
    assert queue == [1, 2, 3]
    assert value(shown, "request_queue_seconds_count") == 3
    assert value(shown, "request_duration_seconds_count", model="", route="chat/completions") == 1


@given(st.lists(st.floats(min_value=0, max_value=1e4), min_size=1))
def test_no_time_is_lost(times: list[float]) -> None:
    """Buckets only grow, each holds exactly what is at most its bound, and the sum is that of all."""
    shown = Counted("alpha").count(*(ended(duration_s=time) for time in times))
    buckets = {
        float(dict(labels)["le"]): number
        for (name, labels), number in shown.items()
        if name == "llamavisor_request_duration_seconds_bucket"
    }
    assert buckets == {bound: sum(time <= bound for time in times) for bound in buckets}
    assert math.inf in buckets
    assert value(shown, "request_duration_seconds_sum") == pytest.approx(sum(times))


def test_tokens_retries_and_clients_that_left() -> None:
    """Summed up for each model and route; tokens that no answer tells count nothing."""
    shown = Counted("alpha", "beta").count(
        ended(tokens_in=7, tokens_out=11, retries=2),
        ended(tokens_in=1, tokens_out=None, outcome=RequestOutcome.LEFT),
        ended(outcome=RequestOutcome.BROKEN),
        ended(route="embeddings", tokens_in=100),
        ended(model="beta"),
    )
    numbers = [
        (
            value(shown, "request_tokens_total", **of, kind="prompt"),
            value(shown, "request_tokens_total", **of, kind="completion"),
            value(shown, "request_retries_total", **of),
            value(shown, "requests_cancelled_total", **of),
            value(shown, "requests_broken_total", **of),
        )
        for of in ({"model": model, "route": "chat/completions"} for model in ("alpha", "beta"))
    ]
    assert numbers == [(8, 11, 2, 1, 1), (0, 0, 0, 0, 0)]
    assert value(shown, "request_tokens_total", model="alpha", route="embeddings", kind="prompt") == 100


def test_what_is_refused_at_once_makes_nobody_look_fast() -> None:
    """It is counted, and has no time; who was refused after a wait has waited."""
    shown = Counted("alpha").count(
        ended(status=403, outcome=RequestOutcome.REFUSED, duration_s=0.001),
        ended(status=503, outcome=RequestOutcome.REFUSED, duration_s=9.0, queue_s=9.0),
    )
    of = {"model": "alpha", "route": "chat/completions"}
    assert value(shown, "request_duration_seconds_count", **of) == 1
    assert value(shown, "request_queue_seconds_sum", **of) == 9.0
    assert value(shown, "requests_total", **of, router="main", status="403") == 1


def test_names_that_clients_invent_make_no_series() -> None:
    """They are counted as one; a model that appears later has its own."""
    counted = Counted("alpha")
    shown = counted.count(*(ended(model=f"invented-{number}", router=None, status=404) for number in range(50)))
    assert value(shown, "requests_total", model="", router="", route="chat/completions", status="404") == 50
    assert not any("invented" in str(key) for key in shown)
    counted.models.add("invented-7")
    shown = counted.count(ended(model="invented-7"), ended(model=None))
    assert (
        value(shown, "requests_total", model="invented-7", router="main", route="chat/completions", status="200") == 1
    )
    assert value(shown, "request_queue_seconds_count", model="", route="chat/completions") == 50


def test_models_and_routers_that_have_gone_are_forgotten() -> None:
    """Only they; a model that comes back begins anew."""
    counted = Counted("alpha", "beta")
    counted.routers.append("other")
    counted.count(ended(), ended(router="other"), ended(model="beta"), ended(model="gamma", router=None, status=404))
    counted.models.discard("beta")
    counted.routers.remove("other")
    counted.forget_vanished()
    labels = [dict(key) for name, key in counted.count() if name == "llamavisor_requests_total"]
    assert [(each["model"], each["router"]) for each in labels] == [("alpha", "main"), ("", "")]
    counted.models.add("beta")
    shown = counted.count(ended(model="beta"))
    assert value(shown, "requests_total", model="beta", router="main", route="chat/completions", status="200") == 1


def test_requests_for_models_beyond_the_cap_are_counted_together() -> None:
    """Histograms too; a model that is called like the rest is among them, and one that clients invent is not."""
    counted = Counted("alpha", "beta", "gamma", OTHER, room=1)
    shown = counted.count(
        ended(duration_s=1.0, tokens_in=1),
        ended(model="beta", duration_s=2.0, tokens_in=10),
        ended(model="gamma", duration_s=3.0, tokens_in=100),
        ended(model=OTHER, duration_s=4.0, tokens_in=1000),
        ended(model="invented", duration_s=5.0),
    )
    durations = {
        dict(labels)["model"]: number
        for (name, labels), number in shown.items()
        if name == "llamavisor_request_duration_seconds_sum"
    }
    assert durations == {"alpha": 1, OTHER: 2 + 3 + 4, "": 5}
    assert value(shown, "request_tokens_total", model=OTHER, route="chat/completions", kind="prompt") == 1110


def test_a_place_that_a_model_has_left_is_for_the_next() -> None:
    """What was counted for others before stays with them as long as there are any."""
    counted = Counted("alpha", "beta", "gamma", room=1)
    counted.count(ended(), ended(model="beta"), ended(model="gamma"))
    counted.models.discard("alpha")
    counted.forget_vanished()
    shown = counted.count(ended(model="beta"))
    of = {"router": "main", "route": "chat/completions", "status": "200"}
    assert value(shown, "requests_total", model="beta", **of) == 1
    assert value(shown, "requests_total", model=OTHER, **of) == 2
    counted.models.discard("gamma")
    counted.forget_vanished()
    labels = [dict(key) for name, key in counted.count() if name == "llamavisor_requests_total"]
    assert [each["model"] for each in labels] == ["beta"]


# --- in the daemon ----------------------------------------------------------------------------------------------------


def gateway(daemon: Daemon) -> Traffic:
    """Give the daemon a gateway that listens."""
    daemon.traffic = Traffic(Drain(daemon.bus), held_bytes=lambda: 4096, connections=lambda: 3)
    daemon.traffic.urls = ("http://127.0.0.1:8080",)
    return daemon.traffic


class TestExposed:
    """What a scrape of the daemon shows."""

    pytestmark = asynchronous

    async def test_what_happens_is_what_is_shown(self, tmp_path: Path) -> None:
        """Requests are heard of on the bus; models of the fleet alone have series, and those that go lose them."""
        stage = Stage(tmp_path)
        watch = stage.put(entry("alpha"), entry("beta"))
        async with stage.running(stage.config(("main", "a"))) as daemon:
            exposition = Exposition(daemon)
            for model in ("alpha", "beta", "nobody's"):
                stage.bus.publish(ended(model=model))
            exposition._forget_vanished()
            labels = [dict(key) for name, key in read(exposition.registry) if name == "llamavisor_requests_total"]
            assert sorted(each["model"] for each in labels) == ["", "alpha", "beta"]
            watch.entries.pop("beta")
            watch.put()
            await stage.until(lambda: stage.fleet["main"].table.get("beta") is None)
            exposition._forget_vanished()
            labels = [dict(key) for name, key in read(exposition.registry) if name == "llamavisor_requests_total"]
            assert sorted(each["model"] for each in labels) == ["", "alpha"]

    async def test_the_gateway_as_it_is_now(self, tmp_path: Path) -> None:
        """What is in flight, what waits, what it takes, and whether clients are let in; without one, nothing."""
        stage = Stage(tmp_path)
        stage.put(entry("alpha"))
        async with stage.running(stage.config(("main", "a"))) as daemon:
            exposition = Exposition(daemon)
            assert not any("gateway" in name or "in_flight" in name for name, _ in read(exposition.registry))
            traffic = gateway(daemon)
            with traffic.enter() as passage, traffic.enter():
                passage.run("alpha")
                shown = read(exposition.registry)
                assert value(shown, "requests_in_flight", model="alpha") == 1
                names = ("requests_waiting", "gateway_held_bytes", "gateway_connections", "gateway_listening")
                assert [value(shown, name) for name in names] == [1, 4096, 3, 1]
                assert value(shown, "gateway_draining") == 0
            traffic.drain.begin("test")
            traffic.urls = ()
            shown = read(exposition.registry)
            assert (value(shown, "gateway_draining"), value(shown, "gateway_listening")) == (1, 0)
            assert not any(name == "llamavisor_requests_in_flight" for name, _ in shown)

    async def test_promtool_finds_nothing_to_mend_in_requests(self, tmp_path: Path) -> None:
        """The exposition is as Prometheus's own linter wants it."""
        stage = Stage(tmp_path)
        stage.put(entry("alpha"))
        async with stage.running(stage.config(("main", "a"))) as daemon:
            exposition = Exposition(daemon)
            stage.bus.publish(ended(tokens_in=1, tokens_out=2))
            with gateway(daemon).enter() as passage:
                passage.run("alpha")
                metrics = generate_latest(exposition.registry).decode()
        assert "llamavisor_requests_total" in metrics
        assert complaints(metrics) == []
