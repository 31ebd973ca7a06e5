"""One model as one router is to serve it, and the section of the router's preset that says so."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from llamavisor import automatic, ini
from llamavisor.budgets import Allowance
from llamavisor.catalog import Entry, FileId
from llamavisor.errors import OptionError
from llamavisor.flags import OptionLayer, resolve
from llamavisor.gguf import Header, Kind
from llamavisor.helptext import FlagSet
from llamavisor.options import HANG_AFTER_S, hang_after_s, without_ours
from llamavisor.rules import ModelRule, alias_problem, is_template_file, matching, split_scale
from llamavisor.spellings import find_typed

_DRAFT_TYPES = {
    "mtp-": "draft-mtp",
    "dflash-": "draft-dflash",
    "dspark-": "draft-dspark",
    "eagle3-": "draft-eagle3",
}
"""How a draft is used, by how its file's name begins: the names that llama-server's own downloads look for.

Left to itself llama-server takes every draft for a small model of the same kind.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model as one router is to serve it. Equal specs mean that nothing has to be loaded anew; `is_same` asks more.

    Attributes:
        name: what clients call it.
        path: absolute path of its first file.
        files: which contents it is made of: its own files, then the projector and the draft that were found and are
            used. Files that a configuration names are not among them.
        projector: found beside it and used, None without one.
        draft: likewise.
        senses: what the projector lets it read besides text: "image", "audio".
        base: the option tables of its router, lowest precedence first, as far as a load heeds them.
        layers: its own above them, likewise: what was found beside it, then the rules.
        aliases: more names, such as its folder's.
        tags: words that are shown with it.
        load_on_start: whether it is loaded when the router is ready.
        n_ctx_train: tokens of context that it was trained for, None when its file does not say.
        kind: what it is for.
        changed_at: Unix seconds at which the last of its files was last changed.
        ttl_s: seconds without requests after which it is unloaded, None for never.
        is_pinned: whether it is unloaded neither to make room nor for being idle.
        hang_after_s: silent seconds without progress after which its process hangs, None for never.
        recycle_bytes: anonymous memory and swap above which it is loaded anew, None for no bound.
        header: of its first file, None when it could not be read.
        parameter_count: of all its parts; 0 when that is not known.
        allowance: what the memory budgets of its router come to, None when they are not known (yet).
    """

    name: str
    path: str
    files: tuple[FileId, ...]
    projector: str | None = None
    draft: str | None = None
    base: tuple[OptionLayer, ...] = ()
    layers: tuple[OptionLayer, ...] = ()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    load_on_start: bool = False
    n_ctx_train: int | None = None
    kind: Kind = Kind.MODEL
    changed_at: float = field(default=0.0, compare=False)
    ttl_s: float | None = field(default=None, compare=False)
    is_pinned: bool = field(default=False, compare=False)
    hang_after_s: float | None = field(default=HANG_AFTER_S, compare=False)
    recycle_bytes: int | None = field(default=None, compare=False)
    header: Header | None = field(default=None, compare=False, repr=False)
    senses: tuple[str, ...] = field(default=(), compare=False)  # of the projector's content, which is compared
    parameter_count: int = field(default=0, compare=False)
    allowance: Allowance | None = None

    @property
    def own_files(self) -> tuple[FileId, ...]:
        """The contents that it is made of itself, without projector and draft."""
        return self.files[: len(self.files) - (self.projector is not None) - (self.draft is not None)]

    @property
    def own_bytes(self) -> int:
        """Of its own files together."""
        return sum(file.size for file in self.own_files)

    @property
    def beside_bytes(self) -> int:
        """Of the projector and the draft that were found and are used."""
        return sum(file.size for file in self.files) - self.own_bytes

    def is_same(self, other: ModelSpec) -> bool:
        """Whether `other` says the same, be it something that needs no load; when a file was changed does not count."""
        return self == other and self._is_looked_after_as(other)

    def _is_looked_after_as(self, other: ModelSpec) -> bool:
        mine, others = ((each.ttl_s, each.is_pinned, each.hang_after_s, each.recycle_bytes) for each in (self, other))
        return mine == others


def specify(
    entry: Entry,
    rules: Sequence[ModelRule],
    *,
    router: str,
    base: tuple[OptionLayer, ...] = (),
    allowance: Allowance | None = None,
) -> ModelSpec | None:
    """What a router is to make of an entry of the catalog; None if the rules keep it from that router. Pure.

    Args:
        entry: the model, in whatever state.
        rules: all of them, in the order of the configuration. A tuple is looked up faster.
        router: name of the router.
        base: the option tables of the router, lowest precedence first.
        allowance: what the memory budgets of the router come to, None when they are not known.
    """
    own = matching(rules, entry.name)
    routers = _last(own, "router", default=None)
    if isinstance(routers, tuple) and router not in routers:
        return None
    projector = entry.projector if _last(own, "mmproj", default=True) is True else None
    draft = entry.draft if _last(own, "draft", default=True) is True else None
    beside = automatic.for_neighbours(projector.path if projector else None, draft.path if draft else None)
    wishes = [key for key in ("mmproj", "draft") if _last(own, key, default=None) is True]
    layers = tuple(_without(rule.layer, wishes) for rule in own)
    header = entry.header
    said = (*base, *(rule.layer for rule in own))
    used = (*entry.files, *((projector,) if projector else ()), *((draft,) if draft else ()))
    return ModelSpec(
        name=entry.name,
        path=entry.path,
        files=tuple(file.id for file in used),
        projector=projector.path if projector else None,
        draft=draft.path if draft else None,
        base=without_ours(base),
        layers=without_ours((beside, *layers) if beside else layers),
        aliases=tuple(dict.fromkeys((*entry.aliases, *_last_written(own, "aliases")))),
        tags=tuple(dict.fromkeys(_last_written(own, "tags"))),
        load_on_start=bool(_last(own, "load_on_start", default=False)),
        n_ctx_train=header.context_length if header else None,
        kind=header.kind if header else Kind.MODEL,
        changed_at=entry.changed_at,
        ttl_s=_ttl_s(said),
        is_pinned=_last(own, "pin", default=False) is True,
        hang_after_s=hang_after_s(said),
        recycle_bytes=_recycle_bytes(said),
        header=header,
        senses=entry.senses if projector else (),
        parameter_count=entry.parameter_count,
        allowance=allowance,
    )


def layers_in_force(spec: ModelSpec, flags: FlagSet | None = None) -> tuple[OptionLayer, ...]:
    """Every table that speaks for a model, lowest precedence first: the budget's, its router's, its kind's, its own.

    Args:
        spec: the model.
        flags: the options of the build, None when it is not known. What follows from the budget and is no option of it
            is left out.
    """
    memory = for_memory(spec, flags)
    return (memory, *_told(spec)) if memory else _told(spec)


def for_memory(spec: ModelSpec, flags: FlagSet | None = None) -> OptionLayer | None:
    """What a model is told because of the memory budget, and by nobody else; arguments as for `layers_in_force`."""
    if spec.allowance is None:
        return None
    sizes = spec.own_bytes, spec.beside_bytes

    def knows(option: str) -> bool:
        return flags is None or flags.find(option) is not None

    return automatic.for_memory(spec.allowance, spec.header, sizes, _told(spec), knows=knows)


def _told(spec: ModelSpec) -> tuple[OptionLayer, ...]:
    kind = automatic.for_kind(spec.kind, spec.n_ctx_train, spec.base, spec.layers)
    return (*spec.base, *((kind,) if kind else ()), *spec.layers)


def section(spec: ModelSpec, flags: FlagSet, *, binary: str) -> Mapping[str, str]:
    """The entries of a model's section in the preset: its file, and all that it is told. Pure.

    What all models are told stands in each section, not in `[*]`: a router that reads its preset again stops every
    model for which anything has changed, and what is in a section of its own can wait until the model is idle.

    Args:
        spec: the model.
        flags: the options of the build.
        binary: its path, for messages.

    Raises:
        OptionError: names the model, the table and the option that cannot be written for this build.
    """
    try:
        _refuse_unfit(spec)
        own = _entries(layers_in_force(spec, flags), flags, binary)
    except OptionError as error:
        raise OptionError(f"model {spec.name}: {error}", hint=error.hint) from error
    entries = {"model": spec.path}
    for key, words in (("alias", spec.aliases), ("tags", spec.tags)):
        if words:
            entries[key] = ",".join(words)
    return {**entries, **own}


def try_rule(rule: ModelRule, base: Sequence[OptionLayer], flags: FlagSet, *, binary: str) -> None:
    """Refuses a rule that this build could not follow for any model of a router.

    Raises:
        OptionError: names the table and the option.
    """
    _entries((*base, rule.layer), flags, binary)


def without_clashes(specs: Iterable[ModelSpec]) -> tuple[dict[str, ModelSpec], dict[str, str]]:
    """The models of one router by name, without aliases that would stop it; and what is to be said of whom.

    A name beats an alias; of two models with one alias the one whose name is smaller keeps it: the same models give
    the same answer in whatever order they come. Pure.

    Args:
        specs: no two of one name.
    """
    by_name = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
    owners: dict[str, str] = {name: name for name in by_name}
    notes: dict[str, str] = {}
    for name, spec in by_name.items():
        kept, lost = [], []
        for alias in spec.aliases:
            problem, owner = alias_problem(alias), owners.get(alias)
            if problem or owner not in (None, name):
                lost.append(f"the alias {alias!r} {problem or f'is what the model {owner} is called'}")
            elif owner is None:
                owners[alias] = name
                kept.append(alias)
        if tuple(kept) != spec.aliases:
            by_name[name] = replace(spec, aliases=tuple(kept))
        if lost:
            notes[name] = "; ".join(lost)
    return by_name, notes


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that a table of the configuration names for a model, or with `slot_save_path` a folder.

    Attributes:
        source: the table.
        key: under which it stands there.
        path: where it should be.
    """

    source: str
    key: str
    path: str

    def problem(self) -> str | None:
        """Why it cannot be used, None if it can. Blocking: one stat, which hangs on a dead mount."""
        found = _path_problem(self.path, is_folder=self.key == "slot_save_path")
        return self.complain(found) if found else None

    def complain(self, text: str) -> str:
        """A sentence about it."""
        return f"{self.source}: {self.key} {self.path} {text}"


