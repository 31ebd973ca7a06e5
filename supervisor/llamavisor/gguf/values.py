"""The values of a header, each as what it is expected to be."""

from __future__ import annotations

from collections.abc import Mapping

from llamavisor.gguf.container import Value

PerLayer = int | tuple[int, ...]
"""One number for all layers, or one for each where they vary."""


class Values:
    """Looks values up by key; one of another type than expected is as good as none.

    Args:
        values: of a container, by key.

    Attributes:
        architecture: what the keys about the model begin with, empty when the file does not say it.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        self.architecture = self.text("general.architecture")

    def __repr__(self) -> str:
        return f"<Values {self.architecture} {len(self._values)}>"

    def key(self, name: str) -> str:
        """The key of what is said about this architecture."""
        return f"{self.architecture}.{name}"

    def text(self, key: str) -> str:
        """A string, empty when there is none."""
        value = self._values.get(key)
        return value if isinstance(value, str) else ""

    def flag(self, key: str, *, default: bool = False) -> bool:
        """A bool."""
        value = self._values.get(key)
        return value if isinstance(value, bool) else default

    def number(self, key: str) -> float | None:
        """A number that may be a fraction."""
        value = self._values.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def count(self, key: str, default: int | None = None) -> int | None:
        """A whole number; the largest where it varies from layer to layer."""
        found = self.per_layer(key)
        return max(found) if isinstance(found, tuple) else default if found is None else found

    def per_layer(self, key: str) -> PerLayer | None:
        """A whole number, or one for each layer where they are not all the same."""
        value = self._values.get(key)
        if not isinstance(value, tuple):
            return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
        counts = tuple(int(item) for item in value if isinstance(item, int) and item >= 0)
        if not counts or len(counts) != len(value):
            return None
        return counts[0] if len(set(counts)) == 1 else counts
