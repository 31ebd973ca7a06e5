"""Metrics of memory: what there is, who takes it, who waits for it, and who was refused it."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from llamavisor import events as ev
from llamavisor.gauge import Pressure
from llamavisor.occupancy import Occupancy
from llamavisord.exposition_label import ModelLabel, folded
from llamavisord.memory_view import models_bytes, others_bytes

_WAIT_BUCKETS_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class MemoryCounts:
    """What has happened about memory since the daemon began.

    Args:
        registry: where the metrics are exposed.
        label: decides what a model is called here.
    """

    def __init__(self, registry: CollectorRegistry, label: ModelLabel) -> None:
        self._label = label
        self._waits = Histogram(
            "llamavisor_demand_wait_seconds",
            "Time from the demand for a model until it was had, 0 for one that was loaded.",
            ["router", "model"],
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
        # Not by model: clients ask for names that nobody has, and each would stay as a series.
        self._refused = Counter(
            "llamavisor_demands_refused",
            "Demands for a model that were not met, by reason.",
            ["reason"],
            registry=registry,
        )
        self._quarantines = Counter(
            "llamavisor_model_quarantines",
            "Times that a model was left alone for a while because it failed to load, crashed or hung too often.",
            ["router", "model"],
            registry=registry,
        )
        self._unreclaimed = Counter(
            "llamavisor_device_unreclaimed_bytes",
            "Bytes that had not come back to a device in time after a model had left it.",
            ["device"],
            registry=registry,
        )
        self._kills = Counter(
            "llamavisor_memory_oom_kills",
            "Processes of this cgroup that the kernel has killed for want of memory.",
            registry=registry,
        )
        self.of_models = (self._waits, self._quarantines)

    def __repr__(self) -> str:
        return "<MemoryCounts>"

    def count(self, event: ev.Event) -> None:
        """Count what happened; events about other things count nothing."""
        match event:
            case ev.DemandMet(router=router, model=model, wait_s=wait_s):
                self._waits.labels(router, self._label.of(model)).observe(wait_s)
            case ev.DemandRefused(reason=reason):
                self._refused.labels(reason).inc()
            case ev.ModelQuarantined(router=router, model=model):
                self._quarantines.labels(router, self._label.of(model)).inc()
            case ev.MemoryUnreclaimed(device=device, bytes=size):
                self._unreclaimed.labels(device).inc(size)
            case ev.MemoryKill(kills=kills):
                self._kills.inc(kills)


def memory_gauges(occupancy: Occupancy, label: ModelLabel) -> Iterator[Metric]:
    """What is true of memory now; what is not known has no series."""
    total = gauge("device_total_bytes", "Memory that a device has.", "device", "name")
    used = gauge("device_used_bytes", "Memory of a device that is taken, by whomever.", "device", "name")
    budget = gauge("device_budget_bytes", "Memory of a device that models may take.", "device", "name")
    free = gauge("device_free_bytes", "Memory of a device that can be had; drivers keep some.", "device", "name")
    others = gauge("device_others_bytes", "Memory of a device that is taken by others than models.", "device", "name")
    for device in occupancy.devices:
        for known, size in (
            (total, device.total_bytes),
            (used, device.used_bytes),
            (free, device.free_bytes),
            (budget, device.budget_bytes),
            (others, others_bytes(device, models_bytes(device, occupancy))),
        ):
            if size is not None:
                known.add_metric([device.id, device.name], size)
    yield from (total, used, free, budget, others)

    resident = gauge(
        "model_resident_bytes",
        "Memory that a model takes of a device, as it is reckoned (expected) and as it was seen (measured).",
        *("router", "model", "device", "kind"),
    )
    pinned = gauge("model_pinned", "1 for a model in memory that is to stay there.", "router", "model")
    for occupant in occupancy.occupants:
        labels = [occupant.router, label.of(occupant.model)]
        pinned.add_metric(labels, float(occupant.is_pinned))
        for kind, sizes in (("expected", occupant.expected), ("measured", occupant.measured)):
            for device_id, size in sizes.items():
                resident.add_metric([*labels, device_id, kind], size)
    yield from map(folded, (resident, pinned))

    waiting = gauge("demands_waiting", "Demands for a model that wait for it.", "model")
    for queue in occupancy.queues:
        waiting.add_metric([label.of(queue.model)], queue.demands)
    strained = gauge("memory_strained", "1 while no model is loaded because memory is short.")
    strained.add_metric([], float(bool(occupancy.strain)))
    yield from (folded(waiting), strained)


def pressure_gauges(pressure: Pressure | None) -> Iterator[Metric]:
    """How much work stands still for want of memory; no series where the kernel does not tell."""
    stalled = gauge(
        "memory_pressure_ratio", "Share of ten seconds in which some tasks, or all, stood still for memory.", "tasks"
    )
    if pressure is not None:
        stalled.add_metric(["some"], pressure.some_avg10 / 100)
        stalled.add_metric(["all"], pressure.full_avg10 / 100)
    yield stalled


def gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    """A gauge of this program, without values yet."""
    return GaugeMetricFamily(f"llamavisor_{name}", documentation, labels=labels)
