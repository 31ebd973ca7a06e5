"""A place in the header of a GGUF file, from where its bytes are read in bounded pieces."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from llamavisor.errors import LlamavisorError

ReadAt = Callable[[int, int], bytes]
"""Reads from an offset up to so many bytes; fewer only when the file ends there, or a part of a stream came short."""

CHUNK_BYTES = 256 * 1024
"""So much is read at once: a header of 10 MB takes 40 reads, and the last one reads at most this much too far."""
MAX_HEADER_BYTES = 256 * 1024 * 1024
"""No header is longer. Those of models with 260,000 tokens are 16 MB long."""
MAX_STRINGS = 4 * 1024 * 1024
"""No header holds more strings in its arrays. Models with 260,000 tokens have 780,000, their merges counted."""

_BLANK_BYTES = 4096
_LENGTH = struct.Struct("<Q")


class GgufError(LlamavisorError):
    """Raised when a file is not a GGUF file that llama.cpp reads, or not yet.

    Attributes:
        reason: what is wrong, without the file's name.
        offset: the byte where it is.
        is_partial: whether a file that is still being written looks like this, and may become whole.
        name: the file, as it is shown to people; empty when it is not known.
    """

    code = "gguf_invalid"

    def __init__(self, reason: str, offset: int, *, is_partial: bool = False, hint: str = "", name: str = "") -> None:
        where = f"{name}: " if name else ""
        super().__init__(f"{where}{reason} (byte {offset})", hint=hint)
        self.reason = reason
        self.offset = offset
        self.is_partial = is_partial
        self.name = name

    def __reduce__(self) -> tuple[Callable[..., GgufError], tuple[str, int]]:
        """Pickled by its fields: it is raised in a worker process and shown by another."""
        rebuild = partial(GgufError, is_partial=self.is_partial, hint=self.hint, name=self.name)
        return rebuild, (self.reason, self.offset)

    def named(self, name: str) -> GgufError:
        """The same error about a file whose name is known."""
        return GgufError(self.reason, self.offset, is_partial=self.is_partial, hint=self.hint, name=name)


class Cursor:
    """Moves through a header from its beginning and never back; one chunk of it is in memory at a time.

    No length is trusted: whatever reaches beyond the end of the file or beyond `MAX_HEADER_BYTES` is refused before
    anything is read or allocated for it. All that is read is at most the header and one chunk more.

    Args:
        read_at: reads the file.
        size: the file's size in bytes.

    Attributes:
        inside: what is being read, for messages.
    """

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self.size = size
        self._chunk = b""
        self.inside = "the header"
        self._read_at = read_at
        self._begin = 0
        self._place = 0  # in the chunk, or beyond it after a skip
        self._strings = 0

    def __repr__(self) -> str:
        return f"<Cursor {self.offset} of {self.size} bytes, inside {self.inside}>"

    @property
    def offset(self) -> int:
        """The place in the file."""
        return self._begin + self._place

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next numbers; what they mean is still to be bounded.

        Raises:
            GgufError: the file ends before.
        """
        place = self._take(layout.size)
        return layout.unpack_from(self._chunk, place)

    def take_length(self) -> int:
        """The next 8 bytes as a number, which is still to be bounded."""
        length: int = self.unpack(_LENGTH)[0]
        return length

    def take_bytes(self, count: int) -> bytes:
        """The next `count` bytes. `count` is bounded by the caller."""
        place = self._take(count)
        return self._chunk[place : place + count]

    def skip(self, count: int) -> None:
        """Moves over `count` bytes, however many, without reading them."""
        self.check_room(count)
        self._place += count

    def skip_strings(self, count: int) -> None:
        """Moves over `count` strings, each a length and as many bytes, from one length to the next."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise GgufError(f"{self.inside} has {count} strings, more than any model", self.offset)
        self.check_room(8 * count)
        unpack = _LENGTH.unpack_from
        while count:
            if self._place + 8 > len(self._chunk):
                self._read(8)
            chunk, place, last = self._chunk, self._place, len(self._chunk) - 8
            begin = place
            # The one hot loop: a vocabulary and its merges have up to 800,000 strings.
            for done in range(count):
                if place > last:
                    count -= done
                    break
                begin = place
                place += 8 + unpack(chunk, place)[0]
            else:
                count = 0
            # Only the last string can reach beyond the chunk; its length is checked against the file.
            self._place = begin
            self.skip(place - begin)

    def is_before_zeros(self) -> bool:
        """Whether the next 4 KiB are zeros, as where a copy has taken its room and its bytes have not come yet."""
        place, count = self._place, min(_BLANK_BYTES, self.size - self.offset)
        ahead = self._chunk[place : place + count]
        if len(ahead) < count:
            ahead = self._read_at(self.offset, count)
        return bool(ahead) and not any(ahead)

    def check_room(self, count: int) -> None:
        """Refuses what cannot be there: `count` bytes from here on.

        Raises:
            GgufError: they reach beyond the longest header, or beyond the end of the file.
        """
        offset = self.offset
        if offset + count > MAX_HEADER_BYTES:
            raise GgufError(f"{self.inside} would end at byte {offset + count}, beyond any header", offset)
        if offset + count > self.size:
            reason = f"the file ends at byte {self.size}, and {self.inside} goes on to byte {offset + count} at least"
            raise GgufError(reason, offset, is_partial=True)

    def _take(self, count: int) -> int:
        """Moves over `count` bytes and returns where in the chunk, which may be a new one, they begin."""
        place = self._place
        if place + count > len(self._chunk):
            self._read(count)
            place = 0
        self._place = place + count
        return place

    def _read(self, count: int) -> None:
        """Puts at least `count` bytes from here on into the chunk."""
        self.check_room(count)
        offset = self.offset
        wanted = min(max(count, CHUNK_BYTES), self.size - offset, MAX_HEADER_BYTES - offset)
        chunk = self._read_at(offset, wanted)
        while len(chunk) < count:
            more = self._read_at(offset + len(chunk), wanted - len(chunk))
            if not more:
                reason = f"the file was cut off at byte {offset + len(chunk)} while {self.inside} was read"
                raise GgufError(reason, offset, is_partial=True)
            chunk += more
        self._begin, self._place, self._chunk = offset, 0, chunk
