"""Every model that is known, as the control API shows it: the routers' tables beside the catalogs of their folders.

Ten thousand models take a tenth of a second and make megabytes: everything that goes over all of them does so in steps
between which others have their turn.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from llamavisor.catalog import Entry, EntryState, FileId
from llamavisor.events.model import CHANGES
from llamavisor.fleet import Fleet
from llamavisor.folder import Folder
from llamavisor.models import Model
from llamavisor.refresh import REMEDIES, remedy
from llamavisor.router import Router
from llamavisor.settings import OnOverwrite
from llamavisor.states import RESIDENT, Change, ModelState

STEP = 200
"""Models that are shown without giving others a turn: some milliseconds."""
WITHHELD = "withheld"
"""The state of a model whose files are all right and that no router is told of, because it would not take it."""


@dataclass(frozen=True, slots=True)
class Known:
    """One model: on one router, or on none.

    Attributes:
        name: what it is called.
        folder: the models folder that it belongs to, None when that is not under watch.
        router: who lists it, None for a model that no router lists.
        model: what the router says of it; set if and only if `router` is.
        entry: what the catalog says of it, None when the catalog does not know it.
    """

    name: str
    folder: Path | None
    router: Router | None = None
    model: Model | None = None
    entry: Entry | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to tell of it but that it could be loaded."""
        return self.model is not None and self.model.state is ModelState.UNLOADED


class Inventory:
    """The models of a fleet as they are now. Made anew for every answer.

    Args:
        fleet: the routers and folders.
        on_overwrite: what happens to a loaded model whose file was overwritten.
    """

    def __init__(self, fleet: Fleet, *, on_overwrite: OnOverwrite = "reload") -> None:
        self._fleet = fleet
        self._on_overwrite = on_overwrite
        self._folders: dict[Path, Folder] = {folder.path: folder for folder in fleet.folders}
        self._to_unix = time.time() - anyio.current_time()  # right for as long as nobody sets the clock
        self._stale = {router.name: dict(router.shelf.stale(router.table)) for router in fleet}
        self._withheld: dict[tuple[Path, str], dict[str, str]] = {}  # by folder and model: routers and reasons
        for router in fleet:
            for name, withheld in router.shelf.offer.withheld.items():
                at = (router.settings.models_dir, name)
                self._withheld.setdefault(at, {})[router.name] = withheld.reason

    def __repr__(self) -> str:
        return f"<Inventory of {self._fleet!r}>"

    def known(self) -> list[Known]:
        """All models by name: one for each router that lists it, one for a model that none lists."""
        found: list[Known] = []
        listed: dict[Path, set[str]] = {}
        for router in self._fleet:
            path = router.settings.models_dir
            entries = self._entries(path)
            found += [Known(model.name, path, router, model, entries.get(model.name)) for model in router.table]
            listed.setdefault(path, set()).update(model.name for model in router.table)
        for path, folder in self._folders.items():
            taken = listed.get(path, set())
            found += [Known(entry.name, path, entry=entry) for entry in folder.catalog if entry.name not in taken]
        found.sort(key=lambda each: (each.name, each.router.name if each.router else ""))
        return found

    def called(self, name: str) -> list[Known]:
        """What is known of the models of this very name."""
        found: list[Known] = []
        listed: set[Path] = set()
        for router in self._fleet:
            path, model = router.settings.models_dir, router.table.get(name)
            if model is not None:
                found.append(Known(name, path, router, model, self._entries(path).get(name)))
                listed.add(path)
        for path in self._folders:
            entry = self._entries(path).get(name)
            if entry is not None and path not in listed:
                found.append(Known(name, path, entry=entry))
        return found

    def real_name(self, alias: str) -> str | None:
        """The name of the model that has this alias, None if there is none."""
        for router in self._fleet:
            if (name := router.shelf.name_of(alias)) != alias:
                return name
        for folder in self._folders.values():
            for entry in folder.catalog:
                if alias in entry.aliases:
                    return entry.name
        return None

    def _entries(self, folder: Path) -> Mapping[str, Entry]:
        known = self._folders.get(folder)
        return known.catalog.entries if known is not None else {}

    def item(self, known: Known) -> dict[str, Any]:
        """One model; times are Unix seconds, sizes bytes, contexts tokens."""
        model, entry, router = known.model, known.entry, known.router
        offered = router.shelf.offer.models.get(known.name) if router is not None else None
        stale = self._stale[router.name].get(known.name) if router is not None else None
        told = offered.spec.own_files if offered is not None else None
        # Of what is in memory the file on disk says nothing any more once it is another one.
        seen = entry if stale is None or entry is None or _ids(entry) == told else None
        header = seen.header if seen is not None else None
        size_bytes = seen.size_bytes if seen is not None else sum(file.size for file in told) if told else None
        aliases = _words(offered.section, "alias") if offered else list(entry.aliases) if entry else []
        path = entry.path if entry is not None else None
        if model is not None and model.path is not None:
            path = str(model.path)
        return {
            "name": known.name,
            "router": router.name if router is not None else None,
            "state": self._state(known),
            "file_state": entry.state.value if entry is not None else None,
            "problem": self._problem(known, stale),
            "notes": self._notes(known),
            "stale": stale.value if stale is not None else None,
            "size_bytes": size_bytes,
            "quantization": (header.quantization or None) if header is not None else None,
            "architecture": (header.architecture or None) if header is not None else None,
            "kind": header.kind.value if header else offered.spec.kind.value if offered else None,
            "parameter_count": (seen.parameter_count or None) if seen is not None else None,
            "n_ctx": model.n_ctx if model is not None else None,
            "n_ctx_train": header.context_length if header else offered.spec.n_ctx_train if offered else None,
            "aliases": aliases,
            "tags": list(offered.spec.tags) if offered else [],
            "used_unix": self._unix(model.used_at) if model is not None else None,
            "in_flight": model.in_flight if model is not None else None,
            "stage": model.stage if model is not None else None,
            "progress": model.progress if model is not None else None,
            "pid": model.pid if model is not None else None,
            "port": model.port if model is not None else None,
            "since_unix": self._unix(model.since) if model is not None else None,
            "error": model.error if model is not None else None,
            "path": path,
        }

    def _state(self, known: Known) -> str:
        """A router's word if there is one, else what is to be said of the files."""
        if known.model is not None:
            return known.model.state.value
        assert known.entry is not None  # noqa: S101 (one of them knows it)
        return WITHHELD if self._why_withheld(known) else known.entry.state.value

    def _why_withheld(self, known: Known) -> Mapping[str, str]:
        if known.folder is None or (known.entry is not None and known.entry.state is not EntryState.READY):
            return {}
        return self._withheld.get((known.folder, known.name), {})

    def _problem(self, known: Known, stale: Change | None) -> str | None:
        """What keeps it from being as it should be, in one line."""
        problems = [known.model.error] if known.model is not None and known.model.error else []
        reason = known.entry.reason if known.entry is not None else ""
        if stale is not None:
            what = CHANGES[stale]
            if reason:
                what = reason if stale is Change.GONE else f"{what}: {reason}"
            is_fit = known.router is not None and known.name in known.router.shelf.wanted
            problems.append(f"{what}; {REMEDIES[remedy(stale, self._on_overwrite, is_fit=is_fit)]}")
        elif reason:
            problems.append(reason)
        if known.model is None:
            problems += dict.fromkeys(self._why_withheld(known).values())
        return "; ".join(problems) or None

    def _notes(self, known: Known) -> list[str]:
        notes = list(known.entry.notes) if known.entry is not None else []
        if known.router is not None:
            if note := known.router.shelf.offer.notes.get(known.name):
                notes.append(note)
            # Another router serves it, so this is no state of its own.
            why = self._why_withheld(known)
            notes += [f"withheld from router {router}: {reason}" for router, reason in why.items()]
        return notes

    def _unix(self, then: float | None) -> float | None:
        return None if then is None else then + self._to_unix


