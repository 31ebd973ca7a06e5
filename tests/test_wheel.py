"""What is built from this repository has in it what people install it for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED = {
    "share/bash-completion/completions/llamavisor": "deploy/completions/llamavisor",
    "share/zsh/site-functions/_llamavisor": "deploy/completions/_llamavisor",
    "share/fish/vendor_completions.d/llamavisor.fish": "deploy/completions/llamavisor.fish",
    "share/man/man1/llamavisor.1": "deploy/man/llamavisor.1",
}
_BUILT_FROM = ("daemon", "supervisor", "systemd", "deploy/completions", "deploy/man")
_FILES = ("pyproject.toml", "README.md", "LICENSE")


def test_a_wheel_has_completions_and_the_manual(tmp_path: Path) -> None:
    """They are put where shells and man look for them, below the prefix that it is installed into."""
    source = tmp_path / "source"  # a build leaves things in the folder that it is made in
    for name in _BUILT_FROM:
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(REPOSITORY / name, source)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=100)
    if "No module named pip" in done.stderr or "No matching distribution found" in done.stderr:
        pytest.skip(f"nothing to build a wheel with: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".data/data/")[2]: name for name in archive.namelist() if ".data/data/" in name}
        assert names.keys() == SHARED.keys()
        for name, written in SHARED.items():
            assert archive.read(names[name]) == (REPOSITORY / written).read_bytes()
        assert "llamavisord/systemd/llamavisor.service" in archive.namelist()
