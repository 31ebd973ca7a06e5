"""Metrics: events are counted as they happen, states are read when somebody scrapes."""

from __future__ import annotations

from collections import Counter as Count
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
from prometheus_client.core import CounterMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from llamavisor import events as ev
from llamavisor.catalog import EntryState
from llamavisor.fleet import Fleet
from llamavisor.states import ModelState, RouterState
from llamavisord import __version__
from llamavisord.control import health_routes
from llamavisord.daemon import Daemon
from llamavisord.exposition_children import child_metrics
from llamavisord.exposition_label import OTHER, ModelLabel, folded
from llamavisord.exposition_memory import MemoryCounts, gauge, memory_gauges, pressure_gauges
from llamavisord.exposition_pulls import PullCounts
from llamavisord.exposition_requests import RequestCounts, traffic_gauges
from llamavisord.lives import Lives
from llamavisord.view import unix_time

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_START_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LOAD_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_PROBE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 10)
_SCAN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SERVABLE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MODES = ("inotify", "polling")
_COUNTED_BY_MODEL = (
    ev.ModelLoaded,
    ev.ModelLoadFailed,
    ev.ModelUnloaded,
    ev.ModelHung,
    ev.DemandMet,
    ev.ModelQuarantined,
)


class Exposition:
    """The registry of one daemon.

    Args:
        daemon: what is exposed.
        lives: how often it was started.
    """

    def __init__(self, daemon: Daemon, lives: Lives | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types for it
        self._daemon = daemon
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._label = ModelLabel(self._is_known)
        registry.register(_Snapshot(daemon, lives or Lives(), self._label))
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
            "Loads of a model that ended, by result: loaded or failed.",
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
        self._failures = Counter(
            "llamavisor_model_failures",
            "Loads that failed and processes of models that were lost, by cause.",
            ["router", "model", "cause"],
            registry=registry,
        )
        self._router_hangs = Counter(
            "llamavisor_router_hangs",
            "Times that a router hung and was restarted for that.",
            ["router"],
            registry=registry,
        )
        self._model_hangs = Counter(
            "llamavisor_model_hangs",
            "Times that the process of a model hung and was ended for that.",
            ["router", "model"],
            registry=registry,
        )
        self._strays = Counter(
            "llamavisor_orphans_reaped",
            "Left-over processes that were killed because the one that started them had ended.",
            registry=registry,
        )
        self._rebinds = Counter(
            "llamavisor_control_socket_rebinds",
            "Times that the control socket was bound anew because its file had gone.",
            registry=registry,
        )
        self._scan_seconds = Histogram(
            "llamavisor_catalog_scan_duration_seconds",
            "Time that a look at a models folder took.",
            ["folder"],
            buckets=_SCAN_BUCKETS_S,
            registry=registry,
        )
        self._servable_seconds = Histogram(
            "llamavisor_model_servable_seconds",
            "Time from the last change of a model's files until a router could serve it.",
            ["router"],
            buckets=_SERVABLE_BUCKETS_S,
            registry=registry,
        )
        self._requests = RequestCounts(
            is_known=self._is_known,
            label=self._label,
            routers=lambda: [router.name for router in daemon.fleet],
        )
        registry.register(self._requests)
        self._memory = MemoryCounts(registry, self._label)
        self._pulls = PullCounts(registry)
        self._of_models = (
            self._loads,
            self._load_seconds,
            self._unloads,
            self._failures,
            self._model_hangs,
            *self._memory.of_models,
        )
        self._of_routers = (
            self._restarts,
            self._start_seconds,
            self._probe_seconds,
            self._probe_failures,
            self._router_hangs,
            self._servable_seconds,
            *self._of_models,
        )
        self._counted: set[tuple[str, str]] = set()  # router and label; a router's own with an empty one
        self._folders: set[str] = set()
        daemon.bus.listen(self._count)

    def _is_known(self, model: str) -> bool:
        return any(router.table.get(model) is not None for router in self._daemon.fleet)

    def _count(self, published: ev.Published) -> None:
        event = published.event
        if isinstance(event, ev.RequestEnded):  # first: there may be thousands in a second
            self._requests.count(event)
            return
        self._memory.count(event)
        self._pulls.count(event)
        label = self._label.of
        if (router := getattr(event, "router", None)) is not None:
            self._counted.add((router, ""))
        if isinstance(event, _COUNTED_BY_MODEL):
            self._counted.add((event.router, label(event.model)))
        match event:
            case ev.RouterSpawned(router=router, cause=cause) if cause is not None:
                self._restarts.labels(router, cause.value).inc()
            case ev.RouterReady(router=router, start_s=start_s):
                self._start_seconds.labels(router).observe(start_s)
            case ev.RouterProbed(router=router, duration_s=duration_s, error=error):
                self._probe_seconds.labels(router).observe(duration_s)
                self._probe_failures.labels(router).inc(0 if error is None else 1)
            case ev.ModelLoaded(router=router, model=model, load_s=load_s):
                self._loads.labels(router, label(model), "loaded").inc()
                if load_s is not None:
                    self._load_seconds.labels(router, label(model)).observe(load_s)
            case ev.ModelLoadFailed(router=router, model=model, cause=cause):
                self._loads.labels(router, label(model), "failed").inc()
                self._failures.labels(router, label(model), cause.value).inc()
            case ev.ModelUnloaded(router=router, model=model, reason=reason, cause=cause):
                self._unloads.labels(router, label(model), reason.value).inc()
                if cause is not None:
                    self._failures.labels(router, label(model), cause.value).inc()
            case ev.RouterHung(router=router):
                self._router_hangs.labels(router).inc()
            case ev.ModelHung(router=router, model=model):
                self._model_hangs.labels(router, label(model)).inc()
            case ev.ModelAdded(router=router, wait_s=wait_s) if wait_s is not None:
                self._servable_seconds.labels(router).observe(wait_s)
            case ev.FolderLooked(folder=folder, duration_s=duration_s):
                self._folders.add(folder)
                self._scan_seconds.labels(_label(folder)).observe(duration_s)
            case ev.StraysKilled(pids=pids):
                self._strays.inc(len(pids))
            case ev.ControlSocketRebound():
                self._rebinds.inc()

    def _forget_vanished(self) -> None:
        """Drop the series of routers, models and folders that are not there any more: they would stay for ever."""
        self._label.forget_vanished()
        self._requests.forget_vanished()
        routers = {router.name: router for router in self._daemon.fleet}
        for router, model in list(self._counted):
            there = routers.get(router)
            is_shared = model == OTHER and self._label.is_used(OTHER)
            if there is not None and (not model or is_shared or there.table.get(model) is not None):
                continue
            self._counted.discard((router, model))
            labels = {"router": router, "model": model} if model else {"router": router}
            for metric in self._of_models if model else self._of_routers:
                metric.remove_by_labels(labels)
        for folder in self._folders - {str(each.path) for each in self._daemon.fleet.folders}:
            self._folders.discard(folder)
            self._scan_seconds.remove_by_labels({"folder": _label(folder)})

    def app(self) -> web.Application:
        """The web application behind the metrics port: /metrics, /livez, /readyz."""

        async def metrics(_: web.Request) -> web.Response:
            """The metrics, as Prometheus reads them. Reading them loads and wakes no model."""
            self._forget_vanished()
            return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE})

        app = web.Application()
        app.add_routes([web.get("/metrics", metrics), *health_routes(self._daemon)])
        return app


