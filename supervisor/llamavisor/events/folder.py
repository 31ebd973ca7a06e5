"""What happens to models folders and the files in them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from llamavisor.catalog import EntryState
from llamavisor.events.base import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryChanged(Event):
    """A model's files in the folder are in another state than before, or are new there and cannot be used."""

    folder: str
    model: str
    state: EntryState
    reason: str = ""

    def message(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"model {self.model}: {self.state.value}{why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryNoted(Event):
    """There is something that a person should know about a model that can be served."""

    level: ClassVar[int] = logging.WARNING

    folder: str
    model: str
    text: str

    def message(self) -> str:
        return f"model {self.model}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderLooked(Event):
    """A models folder was looked at. `headers_read` counts the files that were not known before."""

    level: ClassVar[int] = logging.DEBUG
    is_kept: ClassVar[bool] = False

    folder: str
    duration_s: float
    file_count: int
    headers_read: int

    def message(self) -> str:
        took = f"{self.duration_s * 1000:.0f} ms"
        return f"folder {self.folder}: {self.file_count} files, {self.headers_read} of them new ({took})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderStale(Event):
    """A models folder cannot be looked at, or what it shows is not believed yet; what was known of it stays."""

    level: ClassVar[int] = logging.WARNING

    folder: str
    reason: str

    def message(self) -> str:
        return f"folder {self.folder}: {self.reason}; what was known of it stays"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderBack(Event):
    """A models folder that was stale is looked at again."""

    folder: str

    def message(self) -> str:
        return f"folder {self.folder}: can be looked at again"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatcherChanged(Event):
    """A models folder is watched in another way than before: "inotify", or "polling" with the reason."""

    folder: str
    mode: str
    reason: str = ""

    def message(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"folder {self.folder}: watched by {self.mode}{why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatcherFailed(Event):
    """The process that looks at a models folder, or the kernel's hints in it, failed; it is started again."""

    level: ClassVar[int] = logging.WARNING

    folder: str
    reason: str

    def message(self) -> str:
        return f"folder {self.folder}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDeleted(Event):
    """The files of a model were removed from the disk because a person wanted that."""

    folder: str
    model: str
    files: tuple[str, ...]
    freed_bytes: int

    def message(self) -> str:
        return f"model {self.model}: removed from {self.folder}: {', '.join(self.files)} ({self.freed_bytes} bytes)"


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageCleaned(Event):
    """Staging leftovers, pulls that were left or old revisions were removed because a person wanted that."""

    folder: str
    gone: tuple[str, ...]
    freed_bytes: int

    def message(self) -> str:
        return f"folder {self.folder}: cleaned of {', '.join(self.gone)} ({self.freed_bytes} bytes)"