def named_files(layers: Iterable[OptionLayer]) -> tuple[NamedFile, ...]:
    """The files that tables name, such as a projector or an adapter; what a later table takes back is not among them.

    A model whose projector is missing can keep a whole router from starting. What was found beside a model is not among
    them: the catalog has looked at it.
    """
    effective: dict[str, tuple[str, object]] = {}
    for layer in layers:
        if layer.source != automatic.BESIDE:
            found = {key: getattr(layer.options, key, None) for key in _FILE_KEYS}
            effective |= {key: (layer.source, value) for key, value in found.items() if value is not None}
    return tuple(
        NamedFile(source, key, path) for key, (source, value) in effective.items() for path in _paths(key, value)
    )


_FILE_KEYS = ("mmproj", "draft", "lora", "chat_template", "grammar_file", "slot_save_path")


def _last(rules: Sequence[ModelRule], key: str, *, default: object) -> object:
    """What the last rule that sets `key` sets it to."""
    for rule in reversed(rules):
        value: object = getattr(rule.settings, key)
        if value is not None:
            return value
    return default


def _ttl_s(layers: Sequence[OptionLayer]) -> float | None:
    """What the last table that speaks of it says; None if that is never, or none does."""
    said = (layer.options.ttl for layer in reversed(layers))
    return next((ttl for ttl in said if ttl is not None), None) or None


