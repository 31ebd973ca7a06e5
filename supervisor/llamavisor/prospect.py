"""What a model of the Hub would take here, before it is fetched.

It is reckoned as for a model that is here, with the options that it would get: see `appraisal`. But llama.cpp cannot be
asked, nothing was ever measured, and of its header only the beginning is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llamavisor import preset
from llamavisor.budgets import Limit
from llamavisor.capacity import Capacity
from llamavisor.errors import OptionError
from llamavisor.footprint import Footprint, Plan, Weights, context_size, estimate, read_options
from llamavisor.gguf import Header, TypeShare
from llamavisor.gguf.tensortypes import TENSOR_TYPES
from llamavisor.hub import Choice, Spec
from llamavisor.router import Router
from llamavisor.rules import ModelRule
from llamavisor.sections import section, specify

_TYPES = tuple(kind.name for kind in TENSOR_TYPES.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """How a model would do on a router.

    Attributes:
        bytes: what it would take and may grow to, by device id; empty when nobody can say.
        n_ctx: tokens of context that it would have, all slots together; None when nobody can say.
        is_fitting: whether that goes into what models may take there; None when nobody can say.
    """

    bytes: Mapping[str, int]
    n_ctx: int | None
    is_fitting: bool | None


def foresee(choice: Choice, spec: Spec, router: Router, *, capacity: Capacity, rules: Sequence[ModelRule]) -> Prospect:
    """How a model would do on a router; without its header it is only known when its files alone are too large.

    Args:
        choice: the model.
        spec: whether its projector and draft are wanted.
        router: where.
        capacity: what there is.
        rules: tables of options of models, in the order of the configuration.
    """
    limits = capacity.limits(router.settings)
    footprint = _estimate(choice, spec, router, capacity, rules)
    if footprint is not None:
        return Prospect(
            bytes=footprint.grown(), n_ctx=footprint.n_ctx, is_fitting=_is_within(footprint.grown(), limits)
        )
    known = [limit.bytes for limit in limits.values() if limit.bytes is not None]
    size = sum(file.size for file in choice.wanted(spec))
    return Prospect(bytes={}, n_ctx=None, is_fitting=False if len(known) == len(limits) and size > sum(known) else None)


def _estimate(
    choice: Choice, spec: Spec, router: Router, capacity: Capacity, rules: Sequence[ModelRule]
) -> Footprint | None:
    if choice.entry is None or choice.header is None or router.launch is None:
        return None
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
        return None
    try:
        options = read_options(preset.ALWAYS, section(model, found.flags, binary=str(found.path)))
    except OptionError:
        return None
    plan = Plan(options=options, n_ctx=context_size(header, options), devices=capacity.devices_of(settings.name))
    own = sum(file.size for file in model.own_files)
    # What lies beside it is spread as adapters are.
    beside = sum(file.size for file in model.files) - own
    return estimate(Weights(header=header, size_bytes=own, adapter_bytes=beside), plan)


def _supplemented(header: Header, choice: Choice) -> Header:
    """With what the name says of how it is stored, as if all of it were stored so: the CPU stores some types anew."""
    kind = max((kind for kind in _TYPES if choice.quantization.startswith(kind)), key=len, default=None)
    if kind is None:
        return header
    share = TypeShare(kind, header.tensor_count, 0, choice.size_bytes)
    return replace(header, type_mix=(share,), data_bytes=choice.size_bytes)


def _is_within(sizes: Mapping[str, int], limits: Mapping[str, Limit]) -> bool | None:
    room = {device: limits[device].bytes if device in limits else None for device in sizes}
    if any(limit is not None and sizes[device] > limit for device, limit in room.items()):
        return False
    return None if None in room.values() else True
