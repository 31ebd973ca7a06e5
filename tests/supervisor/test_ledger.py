"""The ledger: what it keeps, what it survives, and how little it writes."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor import ledger as ledger_module
from llamavisor.catalog import FileId
from llamavisor.ledger import (
    FLUSH_EVERY_S,
    MAX_AGE_S,
    MAX_FILE_BYTES,
    MAX_KEYS,
    NAME,
    WARN_EVERY_S,
    FootprintKey,
    Footprints,
    Ledger,
)

NOW = 1_800_000_000.0


@dataclass
class Clock:
    """Time that stands still until it is moved."""

    now: float = NOW

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@dataclass
class Opened:
    """A ledger and all around it."""

    path: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.footprints = Footprints(self.clock)
        self.ledger = Ledger(self.path, [self.footprints], clock=self.clock, wall=self.clock)
        self.messages = self.ledger.load()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger lies."""
    return tmp_path / NAME


def key(number: int = 0) -> FootprintKey:
    """One of many keys."""
    return FootprintKey(f"files{number}", "options", "build")


def content(path: Path) -> dict[str, object]:
    """What the file says."""
    said = json.loads(path.read_text())
    assert isinstance(said, dict)
    return said


def test_what_was_learned_survives(path: Path) -> None:
    """The next daemon knows what this one has measured, in the same order."""
    first = Opened(path)
    assert first.messages == ()
    for size in (1, 2, 3, 4):
        first.footprints.record(key(), {"RAM": size, "GPU-1": 10})
    assert first.ledger.flush().is_written
    second = Opened(path)
    assert second.messages == ()
    assert second.footprints.recall(key()) == tuple({"RAM": size, "GPU-1": 10} for size in (2, 3, 4))
    assert second.footprints.recall(key(1)) == ()
    assert not second.ledger.is_dirty
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [NAME]


def test_it_is_written_rarely(path: Path) -> None:
    """Nothing is written unless something changed, and what changes soon after waits."""
    opened = Opened(path)
    assert not opened.ledger.is_due
    opened.ledger.flush()
    assert not path.exists()
    opened.footprints.record(key(), {"RAM": 1})
    assert opened.ledger.is_due
    opened.ledger.flush()
    opened.footprints.record(key(), {"RAM": 2})
    opened.clock.now += FLUSH_EVERY_S - 1
    assert opened.ledger.is_dirty
    assert not opened.ledger.is_due
    opened.clock.now += 1
    assert opened.ledger.is_due
    opened.ledger.flush()
    assert repr(opened.ledger) == f"<Ledger {NAME} written>"


