"""`llamavisor doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import anyio

from llamavisord.cli.render import Screen
from llamavisord.doctor import Examined, Finding, Grade, examine, open_case
from llamavisord.exit_codes import ExitCode
from llamavisord.leaving import leave_hung_threads
from llamavisord.plain import plain

_COLOURS: Mapping[Grade, str] = {
    Grade.OK: "green",
    Grade.NOTE: "dim",
    Grade.WARNING: "yellow",
    Grade.PROBLEM: "red",
}
_GRADE_WIDTH = max(map(len, Grade))


def run(arguments: Namespace) -> int:
    """Examine, and tell; the exit code says whether there is a problem."""
    opening = partial(open_case, os.environ, config_file=arguments.config, socket=arguments.socket)
    examined = anyio.run(examine, opening)
    screen = Screen()
    if arguments.json:
        screen.json(_document(examined))
    else:
        _show(screen, examined)
    screen.flush()
    code = ExitCode.FAILED if _counts(examined)[Grade.PROBLEM] else ExitCode.OK
    leave_hung_threads(code)
    return code


def _counts(examined: Sequence[Examined]) -> Counter[Grade]:
    return Counter(finding.grade for each in examined for finding in each.findings)


def _document(examined: Sequence[Examined]) -> dict[str, object]:
    counts = _counts(examined)
    findings = [
        {"check": each.check, "grade": finding.grade.value, "text": finding.text, "hint": finding.hint or None}
        for each in examined
        for finding in each.findings
    ]
    return {
        "ok": not counts[Grade.PROBLEM],
        "counts": {grade.value: counts[grade] for grade in Grade},
        "findings": findings,
    }


def _show(screen: Screen, examined: Sequence[Examined]) -> None:
    width = max(len(each.check) for each in examined)
    for each in examined:
        for finding in each.findings:
            _show_one(screen, each.check.ljust(width), finding)
    counts = _counts(examined)
    told = [f"{counts[grade]} {grade}{'s' * (counts[grade] != 1)}" for grade in (Grade.PROBLEM, Grade.WARNING)]
    screen.line()
    screen.line(f"{', '.join(told)}; {counts[Grade.OK]} ok")


def _show_one(screen: Screen, check: str, finding: Finding) -> None:
    grade = screen.paint(finding.grade.ljust(_GRADE_WIDTH), _COLOURS[finding.grade])
    screen.line(f"{grade}  {check}  {plain(finding.text)}")
    if finding.hint:
        screen.line(f"{' ' * (_GRADE_WIDTH + len(check) + 4)}-> {plain(finding.hint)}")
