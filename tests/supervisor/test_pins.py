"""Who is to stay in memory: wishes by name over what the configuration says."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamavisor.ledger import Ledger
from llamavisor.pins import Pins
from llamavisor.sections import ModelSpec


def _spec(name: str, *, is_pinned: bool) -> ModelSpec:
    return ModelSpec(name=name, path=f"/models/{name}.gguf", files=(), is_pinned=is_pinned)


def test_a_word_by_name_beats_what_is_written() -> None:
    """Either way; and a word about a model that is not there now is kept for when it comes back."""
    pins = Pins()
    specs = [_spec("a", is_pinned=True), _spec("b", is_pinned=True), _spec("c", is_pinned=False)]
    assert pins.among(specs) == {"a", "b"}
    assert pins.wish("a", is_pinned=False)
    assert pins.wish("d", is_pinned=True)
    assert pins.among(specs) == {"b", "d"}


def test_the_same_word_again_is_no_change() -> None:
    """So that the file is not written for nothing."""
    pins = Pins()
    assert pins.wish("a", is_pinned=True)
    assert (pins.wish("a", is_pinned=True), pins.changes) == (False, 1)


def test_words_outlive_the_daemon(tmp_path: Path) -> None:
    """They are read back from the ledger."""
    before = Pins()
    ledger = Ledger(tmp_path / "ledger.json", [before])
    before.wish("a", is_pinned=True)
    before.wish("b", is_pinned=False)
    assert ledger.flush().is_written
    after = Pins()
    assert Ledger(tmp_path / "ledger.json", [after]).load() == ()
    assert after.among([_spec("b", is_pinned=True)]) == {"a"}


@pytest.mark.parametrize("raw", [["a"], "a", 7, None])
def test_what_is_no_table_is_left_out(raw: object) -> None:
    """With a word about it."""
    pins = Pins()
    assert "left out" in pins.load(raw, 0.0)
    assert pins.among([]) == frozenset()


def test_damaged_entries_are_left_out() -> None:
    """The others count."""
    pins = Pins()
    assert pins.load({"a": True, "b": "yes", "c": False}, 0.0) == "1 damaged entries were left out"
    assert pins.among([]) == {"a"}
