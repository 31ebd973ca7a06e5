"""What a repository holds: its GGUF files as the models that they make, and which of them is meant.

A repository is looked at as if it lay in the hub's cache, so that the catalog's own rules say which files belong
together, which projector and draft a model gets, and what it is called.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Annotated

from pydantic import AfterValidator, Field

from llamavisor.catalog import Entry, EntryState
from llamavisor.catalog.group import DRAFT_PREFIXES, PROJECTOR_MARK, group
from llamavisor.catalog.hub import SNAPSHOTS, Snapshot, quantization_tag
from llamavisor.catalog.naming import PART, stem_of
from llamavisor.catalog.settle import Verdict
from llamavisor.catalog.split import Judged, join
from llamavisor.catalog.walk import SUFFIX, Found
from llamavisor.gguf import Header
from llamavisor.gguf.container import printable
from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.spec import Spec, path_problem
from llamavisor.likeness import near

USUAL = ("Q4_K_M", "Q8_0")
"""The quantizations that a name without one means, in this order, else the first file: `find_best_model` in
common/download.cpp of llama.cpp b11434."""

_NO_MODELS = (PROJECTOR_MARK, "imatrix", "eagle3-", *DRAFT_PREFIXES)
"""What is in the names of files that are no models: `gguf_filename_is_model`, ibidem."""
MOST_FILES = 1000
"""A repository with more GGUF files is not looked at: what they belong to each other takes time and room."""
_LISTED = 12
_GIT_DIGITS = 40


def harmless(path: str) -> str:
    """The path.

    Raises:
        ValueError: it leads elsewhere, or is no path.
    """
    if problem := path_problem(path):
        raise ValueError(problem)
    return path


Commit = Annotated[str, Field(pattern=r"^[0-9a-zA-Z]{1,64}$")]
"""A revision that never changes, as the Hub tells it and as a record keeps it."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; pydantic holds it to what is said of its fields, where it comes from the Hub or the disk.

    Attributes:
        path: in the repository.
        size: bytes.
        digest: of its content, in hexadecimal: its SHA-256, or what git calls it if git holds it, which is the SHA-1 of
            a short header and it. Empty when the Hub does not tell.
    """

    path: Annotated[str, AfterValidator(harmless)]
    size: Annotated[int, Field(ge=0, lt=2**63)]
    digest: Annotated[str, Field(pattern=r"^(?:[0-9a-f]{64}|[0-9a-f]{40})?$")] = ""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    def hash(self) -> hashlib._Hash:
        """What all of its content is given to, so as to be its `digest` in the end."""
        if len(self.digest) != _GIT_DIGITS:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)  # as `git hash-object` does


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A model that can be taken.

    Attributes:
        name: what it is going to be called: its first file's name without suffix and part.
        files: its own, the first part first.
        projector: what comes along if it is wanted, None without one.
        draft: likewise.
        problem: why it cannot be used, empty when it can.
        entry: what the catalog would make of it if it lay in the hub's cache; None of what is no model by itself.
        header: the beginning of its first file, None when that is not known.
        unread: why it is not known, empty if nobody wanted to know it.
    """

    name: str
    files: tuple[RemoteFile, ...]
    projector: RemoteFile | None = None
    draft: RemoteFile | None = None
    problem: str = ""
    entry: Entry | None = None
    header: Header | None = None
    unread: str = ""

    @property
    def first(self) -> RemoteFile:
        """The file that llama-server is given."""
        return self.files[0]

    @property
    def quantization(self) -> str:
        """What `USER/REPO:QUANT` calls it, as far as its name says."""
        return quantization_tag(stem_of(PART.sub(r"\1.gguf", self.first.name)), "")

    @property
    def size_bytes(self) -> int:
        """Of its own files together."""
        return sum(file.size for file in self.files)

    def wanted(self, spec: Spec) -> tuple[RemoteFile, ...]:
        """All files that are to come, its own first."""
        beside = (self.projector if spec.with_projector else None, self.draft if spec.with_draft else None)
        return (*self.files, *(file for file in beside if file is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What a repository holds at one commit.

    Attributes:
        repository: `USER/REPO`.
        revision: what was asked for.
        commit: what that is.
        choices: the models in it, by the paths of their first files.
        others: GGUF files that are no model of their own: projectors, drafts, statistics.
    """

    repository: str
    revision: str
    commit: str
    choices: tuple[Choice, ...]
    others: tuple[RemoteFile, ...] = ()

    def choose(self, spec: Spec) -> Choice:
        """The model that is meant.

        Raises:
            HubError: there is none, or several, or it is not all there; the message says what there is.
        """
        if not self.choices and not self.others:
            raise HubError(f"{self.repository} holds no GGUF file", why=Why.NO_FILE, hint=_NO_GGUF)
        found = self._by_pattern(spec.file) if spec.file else self._by_quantization(spec.quantization)
        if found.problem:
            raise HubError(f"{self.repository}: {found.problem}", why=Why.NO_FILE)
        return found

    def _by_quantization(self, quantization: str) -> Choice:
        for tag in (quantization,) if quantization else USUAL:
            # llama.cpp looks for the tag anywhere in the path, whatever stands before it.
            pattern = re.compile(re.escape(tag) + "[.-]", re.IGNORECASE)
            for choice in self.choices:
                if pattern.search(choice.first.path):
                    return choice
        if self.choices and not quantization:
            return self.choices[0]
        if not self.choices:
            raise HubError(f"{self.repository} holds no model, only what belongs to one", why=Why.NO_FILE)
        tags = list(dict.fromkeys(choice.quantization or choice.name for choice in self.choices))
        raise HubError(
            f"{self.repository} has no {quantization}", why=Why.NO_FILE, hint=_suggestion(quantization, tags)
        )

    def _by_pattern(self, pattern: str) -> Choice:
        found = [choice for choice in self.choices if any(_matches(file.path, pattern) for file in choice.files)] or [
            Choice(name=stem_of(file.name), files=(file,)) for file in self.others if _matches(file.path, pattern)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            names = _listed([choice.first.path for choice in found])
            text = f"{self.repository}: {len(found)} models have files like {pattern!r}"
            raise HubError(text, why=Why.NO_FILE, hint=f"Take one of them: {names}.")
        paths = [choice.first.path for choice in self.choices] + [file.path for file in self.others]
        text = f"{self.repository} has no GGUF file like {pattern!r}"
        raise HubError(text, why=Why.NO_FILE, hint=_suggestion(pattern, paths))


_NO_GGUF = "llama-server reads GGUF files only; other repositories have them, often with -GGUF in their names."


def is_gguf(path: str) -> bool:
    """Whether a file of a repository is looked at by its path; of the others nothing is wanted."""
    return path.lower().endswith(SUFFIX) and not path_problem(path)


def arrange(repository: str, revision: str, commit: str, files: Iterable[RemoteFile]) -> Listing:
    """The files of a repository as models.

    Args:
        repository: `USER/REPO`.
        revision: what was asked for.
        commit: what that is.
        files: all GGUF files that it holds.

    Raises:
        HubError: it holds too many of them.
    """
    snapshot = Snapshot(repository, f"models--{repository.replace('/', '--')}/{SNAPSHOTS}/{commit}")
    known = {file.path: file for file in files}
    if len(known) > MOST_FILES:
        text = f"{repository} holds {len(known)} GGUF files, and more than {MOST_FILES} are not looked at"
        raise HubError(text, why=Why.NO_FILE)
    models = {path: file for path, file in known.items() if not _is_statistic(file)}
    units = join(_judged(models.values(), snapshot))
    # What names models would have in the cache is no matter here: they get others.
    problems = {unit.first.path: unit.verdict.reason for unit in units if unit.verdict.state is not EntryState.READY}
    entries = group(units, (), "").values()
    choices = sorted(_choices(entries, models, snapshot, problems), key=lambda choice: choice.first.path)
    own = {file.path for choice in choices for file in choice.files}
    others = tuple(file for path, file in sorted(known.items()) if path not in own)
    return Listing(repository=repository, revision=revision, commit=commit, choices=tuple(choices), others=others)


def _choices(
    entries: Iterable[Entry], known: Mapping[str, RemoteFile], snapshot: Snapshot, problems: Mapping[str, str]
) -> Iterator[Choice]:
    for entry in entries:
        files = tuple(known[snapshot.inside(file.path)] for file in entry.files)
        if any(mark in files[0].name.lower() for mark in _NO_MODELS):
            continue  # beside no model a draft passes for one
        yield Choice(
            name=stem_of(PART.sub(r"\1.gguf", files[0].name)),
            files=files,
            projector=known[snapshot.inside(entry.projector.path)] if entry.projector else None,
            draft=known[snapshot.inside(entry.draft.path)] if entry.draft else None,
            problem=problems.get(entry.path, ""),
            entry=entry,
        )


def _judged(files: Iterable[RemoteFile], snapshot: Snapshot) -> Iterator[Judged]:
    """The files as the catalog would find them if they were here: each whole, none of them read."""
    for number, file in enumerate(files):
        rel = f"{snapshot.folder}/{file.path}"
        found = Found(rel, rel, 0, number, file.size, 0, 0, snapshot=snapshot)
        yield Judged(found, None, Verdict(EntryState.READY))


def _is_statistic(file: RemoteFile) -> bool:
    return "imatrix" in file.name.lower()


def _matches(path: str, pattern: str) -> bool:
    return fnmatch(path, pattern) or fnmatch(path.rpartition("/")[2], pattern)


def _suggestion(wanted: str, present: Sequence[str]) -> str:
    like = near(wanted, present, like=0.5)
    meant = f"Did you mean {printable(like[0], 80)}? " if like else ""
    return f"{meant}It has {_listed(present)}."


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 80) for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown
