"""Which files make which model: a pure function of the files, their headers, whether each is whole, and the past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from llamavisor import ini
from llamavisor.catalog.entry import Entry, EntryState, FileId, ModelFile
from llamavisor.catalog.hub import quantization_tag
from llamavisor.catalog.naming import Named, Place, Standing, assign, name_problem, stem_of
from llamavisor.catalog.settle import Verdict
from llamavisor.catalog.split import Unit
from llamavisor.catalog.walk import Found, Oddity
from llamavisor.gguf import Header, Kind
from llamavisor.gguf.container import printable

DRAFT_PREFIXES = ("mtp-", "dspark-", "dflash-")
"""A file that is called so belongs to the models beside it, for llama-server's router as well."""
PROJECTOR_MARK = "mmproj"
"""What is in the name of a projector."""
PROJECTOR_QUANTIZATIONS = ("F16", "BF16", "Q8_0", "F32")
"""Of several projectors the one that comes first here: they are small, and suffer from quantization."""


class _Role(Enum):
    """What a file is for in a models folder."""

    MODEL = auto()
    PROJECTOR = auto()
    DRAFT = auto()
    NONE = auto()


_ROLES = {
    Kind.MODEL: _Role.MODEL,
    Kind.EMBEDDING: _Role.MODEL,
    Kind.RERANK: _Role.MODEL,
    Kind.PART: _Role.MODEL,
    Kind.PROJECTOR: _Role.PROJECTOR,
    Kind.DRAFT: _Role.DRAFT,
}
"""All others (adapters, vectors, statistics, vocabularies) are used where the configuration says so, nowhere else."""

_Beside = dict[str, list[Unit]]
"""Projectors or drafts, by the folder they lie in."""


class _Projector(NamedTuple):
    """A projector as all models beside it see it.

    Attributes:
        unit: the file.
        problem: why no model can use it, empty when one can.
    """

    unit: Unit
    problem: str


_Projectors = Mapping[str, Sequence[_Projector]]
"""By the folder they lie in, those first that are to be preferred."""
_Drafts = Mapping[str, Mapping[str, Unit]]
"""The drafts that can be used, by the folder they lie in and by quantization; the first of all as "" as well."""


class Past(NamedTuple):
    """What of the looks before decides about names: what works is not renamed by what comes.

    Attributes:
        ready: keys of the units that were READY, whatever they are now.
        heads: keys of those that have the names of their folders.
    """

    ready: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()


_NO_PAST = Past()


def remember(units: Iterable[Unit], entries: Mapping[str, Entry], past: Past) -> Past:
    """What is to be known at the next look of what was made of `units` at this one."""
    by_path = {entry.path: entry for entry in entries.values()}
    ready, heads = set(), set()
    for unit in units:
        if unit.verdict.state is EntryState.READY or unit.key in past.ready:
            ready.add(unit.key)
        entry = by_path.get(unit.first.path)
        if entry is not None and unit.folder and (entry.name == unit.folder or unit.stem in entry.aliases):
            heads.add(unit.key)
    return Past(frozenset(ready), frozenset(heads))


def group(joined: Iterable[Unit], oddities: Iterable[Oddity], root: str, past: Past = _NO_PAST) -> dict[str, Entry]:
    """The entries of a models folder by their names, whatever the order of the files.

    Args:
        joined: all files that call themselves GGUF files, as what is loaded together.
        oddities: what calls itself so and is none.
        root: path of the models folder.
        past: what `remember` returned after the look before.
    """
    models: list[Unit] = []
    projectors: _Beside = {}
    drafts: _Beside = {}
    broken: list[Unit] = []
    for unit in joined:
        role = _role(unit)
        if role is _Role.MODEL:
            models.append(unit)
        elif role is not _Role.NONE and unit.verdict.state is EntryState.INVALID:
            broken.append(unit)
        elif role is not _Role.NONE:
            (projectors if role is _Role.PROJECTOR else drafts).setdefault(unit.home, []).append(unit)
    owners = _find_copies(models)
    units, odd = [*models, *broken], list(oddities)
    places = [
        _place(unit, past, is_copy=unit.first.path in owners or index >= len(models))
        for index, unit in enumerate(units)
    ]
    named = assign([*places, *(_odd_place(oddity, root) for oddity in odd)])
    names = {unit.first.path: name.name for unit, name in zip(units, named, strict=False)}
    ranked, usable = _rank_projectors(projectors), _pick_drafts(drafts)
    entries = [
        _entry(unit, name, ranked, usable, names.get(owners.get(unit.first.path, "")))
        for unit, name in zip(units, named, strict=False)
    ]
    entries += [_odd_entry(oddity, name) for oddity, name in zip(odd, named[len(units) :], strict=True)]
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def _role(unit: Unit) -> _Role:
    """What it is for: by its header where that can be read, else by its name.

    A model is a draft if it is called so and lies beside others, in a folder of its own; the router's rule.
    """
    name = unit.file_name
    header = unit.header
    if header is not None:
        role = _ROLES.get(header.kind, _Role.NONE)
    elif not unit.is_known and PROJECTOR_MARK in name.lower():
        return _Role.PROJECTOR
    else:
        role = _Role.MODEL
    if role is _Role.MODEL and unit.folder and name.startswith(DRAFT_PREFIXES):
        return _Role.DRAFT
    return role


