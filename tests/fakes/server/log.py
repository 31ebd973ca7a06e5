"""Log lines as llama-server prints them."""

from __future__ import annotations

import os
import time

_START = time.monotonic()


class Log:
    """Writes whole lines to one descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def info(self, function: str, message: str) -> None:
        """Print a line of level info."""
        self._print("I", function, message)

    def warning(self, function: str, message: str) -> None:
        """Print a line of level warning."""
        self._print("W", function, message)

    def error(self, function: str, message: str) -> None:
        """Print a line of level error."""
        self._print("E", function, message)

    def raw(self, data: bytes) -> None:
        """Print bytes as they are; lost when nobody reads any more."""
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            pass

    def _print(self, level: str, function: str, message: str) -> None:
        us = int((time.monotonic() - _START) * 1e6)
        stamp = f"{us // 60_000_000}.{us // 1_000_000 % 60:02}.{us // 1000 % 1000:03}.{us % 1000:03}"
        self.raw(f"{stamp} {level} srv  {function[:12]:>12}: {message}\n".encode(errors="surrogateescape"))
