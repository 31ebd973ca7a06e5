"""Sizes and durations as people write them in a file, in one whole unit."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A duration: "10m", "90s", "1h"; 0 is "0"."""
    for unit, unit_s in (("h", 3600), ("m", 60)):
        if seconds and seconds % unit_s == 0:
            return f"{seconds / unit_s:g}{unit}"
    return f"{seconds:g}s" if seconds else "0"


def size(size_bytes: int) -> str:
    """A size: "64MiB", "1GiB"; 0 is "0"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size_bytes and size_bytes % 1024**power == 0:
            return f"{size_bytes // 1024**power}{unit}"
    return str(size_bytes)
