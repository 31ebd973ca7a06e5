"""What crosses the pipe between the daemon and the worker that looks at a models folder."""

from __future__ import annotations

import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.catalog.disk import Disk
from llamavisor.catalog.entry import Entry, EntryState, FileId, ModelFile, Scan
from llamavisor.watch.wire import (
    MAX_MESSAGE_BYTES,
    MAX_PART_BYTES,
    MAX_PART_ENTRIES,
    Configure,
    Decoder,
    Mode,
    ScanDone,
    ScanNow,
    ScanPart,
    WireError,
    encode,
    encode_scan,
)

MESSAGES = (Configure("/m\udcff", ("/l",), 30.0, 3), ScanNow(7), Mode("polling", "no watches", 2))


def make_entry(name: str, *, note: str = "") -> Entry:
    """An entry of one file."""
    files = (ModelFile(f"/models/{name}.gguf", FileId(1, 2, 3, 4)),)
    return Entry(name=name, state=EntryState.READY, files=files, notes=(note,))


@given(st.lists(st.integers(1, 40)))
def test_messages_come_out_as_they_went_in(sizes: list[int]) -> None:
    """However the pipe cuts them, surrogates of names that are not UTF-8 included."""
    stream = b"".join(map(encode, MESSAGES))
    decoder, heard = Decoder(), []
    for size in [*sizes, len(stream)]:
        heard += decoder.feed(stream[:size])
        stream = stream[size:]
    assert tuple(heard) == MESSAGES


def test_a_large_scan_comes_in_small_parts() -> None:
    """No part has more entries than the event loop unpickles in a moment, and none is lost."""
    entries = tuple(make_entry(f"m{number}") for number in range(MAX_PART_ENTRIES * 2 + 1))
    heard = list(Decoder().feed(b"".join(encode_scan(Scan(changed=entries, removed=("old",), file_count=9), 5))))
    parts = [message for message in heard if isinstance(message, ScanPart)]
    assert sum((part.changed for part in parts), ()) == entries
    assert max(len(part.changed) for part in parts) <= MAX_PART_ENTRIES
    assert heard[-1] == ScanDone(Scan(removed=("old",), file_count=9), 5)


def test_all_else_that_a_look_found_comes_at_its_end() -> None:
    """Nothing of it is lost on the way, the disk included."""
    disk = Disk(10, 3)
    rest = Scan(removed=("a",), duration_s=1.0, file_count=2, headers_read=3, again_in_s=4.0, disk=disk)
    (done,) = Decoder().feed(b"".join(encode_scan(rest, 7)))
    assert done == ScanDone(rest, 7)
    assert done.scan.disk == disk


def test_large_entries_come_in_smaller_parts() -> None:
    """Entries with long texts are cut by bytes; one that is longer by itself still goes."""
    entries = tuple(make_entry(f"m{number}", note="x" * (MAX_PART_BYTES // 3)) for number in range(8))
    giant = make_entry("giant", note="x" * MAX_PART_BYTES * 2)
    messages = list(encode_scan(Scan(changed=(*entries, giant)), 0))
    heard = [message for data in messages for message in Decoder().feed(data)]
    told = [entry for message in heard if isinstance(message, ScanPart) for entry in message.changed]
    assert told == [*entries, giant]
    assert sorted(map(len, messages))[-2] <= MAX_PART_BYTES + 4


def test_a_scan_without_changes_is_one_message() -> None:
    """Which is what every look at a quiet folder costs."""
    assert len(list(encode_scan(Scan(problem="gone"), 1))) == 1


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(struct.pack("<I", MAX_MESSAGE_BYTES + 1), id="too long"),
        pytest.param(struct.pack("<I", 4) + b"junk", id="no pickle"),
        pytest.param(struct.pack("<I", 0), id="empty"),
        pytest.param(struct.pack("<I", len(pickle.dumps(3))) + pickle.dumps(3), id="no message"),
    ],
)
def test_what_is_no_message_is_refused(stream: bytes) -> None:
    """It is the end of the conversation, not of the daemon."""
    with pytest.raises(WireError):
        list(Decoder().feed(stream))
