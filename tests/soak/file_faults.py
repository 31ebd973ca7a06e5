"""Faults of files, folders and disks."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import anyio
from fault import Fault
from journal import Event
from stage import LAYERS

from llamavisor.ledger import NAME as LEDGER
from llamavisord.tiny_model import write_tiny_model

CHUNK = 64 * 1024
PINNED_FULL = "c"
"""This model of each router is pinned while the disk is full, and never otherwise."""


class _OfFile(Fault):
    """A fault of a model's file."""

    is_loaded_first = True

    async def prepare(self) -> bool:
        return not self.is_loaded_first or await self.stage.has_loaded(self.model) is not None

    async def cure(self) -> None:
        """Put a whole file in its place, after a while."""
        await anyio.sleep(self.choose.uniform(0.5, 3.0))
        self.cured_at = time.time()
        self.stage.write(self.model)

    async def healed_at(self, since: int) -> float | None:
        """When it can be loaded."""

        async def is_loaded() -> bool:
            model = (await self.stage.all_models())[self.model]
            if model["file_state"] != "ready" or model["stale"]:
                return False
            return await self.stage.has_loaded(self.model, tries=1) is not None

        return await self.stage.until(is_loaded, self.recover_s, every_s=0.25)

    def tells(self, event: Event, *names: str) -> bool:
        """Whether this is an event of one of these names about this model, after the fault."""
        return event["event"] in names and event["model"] == self.model and event["time"] > self.done_at


class FileReplaced(_OfFile):
    """F3. Well again: the old content has left memory, which it does once clients leave it alone for 2 s."""

    label = "file replaced by a rename"

    async def inject(self) -> None:
        self.stage.quiet.add(self.model)
        self.done_at = time.time()
        self.stage.write(self.model)

    def is_seen(self, event: Event) -> bool:
        return self.tells(event, "ModelStale")

    def is_overtaken(self, event: Event) -> bool:
        return self.tells(event, "ModelUnloaded", "ModelLoading")

    async def cure(self) -> None:
        pass

    async def healed_at(self, since: int) -> float | None:
        event = await self.stage.journal.first(lambda event: self.tells(event, "ModelUnloaded"), since, self.recover_s)
        return None if event is None else float(event["time"])

    async def tidy(self) -> None:
        self.stage.quiet.discard(self.model)


class FileTruncated(_OfFile):
    """F4. Well again, counted from when a whole file is there: it can be loaded."""

    label = "file truncated in place"
    recover_s = 90.0  # it may have been put under quarantine for its crashes

    async def inject(self) -> None:
        path = self.stage.file(self.model)
        self.done_at = time.time()
        os.truncate(path, path.stat().st_size // 2)

    def is_seen(self, event: Event) -> bool:
        return self.tells(event, "ModelStale", "EntryChanged", "ModelRemoved", "ModelUnloaded", "ModelLoadFailed")


class FileDeleted(_OfFile):
    """F6. Well again, counted from when it is back: it can be loaded."""

    label = "file deleted, and back"

    async def inject(self) -> None:
        self.done_at = time.time()
        self.stage.file(self.model).unlink()

    def is_seen(self, event: Event) -> bool:
        return self.tells(event, "ModelStale", "ModelRemoved", "EntryChanged")


class FileDropped(_OfFile):
    """F1. A new model comes by a slow copy. Well again, counted from the end of that: it can be served."""

    label = "a new file, copied slowly"
    detect_s = 10.0
    is_loaded_first = False

    async def prepare(self) -> bool:
        self._name = f"{self.router}-n{self.choose.randrange(1000)}"
        return not self.stage.file(self._name).exists()

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({f"{self.router}/new"})

    async def inject(self) -> None:
        path = self.stage.file(self._name)
        draft = self.stage.folder / f"{self._name}.draft"
        write_tiny_model(draft, ["I", "am", self._name], loop=True, n_layer=LAYERS, n_ctx=2048)
        content = draft.read_bytes()
        draft.unlink()
        with path.open("wb") as file:
            self.done_at = time.time()
            for at in range(0, len(content), CHUNK):
                file.write(content[at : at + CHUNK])
                file.flush()
                await anyio.sleep(0.1)
        self.cured_at = time.time()

    def is_seen(self, event: Event) -> bool:
        return event["event"] in {"ModelAdded", "EntryChanged"} and event["model"] == self._name

    async def cure(self) -> None:
        pass

    def is_healed(self, event: Event) -> bool:
        return event["event"] == "ModelAdded" and event["model"] == self._name

    async def healed_at(self, since: int) -> float | None:
        self.cured_at = self.stage.file(self._name).stat().st_mtime
        return await Fault.healed_at(self, since)

    async def tidy(self) -> None:
        with suppress(FileNotFoundError):
            self.stage.file(self._name).unlink()


class FolderMoved(Fault):
    """F7. Well again, counted from when it is back: it is looked at."""

    label = "models folder moved, and back"
    weight = 1
    detect_s = 40.0  # the next look, if the kernel says nothing
    recover_s = 60.0

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({self.router})

    async def inject(self) -> None:
        self._folder = self.stage.models / self.router
        self._away = self._folder.with_name(f"{self.router}.away")
        self.done_at = time.time()
        self._folder.rename(self._away)

    def is_seen(self, event: Event) -> bool:
        return self._tells(event, "FolderStale")

    async def cure(self) -> None:
        await anyio.sleep(self.choose.uniform(0.5, 3.0))
        self.cured_at = time.time()
        self._away.rename(self._folder)

    def is_healed(self, event: Event) -> bool:
        return self._tells(event, "FolderBack")

    def _tells(self, event: Event, name: str) -> bool:
        is_it = event["event"] == name and event["folder"] == str(self._folder)
        return is_it and event["time"] > self.done_at

    async def tidy(self) -> None:
        if self._away.exists():
            self._away.rename(self._folder)


class DiskFull(Fault):
    """R1. Well again, counted from when there is room: a pin of that time is on the disk. It is told once an hour."""

    label = "disk of the state full"
    weight = 1
    detect_s = None
    recover_s = 90.0

    @property
    def claims(self) -> frozenset[str]:
        return frozenset({"disk"})

    async def inject(self) -> None:
        self._pinned = f"{self.router}-{PINNED_FULL}"
        self._filler = self.stage.daemon.state_dir / "filler"
        self.done_at = time.time()
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(CHUNK)):
                pass
        await self.stage.call("POST", f"models/{self._pinned}/pin")

    async def cure(self) -> None:
        await anyio.sleep(self.choose.uniform(1.0, 4.0))
        self.cured_at = time.time()
        self._filler.unlink()

    async def healed_at(self, since: int) -> float | None:
        ledger = self.stage.daemon.state_dir / LEDGER

        async def is_written() -> bool:
            return ledger.stat().st_mtime > self.cured_at and f'"{self._pinned}"' in ledger.read_text(encoding="utf-8")

        return await self.stage.until(is_written, self.recover_s, every_s=0.25)

    async def tidy(self) -> None:
        self._filler.unlink(missing_ok=True)
        await self.stage.call("POST", f"models/{self._pinned}/unpin")
