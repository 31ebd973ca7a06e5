"""What a models folder holds: one entry for each model, with its files and what is to be said of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llamavisor.catalog.disk import Disk
from llamavisor.gguf import Header


class EntryState(Enum):
    """Whether a model's files can be used."""

    READY = "ready"
    """All of them are there, whole and still."""
    SETTLING = "settling"
    """They are still being written, or look like it."""
    INCOMPLETE = "incomplete"
    """Parts of a split file are missing."""
    INVALID = "invalid"
    """They cannot be used, and waiting does not help."""
    GONE = "gone"
    """They were there. A model that is loaded goes on serving without them."""


@dataclass(frozen=True, slots=True)
class FileId:
    """Which content of which file: another one, or another content, has another id.

    Attributes:
        device: st_dev, of the file that a symlink leads to.
        inode: st_ino.
        size: bytes.
        mtime_ns: time of the last change of the content, nanoseconds since 1970.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model.

    Attributes:
        path: absolute; bytes that are not UTF-8 are surrogates, as `os.fsdecode` makes them.
        id: which content.
    """

    path: str
    id: FileId


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of a folder.

    Attributes:
        name: what it is called, unique in its folder. Of an entry that is INVALID because of its very name it is
            that name escaped.
        state: whether it can be used.
        reason: why it is not READY, as a person reads it; empty when it is.
        files: its own, the first part first. Never empty.
        projector: lets it see or hear, found beside it; None without one.
        draft: for speculative decoding, found beside it; None without one.
        senses: what its projector lets it read besides text, as llama-server calls it: "image", "audio".
        header: of its first file, None when it cannot be read.
        parameter_count: of all its parts; 0 when that is not known.
        aliases: names that it has besides by its place in the folder.
        notes: what a person should know although it can be used, such as a name that it could not have.
        changed_at: Unix seconds at which the last of its files was last changed, by its ctime; never later than it was
            first seen.
    """

    name: str
    state: EntryState
    reason: str = ""
    files: tuple[ModelFile, ...]
    projector: ModelFile | None = None
    draft: ModelFile | None = None
    senses: tuple[str, ...] = ()
    header: Header | None = None
    parameter_count: int = 0
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    changed_at: float = 0.0

    @property
    def path(self) -> str:
        """The file that llama-server is given."""
        return self.files[0].path

    @property
    def size_bytes(self) -> int:
        """Of its own files together, without projector and draft."""
        return sum(file.id.size for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What one look at a folder found, told as the difference from the look before.

    Attributes:
        changed: entries that are new or not what they were.
        removed: names of those that have gone.
        problem: why the folder could not be looked at, or why what was found is not believed yet, to be read behind
            the folder's path; then nothing is changed or removed. Empty when all is well.
        duration_s: how long the look took.
        file_count: model files, readable or not, that were seen.
        headers_read: how many headers had to be read because they were not known.
        again_in_s: when another look is due at the latest, because something is settling or is not believed yet.
        disk: what the folder lies on; None when that is not known, or there is a problem.
    """

    changed: tuple[Entry, ...] = ()
    removed: tuple[str, ...] = ()
    problem: str = ""
    duration_s: float = 0.0
    file_count: int = 0
    headers_read: int = 0
    again_in_s: float | None = None
    disk: Disk | None = field(default=None, compare=False)  # others write to it all the time
