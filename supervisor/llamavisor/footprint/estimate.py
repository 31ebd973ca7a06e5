"""How much memory a model will take: what was measured, else what llama.cpp says, else what its header comes to."""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from llamavisor.footprint.fitparams import Fit
from llamavisor.footprint.formula import (
    MIB,
    Parts,
    Plan,
    Weights,
    add_extras,
    add_process,
    checkpoint_bytes,
    compute_bytes,
    context_parts,
    micro_batch,
    output_bytes,
    outputs,
    work_out,
)
from llamavisor.footprint.layers import Layers, find_layers
from llamavisor.footprint.options import DEFAULT_CACHE_RAM_BYTES
from llamavisor.gauge.device import RAM_ID as RAM
from llamavisor.gguf import Header

CTX_SHARE = 0.25
"""So much of a budget may be context and compute buffers of one model whose context nobody chose."""
LEAST_CTX = 4096
"""llama.cpp's own fit does not go below it either (`--fit-ctx`)."""
MAX_CTX = 1 << 30
"""What a header says may not fit into the 31 bits that llama-server has for it."""
CACHE_RAM_SHARE = 0.1
"""So much of the RAM budget all prompt caches together may grow to."""
MAX_CACHE_RAM_BYTES = 2048 * MIB
DEFAULT_MODELS_MAX = 4
"""How many models are reckoned with when their number has no bound; a router's own default."""
LEAST_FIT_TARGET_BYTES = 256 * MIB
"""llama.cpp's fit is exact to a few MiB, and the driver wants some too."""
_FIT_TOLERANCE = 1.1


class Source(Enum):
    """Where a footprint is known from."""

    MEASURED = "measured"
    """The same files with the same options were loaded before."""
    FIT_PARAMS = "fit-params"
    """llama.cpp worked it out."""
    FORMULA = "formula"
    """It follows from the header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a model takes.

    Attributes:
        bytes: by device id, when it has answered its first requests. Mapped weights count as resident.
        source: where that is known from.
        parts: for people, by device and by what it is for. They come from a formula or from llama.cpp, and need not add
            up to what was measured.
        prompt_cache_bytes: what its prompt cache may grow to besides, in RAM; None without a bound.
        checkpoint_bytes: the same of its context checkpoints.
        n_ctx: tokens of context, all slots together.
    """

    bytes: Mapping[str, int]
    source: Source
    parts: Mapping[str, Mapping[str, int]]
    prompt_cache_bytes: int | None
    checkpoint_bytes: int
    n_ctx: int

    @property
    def growth_bytes(self) -> int | None:
        """RAM that it may come to take while it serves, None without a bound."""
        return None if self.prompt_cache_bytes is None else self.prompt_cache_bytes + self.checkpoint_bytes

    def grown(self) -> dict[str, int]:
        """Bytes by device when it has grown as far as it may; without a bound, to llama-server's own."""
        growth = DEFAULT_CACHE_RAM_BYTES if self.growth_bytes is None else self.growth_bytes
        return {**self.bytes, RAM: self.bytes.get(RAM, 0) + growth}


def estimate(
    weights: Weights,
    plan: Plan,
    *,
    fit: Fit | None = None,
    draft_fit: Fit | None = None,
    measured: Sequence[Mapping[str, int]] = (),
) -> Footprint | None:
    """What a model will take; None when nobody knows. Pure.

    Args:
        weights: its files.
        plan: how it is to be run.
        fit: what llama-fit-params says of the model, None when it was not asked or does not know.
        draft_fit: the same of the draft.
        measured: bytes by device when the same was loaded before, the latest last; three count.
    """
    layers, source = find_layers(weights.header), Source.FIT_PARAMS
    parts = _from_fit(weights, plan, fit, draft_fit) if fit is not None else None
    if parts is None:
        parts, source = work_out(weights, plan), Source.FORMULA
    total = parts.total() if parts else {}
    if measured:
        total, source = total | median_of(measured), Source.MEASURED
    if not total:
        return None
    return Footprint(
        bytes=total,
        source=source,
        parts={device: dict(each) for device, each in parts.of.items()} if parts else {},
        prompt_cache_bytes=plan.options.prompt_cache_bytes,
        checkpoint_bytes=checkpoint_bytes(layers, plan.options, plan.n_ctx) if layers else 0,
        n_ctx=plan.n_ctx,
    )


