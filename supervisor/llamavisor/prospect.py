"""What a model of the Hub would take here, before it is fetched.

It is reckoned from what is known of it, with the options that it would get, as for a model that is here (`appraisal`).
But llama.cpp cannot be asked, nothing was ever measured, and the tensors are not known: how they are stored follows
from the name. What comes of it is within some percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llamavisor import preset
from llamavisor.budgets import Limit
from llamavisor.capacity import Capacity
from llamavisor.errors import OptionError
from llamavisor.footprint import Plan, Weights, context_size, estimate, read_options, slot_context
from llamavisor.footprint.formula import row_bytes
from llamavisor.gguf import Header, Places, TypeShare
from llamavisor.gguf.tensortypes import TENSOR_TYPES
from llamavisor.hub import Choice, Spec
from llamavisor.router import Router
from llamavisor.rules import ModelRule
from llamavisor.sections import section, specify

_TYPES = tuple(kind.name for kind in TENSOR_TYPES.values())
_SHARES = {"_S": 0.9, "_M": 0.75, "_L": 0.6}
"""How much of a model is stored in the type that its quantization is named after, by the end of that name.

What llama-quantize makes of a llama of 8 billion parameters, rounded (`llama_tensor_get_type` in src/llama-quant.cpp).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """How a model would do on a router.

    Attributes:
        bytes: what it would take and may grow to, by device id; empty when nobody can say.
        n_ctx: tokens of context that one request could have; None when nobody can say.
        is_fitting: whether that goes into what models may take there; None when nobody can say.
        reason: why nobody can say what it would take, empty if that is known.
    """

    bytes: Mapping[str, int] = field(default_factory=dict)
    n_ctx: int | None = None
    is_fitting: bool | None = None
    reason: str = ""


class _UnknownError(Exception):
    """Nobody can say; why."""


def foresee(choice: Choice, spec: Spec, router: Router, *, capacity: Capacity, rules: Sequence[ModelRule]) -> Prospect:
    """How a model would do on a router. Files that are too large alone do not fit, whatever else is known.

    Args:
        choice: the model.
        spec: whether its projector and draft are wanted.
        router: where.
        capacity: what there is.
        rules: tables of options of models, in the order of the configuration.
    """
    limits = capacity.limits(router.settings)
    try:
        return _reckon(choice, spec, router, capacity=capacity, rules=rules, limits=limits)
    except _UnknownError as unknown:
        known = [limit.bytes for limit in limits.values() if limit.bytes is not None]
        size = sum(file.size for file in choice.wanted(spec))
        is_too_large = len(known) == len(limits) and size > sum(known)
        return Prospect(is_fitting=False if is_too_large else None, reason=str(unknown))


def _reckon(
    choice: Choice,
    spec: Spec,
    router: Router,
    *,
    capacity: Capacity,
    rules: Sequence[ModelRule],
    limits: Mapping[str, Limit],
) -> Prospect:
    if choice.entry is None or choice.header is None:
        raise _UnknownError(choice.unread or "its header was not read")
    if router.launch is None:
        raise _UnknownError(f"router {router.name} is {router.state.value}")
    found, settings = router.launch.found, router.settings
    header = _supplemented(choice.header, choice)
    entry = replace(
        choice.entry,
        name=choice.name,
        header=header,
        projector=choice.entry.projector if spec.with_projector else None,
        draft=choice.entry.draft if spec.with_draft else None,
    )
    allowance = capacity.allowance(settings)
    model = specify(entry, rules, router=settings.name, base=settings.layers, allowance=allowance)
    if model is None:
        raise _UnknownError(f"the tables of the configuration keep it from router {router.name}")
    try:
        options = read_options(preset.ALWAYS, section(model, found.flags, binary=str(found.path)))
    except OptionError as error:
        raise _UnknownError(str(error)) from error
    plan = Plan(options=options, n_ctx=context_size(header, options), devices=capacity.devices_of(settings.name))
    # What lies beside it is spread as adapters are, for its headers are not known.
    weights = Weights(header=header, size_bytes=model.own_bytes, adapter_bytes=model.beside_bytes)
    footprint = estimate(weights, plan)
    if footprint is None:
        raise _UnknownError("its header does not say enough")
    sizes = footprint.grown()
    return Prospect(bytes=sizes, n_ctx=slot_context(header, options, plan.n_ctx), is_fitting=_is_within(sizes, limits))


def _supplemented(header: Header, choice: Choice) -> Header:
    """With what the name says of how its tensors are stored: the CPU stores some types anew."""
    quantization, size = choice.quantization, choice.size_bytes
    kind = max((kind for kind in _TYPES if quantization.startswith(kind)), key=len, default=None)
    if kind is None:
        return header
    share = next((share for end, share in _SHARES.items() if quantization.endswith(end)), 1.0)
    rows = row_bytes(kind.lower(), header.embedding_length or 0) * (header.vocabulary_size or 0)
    places = Places(input_bytes=min(rows, size), layer_bytes=(), expert_bytes=(), other_bytes=0)
    return replace(
        header,
        type_mix=(TypeShare(kind, header.tensor_count, 0, int(share * size)),),
        data_bytes=size,
        layout=replace(header.layout, places=places),
    )


def _is_within(sizes: Mapping[str, int], limits: Mapping[str, Limit]) -> bool | None:
    room = {device: limits[device].bytes if device in limits else None for device in sizes}
    if any(limit is not None and sizes[device] > limit for device, limit in room.items()):
        return False
    return None if None in room.values() else True
