"""Metrics: events are counted as they happen, states are read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Iterator

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from llamavisor import events as ev
from llamavisor.states import ModelState, RouterState
from llamavisord import __version__
from llamavisord.control import health_routes
from llamavisord.daemon import Daemon
from llamavisord.view import unix_time

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_START_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LOAD_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_PROBE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 10)


class Exposition:
    """The registry of one daemon.

    Args:
        daemon: what is exposed.
    """

    def __init__(self, daemon: Daemon) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types for it
        self._daemon = daemon
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_Snapshot(daemon))
        self._restarts = Counter(
            "llamavisor_router_restarts",
            "Processes that replaced another one, by what ended the other.",
            ["router", "reason"],
            registry=registry,
        )
        self._start_seconds = Histogram(
            "llamavisor_router_start_duration_seconds",
            "Time from the start of a router's process until it was ready.",
            ["router"],
            buckets=_START_BUCKETS_S,
            registry=registry,
        )
        self._probe_seconds = Histogram(
            "llamavisor_router_probe_duration_seconds",
            "Time that a router took to answer a probe, or to fail it.",
            ["router"],
            buckets=_PROBE_BUCKETS_S,
            registry=registry,
        )
        self._probe_failures = Counter(
            "llamavisor_router_probe_failures", "Probes that a router did not answer.", ["router"], registry=registry
        )
        self._loads = Counter(
            "llamavisor_model_loads",
            "Loads of a model that ended, by result.",
            ["router", "model", "result"],
            registry=registry,
        )
        self._load_seconds = Histogram(
            "llamavisor_model_load_duration_seconds",
            "Time from the beginning of a load until the router said loaded.",
            ["router", "model"],
            buckets=_LOAD_BUCKETS_S,
            registry=registry,
        )
        self._unloads = Counter(
            "llamavisor_model_unloads",
            "Models that left memory, by reason.",
            ["router", "model", "reason"],
            registry=registry,
        )
        self._strays = Counter(
            "llamavisor_orphans_reaped",
            "Left-over processes that were killed because the one that started them had ended.",
            registry=registry,
        )
        self._of_models = (self._loads, self._load_seconds, self._unloads)
        self._of_routers = (
            self._restarts,
            self._start_seconds,
            self._probe_seconds,
            self._probe_failures,
            *self._of_models,
        )
        self._counted: set[tuple[str, str]] = set()  # router and model; a router's own with an empty model
        daemon.bus.listen(self._count)

    def _count(self, published: ev.Published) -> None:
        router = getattr(published.event, "router", None)
        if router is not None:
            self._counted |= {(router, ""), (router, getattr(published.event, "model", ""))}
        match published.event:
            case ev.RouterSpawned(router=router, cause=cause) if cause is not None:
                self._restarts.labels(router, cause.value).inc()
            case ev.RouterReady(router=router, start_s=start_s):
                self._start_seconds.labels(router).observe(start_s)
            case ev.RouterProbed(router=router, duration_s=duration_s, error=error):
                self._probe_seconds.labels(router).observe(duration_s)
                self._probe_failures.labels(router).inc(0 if error is None else 1)
            case ev.ModelLoaded(router=router, model=model, load_s=load_s):
                self._loads.labels(router, model, "loaded").inc()
                if load_s is not None:
                    self._load_seconds.labels(router, model).observe(load_s)
            case ev.ModelLoadFailed(router=router, model=model):
                self._loads.labels(router, model, "failed").inc()
            case ev.ModelUnloaded(router=router, model=model, reason=reason):
                self._unloads.labels(router, model, reason.value).inc()
            case ev.StraysKilled(pids=pids):
                self._strays.inc(len(pids))

    def _forget_vanished(self) -> None:
        """Drop the series of routers and models that are not there any more: they would stay for ever."""
        there = {(router.name, "") for router in self._daemon.fleet}
        there |= {(router.name, model.name) for router in self._daemon.fleet for model in router.table}
        for router, model in self._counted - there:
            labels = {"router": router, "model": model} if model else {"router": router}
            for metric in self._of_models if model else self._of_routers:
                metric.remove_by_labels(labels)
        self._counted &= there

    def app(self) -> web.Application:
        """The web application behind the metrics port: /metrics, /livez, /readyz."""

        async def metrics(_: web.Request) -> web.Response:
            self._forget_vanished()
            return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE})

        app = web.Application()
        app.add_routes([web.get("/metrics", metrics), *health_routes(self._daemon.fleet)])
        return app


class _Snapshot(Collector):
    """What is true at the moment of the scrape; series of what has vanished are not there any more."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def collect(self) -> Iterator[Metric]:
        daemon = self._daemon
        build = InfoMetricFamily("llamavisor_build", "The version that runs.")
        build.add_metric([], {"version": __version__})
        yield build

        state = _gauge("router_state", "1 for the state that a router is in, 0 for the others.", "router", "state")
        failures = _gauge("router_consecutive_failures", "Failures to stay up, in a row.", "router")
        crash_loop = _gauge("router_crash_loop", "1 while a router fails again and again.", "router")
        started = _gauge("router_start_timestamp_seconds", "When a router's process was started.", "router")
        model_state = _gauge(
            "model_state", "1 for the state that a model is in, 0 for the others.", "router", "model", "state"
        )
        for router in daemon.fleet:
            for each in RouterState:
                state.add_metric([router.name, each.value], float(router.state is each))
            failures.add_metric([router.name], router.history.failures)
            crash_loop.add_metric([router.name], float(router.history.is_crash_loop))
            if router.spawned_at is not None:
                started.add_metric([router.name], unix_time(router.spawned_at))
            for model in router.table:
                for known in ModelState:
                    model_state.add_metric([router.name, model.name, known.value], float(model.state is known))
        yield from (state, failures, crash_loop, started, model_state)

        lag = _gauge("event_loop_lag_seconds", "The longest that the event loop was late in the last ten seconds.")
        lag.add_metric([], daemon.loop_lag_s)
        good = _gauge("config_last_reload_successful", "1 if the last attempt to read the configuration succeeded.")
        good.add_metric([], float(daemon.config_error is None))
        when = _gauge("config_last_reload_success_timestamp_seconds", "When the configuration in force was read.")
        when.add_metric([], daemon.config_loaded_at)
        yield from (lag, good, when)


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"llamavisor_{name}", documentation, labels=labels)
