"""The options of models that a configuration names, typed, and checked as far as that needs no binary."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llamavisor.quantities import parse_duration, parse_size

OURS = frozenset({"ttl", "pin", "hang_after", "recycle_above"})
"""What tables say of how models are looked after: it is ours to heed, and llama-server is never told."""
HANG_AFTER_S = 60.0
"""How long a process may be silent and do nothing, if nobody has said."""


_HANG_AFTER_MIN_S = 5.0
_SIZE_MIN = 1024 * 1024


def _no_bool(value: object) -> object:
    if isinstance(value, bool):  # TOML's `true` would pass for 1
        raise ValueError("must be a number, not true or false")  # noqa: TRY004 - pydantic reports ValueErrors
    return value


def _gpu_layers(value: object) -> object:
    text = str(value).strip()
    if text in ("auto", "all"):
        return text
    if isinstance(value, bool) or not re.fullmatch(r"\d+", text):
        raise ValueError('must be "auto", "all", or a number of layers from 0 up')
    return int(text)


def _on_off(value: object) -> object:
    return ("off", "on")[value] if isinstance(value, bool) else value


def _device_names(value: object) -> object:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return value
    names = tuple(name.strip() if isinstance(name, str) else name for name in value)
    if any(isinstance(name, str) and (not name or "," in name) for name in names):
        raise ValueError('must be a list of names, such as ["CUDA0", "CUDA1"]')
    if len(names) > 1 and any(str(name).lower() in ("none", "cpu") for name in names):
        raise ValueError('"none" (the CPU alone) cannot stand beside other devices')
    # llama-server refuses the name CPU; what people mean by it is spelled "none"
    return ("none",) if [str(name).lower() for name in names] == ["cpu"] else names


def _ttl(value: object) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{error}; 0 for never") from None


def _hang_after(value: object) -> float:
    seconds = _ttl(value)
    if 0 < seconds < _HANG_AFTER_MIN_S:
        raise ValueError(f"must be at least {_HANG_AFTER_MIN_S:.0f} s: slow is not dead; 0 for never")
    return seconds


def _size(value: object) -> int:
    try:
        size_bytes = parse_size(value)
    except ValueError as error:
        raise ValueError(f"{error}; 0 for never") from None
    if size_bytes < _SIZE_MIN and str(value).strip() not in {"0", "0.0"}:
        raise ValueError('less than any model takes; write it with its unit, as in "12GiB"; 0 for never')
    return size_bytes


def _words(value: object) -> object:
    if isinstance(value, str):
        raise ValueError('must be a list with one string per word, such as ["--threads", "8"]')  # noqa: TRY004
    if not isinstance(value, list | tuple):
        return value
    return tuple(str(word) if type(word) in (int, float) else word for word in value)


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
_Temperature = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=10, allow_inf_nan=False)]
_Probability = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)]
_Penalty = Annotated[
    float, BeforeValidator(_no_bool), Field(gt=0, le=10, allow_inf_nan=False, title="number above 0, at most 10")
]
Share = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)]
GpuLayers = Annotated[
    Literal["auto", "all"] | int, BeforeValidator(_gpu_layers), Field(title='"auto", "all" or whole number from 0 up')
]
Devices = Annotated[tuple[str, ...], BeforeValidator(_device_names), Field(min_length=1, title="list of names")]
_Shares = Annotated[tuple[Share, ...], Field(min_length=1, title="list of numbers")]
_OnOffAuto = Annotated[Literal["on", "off", "auto"], BeforeValidator(_on_off)]
_IdleSeconds = Annotated[int, BeforeValidator(parse_duration), Field(ge=1, title="duration of at least 1s")]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]

LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]


class ModelOptions(BaseModel):
    """How models are loaded and served; None leaves the choice to an earlier table, or to llama-server.

    Raises pydantic's ValidationError on an unknown key and on a value out of range. Whether the found
    llama-server knows an option is for `llamavisor.flags.resolve` to say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    is_per_model: ClassVar[bool] = False
    """Whether a table of this kind speaks for single models only, never for a router."""

    gpu_layers: GpuLayers | None = None
    """Layers to keep in GPU memory: "auto" (as many as fit), "all", or a number."""
    devices: Devices | None = None
    """Devices to use, as llama-server --list-devices names them; ["none"] keeps models on the CPU."""
    split_mode: Literal["none", "layer", "row", "tensor"] | None = None
    """How a model is spread over several GPUs."""
    tensor_split: _Shares | None = None
    """Share of the model for each device, in the order of devices, such as [3, 1]."""
    main_gpu: Natural | None = None
    """Index of the GPU to use with split_mode none, or for intermediate results with row."""
    flash_attn: _OnOffAuto | None = None
    """Whether to use Flash Attention."""
    ctx_size: Natural | None = None
    """Context size in tokens, all slots together; 0 takes the model's own. If it is not said: 4096, doubled as long as
    context and buffers stay within a quarter of the memory budget and the model within all of it, never beyond what the
    model was trained for."""
    parallel: Count | None = None
    """Slots: how many requests a model answers at once."""
    threads: Count | None = None
    """CPU threads for generation."""
    batch_size: Count | None = None
    """Logical batch size in tokens."""
    ubatch_size: Count | None = None
    """Physical batch size in tokens."""
    cache_type_k: CacheType | None = None
    """Data type of the keys in the KV cache."""
    cache_type_v: CacheType | None = None
    """Data type of the values in the KV cache."""
    load_mode: LoadMode | None = None
    """How a file gets into memory: mapped, locked, read directly ("dio"), or plainly read ("none")."""
    fit: bool | None = None
    """Whether options that are not set are adjusted to the memory that is free when a model is loaded."""
    jinja: bool | None = None
    """Whether the model's own chat template is used through Jinja."""
    cont_batching: bool | None = None
    """Whether requests are batched continuously."""
    embeddings: bool | None = None
    """Whether models serve embeddings only. If it is not said, true for a model that its header makes out to embed."""
    reranking: bool | None = None
    """Whether models serve reranking. If it is not said, true for a model that its header makes out to rerank."""
    sleep_idle_seconds: _IdleSeconds | None = None
    """Time without requests, such as "5m", after which a model frees its memory and keeps its process."""
    temperature: _Temperature | None = None
    """How freely models choose among tokens if a request does not say; 0 takes the likeliest."""
    top_p: _Probability | None = None
    """Likewise: they choose among the likeliest tokens that have this share together; 1 for all."""
    top_k: Natural | None = None
    """Likewise: they choose among so many of the likeliest tokens; 0 for all."""
    min_p: _Probability | None = None
    """Likewise: tokens below this share of the likeliest are left out; 0 for none."""
    repeat_penalty: _Penalty | None = None
    """Likewise: how much is held back what was said just before; 1 for not at all."""
    max_tokens: Count | None = None
    """Likewise: the longest answer, in tokens."""
    ttl: Annotated[float, BeforeValidator(_ttl), Field(title="duration")] | None = None
    """Time without requests, such as "1h30m", after which a model is unloaded; 0, and if it is not said, never."""
    hang_after: Annotated[float, BeforeValidator(_hang_after), Field(title="duration, 0 or at least 5s")] | None = None
    """How long a router or a model may neither answer nor do anything until it is ended; 0 for ever."""
    recycle_above: Annotated[int, BeforeValidator(_size), Field(title="size, 0 or at least 1MiB")] | None = None
    """Anonymous memory and swap, such as "12GiB", beyond which a model is loaded anew when nobody uses it, ten minutes
    after its last load at the earliest; 0, and if it is not said, never."""
    args: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    """Anything else that llama-server takes, one string per word: ["--top-k", "40"]. Added to those of earlier tables,
    in the place of the same option there."""


@dataclass(frozen=True, slots=True)
class OptionLayer:
    """One table of options, and where it was written.

    Attributes:
        source: names the table in messages: `[defaults]`, `[[router]] gpu0`, `command line`, `[model."qwen*"]`.
        options: what it says.
    """

    source: str
    options: ModelOptions


@functools.lru_cache(maxsize=512)
def without_ours(layers: tuple[OptionLayer, ...]) -> tuple[OptionLayer, ...]:
    """The same tables without what they say of `OURS`; those that say nothing else are left out. Pure.

    Most models of a folder have the same tables: it is worked out once, and they share the outcome.
    """
    kept = []
    for layer in layers:
        options = layer.options
        said = options.model_fields_set & OURS
        if said:
            layer = OptionLayer(layer.source, options.model_copy(update=dict.fromkeys(said)))  # noqa: PLW2901
        if options.model_fields_set > said:
            kept.append(layer)
    return tuple(kept)


def hang_after_s(layers: Sequence[OptionLayer]) -> float | None:
    """After how many silent seconds without progress a process hangs, by the last table that says; None for never."""
    said = next((each for layer in reversed(layers) if (each := layer.options.hang_after) is not None), HANG_AFTER_S)
    return said or None
