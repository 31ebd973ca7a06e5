"""Models whose processes grow beyond their bound are loaded anew, at a quiet moment, and not again and again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from fakes.fleet import GatewayStage, models
from fakes.kernel import Kernel
from llamavisor.events import ModelGrown, ModelUnloaded, UnloadReason
from llamavisor.growth import AGAIN_S, LOOK_S, PATIENCE_S, Growth
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.settings import RouterSettings

MIB = 2**20
KEY = ("main", "alpha")
BOUND = 100 * MIB


def due_at(story: list[tuple[float, bool, bool]]) -> list[float]:
    """When a model that was loaded at 0 is to be loaded anew, by (time, is over its bound, is busy)."""
    growth = Growth()
    return [
        now
        for now, is_over, is_busy in story
        if growth.is_due(KEY, loaded_at=0.0, is_over=is_over, is_busy=is_busy, now=now)
    ]


def test_two_looks_and_a_quiet_moment() -> None:
    """One look may have met with a large prompt; whoever uses it is not disturbed; it is told once."""
    t = AGAIN_S
    assert due_at([(t, True, False), (t + 10, False, False), (t + 20, True, False)]) == []
    assert due_at([(t, True, False), (t + 10, True, True), (t + 20, True, False), (t + 30, True, False)]) == [t + 20]


def test_a_bound_below_what_a_model_takes_at_once_does_not_keep_it_busy() -> None:
    """Soon after a load nothing has leaked."""
    assert due_at([(10.0, True, False), (20.0, True, False), (AGAIN_S, True, False)]) == [AGAIN_S]


def test_patience_has_an_end() -> None:
    """A model that is never quiet takes no more requests in the end."""
    busy = [(AGAIN_S + step, True, True) for step in range(0, 700, 10)]
    assert due_at(busy) == [AGAIN_S + PATIENCE_S]
    quiet = [(AGAIN_S + step, True, False) for step in range(0, 1300, 10)]
    assert due_at(quiet) == [AGAIN_S + 10, AGAIN_S + 10 + AGAIN_S, AGAIN_S + 10 + 2 * AGAIN_S]  # if it would not leave


def with_bound(it: GatewayStage, size: int | None) -> RouterSettings:
    """All models have this bound."""
    return replace(it.router(), layers=(OptionLayer("[defaults]", ModelOptions(recycle_above=size)),))


@pytest.mark.anyio
@pytest.mark.parametrize("bound", [BOUND, None])
async def test_a_leaking_model_is_recycled(tmp_path: Path, virtual_time: object, bound: int | None) -> None:
    """What it has grown to is given back by another process of it; without a bound nothing is done."""
    it = GatewayStage(tmp_path, models(["alpha", "beta"]))
    kernel = Kernel(it.meter._root)
    async with it.running(with_bound(it, bound)):
        await it.served("alpha", "beta")
        process = it.hosts["main"].process
        first = process.children["alpha"].pid
        kernel.process(first, pss=None, anonymous=BOUND + MIB)
        kernel.process(process.children["beta"].pid, pss=None, anonymous=BOUND - MIB)
        await anyio.sleep(AGAIN_S - 60.0)
        client = it.client("alpha")
        await it.until(lambda: client.has_it)
        await anyio.sleep(120.0)
        assert it.story.of(ModelUnloaded) == []
        client.leave()
        await anyio.sleep(3 * LOOK_S)
        assert it.loaded() == {"alpha", "beta"}
        again = process.children["alpha"].pid
        if bound is None:
            assert (again, it.story.of(ModelUnloaded)) == (first, [])
            return
        assert again != first
        assert [event.reason for event in it.story.of(ModelUnloaded)] == [UnloadReason.RECYCLED]
        assert it.story.of(ModelGrown) == [
            ModelGrown(router="main", model="alpha", bytes=BOUND + MIB, limit_bytes=BOUND)
        ]
        kernel.process(again, pss=None, anonymous=2 * BOUND)
        await anyio.sleep(AGAIN_S - 60.0)
        assert process.children["alpha"].pid == again
        await anyio.sleep(120.0)
        assert process.children["alpha"].pid != again
