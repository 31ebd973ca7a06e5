"""All routers of one machine as one: the public face of the library."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.abc

from llamavisor.cause import Cause, Verdict
from llamavisor.downloads import Downloads
from llamavisor.endpoint import Endpoint
from llamavisor.errors import LlamavisorError, RouterNotFoundError
from llamavisor.events import Bus, UnloadReason, Warned
from llamavisor.folder import Folder, Watch
from llamavisor.holders import Holders
from llamavisor.host import Host
from llamavisor.hub import Pull, Spec, parse
from llamavisor.launch import ModelSource
from llamavisor.leases import Leases
from llamavisor.ledger import Footprints
from llamavisor.memory import Memory
from llamavisor.messages import Recalled
from llamavisor.meter import Meter
from llamavisor.pins import Pins
from llamavisor.process import TERM_GRACE_S, Spawner
from llamavisor.quarantine_records import QuarantineRecords
from llamavisor.residents import Residents
from llamavisor.router import Router
from llamavisor.sections import ModelSpec
from llamavisor.settings import FleetSettings, RouterSettings
from llamavisor.states import HAS_CHILD, Change, RouterState
from llamavisor.storage import Storage
from llamavisor.supply import FIRST_LOOK_S, Sized, Supply

REAP_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Applied:
    """What other settings have changed.

    Attributes:
        routers: names of those that were added, ended or restarted.
        models: names of those that are to be served otherwise; one that is loaded when it is idle.
        problems: what did not come to an end in time or was refused, one line for each.
    """

    routers: tuple[str, ...]
    models: tuple[str, ...]
    problems: tuple[str, ...] = ()


class Fleet:
    """The routers of one configuration, side by side, each with its own port.

    Args:
        make_host: where a router with these settings runs, given what knows its models.
        make_watch: sees what is in a folder, and in those outside of it to which links in it may lead.
        meter: reads how much memory there is.
        downloads: brings models from the Hub while it is run; that is for who opens the fleet.
        footprints: what models took when they were loaded before.
        pins: which models people want to stay in memory.
        records: which models were left alone.
        residents: which models were in memory.
        spawner: reaps what is handed to us; None where nothing is spawned.
        bus: where the events go.
        jitter: a source of numbers in [0, 1).
        clock: as for `Scheduler`.
    """

    def __init__(
        self,
        *,
        make_host: Callable[[RouterSettings, ModelSource], Host],
        make_watch: Callable[[Path, Sequence[Path]], Watch],
        meter: Meter,
        downloads: Downloads,
        footprints: Footprints | None = None,
        pins: Pins | None = None,
        records: QuarantineRecords | None = None,
        residents: Residents | None = None,
        spawner: Spawner | None = None,
        bus: Bus,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self.bus = bus
        self.downloads = downloads
        self.folders: list[Folder] = []
        self._make_host = make_host
        self._make_watch = make_watch
        self._spawner = spawner
        self._jitter = jitter
        self._residents = residents
        self._pins = Pins() if pins is None else pins
        self._routers: dict[str, Router] = {}
        self.holders = Holders(self._routers, self.folders)
        self._told: dict[str, RouterSettings] = {}  # what each router was last told to be; that may be on its way yet
        self._supplies: dict[str, Supply] = {}
        self._settings = FleetSettings(routers=())
        self._looked_by = math.inf  # when the first look at the folders has had its time
        self.memory = Memory(
            self._routers,
            meter=meter,
            footprints=footprints,
            pins=self._pins,
            records=records,
            bus=bus,
            resize=self._size_up_all,
            clock=clock,
        )
        self.storage = Storage(
            self._routers,
            self.folders,
            memory=self.memory,
            rules=lambda: self._settings.rules,
            unload=self.unload,
            bus=bus,
        )
        self._tasks: anyio.abc.TaskGroup | None = None

    @classmethod
    def open(
        cls, settings: FleetSettings, *, state_dir: Path, bus: Bus | None = None
    ) -> AbstractAsyncContextManager[Fleet]:
        """A fleet that runs as long as the block, in which models are had by `lease`; see the package's docstring.

        Pulls that were under way when an earlier block ended, or its program did, are gone on with.

        Args:
            settings: a router needs a `models_dir` and nothing else. Where it listens, and whether it loads by itself,
                is not heeded.
            state_dir: folder for what is generated and learned; made if it is missing. A fleet has one alone.
            bus: where the events go.

        Raises:
            AlreadyRunningError: another fleet has that folder.
        """
        from llamavisor.opening import running  # noqa: PLC0415 (it puts this class together with all others)

        return running(settings, state_dir=state_dir, bus=bus)

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

    async def run(self, settings: FleetSettings) -> None:
        """Supervise routers with these settings until cancelled; when cancelled, end them first."""
        async with anyio.create_task_group() as self._tasks:
            if self._spawner is not None:
                self._tasks.start_soon(self._reap, self._spawner)
            self._settings = settings
            self._looked_by = anyio.current_time() + FIRST_LOOK_S
            self.memory.follow(settings)
            self._tasks.start_soon(self.memory.run)
            for each in settings.routers:
                self._add(each)

    def _add(self, settings: RouterSettings) -> None:
        """Begin to supervise a router."""
        assert self._tasks is not None  # noqa: S101 (called from run, or while it runs)
        folder = self._folder(settings.models_dir, self._settings.link_dirs)
        supply = self._supply(folder, settings)
        host = self._make_host(settings, Sized(supply, partial(self.size_up, settings.name, supply)))
        router = Router(host, bus=self.bus, random=self._jitter, arbiter=self.memory.scheduler)
        self._routers[settings.name] = router
        self._told[settings.name] = settings
        self._tasks.start_soon(router.run)
        if folder.catalog.has_looked:
            supply.deliver()
        if before := self._residents_of(settings.name):
            router.tell(Recalled(before))
        router.start()

    def _residents_of(self, router: str) -> tuple[str, ...]:
        """What an earlier daemon had in the memory of a router: who is pinned first, then the most recently loaded."""
        before = self._residents.of(router) if self._residents is not None else ()
        return tuple(sorted(before, key=lambda name: not self._pins.expected(name, self._settings.rules)))

    def _supply(self, folder: Folder, settings: RouterSettings) -> Supply:
        """What a router with these settings is to serve from now on, out of this folder."""
        name = settings.name

        def deliver(specs: Mapping[str, ModelSpec], leaving: Mapping[str, Change]) -> None:
            router = self._routers.get(name)
            if router is not None:
                router.want(specs, leaving, on_overwrite=self._settings.on_overwrite)

        self._drop_supply(name)
        supply = Supply(
            folder,
            settings.name,
            self._settings.rules,
            base=settings.layers,
            allowance=self.memory.capacity.allowance(settings),
            deliver=deliver,
        )
        self._supplies[name] = supply
        folder.listeners.append(supply)
        return supply

    async def size_up(self, name: str, supply: Supply) -> None:
        """See what a router may take of this machine, and have its models told."""
        router = self._routers.get(name)
        if router is not None:
            await self.memory.capacity.look(router.host)
            allowance = self.memory.capacity.allowance(router.settings)
            await supply.follow(self._settings.rules, router.settings.layers, allowance)

    def _size_up_all(self) -> None:
        assert self._tasks is not None  # noqa: S101 (called while it runs)
        for name, supply in self._supplies.items():
            self._tasks.start_soon(self.size_up, name, supply)

    def _drop_supply(self, name: str) -> None:
        supply = self._supplies.pop(name, None)
        if supply is not None:
            supply.folder.listeners.remove(supply)

    def _folder(self, path: Path, link_dirs: Sequence[Path]) -> Folder:
        """The folder of that path under watch; from now on if it was not yet."""
        assert self._tasks is not None  # noqa: S101
        for folder in self.folders:
            if folder.path == path and folder.link_dirs == tuple(link_dirs):
                return folder
        watch = self._make_watch(path, link_dirs)
        folder = Folder(path, link_dirs, watch=watch, held=self._in_memory, bus=self.bus)
        self.folders.append(folder)
        self._tasks.start_soon(folder.run)
        return folder

    def _drop_unused_folders(self) -> None:
        for folder in [folder for folder in self.folders if not folder.listeners]:
            folder.scope.cancel()
            self.folders.remove(folder)

    def _in_memory(self) -> set[str]:
        return {model.name for router in self for model in router.table if model.state in HAS_CHILD}

    async def _reap(self, spawner: Spawner) -> None:
        while True:
            spawner.reap_orphans()
            await anyio.sleep(REAP_INTERVAL_S)

    async def check(self, settings: FleetSettings) -> list[str]:
        """What would stand in the way of other settings; nothing is changed.

        A port that one of our own routers holds is no obstacle: it is let go before it is taken again.

        Returns:
            One line for each new or changed router that could not be started and for each option of a model that its
            llama-server does not take, empty if all is well.
        """
        problems = []
        for each in settings.routers:
            router = self._routers.get(each.name)
            is_changed = router is None or router.settings != each
            if not is_changed and settings.rules == self._settings.rules:
                continue
            folder = self._folder(each.models_dir, settings.link_dirs)
            supply = Supply(folder, each.name, settings.rules, base=each.layers, deliver=lambda *_: None)
            host = self._make_host(each, supply)
            if is_changed:
                found = await host.prepare()
                is_own_port = any(held.settings.port == each.port for held in self)
                if isinstance(found, Verdict) and not (found.cause is Cause.PORT_TAKEN and is_own_port):
                    hint = f" ({found.hint})" if found.hint else ""
                    problems.append(f"router {each.name}: {found.reason}{hint}")
            problems += [f"router {each.name}: {refusal}" for refusal in await host.refusals(settings.rules)]
        if problems:
            self._drop_unused_folders()
        return problems

    async def apply(self, settings: FleetSettings) -> Applied:
        """Go over to other settings: add, end and restart routers; what did not change is not touched.

        Routers that go on are told what has changed of their models; models in memory that have changed wait until they
        are idle.
        """
        has_other_policy = settings.on_overwrite != self._settings.on_overwrite
        self._settings = settings
        self.memory.follow(settings)
        wanted = {each.name: each for each in settings.routers}
        changed: list[str] = []
        models: set[str] = set()
        for name in [name for name in self._routers if name not in wanted]:
            changed.append(name)
            # It stays in the table until it is gone: its port may be wanted by another.
            await self._routers[name].shut_down()
            self._drop_supply(name)
            del self._routers[name], self._told[name]
        self.memory.forget_all_but(wanted)
        for name, each in wanted.items():
            router = self._routers.get(name)
            if router is None:
                changed.append(name)
                self._add(each)
                continue
            folder = self._folder(each.models_dir, settings.link_dirs)
            supply = self._supplies[name]
            if supply.folder is not folder:
                supply = self._supply(folder, each)
            else:
                allowance = self.memory.capacity.allowance(each)
                models.update(await supply.follow(settings.rules, each.layers, allowance))
                if has_other_policy:
                    supply.deliver()
            if (told := self._told[name]) != each:
                self._told[name] = each
                needs_restart = told.without_models() != each.without_models()
                changed += [name] if needs_restart else []
                router.reconfigure(
                    self._make_host(each, Sized(supply, partial(self.size_up, name, supply))), restart=needs_restart
                )
        self.memory.note_specs()
        self._drop_unused_folders()
        return Applied(tuple(changed), tuple(sorted(models)))

    async def wait_for_models(self) -> None:
        """Wait until it is known what is in the models folders, or they have had time enough for it.

        That is `FIRST_LOOK_S` since the fleet runs, whoever asks and how often: one that hangs is waited for once.
        """
        waiting = [folder.answered for folder in self.folders if not folder.answered.is_set()]
        with anyio.CancelScope(deadline=self._looked_by):
            for answered in waiting:
                await answered.wait()

    async def look(self, *, within_s: float) -> tuple[str, ...]:
        """Look at all folders now, and have every router that serves told of what is there.

        Returns:
            What did not come to an end in time or was refused, one line for each; also published as warnings.
        """
        problems: list[str] = []
        async with anyio.create_task_group() as group:
            for folder in self.folders:
                group.start_soon(_look, folder, within_s, problems)
        with anyio.move_on_after(within_s) as scope:
            for router in list(self):  # other settings may be applied meanwhile
                if router.is_serving:
                    problems += await _rescan(router)
        if scope.cancelled_caught:
            problems.append(f"not every router has read its models again within {within_s:.0f} s; it goes on")
        for problem in problems:
            self.bus.publish(Warned(subject="reload", text=problem))
        return tuple(problems)

    def holder_of(self, model: str, *, router: str | None = None) -> Router:
        """The router to ask for `model`: the one that is named, else as `Holders.of` says.

        Raises:
            RouterNotFoundError: the router that was named does not exist.
            ModelNotFoundError: no router lists it.
        """
        return self.holders.of(model) if router is None else self[router]

    @property
    def leases(self) -> Leases:
        """How models are had without a block that keeps them."""
        return self.memory.scheduler.leases

    def lease(self, model: str, *, router: str | None = None) -> AbstractAsyncContextManager[Endpoint]:
        """The address of a model, which is loaded if need be and stays loaded until the block ends.

        Only with `serve = "gateway"`: else routers decide themselves what they load and unload.

            async with fleet.lease("qwen3-8b") as endpoint:
                ...  # endpoint.url

        A process may die whatever is promised. Whose connection broke asks `leases.has_ended` before a next lease: the
        connection tells sooner than the kernel does that the process has ended.

        Args:
            model: its name, or an alias.
            router: the only router on which it may be, None for any.

        Raises:
            RouterNotFoundError: there is no such router.
            ModelNotFoundError: there is no such model.
            RouterNotReadyError: all routers that may have it are stopped or failed, or decide themselves.
            DemandRefusedError: it is not to be had now; `retry_after_s` says when to ask again.
            ModelLoadError: it was lost while it was asked for.
        """
        return self.memory.scheduler.leases.lease(model, router=None if router is None else self[router].name)

    async def pull(self, model: str | Spec, *, router: str | None = None) -> Pull:
        """Begin to bring a model from the Hugging Face Hub into a models folder; the same one twice is one pull.

            pull = await fleet.pull("ggml-org/gemma-3-4b-it-GGUF:Q4_K_M")
            path = await pull.wait()

        It goes on whoever waits for it. What of it is under way when the fleet ends is gone on with by the next fleet
        or daemon of that folder. `look` has what has come be served at once, under the name `pull.name`.

        Args:
            model: `USER/REPO` or `USER/REPO:QUANT`; a `Spec` says more.
            router: into whose folder, None for the first router's.

        Raises:
            RouterNotFoundError: there is no such router.
            HubError: the model is not to be had, has no room, or something else has its name.
        """
        spec = parse(model) if isinstance(model, str) else model
        into = self[next(iter(self._routers), "main") if router is None else router]
        return await (await self.downloads.into(into.settings.models_dir)).start(spec)

    async def load(self, router: Router, model: str) -> bool:
        """Have a model loaded on that router because a person wants it; returns whether it was not yet.

        Raises:
            LlamavisorError: as `Router.load` does; where admission decides, as `lease` does. It carries the end of what
                the model's process had printed.
        """
        try:
            if self.memory.scheduler.decides:
                return await self.memory.scheduler.leases.have(model, router=router.name)
            return await router.load(model)
        except LlamavisorError as error:
            known = router.table.get(router.shelf.name_of(model))
            error.log_tail = known.log_tail if known is not None else ()
            raise

    async def unload(self, router: Router, model: str) -> bool:
        """Have a model unloaded from that router because a person wants it; returns whether it was loaded.

        Where leases tell who is being answered, it leaves when the last one has ended.

        Raises:
            LlamavisorError: as `Router.unload` does.
        """
        self.leases.withdraw(model)
        name = router.shelf.name_of(model)
        scheduler = self.memory.scheduler
        if not scheduler.is_used(router.name, name):
            return await router.unload(name)
        scheduler.dismiss(router.name, name, UnloadReason.REQUESTED)
        await router.wait_until(lambda: not router.table.has_process(name) or not router.is_serving)
        return True

    async def live_on(self) -> None:
        """Returns when all that is done every second was done once more: by each router's owner, and about memory.

        So a watchdog sees that they live.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self.memory.live_on)
            for router in [router for router in self if not router.is_over]:
                looks = itertools.count()
                group.start_soon(router.wait_until, partial(next, looks))

    async def shut_down(self, *, grace_s: float = TERM_GRACE_S) -> None:
        """Stop all routers side by side; returns when nothing of them is left."""
        async with anyio.create_task_group() as group:
            for router in self:
                group.start_soon(partial(router.shut_down, grace_s=grace_s))


async def _look(folder: Folder, within_s: float, problems: list[str]) -> None:
    if not await folder.look(within_s=within_s):
        problems.append(f"folder {folder.path} was not looked at within {within_s:.0f} s; what was known of it stays")


async def _rescan(router: Router) -> list[str]:
    try:
        await router.rescan()
    except LlamavisorError as error:
        return [f"router {router.name}: {error}"]
    return []
