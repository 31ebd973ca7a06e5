"""The cache of the Hugging Face hub: which of its folders belong to which repository, and which revision counts.

Its layout is `models--USER--REPO/snapshots/REVISION/…`, where the files are symlinks into `models--USER--REPO/blobs`,
as huggingface_hub and llama-server's `-hf` write it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from typing import NamedTuple

SNAPSHOTS = "snapshots"
"""The folder of a repository's revisions."""

_PREFIX = "models--"
_REFS_BYTES = 256
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TAG = re.compile(r"[-.]([A-Za-z0-9_]+)\Z")
_QUANTIZATION = re.compile(r"(?:I?Q[0-9]|TQ[0-9]|BF16|F16|F32|MXFP4|NVFP4)[A-Z0-9_]*")


class Snapshot(NamedTuple):
    """One revision of a repository.

    Attributes:
        repository: as `USER/REPO`.
        folder: where its files begin, relative to the models folder.
        rank: 0 is the revision that counts; the others follow where it lacks a file.
    """

    repository: str
    folder: str
    rank: int = 0

    @property
    def shelf(self) -> str:
        """The folder of all revisions, relative to the models folder."""
        return self.folder.rpartition("/")[0]

    def inside(self, rel: str) -> str:
        """The path of one of its files within it, of which `rel` is the path relative to the models folder."""
        return rel[len(self.folder) + 1 :]

    def where(self, rel: str) -> str:
        """That path without the revision: what is the same file for every revision has the same."""
        return f"{self.shelf}/{self.inside(rel)}" if self.shelf else self.inside(rel)


def repository(folder_name: str) -> str | None:
    """`USER/REPO` for `models--USER--REPO`, None for any other folder."""
    if not folder_name.startswith(_PREFIX):
        return None
    user, dashes, name = folder_name.removeprefix(_PREFIX).partition("--")
    if not user or (dashes and not name):
        return None
    return f"{user}/{name}" if dashes else user


def ranked(repository_folder: str, revisions: Iterable[str]) -> list[str]:
    """Revisions, the one that counts first: that of `refs/main`, then what was changed last, by time and name.

    `refs/main` is written before the files come, so the first may lack what the others have.

    Args:
        repository_folder: the path of `models--USER--REPO`.
        revisions: names of the folders in its `snapshots`.
    """
    main = _read_ref(f"{repository_folder}/refs/main")
    known = [(name == main, _mtime_ns(f"{repository_folder}/{SNAPSHOTS}/{name}"), name) for name in revisions]
    return [name for _, _, name in sorted(known, reverse=True)]


def quantization_tag(stem: str, quantization: str) -> str:
    """What `-hf USER/REPO:TAG` calls a file: the end of its name in upper case, where that is a quantization.

    Args:
        stem: of the file's name.
        quantization: what its header says, which counts when the name says nothing.
    """
    found = _TAG.search(stem)
    tag = found[1].upper() if found else ""
    return tag if _QUANTIZATION.fullmatch(tag) else quantization.upper().replace(" ", "_")


def _read_ref(path: str) -> str:
    """The revision that a ref names, empty when there is none. It is no more trusted than any other file."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.fsdecode(os.pread(fd, _REFS_BYTES, 0).strip())
    except OSError:
        return ""
    finally:
        os.close(fd)


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 (names may be no UTF-8; one call each)
    except OSError:
        return 0
