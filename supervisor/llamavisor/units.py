"""Sizes and durations as people read them; `llamavisor.quantities` reads what they write."""

from __future__ import annotations


def format_size(size_bytes: int) -> str:
    """A size for a person: "512 B", "1.5 MiB", "24.0 GiB"."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    scaled = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        scaled /= 1024
        if scaled < 1024:
            return f"{scaled:.1f} {unit}"
    return f"{scaled / 1024:.1f} TiB"


def format_duration(seconds: float) -> str:
    """A duration for a person, in its two largest units: "0.4s", "42s", "3h 12m", "5d 1h"."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f}s"
    whole = int(seconds)
    for unit, size, smaller, smaller_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller_size}{smaller}"
    return f"{whole}s"
