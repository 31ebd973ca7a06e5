"""The simulation that the eviction policy is measured by: right on what can be worked out by hand, and repeatable."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

GB = 10**9
DAY_S = 86_400.0


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which lives among the benchmarks."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("residency_simulation")


def test_card_of_two_models(sim: ModuleType) -> None:
    """Two models that fit together are loaded once each; demands for one share its load; hits do not wait."""
    requests = [
        sim.Request(0.0, "a", 1.0),  # waits for 4 GB at 2 GB/s and a start of 1 s
        sim.Request(1.0, "a", 1.0),  # shares that load
        sim.Request(2.0, "b", 1.0),  # waits for it, then 10 GB
        sim.Request(5.0, "a", 1.0),  # is served while b is being loaded
        sim.Request(20.0, "b", 1.0),
    ]
    result = sim.Card(sim.Trace("two", {"a": 4 * GB, "b": 10 * GB}, requests), sim.by_bytes).run()
    waits = [3.0, 2.0, 1.0 + 6.0, 0.0, 0.0]
    assert result == sim.Result(2 / 5, 2, sum(waits) / 5, 7.0, overdrawn=0, unserved=0)


def test_card_swaps_and_waits_for_who_is_busy(sim: ModuleType) -> None:
    """What does not fit beside a busy model waits until it has answered, then for the swap; the line is kept."""
    requests = [
        sim.Request(0.0, "a", 10.0),  # 20 GB: loaded at 11, busy until 21
        sim.Request(12.0, "b", 1.0),  # 20 GB: waits for 9 s, 0.5 s of unloading, 11 s of loading: until 32.5
        sim.Request(13.0, "c", 1.0),  # 2 GB: there is room beside a, but b came first; loaded at 32.5 + 2
    ]
    trace = sim.Trace("swap", {"a": 20 * GB, "b": 20 * GB, "c": 2 * GB}, requests)
    result = sim.Card(trace, sim.by_bytes).run()
    waits = [11.0, 20.5, 21.5]
    assert (result.loads, result.mean_wait_s) == (3, pytest.approx(sum(waits) / 3))


def test_yardstick_counts_models_and_overdraws_if_told_to(sim: ModuleType) -> None:
    """The router's LRU unloads the least recently asked for when there are too many, whatever their sizes."""
    sizes = {"a": 20 * GB, "b": 2 * GB, "c": 2 * GB}
    requests = [sim.Request(100.0 * at, name, 1.0) for at, name in enumerate("abcab")]
    trace = sim.Trace("count", sizes, requests)
    assert (trace.safe_count, trace.hopeful_count) == (3, 3)
    assert sim.Card(trace, sim.by_count(2)).run().loads == 5
    assert sim.Card(trace, sim.by_count(3)).run().loads == 3
    larger = sim.Trace("larger", {**sizes, "c": 8 * GB}, requests)
    assert larger.safe_count == 1
    assert sim.Card(larger, sim.by_count(3)).run().overdrawn == 1
    assert sim.Card(larger, sim.by_bytes).run().overdrawn == 0


def test_never_worse_on_any_trace(sim: ModuleType) -> None:
    """Ten days of each traffic: no less found loaded, no more loads, no longer waits, and never beyond memory."""
    rows = [row for trace in sim.traces(10 * DAY_S) for row in sim.compare(trace)]
    assert len(rows) == 6 * 5
    assert [row for row in rows if not row.is_good] == []


def test_same_seed_same_month(sim: ModuleType) -> None:
    """The traffic and what becomes of it depend on the seed alone."""
    first, again = (list(sim.traces(DAY_S / 4)) for _ in range(2))
    assert first == again
    assert [each.requests for each in sim.traces(DAY_S / 4, seed=5)] != [each.requests for each in first]
    assert sim.Card(first[0], sim.by_bytes).run() == sim.Card(again[0], sim.by_bytes).run()
