"""Sizes and durations as people write them: "24GiB", "30s", "1h30m"."""

from __future__ import annotations

import re

_NUMBER = r"(\d{1,15})(?:\.(\d{1,6}))?"  # no longer: a double holds it exactly
_SIZE = re.compile(rf"{_NUMBER}\s*([a-z]*)", re.IGNORECASE)
_DURATION_PIECE = re.compile(rf"{_NUMBER}\s*([a-z]+)\s*", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(_NUMBER)

# A bare K, M, G or T is binary, as with Docker and systemd.
_BYTES_OF: dict[str, int] = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in ((letter, 1024), (f"{letter}ib", 1024), (f"{letter}b", 1000))
}
_SECONDS_OF = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LIMIT = 10**15
"""Larger numbers are a slip of the keyboard, and would not survive arithmetic."""


def parse_size(value: object) -> int:
    """The bytes that `value` means: a number of bytes, or text such as "24GiB", "500MB" or "64M".

    GiB and G are 1024^3 bytes, GB is 1000^3; upper and lower case are the same.

    Raises:
        ValueError: it is neither; the message says what is expected.
    """
    if (number := _plain(value)) is not None:
        return int(number)
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    factor = _BYTES_OF.get(found[3].lower()) if found else None
    if found is None or factor is None:
        raise ValueError('expected a size: a number of bytes, or text such as "64MiB" or "24GB"')
    return int(found[1]) * factor + int(float(f"0.{found[2] or 0}") * factor)


def parse_duration(value: object) -> float:
    """The seconds that `value` means: a number of seconds, or text such as "30s", "10m", "1h30m" or "250ms".

    Raises:
        ValueError: it is neither; the message says what is expected.
    """
    if (number := _plain(value)) is not None:
        return float(number)
    text = value.strip().lower() if isinstance(value, str) else ""
    seconds, position = 0.0, 0
    while found := _DURATION_PIECE.match(text, position):
        factor = _SECONDS_OF.get(found[3])
        if factor is None:
            break
        seconds += float(f"{found[1]}.{found[2] or 0}") * factor
        position = found.end()
    if not text or position != len(text):
        raise ValueError('expected a duration: a number of seconds, or text such as "30s", "10m" or "1h30m"')
    return seconds


def _plain(value: object) -> int | float | None:
    """`value` as a number if it is one, also as text; None if it is not, or not one from 0 to the limit."""
    if isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value <= _LIMIT else None
