"""Sizes and durations as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.quantities import parse_size
from llamavisor.units import format_duration, format_size


@given(st.integers(0, 10**14))
def test_a_shown_size_is_near_the_true_one(size_bytes: int) -> None:
    """What a person reads can be read back, within the digit that is shown."""
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06, abs=1)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0.0s"), (0.42, "0.4s"), (42.9, "42s"), (60, "1m 0s"), (3720, "1h 2m"), (90_000, "1d 1h")],
)
def test_a_shown_duration_has_its_two_largest_units(seconds: float, shown: str) -> None:
    """Seconds matter while there are few of them, and a clock that was set back shows nothing strange."""
    assert format_duration(seconds) == shown
