"""Devices and their memory: what there is, what is free, and what models may take of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llamavisor.errors import BinaryError
from llamavisor.gauge import RAM_ID
from llamavisor.gauge.machine import has_nvml
from llamavisor.units import format_size
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, warning
from llamavisord.doctor.machine import Machine, Memory, machine_of

LEAST_FREE_SHARE = 0.05
"""Of RAM: below it the kernel is about to end processes."""
_NODES = {"dev/nvidiactl": "an NVIDIA driver", "dev/kfd": "an AMD driver"}
"""What a driver of GPUs makes, and nothing else does; every machine with a screen has /dev/dri."""


def look(case: Case) -> Findings:
    """Every memory once, and for each router whether its llama-server sees what there is."""
    assert case.config is not None  # noqa: S101 (the check needs one)
    shown: set[str] = set()
    for router in case.config.routers:
        try:
            found = case.binary_of(router)
        except BinaryError:  # another check says so
            found = None
        machine = machine_of(case, router, found)
        yield from judge([each for each in machine.memories if each.id not in shown])
        shown |= {each.id for each in machine.memories}
        yield from judge_sight(router.name, machine, drivers(case.root))
    yield from judge_bindings(drivers(case.root), has_bindings=has_nvml())


def judge(memories: Sequence[Memory]) -> Findings:
    """What is to be said of them. Pure."""
    for each in memories:
        if each.total_bytes is None or each.free_bytes is None:
            hint = "budgets cannot be kept to on it; see whether its driver works"
            yield warning(f"{each.name}: how much memory is free is not known: {each.reason}", hint)
            continue
        budget = f", models may take {format_size(each.budget_bytes)}" if each.budget_bytes is not None else ""
        text = f"{each.name}: {format_size(each.free_bytes)} of {format_size(each.total_bytes)} free{budget}"
        if each.id == RAM_ID and each.free_bytes < each.total_bytes * LEAST_FREE_SHARE:
            yield warning(text, "end what takes it, or set a smaller `memory`: the kernel ends processes next")
        else:
            yield ok(text)


def judge_sight(router: str, machine: Machine, drivers: Sequence[str]) -> Findings:
    """What is to be said of the GPUs that a router sees, where these drivers are. Pure."""
    if machine.gpus is None:
        yield note(f"router {router}: which GPUs it sees is not known, as its llama-server has not said")
    elif machine.gpus:
        yield ok(f"router {router} sees {', '.join(each.name for each in machine.gpus)}")
    else:
        gpus = [each.name for each in machine.memories if each.id != RAM_ID] or list(drivers)
        if gpus:
            text = f"this machine has {', '.join(gpus)}, and llama-server of router {router} sees no GPU"
            yield warning(text, "use a build for that GPU, mend its driver, or say gpu_layers = 0")
        else:
            yield ok(f"router {router}: no GPU, models run on the processor")


def drivers(root: Path) -> tuple[str, ...]:
    """The drivers of GPUs whose device nodes are there."""
    return tuple(name for node, name in _NODES.items() if os.path.lexists(root / node))


def judge_bindings(drivers: Sequence[str], *, has_bindings: bool) -> Findings:
    """What is to be said where an NVIDIA driver is and nobody can ask it. Pure."""
    if "an NVIDIA driver" in drivers and not has_bindings:
        text = "nvidia-ml-py is not installed: llama-server is asked about GPUs, which is slow and knows less"
        yield note(text, 'pip install "llamavisor[nvidia]"')
