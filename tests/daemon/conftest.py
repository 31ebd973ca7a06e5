"""What the tests of the daemon share: a configuration file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "llamavisor.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