class _Snapshot(Collector):
    """What is true at the moment of the scrape; series of what has vanished are not there any more."""

    def __init__(self, daemon: Daemon, lives: Lives, label: ModelLabel) -> None:
        self._daemon = daemon
        self._lives = lives
        self._label = label

    def collect(self) -> Iterator[Metric]:
        daemon = self._daemon
        build = InfoMetricFamily("llamavisor_build", "The version that runs.")
        build.add_metric([], {"version": __version__})
        yield build

        state = gauge("router_state", "1 for the state that a router is in, 0 for the others.", "router", "state")
        failures = gauge("router_consecutive_failures", "Failures to stay up, in a row.", "router")
        crash_loop = gauge("router_crash_loop", "1 while a router fails again and again.", "router")
        started = gauge("router_start_timestamp_seconds", "When a router's process was started.", "router")
        missing = gauge("router_devices_missing", "Devices that a router had seen and that have vanished.", "router")
        vanished = daemon.fleet.memory.devices.missing
        for router in daemon.fleet:
            for each in RouterState:
                state.add_metric([router.name, each.value], float(router.state is each))
            failures.add_metric([router.name], router.comeback.history.failures)
            crash_loop.add_metric([router.name], float(router.comeback.history.is_crash_loop))
            if router.spawned_at is not None:
                started.add_metric([router.name], unix_time(router.spawned_at))
            missing.add_metric([router.name], len(vanished.get(router.name, ())))
        yield from (state, failures, crash_loop, started, missing)
        yield from _of_models(daemon.fleet, self._label)
        yield from child_metrics(daemon.fleet, self._label)
        yield from _of_folders(daemon.fleet)
        yield from memory_gauges(daemon.fleet.memory.occupancy(), self._label)
        yield from pressure_gauges(daemon.fleet.memory.capacity.meter.pressure)
        if daemon.traffic is not None:
            yield from traffic_gauges(daemon.traffic, self._label)

        lag = gauge("event_loop_lag_seconds", "The longest that the event loop was late in the last ten seconds.")
        lag.add_metric([], daemon.loop_lag_s)
        good = gauge("config_last_reload_successful", "1 if the last attempt to read the configuration succeeded.")
        good.add_metric([], float(daemon.config_error is None))
        starts = CounterMetricFamily("llamavisor_daemon_starts", "Times that the daemon was started, ever.")
        starts.add_metric([], self._lives.starts)
        deaths = CounterMetricFamily("llamavisor_daemon_deaths", "Times that the daemon had not ended in order, ever.")
        deaths.add_metric([], self._lives.deaths)
        yield from (starts, deaths)
        when = gauge("config_last_reload_success_timestamp_seconds", "When the configuration in force was read.")
        when.add_metric([], daemon.config_loaded_at)
        yield from (lag, good, when)