def median_of(measured: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The median of the last three measurements by device; where one does not speak of a device, nothing was there."""
    last = measured[-3:]
    devices = dict.fromkeys(device for each in last for device in each)
    return {device: int(statistics.median(each.get(device, 0) for each in last)) for device in devices}


def default_ctx_size(weights: Weights, plan: Plan, budget_bytes: int) -> int:
    """The context that a model gets when nobody chose one. Pure.

    4096 doubled as often as it fits: never more than the model was trained for, so that context and compute buffers
    stay within a quarter of the budget, and all of the model within the budget. It is 4096 when even that is too much,
    less only when the model was trained for less, and 4096 too for a model of unknown layout.

    Args:
        weights: its files.
        plan: how it is to be run; the context in it is not looked at.
        budget_bytes: of the GPUs that the model is put on, together; of RAM when there are none.
    """
    options = plan.options
    trained = (weights.header.context_length or LEAST_CTX) * (1 if options.is_unified else options.slots)
    trained = min(trained, MAX_CTX)
    on = {device.id for device in plan.used} or {RAM}

    def is_too_much(n_ctx: int) -> bool:
        parts = work_out(weights, replace(plan, n_ctx=n_ctx))
        if parts is None:
            return True
        size = sum(total for device, total in parts.total().items() if device in on)
        running = sum(each["context"] + each["compute"] for device, each in parts.of.items() if device in on)
        return size > budget_bytes or running > CTX_SHARE * budget_bytes

    least = min(LEAST_CTX, trained)
    choices = list(itertools.takewhile(lambda n_ctx: n_ctx <= trained, (least << step for step in itertools.count())))
    # More context is never less memory: half of the choices are ruled out with each that is tried.
    return choices[max(0, bisect.bisect_left(choices, True, key=is_too_much) - 1)]


def cache_ram_bytes(ram_budget_bytes: int, models_max: int | None) -> int:
    """What one model's prompt cache may grow to: a share of RAM for all models together, whole MiB, at most 2 GiB.

    Args:
        ram_budget_bytes: RAM that models may take.
        models_max: how many may be loaded at once; None or 0 for as many as there is room.
    """
    share = int(max(0, ram_budget_bytes) * CACHE_RAM_SHARE) // (models_max or DEFAULT_MODELS_MAX)
    return min(MAX_CACHE_RAM_BYTES, share) // MIB * MIB


def fit_target(budgets: Sequence[tuple[int, int]]) -> str | None:
    """The value of `--fit-target`: MiB that llama.cpp's fit must leave free on each device so that budgets hold.

    What the fit sees as free is the total less what all others hold: leaving the total less the budget keeps all models
    of a device within its budget, whichever of them are loaded.

    Args:
        budgets: total and budget of each device, in the order of the router's devices.

    Returns:
        None when there are no devices.
    """
    margins = (max(LEAST_FIT_TARGET_BYTES, total - budget) for total, budget in budgets)
    return ",".join(str(-(-margin // MIB)) for margin in margins) or None


def _from_fit(weights: Weights, plan: Plan, fit: Fit, draft_fit: Fit | None) -> Parts | None:
    """The parts as llama.cpp says, put right where it speaks of something else than the server does."""
    parts = Parts()
    if not _add_fit(parts, weights.header, weights.size_bytes, plan, fit):
        return None
    parts.add(RAM, "output", output_bytes(weights.header, plan.options, plan.n_ctx))
    add_process(parts, weights, plan)
    if weights.draft is not None and draft_fit is not None:
        beside = Parts()
        if _add_fit(beside, weights.draft, weights.draft_bytes, plan.for_draft(), draft_fit):
            for device, size in beside.total().items():
                parts.add(device, "draft", size)
            weights = replace(weights, draft=None)
    add_extras(parts, weights, plan)
    return parts


def _add_fit(parts: Parts, header: Header, size_bytes: int, plan: Plan, fit: Fit) -> bool:
    """Adds one model as the tool says; False when it speaks of a device that is not known."""
    ids: dict[str | None, str] = {None: RAM, **{device.name: device.id for device in plan.devices}}
    if any(row.device not in ids for row in fit):
        return False
    layers = find_layers(header)
    on_gpus = sum(row.weights for row in fit if row.device is not None)
    for row in fit:
        device = ids[row.device]
        parts.add(device, "weights", row.weights)
        parts.add(device, "context", row.context)
        parts.add(device, "compute", _less_outputs(header, layers, plan, row.compute) if layers else row.compute)
    for device, more in _sharing(header, plan).items():
        parts.add(device, "context", more)
    missing = size_bytes - header.data_offset - on_gpus - sum(row.weights for row in fit if row.device is None)
    if missing > size_bytes // 100:
        # Stored anew, in a buffer that the tool counts nowhere; and mapped too, or not.
        parts.add(RAM, "weights", missing)
        parts.add(RAM, "copies", missing if plan.options.is_mapped and not on_gpus else 0)
    return True


def _less_outputs(header: Header, layers: Layers, plan: Plan, compute: int) -> int:
    """A compute buffer with outputs for each slot, where the tool has reserved them for a whole physical batch.

    The tool's number stays when it is larger than the formula can explain: then it is not about outputs.
    """
    options, n_ctx = plan.options, plan.n_ctx
    batch, wanted = micro_batch(options, n_ctx), outputs(options, n_ctx)
    if wanted >= batch or compute > _FIT_TOLERANCE * compute_bytes(header, layers, options, n_ctx, batch):
        return compute
    less = compute - (batch - wanted) * (header.vocabulary_size or 0) * 4
    return min(compute, max(less, compute_bytes(header, layers, options, n_ctx, wanted)))


def _sharing(header: Header, plan: Plan) -> dict[str, int]:
    """What windows and states of all slots take more than those of one, which the tool was asked for."""
    if not plan.options.is_unified or plan.options.slots == 1:
        return {}
    more: dict[str, int] = {}
    alone = replace(plan, options=replace(plan.options, parallel=1))
    for way, sign in ((plan, 1), (alone, -1)):
        for device, size in context_parts(header, way):
            more[device] = more.get(device, 0) + sign * size
    return more