def _ids(entry: Entry) -> tuple[FileId, ...]:
    return tuple(file.id for file in entry.files)


def _words(section: Mapping[str, str], key: str) -> list[str]:
    return section[key].split(",") if key in section else []


def counts(router: Router) -> dict[str, int]:
    """How many models a router lists, and how many of them are in memory."""
    return {
        "model_count": len(router.table),
        "loaded_count": sum(model.state in RESIDENT for model in router.table),
    }


def folders_view(fleet: Fleet) -> list[dict[str, Any]]:
    """The models folders: how they are watched, and how many models are in which state."""
    return [
        {
            "path": str(folder.path),
            "stale": folder.catalog.stale or None,
            "mode": folder.catalog.mode or None,
            "mode_reason": folder.catalog.mode_reason or None,
            "models": dict(Counter(entry.state.value for entry in folder.catalog)),
        }
        for folder in fleet.folders
    ]


async def in_steps(inventory: Inventory, models: Iterable[Known]) -> list[dict[str, Any]]:
    """The items of these models, with a turn for others now and then."""
    items: list[dict[str, Any]] = []
    async for step in _steps(inventory, models):
        items += step
    return items


async def to_json(inventory: Inventory, models: Iterable[Known]) -> bytes:
    """The same as a JSON array. Made at once it would keep everybody waiting, also in a thread: it holds the GIL."""
    pieces = [json.dumps(step)[1:-1].encode("ascii") async for step in _steps(inventory, models)]
    return b"[" + b", ".join(pieces) + b"]"


async def _steps(inventory: Inventory, models: Iterable[Known]) -> AsyncIterator[list[dict[str, Any]]]:
    for step in _cut(list(models)):
        yield [inventory.item(known) for known in step]
        await anyio.lowlevel.checkpoint()


def _cut(models: list[Known]) -> Iterator[list[Known]]:
    for at in range(0, len(models), STEP):
        yield models[at : at + STEP]
