"""What the models of a folder are called: the router's own name where it has one, and always the same.

1. A file directly in the models folder, or deeper than one folder: its stem.
2. In a folder directly in the models folder one model has the folder's name: the only one, as for the router, or of
   several the one whose content is the oldest (mtime of its first file), then a Q4_K_M, then the first by its path.
   Its stem is an alias of it, from the beginning: nothing about it changes when another quantization comes. The others
   are called by their stems.
3. Who has a folder's name keeps it as long as this process looks on, whatever comes with an older date.
4. Only what is READY, or was before, takes part in that: a copy that is under way or broken renames nothing that works.
   Where nothing is READY, it is what may become so; then what cannot; then what no header is known of.
5. In the hub's cache: `USER/REPO:QUANT`, and `USER/REPO` is an alias of the Q4_K_M, or of the first.

Of two models of one name the one that works keeps it, then the one that is less deep, then by path; the other is called
by its folders and its stem. Nothing of this follows from the order in which files are listed, nor from the hash of a
revision in the hub's cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from llamavisor import ini
from llamavisor.catalog.hub import Snapshot, quantization_tag
from llamavisor.gguf.container import printable

FAVOURITE = "Q4_K_M"
"""Of several quantizations the one that a name without one means, as for llama-server's `-hf`."""
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.gguf)", re.DOTALL | re.IGNORECASE)
"""`llama_split_prefix` in llama.cpp's src/llama.cpp finds the other parts by this pattern."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SUFFIX = re.compile(r"\.gguf\Z", re.IGNORECASE)


class Standing(IntEnum):
    """What right a model has to a name; the smaller one takes it from the larger one."""

    USABLE = 0
    """READY, or it was before."""
    COMING = 1
    """It may become so."""
    BROKEN = 2
    """A model by its header, which cannot be used as it is."""
    UNKNOWN = 3
    """No header says that it is a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model that is to have a name.

    Attributes:
        rel: path of its first file, relative to the models folder.
        stem: name of that file without suffix and part, as `stem_of` makes it.
        quantization: as its header says, empty when it cannot be read.
        snapshot: of the hub's cache in which it lies.
        mtime_ns: of that file.
        standing: what right it has to a name.
        is_head: whether it has its folder's name already.
        is_copy: whether it is another's file under a second path; it takes no name from another, and no folder's.
    """

    rel: str
    stem: str
    quantization: str = ""
    snapshot: Snapshot | None = None
    mtime_ns: int = 0
    standing: Standing = Standing.USABLE
    is_head: bool = False
    is_copy: bool = False

    @property
    def where(self) -> str:
        """`rel`, in the hub's cache without the revision."""
        return self.rel if self.snapshot is None else self.snapshot.where(self.rel)

    @property
    def order(self) -> tuple[bool, Standing, int, str, str]:
        """Who has the first choice: no copy, then by standing, then what is less deep, then by path."""
        return self.is_copy, self.standing, self.rel.count("/"), self.where, self.rel

    @property
    def is_favourite(self) -> bool:
        """Whether it is of the usual quantization."""
        return quantization_tag(self.stem, self.quantization) == FAVOURITE

    @property
    def folder(self) -> str:
        """The folder it lies in, relative to the models folder; empty for that folder itself."""
        return self.rel.rpartition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What a model is called.

    Attributes:
        name: unique; fit to be shown, and fit for the router unless there is a problem.
        problem: why the router could not call it so, and what to do; empty when it can.
        aliases: other names.
        notes: a name that it could not have, and why.
    """

    name: str
    problem: str = ""
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stem_of(file_name: str) -> str:
    """A file's name as the router would say it: without every `.gguf`, and without the last one in any case."""
    return _SUFFIX.sub("", file_name).replace(".gguf", "")


def name_problem(name: str) -> str:
    """Why the router cannot serve a model of this name, empty when it can."""
    if found := ini.section_problem(name):
        return found
    if "," in name:
        return "holds a ',', which parts names in a list"
    if name.startswith("-"):
        return "begins with '-', as an option does"
    if _CONTROL.search(name):
        return "holds a control character"
    return ""


