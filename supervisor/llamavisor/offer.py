"""From what a router is to serve to what it is told: a preset's sections, and the folder of links that it scans."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llamavisor import preset
from llamavisor.errors import OptionError
from llamavisor.helptext import FlagSet
from llamavisor.sections import ModelSpec, section, without_clashes
from llamavisor.shelf import Offer, Offered, Withheld, told_names

NAME_BYTES = 255
"""The longest name of a file."""


def make_offer(
    specs: Mapping[str, ModelSpec],
    *,
    kept: Mapping[str, Offered],
    before: Offer,
    missing: Mapping[str, str],
    flags: FlagSet,
    binary: str,
) -> Offer:
    """What a router is told of `specs`. Pure.

    A model whose options this llama-server does not take is withheld, with the reason: one bad section would keep the
    whole router from starting.

    Args:
        specs: what it is to serve, by name.
        kept: what must stay to the letter, because it runs: the router stops what changes.
        before: the last offer to the same process; its sections are used again where nothing has changed.
        missing: why models cannot be served because of files that their tables name, by name.
        flags: the options that the found build knows.
        binary: its path, for messages.
    """
    # A router keeps the aliases of a model that runs, and refuses a whole reload for a name that is one of them.
    taken = told_names(kept.values())
    cleared, notes = without_clashes(spec for name, spec in specs.items() if name not in kept)
    models: dict[str, Offered] = dict(kept)
    withheld: dict[str, Withheld] = {}
    waits_for: set[str] = set()
    for name, spec in cleared.items():
        known = before.models.get(name)
        clashes = {taken[word] for word in (name, *spec.aliases) if word in taken}
        waits_for |= clashes
        is_same = known is not None and known.spec is spec is specs[name] and name not in before.notes
        if name in taken:
            withheld[name] = Withheld(specs[name], "its name is still an alias of a model that is loaded")
        elif name in missing:
            withheld[name] = Withheld(specs[name], missing[name])
        elif known is not None and is_same and not clashes:
            models[name] = known
        else:
            free = tuple(alias for alias in spec.aliases if alias not in taken)
            if free != spec.aliases:
                notes[name] = "an alias of it is still that of a model that is loaded"
            try:
                models[name] = Offered(specs[name], section(replace(spec, aliases=free), flags, binary=binary))
            except OptionError as error:
                withheld[name] = Withheld(specs[name], f"{error}. {error.hint}" if error.hint else str(error))
    return Offer(dict(sorted(models.items())), withheld, notes, frozenset(waits_for))


def to_preset(offer: Offer) -> preset.Preset:
    """The preset that says so."""
    return preset.for_router({name: each.section for name, each in offer.models.items()})


def link_all(folder: Path, offer: Offer) -> None:
    """Make `folder` hold one symlink for each model of `offer`, called as the router calls the model, and nothing else.

    The router scans this folder instead of the user's, and so lists neither junk nor what is half copied. The preset's
    section says the same with the true path; a model whose name no file can have is known by its section alone.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    wanted = {f"{name}.gguf": each.spec.path for name, each in offer.models.items() if _fits(name)}
    with os.scandir(folder) as entries:
        there = {entry.name: str(Path(entry.path).readlink()) if entry.is_symlink() else "" for entry in entries}
    for name, target in there.items():
        if name not in wanted or wanted[name] != target:
            with suppress(IsADirectoryError, PermissionError):  # nothing of ours: a person's folder stays
                (folder / name).unlink()
    for name, target in wanted.items():
        if there.get(name) != target:
            with suppress(FileExistsError):
                (folder / name).symlink_to(target)


def _fits(name: str) -> bool:
    return "/" not in name and len(os.fsencode(name)) + len(".gguf") <= NAME_BYTES
