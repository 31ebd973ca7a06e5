"""What Prometheus's own linter says of an exposition."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

_KNOWN = re.compile(r"llamacpp:\w+ metric names should not contain ':'")
"""Colons are for rules, says Prometheus, and llama.cpp calls its metrics so."""


def complaints(metrics: str) -> list[str]:
    """All that is to be mended; without the linter the test is skipped."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: install the package prometheus")
    checked = subprocess.run([promtool, "check", "metrics"], input=metrics, capture_output=True, text=True, check=False)
    said = [*checked.stdout.splitlines(), *checked.stderr.splitlines()]
    assert bool(said) == bool(checked.returncode), checked  # it has read all of it
    return [line for line in said if not _KNOWN.fullmatch(line)]
