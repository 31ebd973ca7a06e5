"""Which name was probably meant by one that nobody has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LIKE_ENOUGH = 0.6
"""How much two names must have in common to be taken for each other, 1 for all; as `difflib` has it."""


def near(word: str, known: Iterable[str], *, most: int = 1, like: float = LIKE_ENOUGH) -> list[str]:
    """Those of the `known` names that look like `word`, the likest first. Ten thousand take a quarter of a second.

    Args:
        word: what was written.
        known: all names that there are.
        most: so many at most.
        like: how much they must have in common; more than usual where all names begin alike.
    """
    return difflib.get_close_matches(word, list(known), most, like)
