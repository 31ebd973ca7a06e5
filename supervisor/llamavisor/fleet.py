"""All routers of one machine as one: the public face of the library."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import anyio
import anyio.abc

from llamavisor.binary import ProbeCache
from llamavisor.cause import Cause, Verdict
from llamavisor.errors import LlamavisorError, ModelNotFoundError, RouterNotFoundError
from llamavisor.events import Bus, StraysKilled, Warned
from llamavisor.host import Host
from llamavisor.launch import Launcher
from llamavisor.output import CAP_BYTES
from llamavisor.process import TERM_GRACE_S, Spawner
from llamavisor.router import Router
from llamavisor.settings import RouterSettings
from llamavisor.states import HAS_CHILD, RouterState

REAP_INTERVAL_S = 1.0


class Fleet:
    """The routers of one configuration, side by side, each with its own port.

    Args:
        make_host: where a router with these settings runs.
        spawner: reaps what is handed to us; None where nothing is spawned.
        bus: where the events go.
        jitter: a source of numbers in [0, 1).
    """

    def __init__(
        self,
        *,
        make_host: Callable[[RouterSettings], Host],
        spawner: Spawner | None = None,
        bus: Bus,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.bus = bus
        self._make_host = make_host
        self._spawner = spawner
        self._jitter = jitter
        self._routers: dict[str, Router] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Fleet {', '.join(map(repr, self._routers.values()))}>"

    def __iter__(self) -> Iterator[Router]:
        return iter(self._routers.values())

    def __getitem__(self, name: str) -> Router:
        """The router of that name.

        Raises:
            RouterNotFoundError: there is none.
        """
        try:
            return self._routers[name]
        except KeyError:
            known = ", ".join(self._routers)
            raise RouterNotFoundError(f"no router {name!r}", hint=f"the routers are: {known}") from None

    @property
    def is_ready(self) -> bool:
        """Whether at least one router is READY; a DEGRADED one keeps less than it promised."""
        return any(router.state is RouterState.READY for router in self)

    async def run(self, settings: Iterable[RouterSettings]) -> None:
        """Supervise routers with these settings until cancelled; when cancelled, end them first."""
        async with anyio.create_task_group() as self._tasks:
            if self._spawner is not None:
                self._tasks.start_soon(self._reap, self._spawner)
            for each in settings:
                self._add(each)

    def _add(self, settings: RouterSettings) -> None:
        assert self._tasks is not None  # noqa: S101 (called from run, or while it runs)
        router = Router(self._make_host(settings), bus=self.bus, random=self._jitter)
        self._routers[settings.name] = router
        self._tasks.start_soon(router.run)
        router.start()

    async def _reap(self, spawner: Spawner) -> None:
        while True:
            spawner.reap_orphans()
            await anyio.sleep(REAP_INTERVAL_S)

    async def check(self, settings: Iterable[RouterSettings]) -> list[str]:
        """What would stand in the way of routers with other settings; nothing is changed.

        A port that one of our own routers holds is no obstacle: it is let go before it is taken again.

        Returns:
            One line for each new or changed router that could not be started, empty if all can.
        """
        problems = []
        for each in settings:
            router = self._routers.get(each.name)
            if router is not None and router.settings == each:
                continue
            found = await self._make_host(each).prepare()
            is_own_port = any(held.settings.port == each.port for held in self)
            if isinstance(found, Verdict) and not (found.cause is Cause.PORT_TAKEN and is_own_port):
                hint = f" ({found.hint})" if found.hint else ""
                problems.append(f"router {each.name}: {found.reason}{hint}")
        return problems

    async def apply(self, settings: Iterable[RouterSettings]) -> tuple[str, ...]:
        """Go over to other settings: add, end and restart routers; what did not change is only told to look for files.

        Returns:
            The names of the routers that were added, ended or restarted.
        """
        wanted = {each.name: each for each in settings}
        changed = []
        for name in [name for name in self._routers if name not in wanted]:
            changed.append(name)
            # It stays in the table until it is gone: its port may be wanted by another.
            await self._routers[name].shut_down()
            del self._routers[name]
        for name, each in wanted.items():
            router = self._routers.get(name)
            if router is None:
                changed.append(name)
                self._add(each)
            elif router.settings != each:
                changed.append(name)
                router.reconfigure(self._make_host(each))
            elif router.is_serving:
                await self._rescan(router)
        return tuple(changed)

    async def _rescan(self, router: Router) -> None:
        try:
            await router.rescan()
        except LlamavisorError as error:
            self.bus.publish(Warned(subject=f"router {router.name}", text=str(error)))

    def holder_of(self, model: str, *, router: str | None = None) -> Router:
        """The router to ask for `model`.

        There are four cases: the router that was named; the one on which the model is loaded or loading; the one that
        lists it and holds the fewest models; while no list is known yet, the first that may come up.

        Raises:
            RouterNotFoundError: the router that was named does not exist.
            ModelNotFoundError: no router lists it.
        """
        if router is not None:
            return self[router]
        listing = [each for each in self if each.table.get(model) is not None]
        for each in listing:
            known = each.table.get(model)
            if known is not None and known.state in HAS_CHILD:
                return each
        if listing:
            return min(listing, key=_reluctance)
        for each in self:
            if not each.is_serving and each.state not in {RouterState.STOPPED, RouterState.FAILED}:
                return each
        routers = list(self)
        if len(routers) == 1 and not routers[0].is_serving:
            return routers[0]  # it knows best why
        folder = ", ".join(sorted({str(each.settings.models_dir) for each in self}))
        hint = f"see `llamavisor models`; a new file in {folder} needs `llamavisor reload`"
        raise ModelNotFoundError(f"no model {model!r}", hint=hint)

    async def shut_down(self, *, grace_s: float = TERM_GRACE_S) -> None:
        """Stop all routers side by side; returns when nothing of them is left."""
        async with anyio.create_task_group() as group:
            for router in self:
                group.start_soon(_shut_down, router, grace_s)


def _reluctance(router: Router) -> tuple[bool, bool, int]:
    """How little a router is suited for one more model: the least goes first."""
    return router.state is not RouterState.READY, not router.is_serving, len(router.table.residents())


async def _shut_down(router: Router, grace_s: float) -> None:
    await router.shut_down(grace_s=grace_s)


def open_fleet(
    *,
    spawner: Spawner,
    state_dir: Path,
    log_dir: Path,
    environ: Mapping[str, str],
    bus: Bus,
    log_size_bytes: int = CAP_BYTES,
) -> Fleet:
    """A fleet of real routers.

    Args:
        spawner: starts the processes.
        state_dir: folder for generated files.
        log_dir: folder for what the routers print.
        environ: the environment of which a short list is passed on.
        bus: where the events go.
        log_size_bytes: size at which a router's output file is rotated.
    """
    probes = ProbeCache()

    def make_host(settings: RouterSettings) -> Host:
        return Launcher(
            settings,
            spawner=spawner,
            state_dir=state_dir,
            log_dir=log_dir,
            log_size_bytes=log_size_bytes,
            probes=probes,
            environ=environ,
        )

    return Fleet(make_host=make_host, spawner=spawner, bus=bus)


async def sweep(spawner: Spawner, bus: Bus) -> None:
    """Kill what an earlier daemon of this installation left running; before any port is bound."""
    leftovers = await spawner.sweep()
    if leftovers.killed or leftovers.survivors:
        bus.publish(StraysKilled(router=None, pids=leftovers.killed, survivors=leftovers.survivors))
