"""What a preset tells a model, as far as it decides how much memory the model takes."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from llamavisor.flags import spelled
from llamavisor.options import OptionLayer
from llamavisor.rules import split_scale
from llamavisor.spellings import MODEL_SPELLINGS, SPELLINGS

AUTO_SLOTS = 4
"""Slots of a llama-server that is told no number; they share one KV cache (tools/server/server.cpp)."""
DEFAULT_CACHE_RAM_BYTES = 8192 * 1024 * 1024
"""What llama-server lets its prompt cache grow to when it is told nothing (`cache_ram_mib` in common/common.h)."""
ALL_LAYERS = 1 << 20
"""More layers than any model has."""

_OTHERS: Mapping[str, tuple[str, ...]] = {
    "kv_unified": ("--kv-unified", "-kvu"),
    "no_kv_unified": ("--no-kv-unified", "-no-kvu"),
    "ctx_per_slot": ("--kv-unified-per-slot",),
    "swa_full": ("--swa-full",),
    "kv_offload": ("--kv-offload", "-kvo"),
    "no_kv_offload": ("--no-kv-offload", "-nkvo"),
    "cpu_moe": ("--cpu-moe", "-cmoe"),
    "n_cpu_moe": ("--n-cpu-moe", "-ncmoe"),
    "repack": ("--repack",),
    "no_repack": ("--no-repack", "-nr"),
    "mmproj_offload": ("--mmproj-offload",),
    "no_mmproj_offload": ("--no-mmproj-offload",),
    "ctx_checkpoints": ("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"),
    "checkpoint_step": ("--checkpoint-min-step", "-cms"),
    "cache_ram": ("--cache-ram", "-cram"),
    "fit_target": ("--fit-target", "-fitt"),
    "pooling": ("--pooling",),
    "override_tensor": ("--override-tensor", "-ot"),
    "n_cpu_ffn": ("--n-cpu-ffn", "-ncffn"),
    "rpc": ("--rpc",),
    "mmap": ("--mmap",),
    "no_mmap": ("--no-mmap",),
    "mlock": ("--mlock",),
    "direct_io": ("--direct-io", "-dio"),
    "control_vector": ("--control-vector", "--control-vector-scaled"),
}
"""Options that no table of a configuration has a typed name for, in all builds' spellings."""
_NAMES: Mapping[str, str] = {
    spelling.lstrip("-"): name
    for name, spellings in {**SPELLINGS, **MODEL_SPELLINGS, **_OTHERS}.items()
    for spelling in spellings
    if name not in ("load_mode", "chat_template")
} | {"load-mode": "load_mode", "lm": "load_mode"}
"""What a preset's key stands for."""
_TYPED = ("load_mode", *(name for name in (*SPELLINGS, *MODEL_SPELLINGS) if name in _NAMES.values()))
_LOADING = frozenset({"load_mode", "mmap", "no_mmap", "mlock", "direct_io"})
"""Options that together are one: a later table takes back all of them."""
_IN_PIECES = frozenset({"devices", "tensor_split", "draft_devices", "draft_type", "lora", "control_vector"})
"""Lists, which args may say in several words."""
_OPTION = re.compile(r"--?[A-Za-z]")
_TRUTHS = frozenset({"on", "enabled", "true", "1"})
"""`is_truthy` in llama.cpp's common/arg.cpp."""
_FALSEHOODS = frozenset({"off", "disabled", "false", "0"})
"""`is_falsey` there."""
_UNKNOWN_EFFECT = ("override_tensor", "n_cpu_ffn", "rpc")
"""Options that move weights in ways that a formula does not follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """How a model is run, as far as memory goes. The defaults are llama-server's own.

    Attributes:
        ctx_size: tokens of context, all slots together; 0 is what the model was trained for, None is not said.
        parallel: slots, None for as many as llama-server likes.
        kv_unified: whether slots share one KV cache, None when it is not said.
        ctx_per_slot: tokens of context that one slot may have of a shared cache.
        is_fitted: whether llama.cpp fits in what nobody has said, context too.
        batch_size: logical batch in tokens.
        ubatch_size: physical batch in tokens.
        flash_attn: "on", "off" or "auto".
        cache_type_k: type of the KV cache's keys.
        cache_type_v: type of its values.
        swa_full: whether layers with a sliding window keep all of the context.
        kv_offload: whether the KV cache lies where its layer does.
        gpu_layers: layers on GPUs, None for all that there are; "auto" too, which is all unless they do not fit.
        devices: GPUs by the router's names, None for all; empty for the CPU alone.
        split_mode: how a model is spread over GPUs.
        tensor_split: share of each of them; empty for what is free.
        main_gpu: the one that is used when the model is not spread.
        cpu_moe_layers: so many layers, from the first on, keep their experts on the CPU.
        repack: whether the CPU may store weights anew as it likes them best.
        load_mode: how files get into memory.
        is_embedding: whether every token's output is wanted.
        mmproj: projector file.
        mmproj_offload: whether it lies on a GPU.
        draft: draft model's file.
        draft_types: kinds of speculative decoding.
        draft_max: tokens that are drafted at once.
        draft_gpu_layers: the draft's layers on GPUs, None for all.
        draft_devices: GPUs of the draft, None for those of the model.
        draft_cache_type_k: type of the draft's keys.
        draft_cache_type_v: type of its values.
        adapters: files of LoRAs and control vectors.
        ctx_checkpoints: checkpoints of a slot at most.
        checkpoint_step: tokens between two of them at least.
        cache_ram_bytes: what the prompt cache may grow to; -1 without a bound, None when it is not said.
        unknown: options in force whose effect is not known here, by their names.
    """

    ctx_size: int | None = None
    parallel: int | None = None
    kv_unified: bool | None = None
    ctx_per_slot: int | None = None
    is_fitted: bool = True
    batch_size: int = 2048
    ubatch_size: int = 512
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    swa_full: bool = False
    kv_offload: bool = True
    gpu_layers: int | None = None
    devices: tuple[str, ...] | None = None
    split_mode: str = "layer"
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    cpu_moe_layers: int = 0
    repack: bool = True
    load_mode: str = "auto"
    is_embedding: bool = False
    mmproj: str | None = None
    mmproj_offload: bool = True
    draft: str | None = None
    draft_types: tuple[str, ...] = ()
    draft_max: int = 3
    draft_gpu_layers: int | None = None
    draft_devices: tuple[str, ...] | None = None
    draft_cache_type_k: str = "f16"
    draft_cache_type_v: str = "f16"
    adapters: tuple[str, ...] = ()
    ctx_checkpoints: int = 32
    checkpoint_step: int = 8192
    cache_ram_bytes: int | None = None
    unknown: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """How many requests are answered at once."""
        return AUTO_SLOTS if self.parallel is None else max(1, self.parallel)

    @property
    def is_unified(self) -> bool:
        """Whether the slots share one KV cache: when their number is llama-server's choice, or when it is said."""
        return self.parallel is None or bool(self.kv_unified)

    @property
    def is_mapped(self) -> bool:
        """Whether a file's pages are the weights, as far as the CPU has them."""
        return self.load_mode in ("auto", "mmap", "mmap+mlock")

    @property
    def prompt_cache_bytes(self) -> int | None:
        """What the prompt cache can grow to, None without a bound."""
        if self.cache_ram_bytes is None:
            return DEFAULT_CACHE_RAM_BYTES
        return None if self.cache_ram_bytes < 0 else self.cache_ram_bytes

    def for_draft(self) -> MemoryOptions:
        """How the draft runs (`common_base_params_to_speculative` in llama.cpp's common/speculative.cpp)."""
        return MemoryOptions(
            ctx_size=self.ctx_size,
            parallel=self.parallel,
            kv_unified=self.kv_unified,
            ctx_per_slot=self.ctx_per_slot,
            batch_size=self.batch_size,
            ubatch_size=self.ubatch_size,
            flash_attn=self.flash_attn,
            cache_type_k=self.draft_cache_type_k,
            cache_type_v=self.draft_cache_type_v,
            swa_full=self.swa_full,
            kv_offload=self.kv_offload,
            gpu_layers=self.draft_gpu_layers,
            devices=self.devices if self.draft_devices is None else self.draft_devices,
            repack=self.repack,
            load_mode=self.load_mode,
            ctx_checkpoints=0,
            cache_ram_bytes=0,
        )

    def digest(self, n_ctx: int, devices: Sequence[str]) -> str:
        """Names this way to run a model on these devices: what was measured for one digest says nothing of another.

        Args:
            n_ctx: tokens of context that are really asked for.
            devices: ids of the devices that the router sees.
        """
        said = asdict(self) | {"ctx_size": n_ctx, "seen": tuple(devices)}
        return hashlib.sha256(repr(sorted(said.items())).encode()).hexdigest()[:32]


def read_options(common: Mapping[str, str], section: Mapping[str, str] | None = None) -> MemoryOptions:
    """What a preset's entries come to for one model. It is total: what cannot be read is left at its default.

    Args:
        common: entries of `[*]`.
        section: those of the model's own section, which win.
    """
    said: dict[str, str] = {}
    for key, value in (*common.items(), *(section or {}).items()):
        name = _NAMES.get(key.replace("_", "-"))
        if name is not None:
            said.pop(name, None)
            said[name] = value
    return read_said(said)


def said_by(layers: Iterable[OptionLayer]) -> dict[str, str]:
    """What tables say of memory, by names of our own, the last that was said last.

    Without the build's help the words of args cannot be told apart for certain: what looks like an option is taken for
    one, and what follows it and does not for its value.

    Args:
        layers: tables of options, lowest precedence first.
    """
    said: dict[str, str] = {}
    for layer in layers:
        table: dict[str, str] = {}
        for name in _TYPED:
            value = getattr(layer.options, name, None)
            if value is not None:
                table[name] = "" if isinstance(value, bool) and name in MODEL_SPELLINGS else spelled(value)
        args = layer.options.args
        for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
            known = _NAMES.get(word.lstrip("-").replace("_", "-")) if _OPTION.match(word) else None
            if known is not None:
                value = "1" if not following or _OPTION.match(following) else following
                table[known] = f"{table[known]},{value}" if known in table and known in _IN_PIECES else value
        if not _LOADING.isdisjoint(table):
            said = {name: value for name, value in said.items() if name not in _LOADING}
        for name, value in table.items():
            said.pop(name, None)
            if value:  # nothing is what a table says to take back a projector, a draft, or adapters
                said[name] = value
    return said


def read_said(said: Mapping[str, str]) -> MemoryOptions:
    """What that comes to; it is total, as `read_options`.

    Args:
        said: values by names of our own.
    """
    numbers = _Numbers(said)
    return MemoryOptions(
        ctx_size=numbers.natural("ctx_size"),
        parallel=numbers.positive("parallel"),
        kv_unified=_switch(said, "kv_unified", "no_kv_unified"),
        ctx_per_slot=numbers.positive("ctx_per_slot"),
        is_fitted=said.get("fit", "on").lower() not in _FALSEHOODS,
        batch_size=numbers.positive("batch_size") or 2048,
        ubatch_size=numbers.positive("ubatch_size") or 512,
        flash_attn=_flash_attn(said.get("flash_attn", "auto")),
        cache_type_k=said.get("cache_type_k", "f16").lower(),
        cache_type_v=said.get("cache_type_v", "f16").lower(),
        swa_full=_is_true(said.get("swa_full", "0")),
        kv_offload=_switch(said, "kv_offload", "no_kv_offload") is not False,
        gpu_layers=numbers.natural("gpu_layers"),
        devices=_devices(said.get("devices")),
        split_mode=said.get("split_mode", "layer"),
        tensor_split=_shares(said.get("tensor_split", "")),
        main_gpu=numbers.natural("main_gpu") or 0,
        cpu_moe_layers=ALL_LAYERS if _is_true(said.get("cpu_moe", "0")) else numbers.natural("n_cpu_moe") or 0,
        repack=_switch(said, "repack", "no_repack") is not False,
        load_mode=_load_mode(said),
        is_embedding=_embeds(said),
        mmproj=said.get("mmproj"),
        mmproj_offload=_switch(said, "mmproj_offload", "no_mmproj_offload") is not False,
        draft=said.get("draft"),
        draft_types=tuple(each.strip() for each in said.get("draft_type", "").split(",") if each.strip()),
        draft_max=numbers.positive("draft_max") or 3,
        draft_gpu_layers=numbers.natural("draft_gpu_layers"),
        draft_devices=_devices(said.get("draft_devices")),
        draft_cache_type_k=said.get("draft_cache_type_k", "f16").lower(),
        draft_cache_type_v=said.get("draft_cache_type_v", "f16").lower(),
        adapters=tuple(
            split_scale(each.strip())[0]
            for name in ("lora", "control_vector")
            for each in said.get(name, "").split(",")
            if each.strip()
        ),
        ctx_checkpoints=numbers.natural("ctx_checkpoints", 32) or 0,
        checkpoint_step=numbers.natural("checkpoint_step", 8192) or 0,
        cache_ram_bytes=_cache_ram(numbers.whole("cache_ram")),
        unknown=tuple(name for name in _UNKNOWN_EFFECT if name in said),
    )


