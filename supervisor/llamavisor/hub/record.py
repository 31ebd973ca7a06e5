"""What a pull brings, as it is written down: with that a later daemon goes on where this one ended."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llamavisor import ini
from llamavisor.catalog.naming import name_problem
from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.listing import Commit, Listing, RemoteFile, harmless
from llamavisor.hub.spec import Spec, parse, path_problem


def _is_repository(text: str) -> str:
    try:
        is_plain = parse(text).repository == text
    except HubError:
        is_plain = False
    if not is_plain:
        raise ValueError("is no repository")
    return text


class Record(BaseModel):
    """What a pull brings.

    Attributes:
        repository: `USER/REPO`.
        revision: what was asked for.
        commit: what that was.
        name: what the model is going to be called.
        files: all that it brings, the model's first file first.
        is_under_way: whether somebody wants it now; else it is kept so that it can be gone on with.
        why: it was left, as `HubError.why` says; empty if a person has cancelled it.
        reason: likewise, for a person.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    repository: Annotated[str, AfterValidator(_is_repository)]
    revision: str
    commit: Commit
    name: Annotated[str, AfterValidator(harmless), Field(pattern=r"^[^/]*$")]
    files: tuple[RemoteFile, ...] = Field(min_length=1)
    is_under_way: bool = True
    why: str = ""
    reason: str = ""

    @classmethod
    def of(cls, listing: Listing, name: str, files: tuple[RemoteFile, ...]) -> Record:
        """What is to be brought of a repository."""
        return cls(
            repository=listing.repository,
            revision=listing.revision,
            commit=listing.commit,
            name=name,
            files=files,
        )

    @property
    def listing(self) -> Listing:
        """Where they are."""
        return Listing(repository=self.repository, revision=self.revision, commit=self.commit, choices=())

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(each.size for each in self.files)

    @property
    def key(self) -> str:
        """The same for all that bring the same: its name is what a person sees, its hash what tells it apart."""
        what = [self.repository, self.commit, *sorted(f"{each.path}\0{each.size}" for each in self.files)]
        return f"{self.name[:60]}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"


def _name_problem(name: str) -> str | None:
    """Why a model cannot be called so, or lie under that name in a folder and be served."""
    if "/" in name:
        return "names a folder"
    return path_problem(name) or ini.value_problem(name) or name_problem(name)


def plan(listing: Listing, spec: Spec, name: str = "") -> Record:
    """What is to be brought for what is asked.

    Raises:
        HubError: it is not there, or cannot be had under that name.
    """
    choice = listing.choose(spec)
    name = name or choice.name
    if problem := _name_problem(name):
        hint = "Name it otherwise with --name." if name == choice.name else ""
        raise HubError(f"{name!r} is no name for a model: it {problem}", why=Why.SPEC, hint=hint)
    files = choice.wanted(spec)
    names = [file.name for file in files]
    for each in names if len(names) > 1 else ():  # one file alone is called as the model is
        if problem := ini.value_problem(each):
            text = f"{listing.repository}: no router could be told of its file {each!r}: it {problem}"
            raise HubError(text, why=Why.NO_FILE)
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise HubError(f"{listing.repository} has two files {twice} that belong together", why=Why.NO_FILE)
    return Record.of(listing, name, files)
