"""Metrics of requests: counted for each one, so by plain additions; made into metrics only when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llamavisor.events import RequestEnded, RequestOutcome
from llamavisord.exposition_label import OTHER, ModelLabel, folded
from llamavisord.exposition_memory import gauge
from llamavisord.traffic import Traffic

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BOUNDS = (*(str(float(bound)) for bound in _BUCKETS_S), "+Inf")
NOBODY = ""
"""The model of requests that name none, or one that nobody has: clients invent names, and each would stay for ever."""


class RequestCounts(Collector):
    """What has become of requests since the daemon began.

    Args:
        is_known: whether a model of that name is served.
        label: decides what a model is called here.
        routers: the names of the routers that there are.
    """

    def __init__(
        self, *, is_known: Callable[[str], bool], label: ModelLabel, routers: Callable[[], Iterable[str]]
    ) -> None:
        self._is_known = is_known
        self._label = label
        self._routers = routers
        # Invariant: by label; every model in here was served when its first request was counted, or is NOBODY.
        self._of_models: dict[str, _OfModel] = {}

    def __repr__(self) -> str:
        return f"<RequestCounts of {len(self._of_models)} models>"

    def count(self, event: RequestEnded) -> None:
        """Count a request that has ended. This is on the way of every request: a few additions, and no labels."""
        name = event.model or NOBODY
        # What clients call so is no model as a rule, and not those that share the label.
        model = (self._of_models.get(name) if name != OTHER else None) or self._first(name)
        route = model.routes.get(event.route)
        if route is None:
            route = model.routes[event.route] = _OfRoute()
        key = (event.router or NOBODY, event.status)
        route.ended[key] = route.ended.get(key, 0) + 1
        if event.outcome is RequestOutcome.REFUSED and not event.queue_s:  # at once: a slow model would look fast
            return
        route.duration.observe(event.duration_s)
        if event.first_data_s is not None:
            route.first_data.observe(event.first_data_s)
        if event.model is not None:
            route.queue.observe(event.queue_s)
        route.retries += event.retries
        if event.outcome is not RequestOutcome.OK:
            route.left += event.outcome is RequestOutcome.LEFT
            route.broken += event.outcome is RequestOutcome.BROKEN
        if event.tokens_in is not None:
            route.tokens_in += event.tokens_in
        if event.tokens_out is not None:
            route.tokens_out += event.tokens_out

    def _first(self, name: str) -> _OfModel:
        """Where the first request for a model is counted, and each for one that nobody has or that has no label."""
        label = self._label.of(name) if name and self._is_known(name) else NOBODY
        return self._of_models.setdefault(label, _OfModel())

    def forget_vanished(self) -> None:
        """Drop the series of models and routers that are not there any more: they would stay for ever.

        Called after the label has forgotten them.
        """
        for label in [label for label in self._of_models if label and not self._label.is_used(label)]:
            del self._of_models[label]
        there = {NOBODY, *self._routers()}
        for model in self._of_models.values():
            for route in model.routes.values():
                for key in [key for key in route.ended if key[0] not in there]:
                    del route.ended[key]

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        ended = _counter("requests", "Requests that have ended.", "model", "router", "route", "status")
        duration = _histogram("request_duration_seconds", "From a request's arrival to its end.", "model", "route")
        first = _histogram(
            "request_first_data_seconds", "From a request's arrival to the first data of its answer.", "model", "route"
        )
        queue = _histogram("request_queue_seconds", "Time that requests waited for their model.", "model", "route")
        tokens = _counter(
            "request_tokens",
            "Tokens that answers say they took, of the prompt or the completion.",
            "model",
            "route",
            "kind",
        )
        retries = _counter("request_retries", "Times that a request was sent again.", "model", "route")
        left = _counter(
            "requests_cancelled", "Requests whose client did not wait for the whole answer.", "model", "route"
        )
        broken = _counter(
            "requests_broken", "Requests whose answer had begun and could not be finished.", "model", "route"
        )
        for name, model in self._of_models.items():
            for path, route in model.routes.items():
                for (router, status), count in route.ended.items():
                    ended.add_metric([name, router, path, str(status)], count)
                route.duration.add_to(duration, [name, path])
                route.first_data.add_to(first, [name, path])
                route.queue.add_to(queue, [name, path])
                tokens.add_metric([name, path, "prompt"], route.tokens_in)
                tokens.add_metric([name, path, "completion"], route.tokens_out)
                retries.add_metric([name, path], route.retries)
                left.add_metric([name, path], route.left)
                broken.add_metric([name, path], route.broken)
        yield from (ended, duration, first, queue, tokens, retries, left, broken)


class _Histogram:
    """Observations in `_BUCKETS_S`."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """One more; a bucket holds what is at most its bound."""
        self.counts[bisect_left(_BUCKETS_S, seconds)] += 1
        self.total += seconds

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Show it, if it holds anything."""
        counts = list(accumulate(self.counts))
        if counts[-1]:
            family.add_metric(labels, list(zip(_BOUNDS, counts, strict=True)), self.total)


class _OfRoute:
    """What became of the requests for one model on one route."""

    __slots__ = ("broken", "duration", "ended", "first_data", "left", "queue", "retries", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.ended: dict[tuple[str, int], int] = {}  # by router and status
        self.duration = _Histogram()
        self.first_data = _Histogram()
        self.queue = _Histogram()
        self.retries = self.left = self.broken = self.tokens_in = self.tokens_out = 0


class _OfModel:
    """What became of the requests for one model."""

    __slots__ = ("routes",)

    def __init__(self) -> None:
        self.routes: dict[str, _OfRoute] = {}


def traffic_gauges(traffic: Traffic, label: ModelLabel) -> Iterator[Metric]:
    """What is true of the gateway now."""
    in_flight = gauge("requests_in_flight", "Requests of the gateway that a model is answering.", "model")
    for model, count in traffic.in_flight.items():
        in_flight.add_metric([label.of(model)], count)
    waiting = gauge("requests_waiting", "Requests of the gateway that no model is answering yet.")
    waiting.add_metric([], traffic.waiting)
    held = gauge("gateway_held_bytes", "Bytes of the bodies of requests that the gateway holds.")
    held.add_metric([], traffic.held_bytes)
    connections = gauge("gateway_connections", "Connections of clients that are open.")
    connections.add_metric([], traffic.connections)
    listening = gauge("gateway_listening", "1 while clients can connect to the gateway.")
    listening.add_metric([], float(bool(traffic.urls)))
    draining = gauge("gateway_draining", "1 while the gateway takes no new requests.")
    draining.add_metric([], float(traffic.drain.is_draining))
    yield from (folded(in_flight), waiting, held, connections, listening, draining)


def _counter(name: str, documentation: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"llamavisor_{name}", documentation, labels=labels)


def _histogram(name: str, documentation: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"llamavisor_{name}", documentation, labels=labels)
