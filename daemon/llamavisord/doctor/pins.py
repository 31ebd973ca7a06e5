"""Whether the models that are never to leave memory have room in it together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from anyio import from_thread

from llamavisor import budgets
from llamavisor.appraisal import Appraiser
from llamavisor.binary import Binary
from llamavisor.catalog import EntryState, Scanner
from llamavisor.errors import OptionError
from llamavisor.ledger import NAME as LEDGER
from llamavisor.ledger import Footprints, Ledger
from llamavisor.pins import Pins
from llamavisor.sections import ModelSpec, section, specify
from llamavisor.settings import RouterSettings
from llamavisor.shelf import Offered
from llamavisor.units import format_size
from llamavisord.config import Config
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem
from llamavisord.doctor.machine import Machine

Sizes = Mapping[str, int]
"""Bytes by device."""


def look(case: Case, router: RouterSettings, machine: Machine, found: Binary) -> Findings:
    """The pinned models of one router."""
    config = case.config
    assert config is not None  # noqa: S101 (the check needs one)
    learned, wishes = Footprints(), Pins()
    Ledger(config.state_dir / LEDGER, [learned, wishes]).peek()
    appraiser = Appraiser(footprints=learned)
    pinned: dict[str, Sizes] = {}
    unknown: list[str] = []
    for spec in _pinned(case, config, router, machine, wishes):
        sizes = _size(spec, machine, found, case.env_of(router), appraiser)
        if sizes is None:
            unknown.append(spec.name)
        else:
            pinned[spec.name] = sizes
    if unknown:
        yield note(f"router {router.name}: what {', '.join(unknown)} takes is not known, so pins are not added up")
    findings = list(judge(router.name, machine, pinned))
    if pinned and not unknown and not findings:
        yield ok(f"router {router.name}: the pinned models ({', '.join(pinned)}) fit at once")
    yield from findings
    if router.models_max and len(pinned) > router.models_max:
        text = f"router {router.name}: {len(pinned)} models are pinned, and models_max is {router.models_max}"
        yield problem(text, "raise models_max, or pin fewer")


def judge(router: str, machine: Machine, pinned: Mapping[str, Sizes]) -> Findings:
    """Whether the models that are never to leave have room together. Pure.

    Args:
        router: its name.
        machine: what it has.
        pinned: what each of them is expected to take, by device.
    """
    total: dict[str, int] = {}
    for sizes in pinned.values():
        for device, size in sizes.items():
            total[device] = total.get(device, 0) + size
    names = ", ".join(pinned)
    for device, size in total.items():
        memory = machine.memory(device)
        if memory is None or memory.budget_bytes is None:
            continue
        told = f"{format_size(size)} of {memory.name}, and models may take {format_size(memory.budget_bytes)}"
        if size > memory.budget_bytes:
            text = f"router {router}: the pinned models ({names}) want {told}: not all of them fit at once"
            yield problem(
                text,
                "pin fewer, give them less ctx_size, less --cache-ram or a smaller quantization, or raise `memory`",
            )


def _pinned(case: Case, config: Config, router: RouterSettings, machine: Machine, wishes: Pins) -> Iterator[ModelSpec]:
    """The models of a router that are to stay: as the daemon says, else by what was last wished and what is written."""
    told: Collection[str] | None = case.status["memory"].get("pinned") if case.status is not None else None
    is_any = wishes.among(()) or any(rule.settings.pin for rule in config.rules) if told is None else told
    if not is_any:
        return  # a look at thousands of files is saved
    limits = {each.id: budgets.Limit(each.total_bytes, each.budget_bytes, is_auto=False) for each in machine.memories}
    allowance = budgets.allow(limits, machine.gpus or (), router.models_max)
    scanner = Scanner(str(router.models_dir), link_dirs=tuple(map(str, config.link_dirs)))
    scanner.scan()
    for entry in scanner.entries:
        is_pinned = wishes.expected(entry.name, config.rules) if told is None else entry.name in told
        if is_pinned and entry.state is EntryState.READY:
            spec = specify(entry, config.rules, router=router.name, base=router.layers, allowance=allowance)
            if spec is not None:
                yield spec


def _size(
    spec: ModelSpec, machine: Machine, found: Binary, env: Mapping[str, str], appraiser: Appraiser
) -> Sizes | None:
    """What admission sets aside for a model, by device; None when nobody can say, or what the router sees."""
    if machine.gpus is None:
        return None
    try:
        offered = Offered(spec, section(spec, found.flags, binary=str(found.path)))
    except OptionError:  # said already
        return None
    appraisal = from_thread.run(appraiser.appraise, found, env, offered, machine.gpus)
    return appraisal.footprint.grown() if appraisal is not None else None
