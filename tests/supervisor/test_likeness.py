"""Names that are nearly right."""

from __future__ import annotations

from llamavisor.likeness import near

KNOWN = ("alpha", "alpine", "beta")


def test_the_likest_comes_first() -> None:
    """One, or as many as are wanted, the likest first."""
    assert near("alphe", KNOWN) == ["alpha"]
    assert near("alphe", KNOWN, most=3) == ["alpha", "alpine"]


def test_nothing_is_near() -> None:
    """What looks like none of them was none of them; more may be asked for than usual."""
    assert near("omega-13", KNOWN) == []
    assert near("alphe", KNOWN, like=0.9) == []
