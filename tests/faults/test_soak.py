"""A short run of the soak: faults at random under clients at random, and everything that is promised holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

SOAK = Path(__file__).parents[1] / "soak"
SEED = 11
LEFT_OUT = ("SIGSTOP", "pipe held", "disk of the state")
"""What takes half a minute or more to be well again; other tests have each of them."""


@pytest.mark.timeout(120)
def test_x2_all_faults_at_random_on_real_processes(llama_server: Path) -> None:
    """X2: twenty seconds of faults, one every second: no invariant is broken, and what was measured is told."""
    argv = [sys.executable, str(SOAK), "--minutes", "0.33", "--every", "1", "--seed", str(SEED)]
    for label in LEFT_OUT:
        argv += ["--without", label]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = [row for row in rows[2:] if row[1] != "0"]
    assert sum(int(row[1]) for row in rows) >= 8, done.stdout
    measured = [row for row in rows if re.fullmatch(r"[0-9.]+", row[3]) and re.fullmatch(r"[0-9.]+", row[5])]
    assert len(measured) >= 3, done.stdout
