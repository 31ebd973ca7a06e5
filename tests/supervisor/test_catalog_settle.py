"""Whether a file is whole and still."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufs import small_model
from llamavisor import gguf
from llamavisor.catalog import EntryState
from llamavisor.catalog.mounts import parse
from llamavisor.catalog.settle import (
    HOLE_S,
    OLD_NETWORK_S,
    STILL_NETWORK_S,
    STILL_S,
    ZERO_TAIL_S,
    Evidence,
    settle,
)
from llamavisor.gguf import Header

READY, SETTLING, INVALID = EntryState.READY, EntryState.SETTLING, EntryState.INVALID
SECOND_NS = 10**9


@cache
def header() -> Header:
    """Of a small model."""
    raw = small_model().encode()
    return gguf.parse(lambda offset, length: raw[offset : offset + length], len(raw))


def written(**changes: object) -> Evidence:
    """What is seen of a whole file that was written in place: mtime and ctime are the same."""
    return Evidence(
        **{"size": header().min_file_bytes, "mtime_ns": SECOND_NS, "ctime_ns": SECOND_NS, "header": header(), **changes}
    )


def large(**changes: object) -> Evidence:
    """What is seen of a file of 10 GB."""
    return written(header=replace(header(), data_bytes=10**10), size=10**10 + header().data_offset, **changes)


def test_a_written_file_is_ready_once_it_is_still() -> None:
    """Two seconds without a change, and until then it is said when they are over."""
    early = settle(written(watched_s=0.5))
    assert (early.state, early.again_in_s) == (SETTLING, STILL_S - 0.5)
    assert settle(written(watched_s=STILL_S)).state is READY


def test_a_file_that_is_old_when_it_is_first_seen_is_ready_at_once() -> None:
    """After a start of the daemon nobody waits for files that have been there for a year."""
    assert settle(written(age_s=STILL_S)).state is READY
    assert settle(written(age_s=STILL_S - 0.1)).state is SETTLING


def test_a_file_that_was_moved_in_is_ready_at_once() -> None:
    """A rename sets ctime and leaves mtime."""
    assert settle(written(ctime_ns=2 * SECOND_NS)).state is READY


def test_a_time_in_the_future_does_not_matter() -> None:
    """A mtime that somebody set to next year, or a ctime of a clock that was wrong, only costs the usual wait."""
    assert settle(written(mtime_ns=9 * SECOND_NS, watched_s=STILL_S)).state is READY
    assert settle(written(age_s=-1e9, watched_s=STILL_S)).state is READY


def test_nothing_is_ready_at_once_on_a_network_mount() -> None:
    """Another machine's rename is not told from its writing, its pauses are longer, and its clock may be wrong."""
    moved = written(ctime_ns=2 * SECOND_NS, is_network=True)
    assert settle(moved).state is SETTLING
    assert settle(replace(moved, watched_s=STILL_NETWORK_S)).state is READY
    assert settle(replace(moved, age_s=OLD_NETWORK_S - 1)).state is SETTLING
    assert settle(replace(moved, age_s=OLD_NETWORK_S)).state is READY


def test_a_short_file_settles_and_is_then_cut_off() -> None:
    """While it grows it is no news; once it is still, how much is missing is said."""
    short = written(size=header().min_file_bytes - 1)
    assert settle(short).state is SETTLING
    still = settle(replace(short, watched_s=STILL_S))
    needed = header().min_file_bytes
    assert (still.state, still.again_in_s) == (INVALID, None)
    assert still.reason == f"it holds {needed - 1} of at least {needed} bytes: cut off, or a copy that stalled"


def test_a_short_file_that_was_moved_in_is_not_ready() -> None:
    """Only what is whole is ready at once."""
    assert settle(written(size=10, ctime_ns=2 * SECOND_NS)).state is SETTLING


def test_an_empty_file_settles_and_is_then_empty() -> None:
    """Every copy begins empty."""
    empty = Evidence(size=0, problem="the file is empty", is_partial=True)
    assert settle(empty).state is SETTLING
    assert settle(replace(empty, watched_s=STILL_S)).reason == "it is empty: cut off, or a copy that stalled"


