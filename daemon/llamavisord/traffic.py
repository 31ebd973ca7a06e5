"""What goes through the gateway at this moment: counted by the gateway, shown by `status` and by the metrics."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import anyio

from llamavisord.drain import Drain


class Traffic:
    """The requests in the gateway and what they take.

    Args:
        drain: the gate that they come through.
        held_bytes: says how many bytes of bodies are held; asked only when somebody looks.
        connections: says how many connections of clients are open; likewise.

    Attributes:
        urls: where clients come in, empty while they cannot.
        problem: why they cannot, for a person.
        has_tried: one of both is known.
        keys: how many API keys there are; with none everybody may use it.
        in_flight: requests that a model is answering, by its name; no model has zero of them.
    """

    def __init__(self, drain: Drain, *, held_bytes: Callable[[], int], connections: Callable[[], int]) -> None:
        self.drain = drain
        self.urls: tuple[str, ...] = ()
        self.problem: str | None = None
        self.has_tried = anyio.Event()
        self.keys = 0
        self.in_flight: dict[str, int] = {}
        self._held_bytes = held_bytes
        self._connections = connections

    def __repr__(self) -> str:
        return f"<Traffic {self.drain!r} in_flight={self.in_flight}>"

    @property
    def state(self) -> str:
        """Whether somebody who comes now is let in: "open", "draining", or "closed" while nobody listens."""
        if self.drain.is_draining:
            return "draining"
        return "open" if self.urls else "closed"

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies that are held."""
        return self._held_bytes()

    @property
    def connections(self) -> int:
        """Connections of clients that are open."""
        return self._connections()

    @property
    def waiting(self) -> int:
        """Requests that were taken and that no model is answering yet, or again."""
        return self.drain.inside - sum(self.in_flight.values())

    def enter(self) -> Passage:
        """A request was taken: it counts as waiting from now on. Only what ends by itself, or a drain never would."""
        return Passage(self)

    def warnings(self) -> list[str]:
        """What a person should know."""
        found = [self.problem] if self.problem else []
        if self.drain.is_draining and not self.drain.is_final:
            found.append("the gateway takes no new requests, until `llamavisor resume`")
        return found

    def view(self) -> dict[str, Any]:
        """All of it as the control API shows it."""
        return {
            "urls": list(self.urls),
            "draining": self.drain.is_draining,
            "keys": self.keys,
            "in_flight": dict(self.in_flight),
            "waiting": self.waiting,
            "held_bytes": self.held_bytes,
            "connections": self.connections,
        }


class Passage:
    """The way of one request through the gateway; a context manager that counts it out whatever happens.

    Args:
        traffic: what it is counted in.
    """

    __slots__ = ("_model", "_traffic")

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._model: str | None = None
        traffic.drain.enter()

    def __repr__(self) -> str:
        return f"<Passage {'waiting' if self._model is None else self._model}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It has ended."""
        self.wait()
        self._traffic.drain.leave()

    def run(self, model: str) -> None:
        """From now on this model is answering it."""
        self.wait()
        self._model = model
        in_flight = self._traffic.in_flight
        in_flight[model] = in_flight.get(model, 0) + 1

    def wait(self) -> None:
        """No model is answering it any more: its model has gone, and it waits for another chance."""
        if (model := self._model) is None:
            return
        self._model = None
        in_flight = self._traffic.in_flight
        in_flight[model] -= 1
        if not in_flight[model]:
            del in_flight[model]
