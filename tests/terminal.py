"""A terminal with a program on it, as a person has one: what is typed, what is shown, and Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fakes.waiting import PATIENCE_S

INTERRUPT, END = "\x03", "\x04"
"""What Ctrl-C and Ctrl-D type."""
_AGAIN_S = 1.0
_ROWS_AND_COLUMNS = (40).to_bytes(2, sys.byteorder) + (120).to_bytes(2, sys.byteorder) + bytes(4)


class Terminal:
    """A pseudo-terminal that a program has for its own; a context manager that ends it.

    Args:
        argv: the program.
        env: its environment.
        output: a file for its standard output, None for the terminal.

    Attributes:
        seen: all that was shown so far.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, output: Path | None = None) -> None:
        self.seen = ""
        self._argv = list(argv)
        self._env = {"TERM": "xterm", "LANG": "C.UTF-8", **env}
        self._output = output
        self._at = 0  # all before was waited for

    def __repr__(self) -> str:
        return f"<Terminal {self._argv}, {len(self.seen)} characters>"

    def __enter__(self) -> Self:
        """Start the program."""
        self._fd, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, _ROWS_AND_COLUMNS)
        out = inner if self._output is None else os.open(self._output, os.O_WRONLY | os.O_CREAT)
        try:
            self._popen = subprocess.Popen(
                ["setsid", "--ctty", *self._argv],  # becomes the program, and Ctrl-C is for that
                stdin=inner,
                stdout=out,
                stderr=inner,
                env=self._env,
            )
        finally:
            for fd in {inner, out}:
                os.close(fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        os.close(self._fd)

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._fd, keys.encode())

    def until(self, text: str, *, press: str = "") -> str:
        """Wait until `text` is shown, beyond what was waited for before; all that was shown up to its end.

        Args:
            text: what is waited for.
            press: keys to press, and to press again after a while: a Ctrl-C in the moment before somebody waits for
                keys is heeded with the next key alone, and people press it twice.
        """
        deadline = time.monotonic() + PATIENCE_S
        self.type(press)
        while text not in self.seen[self._at :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if self._is_silent(_AGAIN_S if press else PATIENCE_S):
                self.type(press)
            else:
                assert self._read(), f"ended without {text!r}: {self.seen!r}"
        begin, self._at = self._at, self.seen.index(text, self._at) + len(text)
        return self.seen[begin : self._at]

    def wait(self) -> int:
        """Wait for the end of the program; its exit code."""
        while not self._is_silent(PATIENCE_S):
            if not self._read():
                return self._popen.wait(PATIENCE_S)
        raise AssertionError(f"nothing more after {self.seen!r}")

    def _is_silent(self, timeout_s: float) -> bool:
        return not select.select([self._fd], [], [], timeout_s)[0]

    def _read(self) -> bool:
        """Whether there was more; nobody has the terminal any more when there is not."""
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:  # the last process has let go of it
            return False
        self.seen += chunk.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(chunk)