def test_a_change_while_it_is_written_is_not_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded in the middle of a write makes the next one due."""
    opened = Opened(path)
    opened.footprints.record(key(), {"RAM": 1})
    replaced = ledger_module.replace_file

    def meanwhile(path: Path, data: bytes) -> None:
        opened.footprints.record(key(1), {"RAM": 2})
        replaced(path, data)

    monkeypatch.setattr(ledger_module, "replace_file", meanwhile)
    opened.ledger.flush()
    assert opened.ledger.is_dirty
    monkeypatch.undo()
    opened.ledger.flush()
    assert Opened(path).footprints.recall(key(1)) == ({"RAM": 2},)


def test_the_key_longest_not_measured_makes_room(path: Path) -> None:
    """There are never more keys than the bound, in memory or from a file, and a measured key is young again."""
    opened = Opened(path)
    for number in range(MAX_KEYS):
        opened.footprints.record(key(number), {"RAM": 1})
    opened.footprints.record(key(0), {"RAM": 1})
    opened.footprints.record(key(MAX_KEYS), {"RAM": 1})
    assert len(opened.footprints) == MAX_KEYS
    assert opened.footprints.recall(key(1)) == ()
    assert opened.footprints.recall(key(0)) != ()
    opened.ledger.flush()
    assert path.stat().st_size < MAX_FILE_BYTES / 16
    again = Opened(path).footprints
    again.record(key(-1), {"RAM": 1})
    assert again.recall(key(2)) == ()
    assert again.recall(key(0)) != ()


def test_nonsense_is_not_learned(path: Path) -> None:
    """A measurement of nothing or less is none."""
    opened = Opened(path)
    opened.footprints.record(key(), {})
    opened.footprints.record(key(), {"RAM": -1})
    assert not opened.ledger.is_dirty


def _written(**changes: object) -> bytes:
    return json.dumps({"format": ledger_module.FORMAT, "version": 1, "sections": {}} | changes).encode()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "empty"),
        (_written()[:-3], "cut off"),
        (b"\x00" * 100, "cut off"),
        (b"[" * 100_000, "cut off"),
        (b"\xff\xfe{}", "cut off"),
        (b"[]", "not ours"),
        (b'{"a": 1}', "not ours"),
        (_written(version="1"), "damaged"),
        (_written(sections=[]), "damaged"),
        (_written(version=2), "newer llamavisor"),
        (b" " * (MAX_FILE_BYTES + 1), "bytes"),
    ],
    ids=["empty", "torn", "zeros", "deep", "no-text", "list", "foreign", "version", "sections", "future", "huge"],
)
def test_a_file_that_cannot_be_used_is_put_aside(path: Path, raw: bytes, why: str) -> None:
    """D11: torn, foreign, damaged or from the future: a warning, a copy beside, and a daemon that begins anew."""
    path.write_bytes(raw)
    path.with_name(f"{NAME}.bad").write_text("an older one")
    opened = Opened(path)
    assert len(opened.messages) == 1
    assert why in opened.messages[0]
    assert "Beginning with nothing" in opened.messages[0]
    assert path.with_name(f"{NAME}.bad").read_bytes() == raw
    assert not path.exists()
    opened.footprints.record(key(), {"RAM": 1})
    assert opened.ledger.flush().is_written
    assert Opened(path).messages == ()


def test_what_is_no_file_is_put_aside(path: Path) -> None:
    """A FIFO of that name does not hold the daemon up."""
    os.mkfifo(path)
    assert "no regular file" in Opened(path).messages[0]
    assert stat.S_ISFIFO(path.with_name(f"{NAME}.bad").stat().st_mode)


def test_a_folder_in_its_place_is_told(path: Path) -> None:
    """Even what cannot be moved away is only a warning."""
    path.mkdir()
    bad = path.with_name(f"{NAME}.bad")
    bad.mkdir()
    (bad / "x").touch()
    message = Opened(path).messages[0]
    assert "could not be put aside either" in message


@given(st.binary(max_size=200))
def test_any_bytes_are_survived(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Loading is total."""
    path = tmp_path_factory.mktemp("any") / NAME
    path.write_bytes(raw)
    assert len(Opened(path).messages) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
records = st.fixed_dictionaries(
    {},
    optional={
        "files": st.text(max_size=3) | json_values,
        "options": st.just("o"),
        "build": st.just("b"),
        "bytes": st.lists(st.dictionaries(st.text(max_size=3), st.integers())) | json_values,
        "at": st.floats() | st.integers() | json_values,
    },
)


@given(json_values | st.lists(records))
def test_any_section_is_survived(raw: object) -> None:
    """Records that make no sense are left out, and what is kept can be written and read again."""
    footprints = Footprints()
    footprints.load(raw, NOW)
    again = Footprints()
    assert again.load(json.loads(json.dumps(footprints.dump())), NOW) == ""
    assert again.dump() == footprints.dump()


def _record(**changes: object) -> dict[str, object]:
    return {"files": "f", "options": "o", "build": "b", "bytes": [{"RAM": 5}], "at": NOW} | changes


def test_one_bad_record_spoils_no_other(path: Path) -> None:
    """Damaged, stale and future records go, others stay, and a person hears of what was not understood."""
    items = [
        _record(files="good"),
        _record(files=7),
        _record(bytes=[{"RAM": -5}]),
        _record(bytes=[]),
        _record(files="stale", at=NOW - MAX_AGE_S - 1),
        _record(files="ahead", at=NOW + 1e9),
        _record(files="newer", mood="fine"),
        "x",
    ]
    path.write_bytes(_written(sections={"footprints": items}))
    opened = Opened(path)
    assert len(opened.messages) == 1
    assert "4 damaged records" in opened.messages[0]
    assert "mood" in opened.messages[0]
    known = [
        name for name in ("good", "stale", "ahead", "newer") if opened.footprints.recall(FootprintKey(name, "o", "b"))
    ]
    assert known == ["good", "ahead", "newer"]
    # A clock that was wrong when it was measured does not make it immortal.
    opened.footprints.record(key(), {"RAM": 1})
    opened.ledger.flush()
    later = Opened(path, Clock(NOW + MAX_AGE_S + 1))
    assert later.footprints.recall(FootprintKey("ahead", "o", "b")) == ()


