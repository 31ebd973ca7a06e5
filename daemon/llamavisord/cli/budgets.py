"""Budgets of memory as `status` shows them: a line for each device, on a terminal with a bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from llamavisor.units import format_size
from llamavisord.cli.render import Screen, shortened
from llamavisord.plain import plain

_BAR_WIDTH = 24
_NARROWEST_BAR = 8
"""A bar is rather left out than made shorter."""
_NAME_WIDTH = 24
_UNKNOWN = "unknown"
_MODELS, _FREE, _OTHERS, _BUDGET, _NOT_KNOWN = "#", ".", "=", "|", "?"
_COLOURS: Mapping[str, str] = {_MODELS: "green", _FREE: "dim", _OTHERS: "yellow", _BUDGET: "bold", _NOT_KNOWN: "dim"}


def show_budgets(screen: Screen, memory: Mapping[str, Any]) -> None:
    """Write what models take of each device and may take, below an empty line; nothing if no device is known.

    Args:
        screen: where to write; one that is too narrow for bars gets the numbers alone.
        memory: "memory" of the answer to `status`.
    """
    devices = memory["devices"]
    if not devices:
        return
    names = [plain(device["name"]) for device in devices]
    texts = [_numbers(device) for device in devices]
    room = 0
    if screen.is_terminal:
        names = [shortened(name, _NAME_WIDTH) for name in names]
        room = screen.width - max(map(len, texts)) - len("  []  ")
        if room - max(map(len, names)) < _BAR_WIDTH:
            names = [shortened(plain(name), _NAME_WIDTH) for name in short_names(devices).values()]
    indent = max(map(len, names))
    width = min(room - indent, _BAR_WIDTH)
    screen.line()
    shown = "" if memory["enforced"] else ' (budgets are shown and not enforced: serve = "router")'
    screen.line(f"{screen.paint('MEMORY', 'bold')}{shown}")
    for name, device, text in zip(names, devices, texts, strict=True):
        drawn = f"[{_painted(screen, bar(device, width))}]  " if width >= _NARROWEST_BAR else ""
        screen.line(f"{name.ljust(indent)}  {drawn}{text}")


def short_names(devices: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The first words of the devices' names, by their ids: "CUDA0". The id itself where several have the same."""
    short = {device["id"]: str(device["name"]).partition(" (")[0] for device in devices}
    count = Counter(short.values())
    return {key: name if count[name] == 1 else key for key, name in short.items()}


def bar(device: Mapping[str, Any], width: int) -> str:
    """A device in so many characters: its models from the left, all others from the right, a mark at the budget.

    What is not known is drawn as such and never as free.
    """
    total, budget = device["total_bytes"], device["budget_bytes"]
    models, others = device["models_bytes"], device["others_bytes"]
    if not total:
        return _NOT_KNOWN * width
    left = _share(models or 0, total, width)
    right = min(_share(others or 0, total, width), width - left)
    middle = _NOT_KNOWN if models is None or others is None else _FREE
    cells = _MODELS * left + middle * (width - left - right) + _OTHERS * right
    if budget is None or budget >= total:
        return cells
    at = min(round(width * budget / total), width - 1)
    return f"{cells[:at]}{_BUDGET}{cells[at + 1 :]}"


def _share(part: int, total: int, width: int) -> int:
    """So many characters of `width`; whatever there is has one at the least."""
    return min(max(round(width * part / total), 1), width) if part else 0


def _painted(screen: Screen, cells: str) -> str:
    return "".join(screen.paint("".join(run), _COLOURS[cell]) for cell, run in groupby(cells))


def _numbers(device: Mapping[str, Any]) -> str:
    """What a device's models take and may take, and what others take."""
    models, budget, others = device["models_bytes"], device["budget_bytes"], device["others_bytes"]
    why = f" ({plain(device['reason'])})" if device["reason"] and None in (models, budget, others) else ""
    if budget is None and others is None:
        # A zero would look like knowledge of the device, and is only that no model is on it.
        return f"{format_size(models)} for models, else {_UNKNOWN}{why}" if models else f"{_UNKNOWN}{why}"
    expected = "expected " if models and device["measured_bytes"] is None else ""
    return f"{_of(models, budget)} {expected}for models, {_size(others)} by others{why}"


def _of(part: int | None, whole: int | None) -> str:
    """As in "12.3 of 22.0 GiB": the unit of both is said once."""
    number, _, unit = _size(part).partition(" ")
    if whole is not None and unit == format_size(whole).partition(" ")[2]:
        return f"{number} of {format_size(whole)}"
    return f"{_size(part)} of {_size(whole)}"


def _size(size_bytes: int | None) -> str:
    return _UNKNOWN if size_bytes is None else format_size(size_bytes)
