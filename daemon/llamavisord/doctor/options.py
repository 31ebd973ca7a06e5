"""The configuration held against the machine: what its llama-server refuses, what no GPU heeds, what cannot fit."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from llamavisor import budgets, flags
from llamavisor.binary import Binary
from llamavisor.errors import BinaryError, OptionError
from llamavisor.gauge import RAM_ID
from llamavisor.options import OptionLayer
from llamavisor.settings import RouterSettings
from llamavisor.units import format_size
from llamavisord.config import Config
from llamavisord.doctor import pins
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, Grade, note, ok, problem, warning
from llamavisord.doctor.machine import Machine, machine_of
from llamavisord.trial import doubts, refused

LEAST_SEVERAL = 2
_FOR_SEVERAL = ("split_mode", "tensor_split", "main_gpu")
"""Options that say how several GPUs share a model."""
_ABOUT_GPUS = frozenset({"gpu_layers", "devices", "args"})


def look(case: Case) -> Findings:
    """Every router, and what its tables say of models."""
    config = case.config
    assert config is not None  # noqa: S101 (the check needs one)
    is_well = True
    for finding in _look(case, config):
        is_well &= finding.grade is Grade.OK
        yield finding
    if is_well:
        yield ok("all that is configured can be heeded on this machine")


def _look(case: Case, config: Config) -> Findings:
    for router in config.routers:
        try:
            found = case.binary_of(router)
        except BinaryError:
            yield note(f"router {router.name}: options are not looked at, as there is no llama-server to ask")
            continue
        for text, hint in refused(config, router, found):
            yield problem(text, hint)
        machine = machine_of(case, router, found)
        yield from judge(config, router, machine, found, cores=os.cpu_count() or 1)
        yield from pins.look(case, router, machine, found)
        if case.status is None:  # a daemon says so itself
            yield from judge_budget(router, machine)
    if case.status is None:
        for text in doubts(config):
            yield warning(text)


def judge(config: Config, router: RouterSettings, machine: Machine, found: Binary, *, cores: int) -> Findings:
    """What of a router's options, and of its models', this machine does not heed, or cannot do. Pure.

    Args:
        config: has the tables of models.
        router: whose options.
        machine: what it has.
        found: its llama-server, which knows how options are spelled.
        cores: how many this machine has.
    """
    own = [rule.layer for rule in config.rules if rule.settings.router is None or router.name in rule.settings.router]
    later: set[str] = set()
    for layer in reversed(router.layers):
        yield from _judge_layer(layer, router, machine, cores, without=later)
        later |= layer.options.model_fields_set
    yield from _without_gpu(f"router {router.name}", router.layers, machine, found)
    for layer in own:
        yield from _judge_layer(layer, router, machine, cores, without=set())
        if layer.options.model_fields_set & _ABOUT_GPUS:
            yield from _without_gpu(layer.source, (*router.layers, layer), machine, found)


def _judge_layer(
    layer: OptionLayer, router: RouterSettings, machine: Machine, cores: int, *, without: Collection[str]
) -> Findings:
    """What one table says; `without` what a later one says otherwise."""
    options = layer.options
    if options.threads is not None and options.threads > cores and "threads" not in without:
        text = f"{layer.source}: threads = {options.threads}, and this machine has {cores} cores"
        yield warning(text, f"they get in each other's way; say {cores} or fewer")
    ignored = [key for key in _FOR_SEVERAL if getattr(options, key) not in (None, "none", 0) and key not in without]
    if ignored and machine.gpus is not None and len(machine.gpus) < LEAST_SEVERAL:
        text = f"{layer.source}: {', '.join(ignored)}, and router {router.name} sees {_listed(machine)}"
        yield warning(text, "it says how several GPUs share a model, and is not heeded; leave it out")


def _without_gpu(source: str, layers: Sequence[OptionLayer], machine: Machine, found: Binary) -> Findings:
    """What tables ask of GPUs that are not there."""
    if machine.gpus is None:
        return
    try:
        asked = flags.resolve(layers, found.flags, binary=str(found.path))
    except OptionError:  # said already
        return
    seen = {each.name for each in machine.gpus}
    if missing := [name for name in asked.required_devices if name not in seen]:
        text = f"{source} asks for {', '.join(missing)}, and llama-server sees {_listed(machine)}"
        yield problem(text, "models are not loaded until it appears; mend the driver, or name other devices")
    elif asked.needs_gpu and not seen:
        text = f"{source} asks for a GPU by gpu_layers, and llama-server sees none"
        yield problem(text, 'models are not loaded until one appears; say gpu_layers = "auto" or 0')


def judge_budget(router: RouterSettings, machine: Machine) -> Findings:
    """Whether the budget of a router is about devices that it has, and no more than they have. Pure."""
    gpus = machine.gpus
    if gpus is None:
        return
    for name in budgets.unseen(router.memory, gpus):
        text = f"router {router.name}: memory names {name}, which it does not see: that budget holds for nothing"
        yield warning(text, f"it sees RAM and {_listed(machine)}")
    ids = {"ram": RAM_ID} | {gpu.name.lower(): gpu.id for gpu in gpus}
    sizes = dict(router.memory.devices)
    if router.memory.size is not None:
        sizes |= dict.fromkeys([gpu.name for gpu in gpus] or [RAM_ID], router.memory.size)
    for name, size in sizes.items():
        memory = machine.memory(ids.get(name.lower(), ""))
        if memory is not None and memory.total_bytes is not None and size > memory.total_bytes:
            text = f"router {router.name}: memory of {name} is {format_size(size)}, and there is"
            yield warning(f"{text} {format_size(memory.total_bytes)}", 'what there is counts; say "auto" or less')


def _listed(machine: Machine) -> str:
    return ", ".join(each.name for each in machine.gpus or ()) or "no GPU"
