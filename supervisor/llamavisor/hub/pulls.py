"""Who brings models from the Hub: all pulls of one models folder, each a task, and what of them outlives a restart."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import anyio
from anyio.abc import TaskGroup

from llamavisor.events import Bus, PullCancelled, PullEnded, PullFailed, PullProgress, PullStarted
from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.flock import FileLock
from llamavisor.hub.part import size_of
from llamavisor.hub.placing import is_placed, keep, paths_of, place, taken, target_of
from llamavisor.hub.progress import Stage
from llamavisor.hub.pull import Pull, PullState
from llamavisor.hub.record import Record, plan
from llamavisor.hub.remote import Connection, Hub
from llamavisor.hub.spec import Spec
from llamavisor.hub.staging import SPARE_BYTES, Staging
from llamavisor.hub.transfer import Errand, fetch, is_same
from llamavisor.threads import Threads
from llamavisor.units import format_size

AT_ONCE = 2
"""So many pulls are at work; the others wait for their turn."""
FILES_AT_ONCE = 4
MOST = 32
"""So many pulls are at work or wait; no other is taken."""
TELL_EVERY_S = 1.0
KEPT = 100
"""So many pulls that have ended are remembered."""
DISK_S = 4.0
"""A folder that does not answer for so long is told of; one on a server that is away does not."""
THREADS = 2 * AT_ONCE * FILES_AT_ONCE
"""So many threads work in the folder, and hang if it does."""

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")
_log = logging.getLogger(__name__)


class Pulls:
    """All pulls into one models folder. Used from one event loop, as long as it is `opened`.

    Args:
        hub: where models come from.
        models_dir: the folder that they come into.
        bus: where events go.
    """

    def __init__(self, hub: Hub, models_dir: Path, bus: Bus) -> None:
        self.hub = hub
        self.staging = Staging(models_dir)
        self._bus = bus
        self._pulls: dict[str, Pull] = {}
        self._turns = anyio.CapacityLimiter(AT_ONCE)
        self._threads = Threads(THREADS)
        self._tasks: TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Pulls {list(self._pulls.values())}>"

    @property
    def models_dir(self) -> Path:
        """The folder that models come into."""
        return self.staging.models_dir

    @property
    def all(self) -> tuple[Pull, ...]:
        """Those under way, and the last that have ended, the oldest first."""
        return tuple(self._pulls.values())

    @property
    def under_way(self) -> tuple[Pull, ...]:
        """Those that are at work, or wait for their turn."""
        return tuple(pull for pull in self._pulls.values() if pull.state is PullState.UNDER_WAY)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Goes on with what was under way when the last daemon ended, whoever wanted it, as with a person's pull.

        What is under way at the end is kept for the next one. A models folder that cannot be read has nothing.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                records = await self._threads.run(self.staging.records, abandon_on_cancel=True)
                await self._threads.run(self.staging.sweep, abandon_on_cancel=True)
                for record in records:
                    if record.is_under_way:
                        self._begin(record).wanted_by.add("")
                yield
            finally:
                self._tasks = None
                tasks.cancel_scope.cancel()

    async def start(self, spec: Spec, *, name: str = "", who: str = "") -> Pull:
        """Begins to bring a model; the same one twice is one pull. One that is there already is only looked at.

        Args:
            spec: which.
            name: what it is to be called, if not as its file is.
            who: wants it, and may `leave` it; empty for a person, who may cancel it.

        Raises:
            HubError: it is not to be had, has no room, or something else has its name.
        """
        listing = await self.hub.look(spec)
        record = plan(listing, spec, name)
        if (known := self._under_way(record.key)) is None:
            self._check_name(record)
            if not await self._ask(is_placed, record, self.models_dir):
                await self._check_room(record)
            known = self._under_way(record.key)  # somebody may have asked for the same meanwhile
        pull = known or self._begin(record)
        pull.wanted_by.add(who)
        if known is None:
            await self._wait_until_noted(pull)
        return pull

    async def cancel(self, key: str, *, drop: bool = False) -> bool:
        """Ends a pull; what came is kept, so that the same pull goes on with it, or dropped.

        Returns:
            Whether it was dropped: not what another daemon brings as well, or what was done already.

        Raises:
            HubError: there is none of that name, or the disk does not let go of it.
        """
        if (pull := self._under_way(key)) is not None:
            pull.is_dropped = drop
            pull.scope.cancel()
            with anyio.move_on_after(DISK_S):
                await pull.ended.wait()
                if pull.error is not None:
                    raise pull.error
                return pull.is_gone
            raise self._hangs()
        is_there = key in {record.key for record in await self._ask(self.staging.records)}
        ended = self._pulls.get(key)
        if not is_there and (ended is None or ended.state is not PullState.DONE):
            raise HubError(f"there is no pull {key!r}", why=Why.NO_PULL, hint="`llamavisor pulls` shows them.")
        if not drop or not is_there or not await self._ask(self.staging.drop, key):
            return False
        self._pulls.pop(key, None)
        return True

    async def leave(self, who: str) -> None:
        """Ends the pulls that nobody else wants; what came is kept.

        Raises:
            HubError: the disk does not let go of one.
        """
        for pull in self.under_way:
            if who in pull.wanted_by:
                pull.wanted_by.remove(who)
                if not pull.wanted_by:
                    await self.cancel(pull.id)

    async def paused(self) -> list[Record]:
        """What was begun, and is not under way: pulls that failed or were cancelled, and keep room on the disk.

        Raises:
            HubError: the folder does not answer.
        """
        return [record for record in await self._ask(self.staging.records) if self._under_way(record.key) is None]

    async def _ask(self, work: Callable[[*_Ts], _R], *args: *_Ts) -> _R:
        """Has the disk looked at or a small thing done, within bounds; it may be left to itself."""
        with anyio.move_on_after(DISK_S):
            return await self._threads.run(work, *args, abandon_on_cancel=True)
        raise self._hangs()

    async def _wait_until_noted(self, pull: Pull) -> None:
        with anyio.move_on_after(DISK_S):
            await pull.noted.wait()
            if pull.error is not None and pull.ended.is_set():
                raise pull.error
            return
        pull.scope.cancel()
        raise self._hangs()

    def _hangs(self) -> HubError:
        hint = "Look at the disk, or at the server that it is on."
        return HubError(f"{self.models_dir} does not answer", why=Why.DISK, hint=hint)

    def _under_way(self, key: str) -> Pull | None:
        pull = self._pulls.get(key)
        return pull if pull is not None and pull.state is PullState.UNDER_WAY else None

    def _begin(self, record: Record) -> Pull:
        if self._tasks is None:
            raise HubError("llamavisor ends, and begins no pull", why=Why.NOT_NOW, hint="Ask again in a moment.")
        pull = Pull(record)
        self._pulls.pop(pull.id, None)
        self._pulls[pull.id] = pull
        for key in [key for key, each in self._pulls.items() if each.ended.is_set()][:-KEPT]:
            del self._pulls[key]
        self._tasks.start_soon(self._carry, pull)
        return pull

    def _check_name(self, record: Record) -> None:
        """Two models of one name would find out at their end, and so would one content under two names."""
        under_way, models_dir = self.under_way, self.models_dir
        if len(under_way) >= MOST:
            text = f"{len(under_way)} pulls are under way or wait already"
            raise HubError(text, why=Why.TOO_MANY, hint="Wait for one to end, or cancel one.")
        for pull in under_way:
            if pull.id != record.key and target_of(pull.record, models_dir) == target_of(record, models_dir):
                text = f"{record.name} is being pulled already, from {pull.record.repository} at {pull.record.commit}"
                raise HubError(text, why=Why.EXISTS, hint="Cancel that, or pull under another name.")
            if pull.name != record.name and pull.record.files == record.files:
                text = f"{record.repository} is being pulled already, as {pull.name}"
                raise HubError(text, why=Why.EXISTS, hint="More names of one model are the aliases in its table.")

    async def _check_room(self, record: Record) -> None:
        """Refuses what the disk has no room for, what others bring considered: other daemons that share it, too."""
        noted = [each for each in await self._ask(self.staging.records) if each.is_under_way]
        under_way = {each.key: each for each in (*noted, *(pull.record for pull in self.under_way))}
        others = [each for each in under_way.values() if each.key != record.key]
        free = await self._ask(self.staging.free_bytes)
        needed = await self._ask(self.staging.missing_bytes, [*others, record])
        taken_bytes = await self._ask(self.staging.missing_bytes, others)
        if free is not None and needed > free:
            more, spare = format_size(needed - taken_bytes), format_size(max(0, free - taken_bytes))
            text = f"{record.name} needs {more} more, and {self.models_dir} has {spare} to spare"
            text += f", beside {format_size(SPARE_BYTES)} that are kept free"
            raise HubError(text, why=Why.NO_SPACE, hint="Make room, or take a smaller quantization.")

    async def _carry(self, pull: Pull) -> None:
        """The task of one pull. There are four ends; only that of the daemon leaves its record as it is."""
        record = pull.record
        began = anyio.current_time()
        try:
            with pull.scope, _noting_why(pull):
                await self._threads.run(self.staging.write, record)
                pull.noted.set()
                async with self._turns, self.staging.lock_of(record.key).held(self._threads):
                    # Whoever had the lock before may have paused or forgotten it.
                    await self._threads.run(self.staging.write, record)
                    pull.path = await self._bring(pull)
            if pull.path is None:
                with _noting_why(pull):
                    await self._give_up(pull)
            self._end(pull, anyio.current_time() - began)
        finally:
            pull.ended.set()
            pull.noted.set()

    async def _give_up(self, pull: Pull) -> None:
        """Remembers that nobody wants it now, or drops it."""
        if pull.is_dropped and pull.error is None:
            pull.is_dropped = await self._threads.run(partial(self.staging.drop, pull.id, is_wanted=True))
        else:
            await self._threads.run(self.staging.pause, pull.record, pull.error)

    def _end(self, pull: Pull, took_s: float) -> None:
        if pull.path is not None:
            pull.state = PullState.DONE
            path, total = str(pull.path), pull.total_bytes
            self._bus.publish(PullEnded(pull=pull.id, model=pull.name, path=path, total_bytes=total, duration_s=took_s))
        elif pull.error is not None:
            pull.state = PullState.FAILED
            why, reason = pull.error.why.value, str(pull.error)
            self._bus.publish(PullFailed(pull=pull.id, model=pull.name, why=why, reason=reason))
        else:
            pull.state = PullState.CANCELLED
            self._bus.publish(PullCancelled(pull=pull.id, model=pull.name, is_dropped=pull.is_dropped))

    async def _bring(self, pull: Pull) -> Path:
        """Everything from the first byte to the rename."""
        record, models_dir = pull.record, self.models_dir
        # By another daemon, or by one that died right then, or long ago.
        if await self._threads.run(is_placed, record, models_dir):
            paths = paths_of(record, models_dir)
            for progress, wanted, path in zip(pull.files, record.files, paths, strict=True):
                if not await is_same(path, wanted, progress, self._threads):
                    raise taken(target_of(record, models_dir))
            await self._threads.run(self._conclude, record)
            pull.was_there = True
        else:
            missing = await self._threads.run(self.staging.missing_bytes, [record])
            self._bus.publish(
                PullStarted(
                    pull=pull.id,
                    model=pull.name,
                    repository=record.repository,
                    commit=record.commit,
                    file_count=len(pull.files),
                    total_bytes=pull.total_bytes,
                    here_bytes=pull.total_bytes - missing,
                )
            )
            await self._fetch_all(pull)
            await self._threads.run(self._place, record)
        for file in pull.files:
            file.stage, file.done = Stage.DONE, file.size
        return target_of(record, models_dir)

    def _place(self, record: Record) -> None:
        """All in one thread: what is in its place is not cancelled any more."""
        self.staging.sweep(done=record.key)  # before, as another link to a file would change it in the catalog's eyes
        place(record, self.staging.folder_of(record), self.models_dir)
        self._conclude(record)

    def _conclude(self, record: Record) -> None:
        """It is done; one that cannot be forgotten is found done by the next daemon."""
        with suppress(HubError):
            self.staging.forget(record.key)
        self.staging.sweep()

    async def _fetch_all(self, pull: Pull) -> None:
        failures: list[HubError] = []
        limiter = anyio.CapacityLimiter(FILES_AT_ONCE)

        async def fetch_one(number: int) -> None:
            try:
                async with limiter:
                    await self._fetch(connection, pull, number)
            except HubError as exc:
                failures.append(exc)
                tasks.cancel_scope.cancel()

        async with self.hub.connect() as connection, anyio.create_task_group() as telling:
            telling.start_soon(self._tell_on, pull)
            async with anyio.create_task_group() as tasks:
                for number in range(len(pull.files)):
                    tasks.start_soon(fetch_one, number)
            telling.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _fetch(self, connection: Connection, pull: Pull, number: int) -> None:
        record, progress, run = pull.record, pull.files[number], self._threads.run
        file = record.files[number]
        path, part = self.staging.folder_of(record) / file.name, self.staging.part_of(record, file)
        if await run(size_of, path) == file.size:  # nothing gets there that is not verified
            progress.stage, progress.done = Stage.DONE, file.size
            return

        async def watch() -> None:
            progress.reach(max(0, await run(size_of, part.partial)))

        async with FileLock(part.whole).held(self._threads, waits=watch):
            if await run(size_of, part.whole) != file.size:
                await fetch(connection, Errand(record.listing, file, part, progress, self._threads), self.hub.patience)
            await run(keep, part, path)
        progress.stage, progress.done = Stage.DONE, file.size

    async def _tell_on(self, pull: Pull) -> None:
        while True:
            await anyio.sleep(TELL_EVERY_S)
            self._bus.publish(
                PullProgress(
                    pull=pull.id,
                    model=pull.name,
                    done_bytes=pull.done_bytes,
                    total_bytes=pull.total_bytes,
                    speed_bytes_per_s=pull.speed,
                    left_s=pull.left_s,
                )
            )


@contextmanager
def _noting_why(pull: Pull) -> Iterator[None]:
    """What goes wrong with a pull is its own affair: even a bug of ours ends no other."""
    try:
        yield
    except HubError as exc:
        pull.error = pull.error or exc
    except Exception:  # noqa: BLE001 (a pull's boundary)
        _log.exception("pull %s failed", pull.id)
        pull.error = pull.error or HubError(f"{pull.name}: a bug in llamavisor; see its log", why=Why.INTERNAL)
