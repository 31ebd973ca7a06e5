"""A router under supervision on a fake host, and everything that was said about it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio

from fakes.host import FakeHost
from fakes.machine import FakeProcess
from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, Event
from llamavisor.router import Router
from llamavisor.states import ModelState, RouterState

PATIENCE_S = 7200.0
"""Virtual seconds after which what has not happened never will."""

_E = TypeVar("_E", bound=Event)


class Story:
    """What happened, in order, with the monotonic times."""

    def __init__(self, bus: Bus) -> None:
        self.all: list[tuple[float, Event]] = []
        bus.listen(lambda published: self.all.append((anyio.current_time(), published.event)))

    def __repr__(self) -> str:
        return "\n".join(f"{at:9.3f} {type(event).__name__}: {event.message()}" for at, event in self.all)

    def of(self, kind: type[_E]) -> list[_E]:
        """The events of one kind."""
        return [event for _, event in self.all if isinstance(event, kind)]

    def times(self, kind: type[Event]) -> list[float]:
        """When the events of one kind happened."""
        return [at for at, event in self.all if isinstance(event, kind)]


class Supervised:
    """A router whose owner runs."""

    def __init__(self, router: Router, host: FakeHost, story: Story) -> None:
        self.router = router
        self.host = host
        self.story = story
        self.has_ended = False

    def __repr__(self) -> str:
        return f"<Supervised {self.router!r}>"

    async def run(self) -> None:
        """Be the owner."""
        await self.router.run()
        self.has_ended = True

    @property
    def process(self) -> FakeProcess:
        """The process that runs."""
        return self.host.process

    @property
    def spawns(self) -> int:
        """How many processes were started so far."""
        return len(self.host.machine.processes)

    def model(self, name: str) -> ModelState:
        """What the router's table says of a model."""
        model = self.router.table.get(name)
        assert model is not None, f"{name} is not in {self.router.table}"
        return model.state

    async def until(self, condition: Callable[[], object], *, within_s: float = PATIENCE_S) -> None:
        """Wait until it holds; the owner looks after every message."""
        with anyio.fail_after(within_s):
            await self.router.wait_until(lambda: bool(condition()))

    async def reaches(self, state: RouterState, *, within_s: float = PATIENCE_S) -> None:
        """Wait until the router is in this state."""
        await self.until(lambda: self.router.state is state, within_s=within_s)

    async def comes_up(self) -> None:
        """Start it and wait until it serves."""
        self.router.start()
        await self.reaches(RouterState.READY)

    async def settle(self) -> None:
        """Let everything happen that takes no time, or next to none."""
        await anyio.sleep(0.2)


class Waiter:
    """Somebody who waits for an answer, and what came of it."""

    def __init__(self) -> None:
        self.answer: bool | None = None
        self.error: LlamavisorError | None = None
        self.done_at: float | None = None

    async def __call__(self, ask: Callable[[str], Awaitable[bool]], model: str) -> None:
        """Ask, and note the answer."""
        try:
            self.answer = await ask(model)
        except LlamavisorError as error:
            self.error = error
        self.done_at = anyio.current_time()

    @property
    def is_done(self) -> bool:
        """Whether there is an answer."""
        return self.done_at is not None


@asynccontextmanager
async def supervised(host: FakeHost, *, jitter: float = 0.0) -> AsyncIterator[Supervised]:
    """Supervise a router on `host`, not started yet; at the end nothing of it may be left."""
    bus = Bus()
    router = Router(host, bus=bus, random=lambda: jitter)
    host.deliver = router.want
    it = Supervised(router, host, Story(bus))
    async with anyio.create_task_group() as group:
        group.start_soon(it.run)
        yield it
        group.cancel_scope.cancel()
    assert host.machine.left == []
