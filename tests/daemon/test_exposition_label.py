"""Which models have series of their own, and what becomes of the others, in all metrics together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from daemon.stage import Stage, entry
from fakes.request import ended
from llamavisor.events import DemandMet, ModelHung, ModelLoadFailed, ModelQuarantined, ModelUnloaded, UnloadReason
from llamavisor.occupancy import Occupancy, Queue
from llamavisor.router import Router
from llamavisord.drain import Drain
from llamavisord.exposition import Exposition
from llamavisord.exposition_label import MAX_MODELS, OTHER, ModelLabel, folded
from llamavisord.traffic import Traffic
from promtool import complaints


def test_the_first_that_come_are_called_by_their_names() -> None:
    """All beyond share one value, and everybody keeps what it has."""
    label = ModelLabel(lambda _: True, room=2)
    assert [label.of(model) for model in "abcadb"] == ["a", "b", OTHER, "a", OTHER, "b"]
    assert [label.is_used(value) for value in ("a", "c", OTHER)] == [True, False, True]


def test_a_model_that_has_gone_makes_room() -> None:
    """The next model that is told of has the place; when nobody shares a value, it is used no more."""
    known = {"a", "b", "c"}
    label = ModelLabel(known.__contains__, room=1)
    assert [label.of(model) for model in "abc"] == ["a", OTHER, OTHER]
    known.remove("a")
    assert label.of("b") == OTHER
    label.forget_vanished()
    assert [label.of(model) for model in "cb"] == ["c", OTHER]
    known.remove("b")
    label.forget_vanished()
    assert [label.is_used(value) for value in ("c", "b", OTHER)] == [True, False, False]


def test_a_model_that_is_called_like_the_rest_is_one_of_them() -> None:
    """It takes no place, and its value is its name all the same."""
    label = ModelLabel(lambda _: True, room=1)
    assert [label.of(model) for model in (OTHER, "a", "b")] == [OTHER, "a", OTHER]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans())))
def test_there_are_never_more_values_than_places(steps: list[tuple[str, bool]]) -> None:
    """Whoever comes and goes, and in which order."""
    known: set[str] = set()
    label = ModelLabel(known.__contains__, room=2)
    for model, is_there in steps:
        if is_there:
            known.add(model)
        else:
            known.discard(model)
            label.forget_vanished()
        values = Counter(label.of(each) for each in sorted(known))
        assert len(values.keys() - {OTHER}) == min(2, len(known))
        assert values.total() == len(known)


def test_series_that_have_become_one_are_joined() -> None:
    """Added up, or the latest; series of other labels stay as they are."""
    family = GaugeMetricFamily("x", "X.", labels=["model", "state"])
    for labels, value in ((["other", "a"], 1.0), (["m", "a"], 2.0), (["other", "a"], 4.0), (["other", "b"], 8.0)):
        family.add_metric(labels, value)
    assert [(*sample.labels.values(), sample.value) for sample in folded(family).samples] == [
        ("other", "a", 5.0),
        ("m", "a", 2.0),
        ("other", "b", 8.0),
    ]
    family.add_metric(["other", "a"], 3.0)
    assert folded(family, max).samples[0].value == 5.0


# --- in the daemon ----------------------------------------------------------------------------------------------------


def scrape(exposition: Exposition) -> list[Sample]:
    """What Prometheus makes of a scrape, in which no series is there twice."""
    exposition._forget_vanished()
    text = generate_latest(exposition.registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    keys = [(sample.name, *sorted(sample.labels.items())) for sample in samples]
    assert len(set(keys)) == len(keys)
    return samples


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """The sum of these series; NaN without one."""
    found = [each.value for each in samples if each.name == name and labels.items() <= each.labels.items()]
    return sum(found) if found else math.nan


async def load(router: Router, names: Sequence[str]) -> None:
    """Load all of them."""
    async with anyio.create_task_group() as group:
        for name in names:
            group.start_soon(router.load, name)


@pytest.mark.anyio
@pytest.mark.usefixtures("virtual_time")
async def test_250_models_make_series_for_200(tmp_path: Path) -> None:
    """In every metric the same ones have names, the sums are those of all models, and who goes makes room."""
    names = [f"m{number:03}" for number in range(249)] + [OTHER]
    stage = Stage(tmp_path)
    watch = stage.put(*map(entry, names))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        daemon.traffic = Traffic(Drain(daemon.bus), held_bytes=lambda: 0, connections=lambda: 0)
        router = stage.fleet["main"]
        for name in names:
            for event in (
                ended(model=name, duration_s=1.0, tokens_in=1),
                DemandMet(router="main", model=name, wait_s=1.0),
                ModelLoadFailed(router="main", model=name, reason="no"),
                ModelUnloaded(router="main", model=name, reason=UnloadReason.EXPIRED),
                ModelHung(router="main", model=name, pid=1, silent_s=1.0, reason="no"),
                ModelQuarantined(router="main", model=name, for_s=1.0, failures=1, reason="no"),
            ):
                stage.bus.publish(event)
            daemon.traffic.in_flight[name] = 1
            stage.hosts["main"].process.metrics[name] = b"# TYPE llamacpp:n_total counter\nllamacpp:n_total 2\n"
        stage.hosts["main"].process.busy |= set(names)
        await load(router, names)
        await anyio.sleep(3)
        samples = scrape(exposition)
        assert {each.labels["model"] for each in samples if "model" in each.labels} == {*names[:MAX_MODELS], OTHER}
        for name, labels, of_each in (
            ("llamacpp:n_total", {}, 2),
            ("llamavisor_model_state", {"state": "loaded"}, 1),
            ("llamavisor_model_requests_in_flight", {}, 1),
            ("llamavisor_model_pinned", {}, 0),
            ("llamavisor_requests_in_flight", {}, 1),
            ("llamavisor_requests_total", {}, 1),
            ("llamavisor_request_tokens_total", {"kind": "prompt"}, 1),
            ("llamavisor_request_duration_seconds_bucket", {"le": "1.0"}, 1),
            ("llamavisor_demand_wait_seconds_sum", {}, 1),
            ("llamavisor_model_loads_total", {"result": "loaded"}, 1),
            ("llamavisor_model_loads_total", {"result": "failed"}, 1),
            ("llamavisor_model_load_duration_seconds_count", {}, 1),
            ("llamavisor_model_unloads_total", {"reason": "expired"}, 1),
            ("llamavisor_model_failures_total", {}, 1),
            ("llamavisor_model_hangs_total", {}, 1),
            ("llamavisor_model_quarantines_total", {}, 1),
        ):
            assert total(samples, name, **labels) == of_each * len(names), name
            assert total(samples, name, model=OTHER, **labels) == of_each * (len(names) - MAX_MODELS), name
            assert total(samples, name, model=names[0], **labels) == of_each, name
        last = [each.value for each in samples if each.name == "llamavisor_model_last_use_timestamp_seconds"]
        assert len(last) == MAX_MODELS + 1
        assert max(last) < 2 * min(last)  # no sum of times

        gone = names[:5]
        for name in gone:
            stage.hosts["main"].process.busy.discard(name)
            daemon.traffic.in_flight.pop(name)
            await router.unload(name)
        watch.remove(*gone)
        await stage.until(lambda: len(router.table) == len(names) - len(gone))
        shown = {each.labels["model"] for each in scrape(exposition) if "model" in each.labels}
        assert len(shown) == MAX_MODELS + 1
        assert shown.isdisjoint(gone)


@pytest.mark.anyio
@pytest.mark.usefixtures("virtual_time")
async def test_what_is_shared_stays_as_long_as_somebody_shares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters go on from scrape to scrape, and go with the last of those models; queues are added up."""
    stage = Stage(tmp_path)
    watch = stage.put(entry("alpha"), entry("beta"), entry("gamma"))
    queues = tuple(Queue(model=model, demands=2, since=0.0, obstacle="") for model in ("alpha", "beta", "gamma"))
    occupancy = Occupancy(occupants=(), devices=(), queues=queues, is_enforced=True)
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        exposition._label._room = 1
        for model in ("alpha", "beta", "gamma"):
            stage.bus.publish(DemandMet(router="main", model=model, wait_s=1.0))
        monkeypatch.setattr(stage.fleet.memory, "occupancy", lambda: occupancy)
        for _ in range(2):
            samples = scrape(exposition)
            assert total(samples, "llamavisor_demand_wait_seconds_count", model=OTHER) == 2
            assert total(samples, "llamavisor_demands_waiting", model=OTHER) == 4
        monkeypatch.undo()
        watch.remove("beta", "gamma")
        await stage.until(lambda: len(stage.fleet["main"].table) == 1)
        waits = [each for each in scrape(exposition) if each.name == "llamavisor_demand_wait_seconds_count"]
        assert [each.labels["model"] for each in waits] == ["alpha"]


@pytest.mark.anyio
@pytest.mark.usefixtures("virtual_time")
async def test_promtool_finds_nothing_to_mend_in_what_is_shared(tmp_path: Path) -> None:
    """Also when most models share their series."""
    stage = Stage(tmp_path)
    names = ["alpha", "beta", "gamma"]
    stage.put(*map(entry, names))
    async with stage.running(stage.config(("main", "a"))) as daemon:
        exposition = Exposition(daemon)
        exposition._label._room = 1
        await load(stage.fleet["main"], names)
        for name in names:
            stage.bus.publish(ended(model=name))
            stage.hosts["main"].process.metrics[name] = b"# HELP llamacpp:n N\n# TYPE llamacpp:n gauge\nllamacpp:n 2\n"
        await anyio.sleep(3)
        text = generate_latest(exposition.registry).decode()
    assert 'llamacpp:n{model="other",router="main"} 4.0' in text
    assert complaints(text) == []