def _recycle_bytes(layers: Sequence[OptionLayer]) -> int | None:
    """Likewise."""
    said = (layer.options.recycle_above for layer in reversed(layers))
    return next((size for size in said if size is not None), None) or None


def _last_written(rules: Sequence[ModelRule], key: str) -> tuple[str, ...]:
    """The same for lists, which are empty where they are not written."""
    written = [getattr(rule.settings, key) for rule in rules if key in rule.settings.model_fields_set]
    return tuple(written[-1]) if written else ()


def _without(layer: OptionLayer, keys: Sequence[str]) -> OptionLayer:
    """A layer that says nothing of `keys`.

    The last word on them is `true`: what was found beside the model, which lies below all rules.
    """
    if all(getattr(layer.options, key) is None for key in keys):
        return layer
    return OptionLayer(layer.source, layer.options.model_copy(update=dict.fromkeys(keys)))


def _refuse_unfit(spec: ModelSpec) -> None:
    for what, problem in (("name", ini.section_problem(spec.name)), ("path", ini.value_problem(spec.path))):
        if problem:
            raise OptionError(f"its {what} {problem}", hint="Rename the file or its folder.")


@functools.lru_cache(maxsize=512)
def _entries(layers: tuple[OptionLayer, ...], flags: FlagSet, binary: str) -> Mapping[str, str]:
    """What these tables come to. Most models of a folder have the same: it is worked out once."""
    entries = dict(resolve(layers, flags, binary=binary).preset)
    draft, kind = find_typed("draft", flags), find_typed("draft_type", flags)
    if draft and kind and draft.key in entries and kind.key not in entries:
        name = PurePath(entries[draft.key]).name
        named = next((value for prefix, value in _DRAFT_TYPES.items() if name.startswith(prefix)), None)
        if named in kind.placeholder.split(","):
            entries[kind.key] = named
    return dict(sorted(entries.items()))


def _paths(key: str, value: object) -> tuple[str, ...]:
    if key == "lora" and isinstance(value, tuple):
        return tuple(split_scale(each)[0] for each in value)
    if key == "chat_template" and isinstance(value, str):
        return (value,) if is_template_file(value) else ()
    return (value,) if isinstance(value, str) else ()


def _path_problem(path: str, *, is_folder: bool) -> str | None:
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (a str with a NUL raises ValueError, as Path's does)
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    except ValueError:
        return "is no path"
    if is_folder:
        if not stat.S_ISDIR(mode):
            return "is no folder"
        return None if os.access(path, os.W_OK | os.X_OK) else "cannot be written by this user"
    if not stat.S_ISREG(mode):
        return "is no file"
    return None if os.access(path, os.R_OK) else "cannot be read by this user"
