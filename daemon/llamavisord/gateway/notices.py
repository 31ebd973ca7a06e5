"""What happens to the fleet's models, as the events of llama-server's GET /models/sse.

llama-server sends no snapshot, no replay and no heartbeat, so neither do we: an event is a reason to read the list
again. One that would contradict the list is not sent: a model that leaves one router while another has it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from llamavisor.events import (
    Bus,
    Event,
    ModelAdded,
    ModelDeleted,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelProgress,
    ModelRemoved,
    ModelsChanged,
    ModelSleeping,
    ModelUnloaded,
    Published,
    UnloadReason,
)
from llamavisord.gateway.listing import FAILED_EXIT_CODE, Listing, Place
from llamavisord.gateway.replies import dump

KEPT = 1000
"""So many events may wait for one reader; who falls further behind is cut off, and reads the list on coming back."""

_FAILURES = frozenset({UnloadReason.CRASHED, UnloadReason.OOM, UnloadReason.FILE_CHANGED, UnloadReason.STALLED})
_STAGES = ((("spec-draft-model", "model-draft"), "spec_model"), (("mmproj",), "mmproj_model"))
"""What is loaded beside a model's own file, by the options that name it, new and old."""

_Reader = tuple[MemoryObjectSendStream[bytes], Callable[[str], bool]]


class Stream:
    """Parts of an SSE stream, each of one event or more.

    Args:
        events: all of them, one by one.
    """

    def __init__(self, events: MemoryObjectReceiveStream[bytes]) -> None:
        self._events = events

    def __repr__(self) -> str:
        return f"<Stream {self._events.statistics().current_buffer_used} waiting>"

    def __aiter__(self) -> Self:
        """The same."""
        return self

    async def __anext__(self) -> bytes:
        """What has happened since the last time; waits until something does."""
        try:
            batch = [await self._events.receive()]
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        while self._events.statistics().current_buffer_used:
            batch.append(self._events.receive_nowait())
        # Of a thousand models that come at once one word is enough.
        return b"".join(part for part, after in zip(batch, [*batch[1:], None], strict=True) if part is not after)


class Notices:
    """Tells every reader of what happens. Used from one event loop.

    Args:
        listing: the models.
        bus: where events come from.
    """

    def __init__(self, listing: Listing, bus: Bus) -> None:
        self._listing = listing
        self._readers: list[_Reader] = []
        self._asleep: set[tuple[str, str]] = set()  # by router and model
        self._is_closed = False
        bus.listen(self._hear, hears_frequent=False)

    def __repr__(self) -> str:
        return f"<Notices for {len(self._readers)}>"

    @contextmanager
    def subscribe(self, may_use: Callable[[str], bool]) -> Iterator[Stream]:
        """The events of the models that somebody may use, from now on; it ends when its reader does not keep up."""
        send, receive = anyio.create_memory_object_stream[bytes](KEPT)
        reader = send, may_use
        if self._is_closed:
            send.close()
        else:
            self._readers.append(reader)
        try:
            with receive:
                yield Stream(receive)
        finally:
            self._drop(reader)

    def close(self) -> None:
        """End all streams, now and from now on: the daemon ends."""
        self._is_closed = True
        for reader in tuple(self._readers):
            self._drop(reader)

    def tell_unloaded(self, name: str) -> None:
        """A load that a client had asked for did not even begin."""
        self._send(name, _event(name, "status_change", {"status": "unloaded", "exit_code": FAILED_EXIT_CODE}))

    def tell(self, name: str, kind: str, data: dict[str, object] | None = None) -> None:
        """What has become of a download that a client had asked for."""
        self._send(name, _event(name, kind, data))

    def _hear(self, published: Published) -> None:
        event = published.event
        match event:
            case ModelSleeping(router=router, model=name):
                self._asleep.add((router, name))
            case (
                ModelLoaded(router=router, model=name)
                | ModelUnloaded(router=router, model=name)
                | ModelLoadFailed(router=router, model=name)
            ):
                self._asleep.discard((router, name))
        if not self._readers:
            return
        match event:
            case ModelAdded() | ModelRemoved() | ModelsChanged():
                self._send(None, _RELOADED)
            case ModelDeleted(model=name):
                self._send(name, _event(name, "model_remove"))
            case (
                ModelLoading(router=router, model=name)
                | ModelProgress(router=router, model=name)
                | ModelLoaded(router=router, model=name)
                | ModelSleeping(router=router, model=name)
                | ModelUnloaded(router=router, model=name)
                | ModelLoadFailed(router=router, model=name)
            ):
                place = self._listing.place(router, name)
                if place is not None and (data := self._data(event, place)) is not None:
                    kind = "model_status" if isinstance(event, ModelLoading) else "status_change"
                    self._send(name, _event(name, kind, data))

    def _data(self, event: Event, place: Place) -> dict[str, object] | None:
        """What there is to say; None if nothing, or if another router has it, and what it says goes before."""
        best = self._listing.find(place.name)
        if best is not None and best.is_running and best.router is not place.router and best.rank < place.rank:
            return None
        match event:
            case ModelLoading():
                # Of one that wakes only its progress is told.
                return None if (place.router.name, place.name) in self._asleep else {"status": "loading"}
            case ModelProgress(stage=stage, progress=progress):
                value = {"stages": _stages(place, stage), "current": stage, "value": progress}
                return {"status": "loading", "progress": value}
            case ModelLoaded():
                return {"status": "loaded", "info": self._listing.info(place)}
            case ModelSleeping():
                return {"status": "sleeping"}
            case ModelUnloaded(reason=reason):
                return {"status": "unloaded", "exit_code": FAILED_EXIT_CODE if reason in _FAILURES else 0}
            case _:
                return {"status": "unloaded", "exit_code": FAILED_EXIT_CODE}

    def _send(self, name: str | None, event: bytes) -> None:
        """Give an event to all who may know of the model, None = to all."""
        for reader in tuple(self._readers):
            send, may_use = reader
            if name is not None and not may_use(name):
                continue
            try:
                send.send_nowait(event)
            except (anyio.WouldBlock, anyio.BrokenResourceError):
                self._drop(reader)

    def _drop(self, reader: _Reader) -> None:
        reader[0].close()
        if reader in self._readers:
            self._readers.remove(reader)


def _event(name: str, kind: str, data: dict[str, object] | None = None) -> bytes:
    event = {"model": name, "event": kind, **({"data": data} if data is not None else {})}
    return b"data: " + dump(event) + b"\n\n"


_RELOADED = _event("*", "models_reload")


def _stages(place: Place, current: str) -> list[str]:
    """All that is loaded, in llama-server's order."""
    offered = place.router.shelf.offer.models.get(place.name)
    section = offered.section if offered is not None else {}
    stages = ["text_model", *(stage for options, stage in _STAGES if any(option in section for option in options))]
    return stages if current in stages else [*stages, current]
