"""Finds `model` and `stream` in a JSON body as it arrives, without building the document.

What a backslash hides is masked, byte for byte; then every quote is the begin or the end of a string, and splitting at
quotes tells strings from structure without looking at single bytes in Python. The depth of nesting is the running sum
over the brackets that are left. So a body costs about as much as splitting it does, whatever it is made of, and one
that is a giant string costs a search for its end. Nesting has no limit.

Whether the document is valid is llama-server's to say. What we take for an object is what begins with a brace whose
closing brace is the body's end.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate

from llamavisord.gateway.peeked import NAME_BYTES_MAX, NOT_AN_OBJECT, Peeked, name_of, no_longer

BLOCK_BYTES = 64 * 1024
"""Read at once: bounds memory and the time that the event loop is kept from others; pieces are gathered up to it."""
SMALL_BYTES = 8 * 1024
"""A body that is not longer is built by the C parser, which takes less time than our search for two of its members."""
_CARRY_BYTES_MAX = 6 * NAME_BYTES_MAX + 2 * 1024  # a name all of whose bytes are escapes, and its key

_WHITE = b" \t\r\n"
_END = b" \t\r\n\0"  # llama-server's parser takes NUL for the end: C programs send their buffers with it
_BOM = b"\xef\xbb\xbf"
_QUOTE = ord('"')
_BRACKETS = b"{}[]"
_NOT_MARKS = bytes(set(range(256)) - set(_BRACKETS) - {_QUOTE})
_decode = json.JSONDecoder().decode
_STEP = [0] * 256
for _bracket in b"{[":
    _STEP[_bracket] = 1
for _bracket in b"}]":
    _STEP[_bracket] = -1
_KEYS = frozenset({b"model", b"stream"})
_ASCII_ESCAPE = b"\\u00"
_SPELLED = re.compile(
    b"|".join(
        b"(?P<%b>%b)" % (key, b"".join(rb"(?:%c|\\u(?i:%04x))" % (letter, letter) for letter in key)) for key in _KEYS
    )
)  # any letter of a key may be written as an escape
_TRUE = re.compile(rb":[ \t\r\n]*true")


class JsonPeek:
    """Reads a JSON body, fed in pieces that may be cut anywhere.

    Of members with one name the last counts, as for llama-server; only those of the outermost object are looked at.
    A name that is too long for any model is kept cut, with an ellipsis at its end, so that it is no model's name.

    Args:
        block_bytes: read at once; no less than a byte order mark has.
    """

    def __init__(self, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._has_ended = False  # a NUL has come: llama-server's parser takes it for the end, whatever follows
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._has_begun = False
        self._is_broken = False
        # Invariant: outside of a string of no interest, what is carried begins at depth `_depth` outside of strings.
        self._carry = b""
        self._depth = 0
        self._is_in_string = False  # one of no interest, however long; a backslash may be carried
        self._is_closed = False
        self._model: str | None = None
        self._stream = False

    def __repr__(self) -> str:
        return f"<JsonPeek model={self._model!r} stream={self._stream} depth={self._depth}>"

    def feed(self, data: bytes) -> None:
        """Take the next piece; nothing is copied that is not short."""
        if self._has_ended:
            return
        if (end := data.find(0)) >= 0:
            self._has_ended, data = True, data[:end]
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= self._block_bytes:
            self._read_gathered()

    def finish(self) -> Peeked:
        """What the body says, which is whole now."""
        if not self._has_begun and self._gathered_bytes <= SMALL_BYTES:
            peeked = _of_small(b"".join(self._gathered))
            if peeked is not None:
                return peeked
        self._read_gathered()
        if self._is_broken or not self._is_closed:
            return NOT_AN_OBJECT
        return Peeked(self._model, self._stream)

    def _read_gathered(self) -> None:
        data = b"".join(self._gathered)
        self._gathered.clear()
        self._gathered_bytes = 0
        for at in range(0, len(data), self._block_bytes):
            if self._is_broken:
                return
            self._read(data[at : at + self._block_bytes])

    def _read(self, data: bytes) -> None:
        if self._carry:
            data = self._carry + data
            self._carry = b""
        if not self._has_begun:
            data = self._begin(data)
        if self._is_closed:
            self._is_broken = bool(data.strip(_END))
        elif self._is_in_string:
            self._read_on(data)
        elif data:
            self._read_structure(data, _masked(data))

    def _begin(self, data: bytes) -> bytes:
        """Look for the opening brace; what follows it."""
        data = data.removeprefix(_BOM).lstrip(_WHITE)
        if data:
            self._has_begun = True
            self._depth = 1
            self._is_broken = data[:1] != b"{"
        return b"" if self._is_broken else data[1:]

    def _read_on(self, data: bytes) -> None:
        """Look for the end of a string of no interest."""
        masked = _masked(data)
        end = masked.find(_QUOTE)
        if end >= 0:
            self._is_in_string = False
            self._read_structure(data[end + 1 :], masked[end + 1 :])
        elif masked.endswith(b"\\"):
            self._carry = b"\\"

    def _read_structure(self, data: bytes, masked: bytes) -> None:
        """Read what begins outside of strings.

        Args:
            data: as it was sent.
            masked: likewise, every quote being the begin or the end of a string.
        """
        parts = masked.split(b'"')
        outside, strings = parts[::2], parts[1::2]
        marks = b'"'.join(outside).translate(None, _NOT_MARKS)  # brackets, and one quote for every whole string
        levels = list(accumulate(map(_STEP.__getitem__, marks), initial=self._depth))  # before each mark, and at last
        self._depth = levels[-1]
        is_cut = len(strings) == len(outside)
        if min(levels) <= 1:
            tops = [level == 1 for mark, level in zip(marks, levels, strict=False) if mark == _QUOTE]
            self._look_at(data, parts, tops)
            if 0 in levels:
                self._is_closed = True
                rest = outside[-1][max(map(outside[-1].rfind, (b"}", b"]"))) + 1 :]
                self._is_broken |= is_cut or levels.index(0) < len(marks) or bool(rest.strip(_END))
                return
        if is_cut:
            self._keep_string(data, outside[-1], strings, has_key=marks.endswith(b'"'))
            if self._is_in_string and masked.endswith(b"\\"):
                self._carry = b"\\"
        elif self._depth == 1 and marks.endswith(b'"'):
            # Its colon or its value may be still to come. To read a member again changes nothing.
            self._carry_if_short(b'"%b"%b' % (strings[-1], outside[-1].strip(_WHITE)))

    def _look_at(self, data: bytes, parts: list[bytes], tops: list[bool]) -> None:
        """Note the members of the outermost object that matter.

        Args:
            data: as it was sent.
            parts: masked: by turns what is outside of strings and a string.
            tops: for each whole string, whether it is in the outermost object.
        """
        name_at = None
        strings = parts[1::2]
        hits = [
            number
            for number, is_top in enumerate(tops)
            if is_top and (strings[number] in _KEYS or _ASCII_ESCAPE in strings[number])
        ]
        for number in hits:
            key = _key(strings[number])
            after = parts[2 * number + 2].strip(_WHITE)
            if key is None or not after.startswith(b":"):
                continue
            if key == "stream":
                self._stream = _TRUE.match(after) is not None
            elif after != b":":
                self._model = name_at = None
            elif number + 1 < len(tops):
                name_at = 2 * number + 3
        if name_at is not None:
            begin = sum(map(len, parts[:name_at])) + name_at
            self._note_name(data[begin : begin + len(parts[name_at])])

    def _note_name(self, raw: bytes) -> None:
        self._model = _name(raw)
        self._is_broken |= self._model is None

    def _keep_string(self, data: bytes, before: bytes, strings: list[bytes], *, has_key: bool) -> None:
        """Keep a string that is cut, with its key, if it may matter; else only that it goes on."""
        size = len(strings[-1])
        if self._depth == 1:
            key = strings[-2] if has_key and before.strip(_WHITE) == b":" else None
            raw = data[len(data) - size :]
            if self._carry_if_short(b'"%b' % raw if key is None else b'"%b":"%b' % (key, raw)):
                return
            if key is not None and _key(key) == "model":
                self._note_name(raw)
            elif key is not None and _key(key) == "stream":
                self._stream = False
        self._is_in_string = True

    def _carry_if_short(self, carry: bytes) -> bool:
        if len(carry) > _CARRY_BYTES_MAX:
            return False
        self._carry = carry
        return True


def _of_small(data: bytes) -> Peeked | None:
    """What a short body says, by the C parser; None = that takes it for no JSON, which is not for it to say."""
    try:
        document = _decode(str(data, "utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return NOT_AN_OBJECT
    model = document.get("model")
    if isinstance(model, str):
        model = name_of(model)
        if model is None:
            return NOT_AN_OBJECT
    else:
        model = None
    return Peeked(model, document.get("stream") is True)


def _masked(data: bytes) -> bytes:
    """`data` with each escaped quote and backslash overwritten, so that every quote that is left delimits a string."""
    if b"\\" not in data:
        return data
    return data.replace(b"\\\\", b"??").replace(b'\\"', b"??")


def _key(raw: bytes) -> str | None:
    """Which of the keys that matter is written so, None = none."""
    spelled = _SPELLED.fullmatch(raw)
    return spelled.lastgroup if spelled else None


def _name(raw: bytes) -> str | None:
    """The name that is written so, None = it is no JSON string."""
    if len(raw) > 6 * NAME_BYTES_MAX:
        return no_longer(raw)
    text = _unescaped(raw)
    return None if text is None else name_of(text)


def _unescaped(raw: bytes) -> str | None:
    """The text of a JSON string, given what is between its quotes; None = it is none."""
    try:
        text = json.loads(str(b'"%b"' % raw, "utf-8"))
    except ValueError:
        return None
    return text if isinstance(text, str) else None