def _of_models(fleet: Fleet, label: ModelLabel) -> Iterator[Metric]:
    """What is true of the models that are in memory or were; ten thousand that never were would bury them."""
    state = gauge("model_state", "1 for the state that a model is in, 0 for the others.", "router", "model", "state")
    stale = gauge("model_stale", "1 for a model in memory whose file or options have changed.", "router", "model")
    last_use = gauge("model_last_use_timestamp_seconds", "When a model was last seen to work.", "router", "model")
    in_flight = gauge("model_requests_in_flight", "Requests that a model is answering.", "router", "model")
    for router in fleet:
        for model in router.table:
            if model.state is ModelState.UNLOADED and model.loaded_at is None:
                continue
            labels = [router.name, label.of(model.name)]
            for known in ModelState:
                state.add_metric([*labels, known.value], float(model.state is known))
            if model.used_at is not None:
                last_use.add_metric(labels, unix_time(model.used_at))
            if model.in_flight is not None:
                in_flight.add_metric(labels, model.in_flight)
        for name, _ in router.shelf.stale(router.table):
            stale.add_metric([router.name, label.of(name)], 1.0)
    yield from (folded(state), folded(stale), folded(last_use, max), folded(in_flight))


def _of_folders(fleet: Fleet) -> Iterator[Metric]:
    """What is true of the models folders."""
    models = gauge("catalog_models", "Models of a folder by the state of their files.", "folder", "state")
    stale = gauge("catalog_stale", "1 while what is known of a folder may not be what is there.", "folder")
    total = gauge("catalog_disk_total_bytes", "Size of the disk that a folder lies on.", "folder")
    free = gauge("catalog_disk_free_bytes", "What may still be written to that disk, except by root.", "folder")
    mode = gauge("watcher_mode", "1 for the way in which changes of a folder are noticed.", "folder", "mode")
    errors = CounterMetricFamily("llamavisor_watcher_errors", "Failures of what looks at a folder.", labels=["folder"])
    for path, folder in {folder.path: folder for folder in fleet.folders}.items():  # a reload may have two for a moment
        catalog, label = folder.catalog, _label(str(path))
        counted = Count(entry.state for entry in catalog)
        for each in EntryState:
            models.add_metric([label, each.value], counted[each])
        stale.add_metric([label], float(bool(catalog.stale)))
        if catalog.disk is not None:
            total.add_metric([label], catalog.disk.total_bytes)
            free.add_metric([label], catalog.disk.free_bytes)
        for known in _MODES:
            mode.add_metric([label, known], float(catalog.mode == known))
        errors.add_metric([label], catalog.watcher_errors)
    yield from (models, stale, total, free, mode, errors)


def _label(path: str) -> str:
    """A path as the value of a label, which must be UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
