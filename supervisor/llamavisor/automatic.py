"""What a model is told because of what it is, and what lies beside it, without anybody having written it.

These tables lie above those of routers and below those of models: whoever writes an option for the model itself has
the last word.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from llamavisor.flags import typed_name
from llamavisor.gguf import Kind
from llamavisor.options import OptionLayer
from llamavisor.rules import ModelSettings

CTX_SIZE_MAX = 8192
"""Tokens of context for an embedding or rerank model when nobody has said: its batch is as large, and costs memory."""

BESIDE = "automatic (found beside it)"
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
