"""`llamavisor doctor`: looks at all that a daemon rests on, says what is wrong, and changes nothing."""

from __future__ import annotations

from llamavisord.doctor.case import Case, open_case
from llamavisord.doctor.examination import CHECKS, Check, Examined, examine
from llamavisord.doctor.finding import Finding, Grade

__all__ = ["CHECKS", "Case", "Check", "Examined", "Finding", "Grade", "examine", "open_case"]