class _Numbers:
    """Numbers among what is said; None for what is none, such as "auto"."""

    def __init__(self, said: Mapping[str, str]) -> None:
        self._said = said

    def whole(self, name: str, default: int | None = None) -> int | None:
        try:
            return int(self._said[name])
        except (KeyError, ValueError):
            return default

    def natural(self, name: str, default: int | None = None) -> int | None:
        value = self.whole(name, default)
        return value if value is not None and value >= 0 else None

    def positive(self, name: str) -> int | None:
        value = self.whole(name)
        return value if value is not None and value > 0 else None


def _is_true(value: str) -> bool:
    return value.lower() in _TRUTHS


def _switch(said: Mapping[str, str], positive: str, negative: str) -> bool | None:
    """A flag that has a name for on and one for off; the one that was said last counts."""
    state = None
    for name, value in said.items():
        if name in (positive, negative):
            state = _is_true(value) == (name == positive)
    return state


def _flash_attn(value: str) -> str:
    """Older builds have a bare flag."""
    if value.lower() in ("auto", "-1"):
        return "auto"
    return "on" if _is_true(value) else "off"


def _devices(value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    return () if [name.lower() for name in names] == ["none"] else names


def _shares(value: str) -> tuple[float, ...]:
    try:
        return tuple(max(0.0, float(each)) for each in value.replace("/", ",").split(",") if each.strip())
    except ValueError:
        return ()


def _load_mode(said: Mapping[str, str]) -> str:
    if "load_mode" in said:
        return said["load_mode"]
    if _is_true(said.get("direct_io", "0")):
        return "dio"
    return "none" if _switch(said, "mmap", "no_mmap") is False else "auto"


def _embeds(said: Mapping[str, str]) -> bool:
    is_switched = any(_is_true(said.get(name, "0")) for name in ("embeddings", "reranking"))
    return is_switched or said.get("pooling", "none") != "none"


def _cache_ram(mebibytes: int | None) -> int | None:
    if mebibytes is None:
        return None
    return -1 if mebibytes < 0 else mebibytes * 1024 * 1024
