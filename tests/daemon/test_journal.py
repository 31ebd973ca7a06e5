"""The journal of systemd: what is handed over, and what becomes of lines that it does not take."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamavisor.events import ModelLoaded
from llamavisord.journal import FIELD_BYTES, JournalHandler, is_behind
from llamavisord.log import begin


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """What listens where the journal would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "journal"))
        listener.settimeout(5)
        yield listener


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logging.Logger]:
    """A log that goes there."""
    logger = logging.Logger("test")  # noqa: LOG001 (one that nobody else has)
    handler = JournalHandler(str(tmp_path / "journal"))
    logger.addHandler(handler)
    yield logger
    handler.close()


def entry(datagram: bytes) -> dict[str, str]:
    """The fields of an entry, read as the journal reads those with a length."""
    fields = {}
    while datagram:
        name, _, rest = datagram.partition(b"\n")
        (length,) = struct.unpack_from("<Q", rest)
        fields[name.decode()] = rest[8 : 8 + length].decode()
        assert rest[8 + length : 9 + length] == b"\n"
        datagram = rest[9 + length :]
    return fields


def test_an_event_has_fields(journal: socket.socket, log: logging.Logger) -> None:
    """Its name, its router and its model, whatever is in them; and how grave it is."""
    name = "a\nPRIORITY=0"
    log.warning("loaded", extra={"event": ModelLoaded(router="main", model=name, load_s=None)})
    assert entry(journal.recv(1 << 20)) == {
        "MESSAGE": "loaded",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "llamavisor",
        "EVENT": "ModelLoaded",
        "ROUTER": "main",
        "MODEL": name,
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3"), (logging.CRITICAL, "2")],
)
def test_levels_are_those_of_syslog(journal: socket.socket, log: logging.Logger, level: int, priority: str) -> None:
    """So that `journalctl --priority` finds them."""
    log.log(level, "text")
    assert entry(journal.recv(1 << 20))["PRIORITY"] == priority


def test_a_huge_line_is_cut_off(journal: socket.socket, log: logging.Logger) -> None:
    """It is not lost."""
    log.info("x" * 1_000_000)
    assert entry(journal.recv(1 << 20))["MESSAGE"] == "x" * FIELD_BYTES


def test_nobody_waits_for_a_journal_that_takes_nothing(journal: socket.socket, log: logging.Logger) -> None:
    """What it does not take is lost, and it is told how much as soon as it takes something again."""
    sent = 0
    while not log.handlers[0]._lost:
        log.info("filler")
        sent += 1
    log.info("lost as well")
    for _ in range(sent - 1):
        assert entry(journal.recv(1 << 20))["MESSAGE"] == "filler"
    log.info("here again")
    assert entry(journal.recv(1 << 20))["MESSAGE"] == "2 lines before this were lost: the journal took none"
    assert entry(journal.recv(1 << 20))["MESSAGE"] == "here again"


def test_it_is_known_by_what_systemd_says(tmp_path: Path) -> None:
    """Output that was turned elsewhere is not taken from whoever turned it."""
    with (tmp_path / "file").open("w") as file:
        stat = os.fstat(file.fileno())
        here = {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
        journal = str(tmp_path / "file")
        assert is_behind(file.fileno(), here, journal)
        assert not is_behind(file.fileno(), here, str(tmp_path / "nothing"))
        assert not is_behind(file.fileno(), {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino + 1}"}, journal)
        assert not is_behind(file.fileno(), {}, journal)


def test_without_a_journal_lines_go_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """With time and level, which a journal knows by itself."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda *, level, handlers: made.append((level, *handlers)))
    made: list[tuple[str, logging.Handler]] = []
    begin("info")
    ((level, handler),) = made
    assert level == "INFO"
    line = handler.format(logging.makeLogRecord({"msg": "text\nmore", "levelname": "INFO"}))
    assert line.endswith(" INFO    text\\nmore")
