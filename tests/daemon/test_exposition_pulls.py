"""Metrics of pulls from the Hub."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from llamavisor.events import Event, PullCancelled, PullEnded, PullFailed, PullProgress, PullStarted
from llamavisord.exposition_pulls import PullCounts


def started(pull: str = "a", here_bytes: int = 0) -> PullStarted:
    """A pull of 100 bytes that is at work."""
    return PullStarted(
        pull=pull,
        model="alpha",
        repository="user/alpha",
        commit="0",
        file_count=1,
        total_bytes=100,
        here_bytes=here_bytes,
    )


def come(done_bytes: int, pull: str = "a") -> PullProgress:
    """So much of it is here."""
    return PullProgress(
        pull=pull, model="alpha", done_bytes=done_bytes, total_bytes=100, speed_bytes_per_s=1.0, left_s=None
    )


def done(pull: str = "a") -> PullEnded:
    """It is whole."""
    return PullEnded(pull=pull, model="alpha", path="/m/alpha.gguf", total_bytes=100, duration_s=1.0)


def counted(*events: Event) -> dict[str, float]:
    """What Prometheus reads when these have happened."""
    registry = CollectorRegistry()
    counts = PullCounts(registry)
    for event in events:
        counts.count(event)
    text = generate_latest(registry).decode()
    lines = [line.removeprefix("llamavisor_").rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines if "_created" not in name}


ENDED = {f'pulls_ended_total{{outcome="{outcome}"}}': 0.0 for outcome in ("done", "failed", "cancelled")}


def test_nothing_was_pulled() -> None:
    """Every series is there before anything has happened, so that the first failure is seen as a rise."""
    assert counted() == {"pulls": 0.0, "pulled_bytes_total": 0.0, **ENDED}


def test_a_pull_at_work() -> None:
    """It is counted, and what has come of it, without what was here before."""
    found = counted(started(here_bytes=30), come(50), started("b"), come(10, "b"))
    assert found == {"pulls": 2.0, "pulled_bytes_total": 30.0, **ENDED}


@pytest.mark.parametrize(
    ("end", "outcome", "pulled_bytes"),
    [
        (done(), "done", 100.0),
        (PullFailed(pull="a", model="alpha", why="disk", reason="no room"), "failed", 40.0),
        (PullCancelled(pull="a", model="alpha", is_dropped=True), "cancelled", 40.0),
    ],
    ids=["done", "failed", "cancelled"],
)
def test_the_end_of_a_pull(end: Event, outcome: str, pulled_bytes: float) -> None:
    """It is counted by its outcome, and is not at work any more."""
    found = counted(started(), come(40), end)
    expected = ENDED | {f'pulls_ended_total{{outcome="{outcome}"}}': 1.0}
    assert found == {"pulls": 0.0, "pulled_bytes_total": pulled_bytes, **expected}


def test_what_is_read_again_has_not_come_again() -> None:
    """What lies on the disk is read before more comes, and a file may begin anew: its bytes count once."""
    assert counted(started(here_bytes=60), come(0), come(60), come(20), come(70))["pulled_bytes_total"] == 10.0


def test_an_end_without_a_beginning() -> None:
    """A pull that another daemon has brought meanwhile has ended, and no byte of it has come to this one."""
    found = counted(done())
    assert (found["pulls"], found["pulled_bytes_total"]) == (0.0, 0.0)
    assert found['pulls_ended_total{outcome="done"}'] == 1.0
