"""Why nobody serves a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamavisor.catalog import EntryState, Scanner
from llamavisor.holders import Holders
from llamavisord.tiny_model import write_tiny_model


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (EntryState.READY, ""),
        (EntryState.GONE, ""),
        (EntryState.INVALID, "is invalid: so it is"),
        (EntryState.SETTLING, "is settling: so it is"),
    ],
)
def test_what_is_wrong_with_a_model_is_told_only_while_its_files_are_there(
    tmp_path: Path, state: EntryState, why: str
) -> None:
    """Whoever asks for one whose file has gone is told that there is no such model."""
    write_tiny_model(tmp_path / "alpha.gguf", ["a"])
    scanner = Scanner(str(tmp_path))
    scanner.scan()
    (entry,) = scanner.entries
    entries = {"alpha": replace(entry, state=state, reason="so it is")}
    folder = SimpleNamespace(catalog=SimpleNamespace(entries=entries))
    assert Holders({}, [folder]).why_missing("alpha") == why
