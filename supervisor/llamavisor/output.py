"""The log file of one router: what llama-server prints, bounded on disk, readable from the end, followable.

The file is opened for appending by llama-server itself (an inherited descriptor), so it cannot be rotated by renaming:
the writer would follow the renamed file. It is copied and truncated instead; lines written between the two are lost.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio

from llamavisor.threads import run_in_thread

CAP_BYTES = 64 * 1024 * 1024
"""A log file is rotated when it grows beyond this size."""
KEPT = 2
"""How many rotated files are kept beside the current one."""
LINE_BYTES = 16 * 1024
"""A longer line is shown in pieces of this size: a flood without a newline must not grow in memory."""
CHECK_S = 1.0
TELL_AGAIN_S = 3600.0
_CHUNK_BYTES = 64 * 1024
_FOLLOW_S = 0.2


class OutputFile:
    """One router's log file and its rotated predecessors (`NAME.1` is the youngest).

    Args:
        path: where llama-server's standard output and error go.
        cap_bytes: size at which the file is rotated.
        kept: number of rotated files.
    """

    def __init__(self, path: Path, *, cap_bytes: int = CAP_BYTES, kept: int = KEPT) -> None:
        self.path = path
        self._cap_bytes = cap_bytes
        self._kept = kept

    def __repr__(self) -> str:
        return f"<OutputFile {self.path} {self.size()} bytes>"

    def size(self) -> int:
        """Bytes in the current file, 0 when it does not exist."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    async def keep_bounded(self, tell: Callable[[int, OSError | None], None]) -> None:
        """Look every second whether the file must be rotated, for ever.

        Args:
            tell: hears of the bytes that were moved, and of an error at most once an hour.
        """
        told_at = -math.inf
        while True:
            await anyio.sleep(CHECK_S)
            try:
                if size := await self.rotate():
                    tell(size, None)
            except OSError as error:
                if anyio.current_time() - told_at >= TELL_AGAIN_S:
                    told_at = anyio.current_time()
                    tell(0, error)

    async def rotate(self) -> int:
        """Rotate the file if it is over its cap; called every second.

        Returns:
            The bytes that were moved out of the current file, 0 when nothing was to do.

        Raises:
            OSError: the copy failed (a full disk); the file is then truncated all the same, so that its size stays
                bounded and no writer ever blocks on us.
        """
        size = self.size()
        if size <= self._cap_bytes:
            return 0
        await run_in_thread(self._copy_and_truncate)
        return size

    def _copy_and_truncate(self) -> None:
        try:
            for number in range(self._kept, 1, -1):
                older = self._rotated(number - 1)
                if older.exists():
                    older.replace(self._rotated(number))
            with self.path.open("rb") as source, self._rotated(1).open("wb") as target:
                # A flood may have outrun us: of a file far over its cap only the last part is kept.
                source.seek(max(0, self.size() - self._cap_bytes))
                shutil.copyfileobj(source, target, 1024 * 1024)
        finally:
            os.truncate(self.path, 0)

    def _rotated(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def tail(self, lines: int, *, since: int = 0) -> list[str]:
        """The last `lines` lines after byte `since`, looking back no further than 64 KiB.

        A mark from before a rotation lies behind the end of the file: everything is newer then.
        """
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                since = since if since <= size else 0
                start = max(since, size - _CHUNK_BYTES)
                file.seek(start)
                text = file.read(_CHUNK_BYTES)
        except OSError:
            return []
        found = text.decode("utf-8", "replace").splitlines()
        if start > since and len(found) > 1:
            del found[:1]  # its beginning was cut off
        return [line[:LINE_BYTES] for line in found[-lines:]] if lines > 0 else []

    async def follow(self) -> AsyncIterator[str]:
        """Yield every line that is written from now on, for ever; a rotation is followed into the new file."""
        position = self.size()
        rest = b""
        while True:
            if self.size() < position:
                position, rest = 0, b""
            chunk = self._read(position)
            position += len(chunk)
            *whole, rest = (rest + chunk).split(b"\n")
            if len(rest) > LINE_BYTES:
                whole, rest = [*whole, rest], b""
            for line in whole:
                for at in range(0, len(line) or 1, LINE_BYTES):
                    yield line[at : at + LINE_BYTES].decode("utf-8", "replace")
            if len(chunk) < _CHUNK_BYTES:
                await anyio.sleep(_FOLLOW_S)

    def _read(self, position: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(position)
                return file.read(_CHUNK_BYTES)
        except OSError:
            return b""
