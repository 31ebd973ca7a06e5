"""Events: numbered, kept, passed on, and told in one line."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import anyio
import pytest

from llamavisor import events
from llamavisor.catalog import EntryState
from llamavisor.cause import Cause
from llamavisor.events import KEPT, Bus, Event, ModelProgress, Published, RequestOutcome, UnloadReason, Warned
from llamavisor.states import Change, RouterState

pytestmark = pytest.mark.anyio

EXAMPLES = {
    "str": "word",
    "str | None": None,
    "int": 3,
    "int | None": 3,
    "float": 1.5,
    "float | None": 1.5,
    "bool": True,
    "tuple[int, ...]": (4, 5),
    "tuple[str, ...]": ("word", "another"),
    "RouterState": RouterState.READY,
    "RequestOutcome": RequestOutcome.LEFT,
    "Cause": Cause.EXIT,
    "Cause | None": Cause.EXIT,
    "Change": Change.REPLACED,
    "EntryState": EntryState.INVALID,
    "UnloadReason": UnloadReason.EVICTED,
}
KINDS = [
    kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
]


def warned(text: str) -> Warned:
    """An event that says `text`."""
    return Warned(subject="test", text=text)


def example(kind: type[Event]) -> Event:
    """An event of this kind with some value in each field."""
    return kind(**{field.name: EXAMPLES[str(field.type)] for field in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_event_is_one_line_and_json(kind: type[Event]) -> None:
    """Every kind of event says what it means in one line, and is JSON with its name and its fields."""
    event = example(kind)
    assert event.message()
    assert "\n" not in event.message()
    told = json.loads(json.dumps(event.as_dict()))
    assert told["event"] == kind.__name__
    assert set(told) == {"event", "message", *(field.name for field in dataclasses.fields(kind))}


def test_numbers_have_no_gaps() -> None:
    """Events are numbered from one, in the order of their publication, with the time of the wall clock."""
    bus = Bus(wall=lambda: 12.5)
    heard: list[Published] = []
    bus.listen(heard.append)
    for text in ("a", "b"):
        bus.publish(warned(text))
    assert [(one.id, one.time, one.event) for one in heard] == [(1, 12.5, warned("a")), (2, 12.5, warned("b"))]
    assert bus.last_id == 2


def test_who_does_not_want_to_hear_of_frequent_events_hears_of_all_others() -> None:
    """There may be thousands of them in a second: only who wants to hear of them is called."""

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Frequent(Event):
        is_frequent: ClassVar[bool] = True

    bus = Bus()
    everything: list[Event] = []
    seldom: list[Event] = []
    bus.listen(lambda published: everything.append(published.event))
    bus.listen(lambda published: seldom.append(published.event), hears_frequent=False)
    for event in (frequent := Frequent(), rare := warned("a")):
        bus.publish(event)
    assert everything == [frequent, rare]
    assert seldom == [rare]


def test_only_the_last_thousand_are_kept() -> None:
    """The replay is bounded, and what is not worth keeping takes no place in it."""
    bus = Bus()
    for number in range(KEPT + 5):
        bus.publish(warned(str(number)))
        bus.publish(ModelProgress(router="r", model="m", stage="s", progress=0.5))
    kept = bus.replay(0)
    assert len(kept) == KEPT
    assert kept[0].event == warned("5")


def test_replay_begins_after_a_number() -> None:
    """Only what followed is replayed; the number of an earlier daemon, which is too high, replays everything."""
    bus = Bus()
    for text in "abc":
        bus.publish(warned(text))
    assert [one.id for one in bus.replay(1)] == [2, 3]
    assert [one.id for one in bus.replay(3)] == []
    assert [one.id for one in bus.replay(1000)] == [1, 2, 3]


async def test_subscription_has_no_gap() -> None:
    """A subscriber gets what was, and then what comes, each exactly once."""
    bus = Bus()
    bus.publish(warned("a"))
    async with bus.subscribe(since=0) as (past, future):
        bus.publish(warned("b"))
        assert [one.id for one in past] == [1]
        assert (await future.receive()).id == 2
    async with bus.subscribe() as (past, _):
        assert past == []


async def test_slow_subscriber_is_cut_off() -> None:
    """A subscriber that falls a thousand events behind is cut off; the publisher and others go on."""
    bus = Bus()
    async with bus.subscribe() as (_, slow), bus.subscribe() as (_, quick):
        for number in range(KEPT + 1):
            bus.publish(warned(str(number)))
            assert (await quick.receive()).id == number + 1
        for _ in range(KEPT):
            await slow.receive()
        with pytest.raises(anyio.EndOfStream):
            await slow.receive()
    assert repr(bus) == f"<Bus last_id={KEPT + 1} subscribers=0>"
