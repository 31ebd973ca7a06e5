"""What the models of a folder are called: the router's own name where it has one, and always the same.

Every name follows from what lies in the folder alone, never from the order in which it came or was listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamavisor import ini
from llamavisor.catalog.hub import Snapshot, quantization_tag
from llamavisor.gguf.container import printable

FAVOURITE = "Q4_K_M"
"""Of several quantizations the one that a name without one means, as for llama-server's `-hf`."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SUFFIX = re.compile(r"\.gguf\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model that is to have a name.

    Attributes:
        rel: path of its first file, relative to the models folder.
        stem: name of that file without suffix and part, as `stem_of` makes it.
        quantization: as its header says, empty when it cannot be read.
        snapshot: of the hub's cache in which it lies.
        is_known: whether a header says that it is a model. What is not known takes no name from what is.
        is_usable: whether it can be used now. Only its folder's alias depends on that.
        is_copy: whether it is another's file under a second path; it takes no name from another, and no folder's.
    """

    rel: str
    stem: str
    quantization: str = ""
    snapshot: Snapshot | None = None
    is_known: bool = True
    is_usable: bool = True
    is_copy: bool = False

    @property
    def order(self) -> tuple[bool, bool, int, str]:
        """Who has the first choice: no copy, then what is known, then what is less deep, then by path."""
        return self.is_copy, not self.is_known, self.rel.count("/"), self.rel

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
    bases = _bases(places)
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
    aliases = _aliases(places, problems, owners)
    return [
        Named(name=names[index], problem=problems[index], aliases=aliases.get(index, ()), notes=notes[index])
        for index in range(len(places))
    ]


def _bases(places: Sequence[Place]) -> list[str]:
    """What each model would be called if it were alone in the world with those in its folder."""
    known: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        if not place.is_copy:
            (known if place.is_known else others).setdefault(place.folder, []).append(index)
    bases = [place.stem for place in places]
    for index, place in enumerate(places):
        if place.snapshot is not None:
            tag = quantization_tag(place.stem, place.quantization)
            bases[index] = f"{place.snapshot.repository}:{tag}" if tag else place.snapshot.repository
    for folder in known.keys() | others.keys():
        here = known.get(folder) or others[folder]
        if folder and "/" not in folder and len(here) == 1 and places[here[0]].snapshot is None:
            bases[here[0]] = folder
    return bases


def _candidates(place: Place, base: str) -> Iterator[str]:
    """Names in the order in which they are tried: with more and more of the folders above, numbered at last."""
    yield _shown(base)
    parents = place.folder.split("/") if place.folder else []
    for count in range(1, len(parents) + 1):
        yield _shown("-".join([*parents[-count:], place.stem]))
    number = 2
    while True:
        yield f"{_shown(base)}-{number}"
        number += 1


def _shown(name: str) -> str:
    """A name that the router can serve as it is, another one escaped. A name may be no more than an emoji."""
    return printable(name) if name_problem(name) else name


def _aliases(places: Sequence[Place], problems: Sequence[str], owners: dict[str, int]) -> dict[int, tuple[str, ...]]:
    """The names of folders and repositories that hold several models, each for the one that is meant by it."""
    groups: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        if place.is_copy or not place.is_known or problems[index]:
            continue
        if place.snapshot is not None:
            groups.setdefault(place.snapshot.repository, []).append(index)
        elif place.folder and "/" not in place.folder:
            groups.setdefault(place.folder, []).append(index)
    aliases: dict[int, tuple[str, ...]] = {}
    for alias in sorted(groups):
        if alias in owners or name_problem(alias):
            continue
        picked = min(groups[alias], key=lambda index: _preference(places[index]))
        aliases[picked] = (*aliases.get(picked, ()), alias)
    return aliases


def _preference(place: Place) -> tuple[bool, bool, str]:
    tag = quantization_tag(place.stem, place.quantization)
    return not place.is_usable, tag != FAVOURITE, place.rel
