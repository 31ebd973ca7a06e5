"""What the tests promise of themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_SKIPPING = """
import pytest

@pytest.mark.skip(reason="by a mark")
def test_mark(): pass

def test_call(): pytest.skip("by a call")

def test_machine(): pytest.skip("no memory cgroup can be made here: Read-only file system")

@pytest.fixture
def missing(): pytest.skip("by a fixture")

def test_fixture(missing): pass

@pytest.mark.xfail(reason="known")
def test_known(): raise AssertionError
"""


@pytest.mark.parametrize(
    ("ci", "outcome"), [("1", "1 failed, 1 skipped, 1 xfailed, 3 errors"), ("0", "5 skipped, 1 xfailed")]
)
def test_nothing_is_skipped_in_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    """With LLAMAVISOR_CI=1 a skip is a failure that says what was skipped and why, but for what a machine forbids."""
    (tmp_path / "test_skips.py").write_text(_SKIPPING)
    (tmp_path / "test_whole.py").write_text('import pytest\npytest.importorskip("no_such_module", reason="by file")\n')
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    done = subprocess.run(
        [*command, "-rs", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "LLAMAVISOR_CI": ci, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f" {outcome} in " in done.stdout.splitlines()[-1]
    assert (done.returncode == 0) == (ci == "0")
    for reason in ("by a mark", "by a call", "by a fixture", "by file"):
        assert reason in done.stdout
