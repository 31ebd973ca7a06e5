"""What the doctor says: one finding, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    """As it should be."""
    NOTE = "note"
    """Worth knowing, or not to be seen without root; nothing has to be done."""
    WARNING = "warning"
    """It works, and not as well as it could, or not for long."""
    PROBLEM = "problem"
    """Something does not work, or will not when it is needed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        grade: how bad it is.
        text: what was found, on which object; one line.
        hint: what to do, empty if nothing.
    """

    grade: Grade
    text: str
    hint: str = ""


Findings = Iterator[Finding]


def ok(text: str) -> Finding:
    """As it should be."""
    return Finding(Grade.OK, text)


def note(text: str, hint: str = "") -> Finding:
    """Worth knowing."""
    return Finding(Grade.NOTE, text, hint)


def warning(text: str, hint: str = "") -> Finding:
    """It could be better."""
    return Finding(Grade.WARNING, text, hint)


def problem(text: str, hint: str = "") -> Finding:
    """It does not work."""
    return Finding(Grade.PROBLEM, text, hint)
