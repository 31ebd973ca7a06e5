"""Finds `model` and `stream` in a multipart form as it arrives; the files in it are skipped."""

from __future__ import annotations

import re

from llamavisord.gateway.peeked import NAME_BYTES_MAX, NOT_AN_OBJECT, Peeked, no_longer

BOUNDARY_BYTES_MAX = 70
"""RFC 2046 5.1.1. llama-server, too, takes no longer one."""
PARTS_MAX = 1024
"""Of a form; CPPHTTPLIB_MULTIPART_FORM_DATA_FILE_MAX_COUNT."""
_PART_HEADERS_MAX = 100  # CPPHTTPLIB_HEADER_MAX_COUNT
_PART_HEADER_BYTES_MAX = 8192  # CPPHTTPLIB_HEADER_MAX_LENGTH
_BLANK = b" \t"
_PARAMETER = re.compile(rb'(?:[^;"]|"[^"]*(?:"|$))+')
_HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:")
_DISPOSITION = re.compile(rb"content-disposition:[ \t]*form-data;", re.IGNORECASE)
_EXTENDED = re.compile(rb"UTF-8''.", re.IGNORECASE | re.DOTALL)


class FormPeek:
    """Reads a multipart form, fed in pieces that may be cut anywhere; files are skipped.

    A field that is there twice is no string for llama-server but a list: it counts as not given.

    Args:
        boundary: of the Content-Type; one that cannot be makes a form that cannot be read.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._data = b""
        self._at = 0  # what is before it in `_data` was read
        self._is_broken = not 0 < len(boundary) <= BOUNDARY_BYTES_MAX
        self._is_closed = False
        self._step = self._seek
        self._parts = 0
        self._headers = 0
        self._name = b""
        self._is_file = False
        self._values: dict[bytes, list[bytes]] = {b"model": [], b"stream": []}

    def __repr__(self) -> str:
        return f"<FormPeek parts={self._parts} closed={self._is_closed}>"

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        if self._is_broken or self._is_closed:
            return
        self._data += data
        while self._step() and not self._is_broken and not self._is_closed:
            pass
        self._data = b"" if self._is_broken or self._is_closed else self._data[self._at :]
        self._at = 0

    def finish(self) -> Peeked:
        """What the form says, which is whole now."""
        if self._is_broken or not self._is_closed:
            return NOT_AN_OBJECT
        models, streams = self._values[b"model"], self._values[b"stream"]
        try:
            model = no_longer(models[0]) if len(models) == 1 else None
        except UnicodeDecodeError:
            return NOT_AN_OBJECT
        return Peeked(model, streams == [b"true"])

    # Each step reads on from `_at`, and says whether there may be more to read before the next piece.

    def _seek(self) -> bool:
        """Look for the first part."""
        first = self._delimiter[2:] + b"\r\n"
        found = self._data.find(first, self._at)
        if found < 0:
            self._at = max(self._at, len(self._data) - len(first) + 1)
            return False
        self._at = found + len(first)
        return self._begin_part()

    def _begin_part(self) -> bool:
        self._name = b""
        self._is_file = False
        self._headers = 0
        self._step = self._read_header
        return True

    def _read_header(self) -> bool:
        end = self._data.find(b"\r\n", self._at)
        if (len(self._data) if end < 0 else end) - self._at > _PART_HEADER_BYTES_MAX:
            self._is_broken = True
        if end < 0:
            return False
        line = self._data[self._at : end]
        self._at = end + 2
        if line:
            self._headers += 1
            self._is_broken |= self._headers > _PART_HEADERS_MAX or not _HEADER.match(line)
            if disposition := _DISPOSITION.match(line):
                self._read_disposition(line[disposition.end() :])
            return True
        self._parts += 1
        self._is_broken |= self._parts > PARTS_MAX
        if not self._is_file and self._name in self._values:
            self._values[self._name].append(b"")
        else:
            self._is_file = True
        self._step = self._read_content
        return True

    def _read_disposition(self, text: bytes) -> None:
        parameters = parameters_of(text)
        self._is_broken |= b"name" not in parameters
        self._name = parameters.get(b"name", b"")
        if b"filename" in parameters:
            self._is_file = bool(parameters[b"filename"])
        if b"filename*" in parameters:
            self._is_file = True
            self._is_broken |= not _EXTENDED.match(parameters[b"filename*"])

    def _read_content(self) -> bool:
        found = self._data.find(self._delimiter, self._at)
        end = found if found >= 0 else max(self._at, len(self._data) - len(self._delimiter) + 1)
        if not self._is_file:
            value = self._values[self._name]
            room = NAME_BYTES_MAX + 1 - len(value[-1])
            value[-1] += self._data[self._at : min(end, self._at + room)]
        self._at = end
        if found < 0:
            return False
        self._at += len(self._delimiter)
        self._step = self._read_end
        return True

    def _read_end(self) -> bool:
        """Read whether another part follows."""
        end = self._data[self._at : self._at + 2]
        if len(end) < 2:
            return False
        self._at += 2
        self._is_closed = end == b"--"
        self._is_broken = end not in {b"--", b"\r\n"}
        return self._begin_part()


def parameters_of(text: bytes) -> dict[bytes, bytes]:
    """The parameters of a header, as llama-server reads them: the first of a name counts, and there are no escapes."""
    parameters: dict[bytes, bytes] = {}
    for each in _PARAMETER.findall(text):
        key, _, value = each.partition(b"=")
        parameters.setdefault(_unquoted(key.strip(_BLANK)), _unquoted(value.strip(_BLANK)))
    return parameters


def _unquoted(text: bytes) -> bytes:
    return text[1:-1] if len(text) >= 2 and text.startswith(b'"') and text.endswith(b'"') else text
