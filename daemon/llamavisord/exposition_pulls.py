"""Metrics of pulls from the Hub: how many are at work, how they ended, and how much has come."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from llamavisor import events as ev

_OUTCOMES = ("done", "failed", "cancelled")


class PullCounts:
    """What has become of pulls since the daemon began; not by model, as a name that was pulled once would stay.

    Args:
        registry: where the metrics are exposed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._here: dict[str, int] = {}  # of each pull at work, so many bytes were here at the most
        at_work = Gauge(
            "llamavisor_pulls",
            "Pulls from the Hub that are at work; those that wait for their turn are not counted.",
            registry=registry,
        )
        at_work.set_function(lambda: len(self._here))
        self._ended = Counter(
            "llamavisor_pulls_ended",
            "Pulls from the Hub that ended, by outcome: done, failed or cancelled.",
            ["outcome"],
            registry=registry,
        )
        self._bytes = Counter(
            "llamavisor_pulled_bytes",
            "Bytes of models that have come from the Hub, also by another that shares the file; "
            "what was thrown away and came again is counted once.",
            registry=registry,
        )
        for outcome in _OUTCOMES:  # a first failure is no rise of what was not there
            self._ended.labels(outcome)

    def __repr__(self) -> str:
        return f"<PullCounts of {len(self._here)} at work>"

    def count(self, event: ev.Event) -> None:
        """Count what happened; events about other things count nothing."""
        match event:
            case ev.PullStarted(pull=pull, here_bytes=here_bytes):
                self._here[pull] = here_bytes
            case ev.PullProgress(pull=pull, done_bytes=done_bytes):
                self._note(pull, done_bytes)
            case ev.PullEnded(pull=pull, total_bytes=total_bytes):
                self._note(pull, total_bytes)
                self._end(pull, "done")
            case ev.PullFailed(pull=pull):
                self._end(pull, "failed")
            case ev.PullCancelled(pull=pull):
                self._end(pull, "cancelled")

    def _note(self, pull: str, done_bytes: int) -> None:
        # What was here already is read again before more comes, and files may begin anew: it counts from the most.
        most = self._here.get(pull, done_bytes)
        if done_bytes > most:
            self._bytes.inc(done_bytes - most)
            self._here[pull] = done_bytes

    def _end(self, pull: str, outcome: str) -> None:
        self._here.pop(pull, None)
        self._ended.labels(outcome).inc()