def test_a_section_of_another_kind_is_left_out(path: Path) -> None:
    """A section that is no list is told, and the others are read."""
    path.write_bytes(_written(sections={"footprints": {"a": 1}}))
    assert "no list" in Opened(path).messages[0]


def test_sections_of_newer_daemons_are_kept(path: Path) -> None:
    """What this version does not know is written back as it was."""
    pins = {"models": ["a", None, 1.5], "deep": {"x": [{}]}}
    path.write_bytes(_written(sections={"pins": pins, "footprints": []}))
    opened = Opened(path)
    assert opened.messages == ()
    opened.footprints.record(key(), {"RAM": 1})
    opened.ledger.flush()
    sections = content(path)["sections"]
    assert isinstance(sections, dict)
    assert sections["pins"] == pins
    assert len(sections["footprints"]) == 1


def _failing(number: int) -> Callable[..., None]:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_is_told_once_an_hour_and_recovers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: what was learned stays in memory, the old file stays whole, and all is written in the end."""
    opened = Opened(path)
    opened.footprints.record(key(), {"RAM": 1})
    opened.ledger.flush()
    before = path.read_bytes()
    opened.footprints.record(key(), {"RAM": 2})
    monkeypatch.setattr(os, "fsync", _failing(errno.ENOSPC))
    told = opened.ledger.flush()
    assert not told.is_written
    assert "No space left" in told.message
    for _ in range(3):
        opened.clock.now += FLUSH_EVERY_S
        assert opened.ledger.is_due
        assert opened.ledger.flush().message == ""
    opened.clock.now += WARN_EVERY_S
    assert opened.ledger.flush().message != ""
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [NAME]
    assert repr(opened.ledger) == f"<Ledger {NAME} failing>"
    assert opened.footprints.recall(key()) == ({"RAM": 1}, {"RAM": 2})
    monkeypatch.undo()
    recovered = opened.ledger.flush()
    assert recovered.is_written
    assert "written again" in recovered.message
    assert Opened(path).footprints.recall(key()) == ({"RAM": 1}, {"RAM": 2})
    opened.footprints.record(key(), {"RAM": 3})
    assert opened.ledger.flush().message == ""


def test_a_folder_that_is_gone_is_survived(tmp_path: Path) -> None:
    """Without its folder nothing is written, and nothing raises."""
    opened = Opened(tmp_path / "gone" / NAME)
    opened.footprints.record(key(), {"RAM": 1})
    assert not opened.ledger.flush().is_written
    (tmp_path / "gone").mkdir()
    assert opened.ledger.flush().is_written


def test_a_draft_of_a_killed_daemon_is_replaced(path: Path) -> None:
    """What a crash left behind is in nobody's way, be it even a link to elsewhere."""
    target = path.parent / "precious"
    target.write_text("mine")
    (path.parent / f".{NAME}.tmp").symlink_to(target)
    opened = Opened(path)
    opened.footprints.record(key(), {"RAM": 1})
    opened.ledger.flush()
    assert target.read_text() == "mine"
    assert sorted(os.listdir(path.parent)) == [NAME, "precious"]


def test_a_folder_without_fsync_is_enough(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that cannot force a folder to the disk say so, and it is no failure."""
    fsync = os.fsync

    def picky(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", picky)
    opened = Opened(path)
    opened.footprints.record(key(), {"RAM": 1})
    assert opened.ledger.flush().is_written


def test_keys_name_contents_ways_and_builds() -> None:
    """Another content, another way or another build is another key; the same is the same in the next daemon."""
    files, build = (FileId(1, 2, 3, 4),), (("llama-server", 5, 6, 7),)
    one = FootprintKey.of(files, "digest", build)
    assert one == FootprintKey.of(list(files), "digest", list(build))
    others = [
        FootprintKey.of((FileId(1, 2, 3, 5),), "digest", build),
        FootprintKey.of((*files, *files), "digest", build),
        FootprintKey.of(files, "other", build),
        FootprintKey.of(files, "digest", (("llama-server", 5, 6, 8),)),
    ]
    assert len({one, *others}) == 5
    assert FootprintKey.of((), "", (("bad\udcff", 1, 2, 3),)).build != one.build
