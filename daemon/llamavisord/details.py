"""Everything that is known of one model: its files and their header, what it is told and by whom, its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import anyio

from llamavisor import flags, preset
from llamavisor.api import RouterApi
from llamavisor.catalog import ModelFile
from llamavisor.errors import ApiError, ModelNotFoundError, OptionError
from llamavisor.launch import Launch
from llamavisor.likeness import near
from llamavisor.options import OptionLayer
from llamavisor.router import Router
from llamavisor.sections import layers_in_force
from llamavisor.shelf import Offered
from llamavisor.threads import run_in_thread
from llamavisord.inventory import Inventory, Known
from llamavisord.redaction import HIDDEN, is_secret, without_secrets

COMMAND_TIMEOUT_S = 5.0
"""How long a router may take to tell a model's command line; who asks us waits for 15 s."""
NEAR_MAX = 3
_PLACE = "its place in the folder"
_OF_NO_ROUTER = ("file_state", "size_bytes", "quantization", "architecture", "kind", "parameter_count", "n_ctx_train")


async def describe(inventory: Inventory, name: str, *, router: str | None = None) -> dict[str, Any]:
    """Everything that is known of a model.

    Args:
        inventory: all models.
        name: a model's name, else an alias.
        router: only what this router makes of it, None for all.

    Raises:
        ModelNotFoundError: nobody knows it, or not that router.
    """
    found = inventory.called(name)
    if not found and (real := inventory.real_name(name)) is not None:
        found = inventory.called(real)
    if router is not None:
        found = [known for known in found if known.router is not None and known.router.name == router]
    if not found:
        raise await _not_there(inventory, name, router)
    told = [(known.router, known) for known in found if known.router is not None]
    entry = next((known.entry for known in found if known.entry is not None), None)
    view: dict[str, Any] = {
        "model": _summary(inventory, found),
        "files": [_file(file) for file in entry.files] if entry else [],
        "projector": _file(entry.projector) if entry and entry.projector else None,
        "draft": _file(entry.draft) if entry and entry.draft else None,
        "header": _as_json(entry.header) if entry and entry.header else None,
        "effective": {},
        "origins": {},
        "layers": {},
        "command": {},
    }
    for each, known in told:
        offered, launch = each.shelf.offer.models.get(known.name), each.launch
        view["command"][each.name] = None
        if offered is not None and launch is not None:
            layers = layers_in_force(offered.spec, launch.found.flags)
            effective = {**preset.ALWAYS, **offered.section}
            view["effective"][each.name] = {
                key: HIDDEN if is_secret(key) else value for key, value in sorted(effective.items())
            }
            view["origins"][each.name] = _origins(effective, offered, layers, launch)
            view["layers"][each.name] = [layer.source for layer in layers]
    async with anyio.create_task_group() as group:
        for each, known in told:
            if each.is_serving:
                group.start_soon(_ask_for_command, each, known.name, view["command"])
    return view


def _summary(inventory: Inventory, found: Sequence[Known]) -> dict[str, Any]:
    """The model itself, and what each router makes of it."""
    items = [inventory.item(known) for known in found]
    first = items[0]
    return {
        "name": first["name"],
        "state": first["state"],
        "problem": next((item["problem"] for item in items if item["problem"]), None),
        "notes": list(dict.fromkeys(note for item in items for note in item["notes"])),
        **{key: first[key] for key in _OF_NO_ROUTER},
        "aliases": list(dict.fromkeys(alias for item in items for alias in item["aliases"])),
        "tags": list(dict.fromkeys(tag for item in items for tag in item["tags"])),
        "path": first["path"],
        "routers": [item for item in items if item["router"] is not None],
    }


async def _not_there(inventory: Inventory, name: str, router: str | None) -> ModelNotFoundError:
    known = inventory.known()
    if router is not None:
        known = [each for each in known if each.router is not None and each.router.name == router]
    # Ten thousand names are compared for a quarter of a second.
    meant = await run_in_thread(_meant, name, list(dict.fromkeys(each.name for each in known)))
    hint = f"did you mean {' or '.join(meant)}?" if meant else "see `llamavisor models`"
    on = f" on router {router}" if router is not None else ""
    return ModelNotFoundError(f"no model {name!r}{on}", hint=hint)


def _meant(name: str, names: Sequence[str]) -> list[str]:
    """Names that may have been meant: those that hold this one, else those that look like it."""
    part = name.casefold()
    holding = [each for each in names if part in each.casefold()]
    return sorted(holding, key=len)[:NEAR_MAX] or near(name, names, most=NEAR_MAX)


def _file(file: ModelFile) -> dict[str, Any]:
    return {"path": file.path, "size_bytes": file.id.size, "mtime_unix": file.id.mtime_ns / 1e9}


def _as_json(value: object) -> Any:
    """A header as JSON: a dataclass is an object, an enum its value."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, float) and (value != value or value in {float("inf"), float("-inf")}):  # noqa: PLR0124
        return str(value)  # JSON has no word for it
    return value


def _origins(
    effective: Mapping[str, str], offered: Offered, layers: Sequence[OptionLayer], launch: Launch
) -> dict[str, str]:
    """Which table each entry is from: the last one that speaks of it."""
    said: dict[str, str] = {}
    for layer in layers:
        with suppress(OptionError):  # together they are right
            alone = flags.resolve((layer,), launch.found.flags, binary=str(launch.found.path))
            said |= dict.fromkeys(alone.preset, layer.source)
    own = offered.spec.layers
    for key, field_name in (("alias", "aliases"), ("tags", "tags")):
        written = [layer.source for layer in own if field_name in layer.options.model_fields_set]
        said[key] = written[-1] if written else _PLACE
    said["model"] = "its file"
    said |= dict.fromkeys(preset.ALWAYS.keys() - offered.section.keys(), "always")
    # What follows from a table that takes something back is not in it.
    rest = own[-1].source if own else _PLACE
    return {key: said.get(key, rest) for key in sorted(effective)}


async def _ask_for_command(router: Router, name: str, answers: dict[str, Any]) -> None:
    """Ask a router for a model's command line; it need not answer."""
    if router.url is None:
        return
    with anyio.move_on_after(COMMAND_TIMEOUT_S), suppress(ApiError):
        async with RouterApi(router.url, api_key=router.settings.api_key) as api:
            command = await api.command_line(name)
            answers[router.name] = list(without_secrets(command)) if command else None
