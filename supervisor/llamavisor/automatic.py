"""What a model is told because of what it is, and what lies beside it, without anybody having written it.

These tables lie above those of routers and below those of models: whoever writes an option for the model itself has
the last word. Only what follows from the memory budget lies below all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llamavisor.budgets import Allowance, GpuAllowance
from llamavisor.footprint import (
    LEAST_CTX,
    Device,
    MemoryOptions,
    Plan,
    Weights,
    cache_ram_bytes,
    default_ctx_size,
    fit_target,
    read_said,
    said_by,
)
from llamavisor.gguf import Header, Kind
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.rules import ModelSettings
from llamavisor.spellings import typed_name

CTX_SIZE_MAX = 8192
"""Tokens of context for an embedding or rerank model when nobody has said: its batch is as large, and costs memory."""

BESIDE = "automatic (found beside it)"
MEMORY = "automatic (fits the memory budget)"
_MIB = 1024 * 1024
_SOURCES = {Kind.EMBEDDING: "automatic (an embedding model)", Kind.RERANK: "automatic (a rerank model)"}


def for_kind(
    kind: Kind, n_ctx_train: int | None, base: Sequence[OptionLayer], own: Sequence[OptionLayer]
) -> OptionLayer | None:
    """The options of an embedding or rerank model, None for any other.

    Without them llama-server answers 501, and 500 to a text that is longer than its physical batch of 512 tokens: a
    text goes through it in one batch. Pure.

    Args:
        kind: what the model is for.
        n_ctx_train: tokens that it was trained for, None when its file does not say.
        base: the tables of its router, lowest precedence first.
        own: the tables of the model itself, likewise. What they say is not said here as well, but the batch follows
            their context size.
    """
    if kind not in _SOURCES:
        return None
    purpose = "embeddings" if kind is Kind.EMBEDDING else "reranking"
    if _last(own, purpose) in (False, "off"):
        return None
    context = _context(n_ctx_train, base, own)
    options: dict[str, object] = {purpose: True}
    if context:
        options |= {"ctx_size": context, "batch_size": context, "ubatch_size": context}
    return OptionLayer(_SOURCES[kind], ModelSettings.model_validate(options))


def for_neighbours(projector: str | None, draft: str | None) -> OptionLayer | None:
    """The files found beside a model as options of it, None without any."""
    found = {"mmproj": projector, "draft": draft}
    written = {key: path for key, path in found.items() if path is not None}
    return OptionLayer(BESIDE, ModelSettings.model_validate(written)) if written else None


def for_memory(
    allowance: Allowance,
    header: Header | None,
    sizes: tuple[int, int],
    layers: tuple[OptionLayer, ...],
    *,
    knows: Callable[[str], bool],
) -> OptionLayer | None:
    """What keeps a model within the memory budgets, as far as nobody has said it; None if all is said. Pure.

    Its context, if nobody has chosen one: left to itself llama-server takes what the model was trained for, be it many
    times the machine. What its prompt cache may grow to, which is 8 GiB else. And what llama.cpp's fit leaves free on
    each GPU, so that it fits the model into the budget, and not into what happens to be free.

    Args:
        allowance: what the budgets come to.
        header: of its first file, None when it cannot be read.
        sizes: bytes of its own files, and of those found beside it that are used.
        layers: all tables that speak for it, lowest precedence first.
        knows: whether the build knows an option. What it does not know is left out.
    """
    told = _told(layers)
    plan = Plan(options=told.options, n_ctx=0, devices=_devices(allowance.gpus))
    budgets = {device.name: device for device in allowance.gpus}
    used = tuple(budgets[device.name] for device in plan.used)
    ctx_size = None
    if not told.has_context:
        ctx_size = LEAST_CTX if header is None else _default_ctx(header, sizes, plan, _budget(allowance, used))
    args: list[str] = []
    if allowance.ram_bytes is not None and not told.has_cache_ram and knows("--cache-ram"):
        args += ["--cache-ram", str(cache_ram_bytes(allowance.ram_bytes, allowance.models_max) // _MIB)]
    if told.is_fitted and knows("--fit-target"):
        margins = [(gpu.total, gpu.budget) for gpu in used if gpu.total is not None and gpu.budget is not None]
        target = fit_target(margins) if len(margins) == len(used) else None
        args += ["--fit-target", target] if target is not None else []
    return _layer(ctx_size, tuple(args))


@dataclass(frozen=True, slots=True)
class _Told:
    """What tables say of memory.

    Attributes:
        options: how the model is run.
        has_context: whether somebody has chosen its context.
        has_cache_ram: whether somebody has bounded its prompt cache.
        is_fitted: whether llama.cpp is to fit it in, and nobody has said how.
    """

    options: MemoryOptions
    has_context: bool
    has_cache_ram: bool
    is_fitted: bool


@functools.lru_cache(maxsize=512)
def _told(layers: tuple[OptionLayer, ...]) -> _Told:
    """Most models of a folder have the same tables: they are read once."""
    said = said_by(layers)
    options = read_said(said)
    return _Told(
        options=options,
        has_context="ctx_size" in said or "ctx_per_slot" in said,
        has_cache_ram="cache_ram" in said,
        is_fitted=options.is_fitted and "fit_target" not in said,
    )


@functools.lru_cache(maxsize=64)
def _devices(gpus: tuple[GpuAllowance, ...]) -> tuple[Device, ...]:
    return tuple(Device(gpu.name, gpu.id) for gpu in gpus)


def _budget(allowance: Allowance, used: Sequence[GpuAllowance]) -> int:
    """Bytes of what a model is put on; 0 when they are not known, so that it gets the least context."""
    if not used:
        return allowance.ram_bytes or 0
    budgets = {gpu.id: gpu.budget for gpu in used}.values()
    return sum(budget or 0 for budget in budgets) if None not in budgets else 0


@functools.lru_cache(maxsize=512)
def _default_ctx(header: Header, sizes: tuple[int, int], plan: Plan, budget: int) -> int:
    # What lies beside the model is not read for this: it is spread as adapters are, and its context is left out.
    own, beside = sizes
    return default_ctx_size(Weights(header=header, size_bytes=own, adapter_bytes=beside), plan, budget)


@functools.lru_cache(maxsize=512)
def _layer(ctx_size: int | None, args: tuple[str, ...]) -> OptionLayer | None:
    """The same object for the same options, so that what follows from it is worked out once."""
    written = ({} if ctx_size is None else {"ctx_size": ctx_size}) | ({"args": args} if args else {})
    return OptionLayer(MEMORY, ModelOptions.model_validate(written)) if written else None


def _context(n_ctx_train: int | None, base: Sequence[OptionLayer], own: Sequence[OptionLayer]) -> int | None:
    """Tokens of context. There are three cases; the first that holds counts.

    1. The model's own tables say it; 0 is what it was trained for.
    2. The router's tables say it: that, but no more than it was trained for.
    3. What it was trained for, but not all of a very long context.
    """
    asked = _number(_last(own, "ctx_size"))
    if asked is not None:
        return asked or n_ctx_train
    common = _number(_last(base, "ctx_size"))
    if n_ctx_train is None:
        return common or None
    return min(n_ctx_train, common or CTX_SIZE_MAX)


def _last(layers: Sequence[OptionLayer], name: str) -> object:
    """What the last table that sets a typed option sets it to, be it in its args; None if none does."""
    for layer in reversed(layers):
        value: object = getattr(layer.options, name)
        if value is not None:
            return value
        args = layer.options.args
        for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
            if word.startswith("-") and typed_name(word) == name:
                return "off" if word.startswith("--no-") else following
    return None


def _number(value: object) -> int | None:
    text = str(value)
    return int(text) if text.isascii() and text.isdecimal() else None
