"""The whole examination: every check side by side, each in a thread and with a deadline of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio

from llamavisor.threads import run_in_thread
from llamavisord.doctor import (
    clock,
    configuration,
    control,
    llama_server,
    memory,
    models,
    options,
    ports,
    service,
    state,
    token,
)
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Finding, Findings, Grade, note, problem

DEADLINE_S = 10.0
"""Of a check that looks at files of the kernel, a socket, or a folder."""
OPENING_S = 20.0
"""The daemon and systemd may take five seconds each to say nothing."""
FOLDER_S = 30.0
"""Ten thousand files on a slow disk take so long at the first look."""
PROGRAM_S = 90.0
"""A llama-server is asked three questions, the first from a cold disk, with a driver that wakes up."""


@dataclass(frozen=True, slots=True)
class Check:
    """One theme.

    Attributes:
        name: what people see.
        look: yields what it finds, as it finds it; blocking.
        deadline_s: what it has not found by then is not waited for.
        needs_config: whether there is nothing to look at without a configuration.
    """

    name: str
    look: Callable[[Case], Findings]
    deadline_s: float = DEADLINE_S
    needs_config: bool = True


CHECKS = (
    Check("configuration", configuration.look, needs_config=False),
    Check("llama-server", llama_server.look, PROGRAM_S),
    Check("memory", memory.look, PROGRAM_S),
    Check("options", options.look, PROGRAM_S),
    Check("models", models.look, FOLDER_S),
    Check("ports", ports.look),
    Check("socket", control.look, needs_config=False),
    Check("service", service.look, needs_config=False),
    Check("state", state.look),
    Check("clock", clock.look, needs_config=False),
    Check("token", token.look, needs_config=False),
)


@dataclass(frozen=True, slots=True)
class Examined:
    """A check that was made, and what it found."""

    check: str
    findings: list[Finding] = field(default_factory=list)


async def examine(
    open_case: Callable[[], Case], checks: Sequence[Check] = CHECKS, *, opening_s: float = OPENING_S
) -> list[Examined]:
    """Make every check; takes no longer than the slowest may.

    Args:
        open_case: finds out what there is to be examined; blocking.
        checks: what to look at.
        opening_s: how long `open_case` may take.
    """
    opened: list[Case] = []
    with anyio.move_on_after(opening_s):
        opened.append(await run_in_thread(open_case, abandon_on_cancel=True))
    if not opened:
        hint = "see whether its folder is on a mount that does not answer"
        return [Examined(checks[0].name, [problem("the configuration cannot be read: no answer", hint)])]
    examined = [Examined(check.name) for check in checks]
    async with anyio.create_task_group() as group:
        for check, each in zip(checks, examined, strict=True):
            group.start_soon(_make, check, opened[0], each.findings)
    return examined


async def _make(check: Check, case: Case, findings: list[Finding]) -> None:
    if check.needs_config and case.config is None:
        findings.append(note("not looked at: there is no configuration that can be used"))
        return
    found: list[Finding] = []

    def look() -> None:
        for each in check.look(case):
            found.append(each)  # noqa: PERF402 (what was found before a mount hung is told)

    with anyio.move_on_after(check.deadline_s) as deadline:
        try:
            await run_in_thread(look, abandon_on_cancel=True)
        except Exception as error:  # noqa: BLE001 (one check that fails must not take the others with it)
            found.append(Finding(Grade.WARNING, f"could not be looked at: {type(error).__name__}: {error}"))
    findings += found[:]
    if deadline.cancelled_caught:
        hint = "see what it waits for: a mount, a driver or a disk that does not answer"
        findings.append(problem(f"no answer within {check.deadline_s:g} s", hint))