def _find_copies(models: Iterable[Unit]) -> dict[str, str]:
    """Paths of what is another's file under a second path, each with that one's path.

    The one that the router can serve stays, then the one without a link, then the one that is less deep.
    """
    firsts: dict[tuple[int, int], list[Unit]] = {}
    for unit in models:
        firsts.setdefault((unit.first.device, unit.first.inode), []).append(unit)
    owners: dict[str, str] = {}
    for same in firsts.values():
        if len(same) > 1:
            owner, *copies = sorted(same, key=_copy_order)
            owners.update((copy.first.path, owner.first.path) for copy in copies)
    return owners


def _copy_order(unit: Unit) -> tuple[bool, bool, int, str]:
    first = unit.first
    has_problem = bool(ini.value_problem(first.path) or name_problem(unit.stem))
    return has_problem, first.is_link, first.rel.count("/"), first.where


def _place(unit: Unit, past: Past, *, is_copy: bool) -> Place:
    return Place(
        rel=unit.first.rel,
        stem=unit.stem,
        quantization=unit.header.quantization if unit.header is not None else "",
        snapshot=unit.first.snapshot,
        mtime_ns=unit.first.mtime_ns,
        standing=_standing(unit, past),
        is_head=unit.key in past.heads,
        is_copy=is_copy,
    )


def _standing(unit: Unit, past: Past) -> Standing:
    if unit.verdict.state is EntryState.READY or unit.key in past.ready:
        return Standing.USABLE
    if not unit.is_known:
        return Standing.UNKNOWN
    return Standing.COMING if unit.verdict.state is EntryState.SETTLING else Standing.BROKEN


def _odd_place(oddity: Oddity, root: str) -> Place:
    base = (oddity.rel or root).rpartition("/")[2]
    # No model's name ends in a slash: a folder that cannot be looked into takes no name from any.
    stem = f"{oddity.rel or base}/" if oddity.is_folder else stem_of(base)
    return Place(rel=oddity.rel, stem=stem, standing=Standing.UNKNOWN, is_copy=True)


def _odd_entry(oddity: Oddity, named: Named) -> Entry:
    return Entry(
        name=named.name,
        state=EntryState.INVALID,
        reason=oddity.reason,
        files=(ModelFile(oddity.path, oddity.id),),
        changed_at=oddity.changed_at,
    )


def _entry(unit: Unit, named: Named, projectors: _Projectors, drafts: _Drafts, owner: str | None) -> Entry:
    verdict = _verdict(unit, named, owner)
    projector, notes = _projector(unit, projectors) if projectors else (None, ())
    draft = _draft(unit, drafts) if drafts else None
    return Entry(
        name=named.name,
        state=verdict.state,
        reason=verdict.reason,
        files=tuple(_file(judged.found) for judged in unit.files),
        projector=_file(projector.first) if projector is not None else None,
        draft=draft,
        senses=_senses(projector.header) if projector is not None else (),
        header=unit.header,
        parameter_count=unit.parameter_count,
        aliases=named.aliases,
        notes=(*named.notes, *notes),
        changed_at=max(judged.changed_at for judged in unit.files),
    )


