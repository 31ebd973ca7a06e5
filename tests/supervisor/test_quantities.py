"""Sizes and durations as people write them."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.quantities import parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("512 B", 512),
        ("24GiB", 24 * 1024**3),
        ("24gib", 24 * 1024**3),
        ("24G", 24 * 1024**3),
        ("24 GB", 24 * 1000**3),
        ("1.5MiB", 1_572_864),
        ("2T", 2 * 1024**4),
    ],
)
def test_a_size_is_a_number_of_bytes_or_a_number_with_a_unit(text: object, size_bytes: int) -> None:
    """GiB and a bare G are binary, GB is decimal, and a bare number counts bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "24 florins", "-1GiB", -1, True, None, [], "1e3", float("nan"), float("inf"), "1 GiB 2"]
)
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    """The message shows how a size is written."""
    with pytest.raises(ValueError, match='such as "64MiB"'):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(30, 30), (0.5, 0.5), ("30", 30), ("30s", 30), ("10m", 600), ("1h30m", 5400), ("250ms", 0.25), ("1.5 h", 5400)],
)
def test_a_duration_is_a_number_of_seconds_or_numbers_with_units(text: object, seconds: float) -> None:
    """Units may follow each other, and a bare number counts seconds."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5 parsecs", "-5s", -5, True, None, "1h 30", "1e2s"])
def test_what_is_no_duration_is_refused_with_an_example(text: object) -> None:
    """The message shows how a duration is written."""
    with pytest.raises(ValueError, match='such as "30s"'):
        parse_duration(text)


@given(st.integers(0, 10**9), st.sampled_from(["", "B", "K", "KiB", "kB", "M", "MiB", "GB", "TiB"]))
def test_a_size_grows_with_its_number(number: int, unit: str) -> None:
    """One more of a unit is at least one byte more, and whole numbers lose nothing."""
    one = parse_size(f"1{unit}")
    assert parse_size(f"{number}{unit}") == number * one
    assert one >= 1


@given(st.text(max_size=12))
def test_no_text_makes_the_parsers_fail_otherwise_than_by_value_error(text: str) -> None:
    """Whatever is typed, the answer is a number from nought up or a ValueError."""
    for parse in (parse_size, parse_duration):
        with suppress(ValueError):
            assert parse(text) >= 0
