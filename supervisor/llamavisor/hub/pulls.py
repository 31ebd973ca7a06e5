"""Who brings models from the Hub: all pulls of one models folder, each a task, and what of them outlives a restart."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from llamavisor.events import Bus, PullCancelled, PullEnded, PullFailed, PullProgress, PullStarted
from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.progress import Stage
from llamavisor.hub.pull import Pull, PullState
from llamavisor.hub.record import Record, plan
from llamavisor.hub.remote import Connection, Hub
from llamavisor.hub.spec import Spec
from llamavisor.hub.staging import Staging, is_placed, keep, locked, place, target_of
from llamavisor.hub.transfer import Errand, fetch
from llamavisor.threads import run_in_thread

AT_ONCE = 2
"""So many pulls are at work; the others wait for their turn."""
FILES_AT_ONCE = 4
TELL_EVERY_S = 1.0
KEPT = 100
"""So many pulls that have ended are remembered."""


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
        self._tasks: TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<Pulls {list(self._pulls.values())}>"

    @property
    def all(self) -> tuple[Pull, ...]:
        """Those under way, and the last that have ended, the oldest first."""
        return tuple(self._pulls.values())

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Goes on with what was under way when the last daemon ended.

        What is under way at the end is kept for the next one. A models folder that cannot be read has nothing.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            records = await run_in_thread(self.staging.records)
            await run_in_thread(self.staging.sweep)
            for record in records:
                if record.is_under_way:
                    self._begin(record)
            try:
                yield
            finally:
                self._tasks = None
                tasks.cancel_scope.cancel()

    async def start(self, spec: Spec, *, name: str = "") -> Pull:
        """Begins to bring a model; the same one twice is one pull.

        Args:
            spec: which.
            name: what it is to be called, if not as its file is.

        Raises:
            HubError: it is not to be had, has no room, or something else has its name.
        """
        listing = await self.hub.look(spec)
        record = plan(listing, spec, name)
        if (known := self._under_way(record.key)) is not None:
            return known
        await run_in_thread(self.staging.prepare)
        if await run_in_thread(is_placed, record, self.staging.models_dir):
            return self._already(record)
        await self._check_room(record)
        self._check_name(record)
        await run_in_thread(self.staging.write, record)
        # Somebody may have asked for the same meanwhile.
        return self._under_way(record.key) or self._begin(record)

    async def cancel(self, key: str, *, drop: bool = False) -> None:
        """Ends a pull; what came is kept, so that the same pull goes on with it, or dropped.

        Raises:
            HubError: there is none of that name.
        """
        pull = self._under_way(key)
        if pull is not None:
            pull.is_dropped = drop
            pull.scope.cancel()
            await pull.ended.wait()
            return
        records = [record for record in await run_in_thread(self.staging.records) if record.key == key]
        if not records and key not in self._pulls:
            raise HubError(f"there is no pull {key!r}", why=Why.NO_PULL, hint="`llamavisor pulls` shows them.")
        if drop:
            for record in records:
                await run_in_thread(self._drop, record)

    async def paused(self) -> list[Record]:
        """What was begun, and is not under way: pulls that failed or were cancelled, and keep room on the disk."""
        records = await run_in_thread(self.staging.records)
        return [record for record in records if self._under_way(record.key) is None]

    def _under_way(self, key: str) -> Pull | None:
        pull = self._pulls.get(key)
        return pull if pull is not None and pull.state is PullState.UNDER_WAY else None

    def _begin(self, record: Record) -> Pull:
        if self._tasks is None:
            raise RuntimeError("pulls are not open")
        pull = self._remember(Pull(record))
        self._tasks.start_soon(self._carry, pull)
        return pull

    def _already(self, record: Record) -> Pull:
        pull = self._remember(Pull(record))
        for file in pull.files:
            file.stage, file.done = Stage.DONE, file.size
        pull.state, pull.path = PullState.DONE, target_of(record, self.staging.models_dir)
        pull.ended.set()
        return pull

    def _remember(self, pull: Pull) -> Pull:
        self._pulls.pop(pull.id, None)
        self._pulls[pull.id] = pull
        for key in [key for key, each in self._pulls.items() if each.ended.is_set()][:-KEPT]:
            del self._pulls[key]
        return pull

    def _check_name(self, record: Record) -> None:
        """Two models of one name would find out at their end."""
        target = target_of(record, self.staging.models_dir)
        for pull in self._pulls.values():
            is_same = target_of(pull.record, self.staging.models_dir) == target
            if is_same and pull.id != record.key and pull.state is PullState.UNDER_WAY:
                text = f"{record.name} is being pulled already, from {pull.record.repository} at {pull.record.commit}"
                raise HubError(text, why=Why.EXISTS, hint="Cancel that, or pull under another name.")

    async def _check_room(self, record: Record) -> None:
        """Refuses what the disk has no room for, what others bring considered."""
        free = await run_in_thread(self.staging.free_bytes)
        needed = record.size_bytes - await run_in_thread(self.staging.here_bytes, record)
        others = sum(
            pull.total_bytes - pull.done_bytes for pull in self._pulls.values() if pull.state is PullState.UNDER_WAY
        )
        if free is not None and needed + others > free:
            gib = 1024**3
            text = f"{record.name} needs {needed / gib:.1f} GiB more, and {self.staging.models_dir} has "
            text += f"{max(0, free - others) / gib:.1f} GiB to spare"
            raise HubError(text, why=Why.NO_SPACE, hint="Make room, or take a smaller quantization.")

    async def _carry(self, pull: Pull) -> None:
        """The task of one pull. There are four ends; only that of the daemon leaves its record as it is."""
        began, record = anyio.current_time(), pull.record
        failure: HubError | None = None
        try:
            with pull.scope:
                try:
                    async with self._turns, locked(self.staging.folder_of(record)):
                        pull.path = await self._bring(pull)
                except HubError as exc:
                    failure = exc
                except Exception as exc:  # noqa: BLE001 (one pull that fails by a bug of ours must end no other)
                    failure = HubError(f"{record.name}: {type(exc).__name__}: {exc}", why=Why.DISK)
            if pull.path is not None:
                await self._forget(record)
                pull.state = PullState.DONE
                took_s = anyio.current_time() - began
                total = pull.total_bytes
                where = str(pull.path)
                self._bus.publish(
                    PullEnded(pull=pull.id, model=pull.name, path=where, total_bytes=total, duration_s=took_s)
                )
            elif failure is not None:
                await self._pause(record)
                pull.state, pull.error = PullState.FAILED, failure
                self._bus.publish(PullFailed(pull=pull.id, model=pull.name, why=failure.why.value, reason=str(failure)))
            else:
                await (run_in_thread(self._drop, record) if pull.is_dropped else self._pause(record))
                pull.state = PullState.CANCELLED
                self._bus.publish(PullCancelled(pull=pull.id, model=pull.name, is_dropped=pull.is_dropped))
        finally:
            pull.ended.set()

    async def _pause(self, record: Record) -> None:
        """Remembers that nobody wants it now; a disk that does not take that has been told of by then."""
        with suppress(HubError):
            await run_in_thread(self.staging.write, record.model_copy(update={"is_under_way": False}))

    async def _forget(self, record: Record) -> None:
        """It is done; one that cannot be forgotten is found done by the next daemon."""
        with suppress(HubError):
            await run_in_thread(self.staging.forget, record)

    def _drop(self, record: Record) -> None:
        self.staging.forget(record)
        self.staging.sweep()

    async def _bring(self, pull: Pull) -> Path:
        """Everything from the first byte to the rename."""
        record, models_dir = pull.record, self.staging.models_dir
        # By another daemon, or by one that died right then.
        if not await run_in_thread(is_placed, record, models_dir):
            here = await run_in_thread(self.staging.here_bytes, record)
            self._bus.publish(
                PullStarted(
                    pull=pull.id,
                    model=pull.name,
                    repository=record.repository,
                    commit=record.commit,
                    file_count=len(pull.files),
                    total_bytes=pull.total_bytes,
                    here_bytes=here,
                )
            )
            await self._fetch_all(pull)
            await run_in_thread(self._place, record)
        for file in pull.files:
            file.stage, file.done = Stage.DONE, file.size
        return target_of(record, models_dir)

    def _place(self, record: Record) -> None:
        """All in one thread: what is in its place is not cancelled any more."""
        self.staging.sweep(done=record)  # before, as another link to a file would change it in the catalog's eyes
        place(record, self.staging.folder_of(record), self.staging.models_dir)

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
        record, progress = pull.record, pull.files[number]
        file = record.remote_files[number]
        path, part = self.staging.folder_of(record) / file.name, self.staging.part_of(record, file)
        if await run_in_thread(_has_size, path, file.size):  # nothing gets there that is not verified
            progress.stage, progress.done = Stage.DONE, file.size
            return

        def watch() -> None:
            progress.reach(_size_of(part.partial))

        async with locked(part.whole, waits=watch):
            if not await run_in_thread(_has_size, part.whole, file.size):
                await fetch(connection, Errand(record.listing, file, part, progress), self.hub.patience)
            await run_in_thread(keep, part, path)
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


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (called from the event loop, where quick is good)
    except OSError:
        return 0


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