def _verdict(unit: Unit, named: Named, owner: str | None) -> Verdict:
    """Whether a model can be used, its name and its path considered."""
    if unit.verdict.state is EntryState.INVALID:
        return unit.verdict
    reason = ""
    if owner is not None:
        reason = f"the same file as {owner}, which serves it"
    elif found := ini.value_problem(unit.first.path):
        reason = f"its path {printable(unit.first.path)!r} {found}; rename the file or its folder"
    elif named.problem:
        reason = named.problem
    return Verdict(EntryState.INVALID, reason) if reason else unit.verdict


def _rank_projectors(beside: _Beside) -> _Projectors:
    """Once for a folder: beside each of a thousand models it would be a thousand times as much."""
    return {
        folder: [
            _Projector(unit, _projector_problem(unit))
            for unit in sorted(units, key=lambda unit: (_projector_rank(unit), unit.first.where))
        ]
        for folder, units in beside.items()
    }


def _projector(unit: Unit, projectors: _Projectors) -> tuple[Unit | None, tuple[str, ...]]:
    """The projector that a model gets, and what is to be said where there is one that it does not get."""
    notes = []
    for folder in _folders(unit):
        for found in projectors.get(folder, ()):
            problem = found.problem or _misfit(unit, found.unit)
            if not problem:
                return found.unit, ()
            notes.append(problem)
    return None, tuple(sorted(notes))


def _senses(header: Header | None) -> tuple[str, ...]:
    """What a projector with this header reads."""
    if header is None or header.projector is None:
        return ()
    found = (("image", header.projector.has_vision), ("audio", header.projector.has_audio))
    return tuple(sense for sense, has in found if has)


def _projector_problem(projector: Unit) -> str:
    """Why no model can use a projector; empty when one can."""
    name = printable(projector.file_name)
    if projector.verdict.state is not EntryState.READY:
        return f"{name} is not used yet: {projector.verdict.reason}"
    problem = ini.value_problem(projector.first.path)
    return f"{name} is not used: its path {problem}" if problem else ""


def _misfit(unit: Unit, projector: Unit) -> str:
    """Why a projector is not this model's, as far as the headers tell; empty when it may be."""
    if unit.header is None or projector.header is None or projector.header.projector is None:
        return ""
    gives, takes = projector.header.projector.projection_length, unit.header.embedding_length
    if gives is None or takes is None or gives == takes:
        return ""
    name = printable(projector.file_name)
    return f"{name} is not used: it makes vectors of {gives} numbers, and this model takes {takes}"


def _projector_rank(projector: Unit) -> int:
    known, quantization = PROJECTOR_QUANTIZATIONS, _quantization(projector)
    return known.index(quantization) if quantization in known else len(known)


def _pick_drafts(beside: _Beside) -> _Drafts:
    """Once for a folder, as with the projectors."""
    picked: dict[str, dict[str, Unit]] = {}
    for folder, units in beside.items():
        for unit in sorted(units, key=lambda unit: unit.first.where):
            if unit.verdict.state is EntryState.READY and not ini.value_problem(unit.first.path):
                for quantization in ("", _quantization(unit)):
                    picked.setdefault(folder, {}).setdefault(quantization, unit)
    return picked


def _draft(unit: Unit, drafts: _Drafts) -> ModelFile | None:
    """The draft that a model gets: the nearest, one of the same quantization first."""
    found = next((drafts[folder] for folder in _folders(unit) if folder in drafts), None)
    return _file((found.get(_quantization(unit)) or found[""]).first) if found else None


def _quantization(unit: Unit) -> str:
    """As its header says; as its name does where that cannot be read, of a file that is not here yet."""
    return unit.header.quantization if unit.header is not None else quantization_tag(unit.stem, "")


def _folders(unit: Unit) -> Sequence[str]:
    snapshot, folder = unit.first.snapshot, unit.home
    if snapshot is None:
        return [folder] if folder else []
    folders = [folder]
    while folder != snapshot.shelf and "/" in folder:
        folder = folder.rpartition("/")[0]
        folders.append(folder)
    return folders


def _file(found: Found) -> ModelFile:
    return ModelFile(found.path, FileId(found.device, found.inode, found.size, found.mtime_ns))