def assign(places: Sequence[Place]) -> list[Named]:
    """Names for all models of a folder, in the order of `places`; the names do not depend on that order."""
    heads = _heads(places)
    bases = [heads.get(index) or _base(place) for index, place in enumerate(places)]
    faults = [name_problem(base) for base in bases]
    order = sorted(range(len(places)), key=lambda index: (bool(faults[index]), places[index].order))
    owners: dict[str, int] = {}
    names: list[str] = [""] * len(places)
    problems: list[str] = [""] * len(places)
    notes: list[tuple[str, ...]] = [()] * len(places)
    for index in order:
        place, base = places[index], bases[index]
        names[index] = next(name for name in _candidates(place, base) if name not in owners)
        owners[names[index]] = index
        if faults[index]:
            problems[index] = f"the name {printable(base)!r} {faults[index]}; rename it"
        elif names[index] != base:
            owner = printable(places[owners[base]].rel)
            notes[index] = (f"it would be called {base!r}, as {owner} is",)
            if later := name_problem(names[index]):
                problems[index] = f"{notes[index][0]}, and {names[index]!r} {later}; rename it"
    aliases = _aliases(places, heads, problems, owners)
    return [
        Named(name=names[index], problem=problems[index], aliases=aliases.get(index, ()), notes=notes[index])
        for index in range(len(places))
    ]


def _base(place: Place) -> str:
    """What a model would be called if it were alone in the world and in no folder."""
    if place.snapshot is None:
        return place.stem
    tag = quantization_tag(place.stem, place.quantization)
    return f"{place.snapshot.repository}:{tag}" if tag else place.snapshot.repository


def _heads(places: Sequence[Place]) -> dict[int, str]:
    """Which models have the names of their folders, and those names."""
    families: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        if place.folder and "/" not in place.folder and place.snapshot is None and not place.is_copy:
            families.setdefault(place.folder, []).append(index)
    heads: dict[int, str] = {}
    for folder, family in families.items():
        best = min(places[index].standing for index in family)
        among = [index for index in family if places[index].standing is best]
        if len(among) == 1 or not name_problem(folder):
            heads[min(among, key=lambda index: _seniority(places[index]))] = folder
    return heads


def _seniority(place: Place) -> tuple[Standing, bool, int, bool, str]:
    return place.standing, not place.is_head, place.mtime_ns, not place.is_favourite, place.where


def _candidates(place: Place, base: str) -> Iterator[str]:
    """Names in the order in which they are tried: with more and more of the folders above, numbered at last."""
    yield _shown(base)
    before, folder = "", place.folder
    if place.snapshot is not None:  # the folders of a repository's revision come behind the repository
        before = f"{place.snapshot.repository}:"
        folder = place.snapshot.inside(place.rel).rpartition("/")[0]
        yield _shown(before + place.stem)
    parents = folder.split("/") if folder else []
    for count in range(1, len(parents) + 1):
        yield _shown(before + "-".join([*parents[-count:], place.stem]))
    number = 2
    while True:
        yield f"{_shown(base)}-{number}"
        number += 1


def _shown(name: str) -> str:
    """A name that the router can serve as it is, another one escaped. A name may be no more than an emoji."""
    return printable(name) if name_problem(name) else name


def _aliases(
    places: Sequence[Place], heads: dict[int, str], problems: Sequence[str], owners: dict[str, int]
) -> dict[int, tuple[str, ...]]:
    """The stems of the models that have their folders' names, and the names of repositories."""
    claims: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        if place.is_copy or place.standing is Standing.UNKNOWN or problems[index]:
            continue
        if place.snapshot is not None:
            claims.setdefault(place.snapshot.repository, []).append(index)
        elif index in heads:
            claims.setdefault(place.stem, []).append(index)
    aliases: dict[int, tuple[str, ...]] = {}
    for alias in sorted(claims):
        if alias in owners or name_problem(alias):
            continue
        picked = min(claims[alias], key=lambda index: _claim(places[index]))
        aliases[picked] = (*aliases.get(picked, ()), alias)
    return aliases


def _claim(place: Place) -> tuple[Standing, bool, int, bool, str]:
    """Whose an alias is that several could have: a repository means its usual quantization, whatever its age."""
    if place.snapshot is not None:
        return place.standing, False, 0, not place.is_favourite, place.where
    return _seniority(place)
