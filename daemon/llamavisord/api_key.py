"""The file that holds a router's API key."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_FILE_BYTES = 4096
"""A longer file holds something else."""


def read_api_key(path: Path) -> tuple[str, bool]:
    """The key in `path`, and whether every user of the machine can read it too.

    Raises:
        ValueError: it cannot be read or holds no key; the message does not repeat what it holds.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_FILE_BYTES + 1)
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc.strerror}") from exc
    lines = raw.decode("ascii", "replace").splitlines()
    if len(raw) > _FILE_BYTES or len(lines) != 1 or not lines[0].strip():
        raise ValueError(f"{path} does not hold exactly one line")
    key = lines[0].strip()
    # It travels in an HTTP header, and llama-server takes a comma for the end of a key.
    if not all("!" <= char <= "~" and char != "," for char in key):
        raise ValueError(f"{path}: a key is made of ASCII letters, digits and signs, without blanks and commas")
    return key, bool(mode & stat.S_IROTH)
