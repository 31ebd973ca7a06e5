"""Where one file becomes whole: its beginning, and the whole of it."""

from __future__ import annotations

from pathlib import Path


class Part:
    """Where one file becomes whole.

    Attributes:
        whole: the file, once it is whole and verified.
        partial: its beginning.
        etag: what the server calls the content that it is the beginning of.
    """

    def __init__(self, whole: Path) -> None:
        self.whole = whole
        self.partial = whole.with_name(f"{whole.name}.part")
        self.etag = whole.with_name(f"{whole.name}.etag")

    def __repr__(self) -> str:
        return f"<Part {self.whole.name}>"

    def read_etag(self) -> str:
        """Of what is here; empty when that is not known. Blocking."""
        try:
            return self.etag.read_text(encoding="latin-1")[:1000]
        except OSError:
            return ""


def size_of(path: Path) -> int:
    """The bytes of a file, -1 if there is none. Blocking."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