def test_a_header_that_ends_early_is_told_in_whole_sentences() -> None:
    """How much there is stands before what is wrong with it, and is not woven into it."""
    odd = Evidence(size=100, problem="the key of value 12 would have 0 bytes (byte 63)", is_partial=True)
    assert settle(odd).reason == "it holds 100 bytes so far: the key of value 12 would have 0 bytes (byte 63)"
    still = "it is cut off, or a copy that stalled, at 100 bytes: the key of value 12 would have 0 bytes (byte 63)"
    assert settle(replace(odd, watched_s=STILL_S)) == (INVALID, still, None)


def test_what_is_no_gguf_file_is_invalid_at_once() -> None:
    """Waiting does not make a web page a model."""
    assert settle(Evidence(size=10, problem="this is a web page")) == (INVALID, "this is a web page", None)


def test_a_hole_is_waited_for_but_not_for_ever() -> None:
    """A copy that took its room beforehand is not used; a file that is sparse for good is, ten minutes later."""
    found = settle(written(hole=4096, watched_s=60))
    assert (found.state, found.again_in_s) == (SETTLING, HOLE_S - 60)
    assert found.reason == "bytes are missing at 4096: a copy seems to be under way"
    assert settle(written(hole=4096, watched_s=HOLE_S)).state is READY
    assert settle(written(hole=4096, ctime_ns=2 * SECOND_NS)).state is SETTLING, "moved in, and not whole"


def test_a_tail_of_zeros_is_waited_for_as_long_as_a_copy_of_that_size_takes() -> None:
    """A small model may end in zeros and is there in an instant; ten gigabytes are not."""
    assert settle(written(has_zero_tail=True, watched_s=STILL_S)).state is READY
    assert settle(large(has_zero_tail=True, watched_s=ZERO_TAIL_S - 1)).state is SETTLING
    assert settle(large(has_zero_tail=True, watched_s=ZERO_TAIL_S)).state is READY
    assert settle(large(has_zero_tail=True, ctime_ns=2 * SECOND_NS)).state is READY, "moved in whole"


def test_what_a_downloader_works_on_settles() -> None:
    """Its control file counts more than how long the file has been still, and more than what is in it."""
    assert settle(written(is_downloading=True, watched_s=1e6)).state is SETTLING
    assert settle(Evidence(size=3, problem="junk", is_downloading=True)).state is SETTLING


@given(
    st.builds(
        Evidence,
        size=st.integers(0, 2**63),
        mtime_ns=st.integers(-(2**63), 2**63),
        ctime_ns=st.integers(-(2**63), 2**63),
        header=st.sampled_from([None, header()]),
        problem=st.text(max_size=5),
        is_partial=st.booleans(),
        hole=st.none() | st.integers(0, 2**63),
        has_zero_tail=st.booleans(),
        is_downloading=st.booleans(),
        is_network=st.booleans(),
        watched_s=st.floats(0, 1e12),
        age_s=st.floats(-1e12, 1e12),
    )
)
def test_every_file_gets_a_verdict_that_does_not_stay_open(seen: Evidence) -> None:
    """Whatever is seen, a file is judged; if it settles it is said when to look again, and then it does no longer."""
    found = settle(seen)
    assert found.state in {READY, SETTLING, INVALID}
    if found.state is SETTLING and not seen.is_downloading:
        assert found.again_in_s is not None
        assert found.again_in_s > 0
        assert settle(replace(seen, watched_s=HOLE_S)).state is not SETTLING
    if found.state is READY:
        assert seen.header is not None
        assert seen.size >= seen.header.min_file_bytes
        assert settle(replace(seen, watched_s=seen.watched_s + 1)).state is READY


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("9p", True), ("fuseblk", False), ("ext4", False)],
)
def test_a_network_mount_is_known_by_its_type(kind: str, is_network: bool) -> None:
    """As /proc/self/mountinfo writes it, with optional fields or without."""
    text = f"36 35 0:41 / /mnt/a\\040b rw,noatime shared:1 master:2 - {kind} server:/x rw\nnonsense\n"
    assert bool(parse(text)) is is_network
