"""Log lines as llama-server prints them."""

from __future__ import annotations

import os
import time

_START = time.monotonic()


class Log:
    """Writes lines to one descriptor: `log("load", "what happened")`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, function: str, message: str, level: str = "I") -> None:
        """Print a line of level "I", "W" or "E", which says in which function of llama-server it happens."""
        us = int((time.monotonic() - _START) * 1e6)
        stamp = f"{us // 60_000_000}.{us // 1_000_000 % 60:02}.{us // 1000 % 1000:03}.{us % 1000:03}"
        line = f"{stamp} {level} srv  {function[:12]:>12}: {message}\n"
        self.raw(line.encode(errors="surrogateescape"))

    def raw(self, data: bytes) -> None:
        """Print bytes as they are; lost when nobody reads any more."""
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            pass
