"""When the worker looks at its folder, on a clock of the test's, and what it does without the kernel's help."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamavisor.catalog.entry import Scan
from llamavisor.watch import worker as worker_module
from llamavisor.watch.hints import FolderId, Hint, Hints
from llamavisor.watch.wire import Configure, Decoder, Message, Mode, ScanDone, ScanNow
from llamavisor.watch.worker import (
    CONTENT_REST_S,
    CONTENT_SHARE,
    NAMES_REST_S,
    POLLING_S,
    REARM_S,
    RETRY_S,
    Line,
    Worker,
)

INTERVAL_S = 30.0


class Stage:
    """A worker with everything around it in the test's hands.

    Attributes:
        now: what its clock says.
        scan_s: how long a look takes.
        again_in_s: what each look asks for.
        heard: what the kernel hints at.
        refusal: raised when it wants to listen.
        linked: folders behind links that each look finds.
        listened: how often it began to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1000.0
        self.scan_s = 0.0
        self.again_in_s: float | None = None
        self.heard: list[tuple[Hint, str]] = []
        self.refusal: OSError | None = None
        self.listened = 0
        self.linked: tuple[str, ...] = ()
        self._said: list[Message] = []
        self.hints = FakeHints(self)
        configure = Configure(str(root), (), INTERVAL_S, 0)
        self.worker = Worker(configure, FakeLine(self), self, self.hints, lambda: self.now)

    def scan(self) -> Scan:
        """The scanner."""
        self.now += self.scan_s
        return Scan(again_in_s=self.again_in_s)

    def said(self) -> list[Message]:
        """What the worker told since the last call."""
        said, self._said[:] = list(self._said), []
        return said

    def hint(self, hint: Hint, failure: str = "") -> None:
        """The kernel says something."""
        if failure:
            self.hints.stop()
        self.heard.append((hint, failure))
        self.worker._listen_to_kernel()

    def due_in_s(self) -> float:
        """How long until it looks again."""
        return self.worker._due_at() - self.now

    def look(self) -> list[Message]:
        """It looks; what it said."""
        self.worker._look()
        return self.said()


class FakeLine(Line):
    """A pipe to the test."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._to = Decoder()

    def send(self, data: bytes) -> None:
        """Hear it."""
        self._stage._said += self._to.feed(data)


class FakeHints(Hints):
    """A kernel in the test's hands."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage
        self._is_listening = False
        self._theirs: dict[str, FolderId] = {}

    @property
    def is_listening(self) -> bool:
        """What it was told last."""
        return self._is_listening

    def covers(self, folders: object, *, within_s: float) -> bool:
        """As it is."""
        return self._is_listening and folders == self._theirs

    def listen(self, folders: object) -> None:
        """Count it, or refuse."""
        self.stop()
        if self._stage.refusal is not None:
            raise self._stage.refusal
        self._stage.listened += 1
        self._is_listening, self._theirs = True, dict(folders)

    def stop(self) -> None:
        """Be deaf."""
        self._is_listening = False

    def take(self) -> tuple[Hint, str]:
        """What the test said."""
        return self._stage.heard.pop(0)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A worker that has looked once, at a folder that exists."""
    (tmp_path / "models").mkdir()
    stage = Stage(tmp_path / "models")
    assert stage.due_in_s() < 0
    assert stage.look() == [Mode("inotify", "", 0), ScanDone(Scan(), 0)]
    yield stage
    os.close(stage.hints.wakeup)


def test_quiet(stage: Stage) -> None:
    """Nothing hints at anything: the interval."""
    assert stage.due_in_s() == INTERVAL_S


def test_names(stage: Stage) -> None:
    """Something came or went: at once, but with a rest after each look."""
    stage.hint(Hint.NAMES)
    assert stage.due_in_s() == pytest.approx(NAMES_REST_S)
    stage.now += 1
    assert stage.due_in_s() < 0


def test_names_in_a_large_folder(stage: Stage) -> None:
    """While a look takes long, half of the time is spent looking at most."""
    stage.scan_s = 3.0
    stage.look()
    stage.hint(Hint.NAMES)
    assert stage.due_in_s() == 3.0


def test_content(stage: Stage) -> None:
    """A file that is written to for minutes costs little."""
    stage.hint(Hint.CONTENT)
    assert stage.due_in_s() == CONTENT_REST_S
    stage.scan_s = 1.0
    stage.look()
    stage.hint(Hint.CONTENT)
    assert stage.due_in_s() == CONTENT_SHARE


def test_the_stronger_hint_counts(stage: Stage) -> None:
    """A write does not make one forget that a file came."""
    stage.hint(Hint.NAMES)
    stage.hint(Hint.CONTENT)
    assert stage.due_in_s() == pytest.approx(NAMES_REST_S)


def test_a_look_asks_for_another(stage: Stage) -> None:
    """What settles is looked at when it is due, and never without end."""
    stage.again_in_s = 1.5
    stage.look()
    assert stage.due_in_s() == 1.5
    stage.again_in_s = 0.0
    stage.look()
    assert stage.due_in_s() > 0


def test_the_daemon_asks(stage: Stage) -> None:
    """The token of what was asked before the look comes back."""
    stage.worker.hear([ScanNow(4), ScanNow(5)])
    assert stage.due_in_s() < 0
    assert stage.look() == [ScanDone(Scan(), 5)]


def test_another_folder_in_its_place(stage: Stage) -> None:
    """A folder that was moved away, and one that came in its place, are looked at, and listened to."""
    stage.root.rename(stage.root.with_name("away"))
    stage.worker._check_root()
    assert stage.due_in_s() < 0
    stage.look()
    assert not stage.hints.is_listening
    assert stage.due_in_s() == INTERVAL_S
    stage.root.mkdir()
    stage.worker._check_root()
    assert stage.due_in_s() < 0
    stage.look()
    assert stage.hints.is_listening


def test_a_folder_made_anew_under_the_same_number(stage: Stage) -> None:
    """Its number says that nothing has changed, but the watch on it has gone."""
    stage.hint(Hint.FOLDERS)
    stage.now += 1
    stage.look()
    assert stage.listened == 2


def test_a_folder_that_comes(stage: Stage) -> None:
    """It is listened to from then on."""
    (stage.root / "sub").mkdir()
    stage.look()
    assert (stage.listened, set(stage.hints._theirs)) == (2, {str(stage.root), str(stage.root / "sub")})


def test_a_folder_behind_a_link(stage: Stage, tmp_path: Path) -> None:
    """It is listened to as soon as a look has found it, and what came meanwhile is looked for."""
    (tmp_path / "out").mkdir()
    stage.linked = (str(tmp_path / "out"), str(tmp_path / "none"), "/\udcff")
    stage.look()
    assert (stage.listened, set(stage.hints._theirs)) == (2, {str(stage.root), str(tmp_path / "out")})
    assert stage.due_in_s() == pytest.approx(NAMES_REST_S)
    stage.look()
    assert (stage.listened, stage.due_in_s()) == (2, INTERVAL_S)
    stage.linked = ()
    stage.look()
    assert set(stage.hints._theirs) == {str(stage.root)}


def test_a_kernel_that_refuses_behind_a_link(stage: Stage, tmp_path: Path) -> None:
    """That it polls now is told at once."""
    stage.linked, stage.refusal = (str(tmp_path),), OSError("no")
    assert stage.look()[-1] == Mode("polling", "no", 1)


def test_a_folder_that_is_not_there_is_not_listened_to(stage: Stage) -> None:
    """Which is told, until it is there; so is one that is none."""
    absent = Mode("polling", "there is no folder that can be read", 0)
    stage.root.rename(stage.root.with_name("away"))
    assert stage.look()[0] == absent
    assert stage.due_in_s() == INTERVAL_S
    stage.root.touch()
    stage.look()
    assert stage.due_in_s() == POLLING_S
    stage.root.unlink()
    stage.root.mkdir()
    assert stage.look()[0] == Mode("inotify", "", 0)


def test_a_name_that_is_not_utf8_is_no_failure(stage: Stage) -> None:
    """It is told as a model that cannot be served; here it only has to be listened again."""
    stage.now += 10
    stage.hint(Hint.NAMES, 'Unable to decode path "/m/\\xFF.gguf" to string')
    assert stage.look() == [ScanDone(Scan(), 0)]
    assert stage.listened == 2


def test_a_failure_is_reported_and_heals(stage: Stage) -> None:
    """The listening begins again with the next look, which is soon."""
    stage.now += 10
    stage.hint(Hint.NAMES, "cannot go on")
    assert stage.due_in_s() < 0
    assert stage.look()[0] == Mode("inotify", "cannot go on", 1)
    assert stage.listened == 2


def test_failures_in_a_row_are_no_storm(stage: Stage) -> None:
    """While a file with a bad name is being written to it is listened again once in a second, not a hundred times."""
    stage.now += 10
    stage.hint(Hint.NAMES, "cannot decode")
    stage.look()
    stage.hint(Hint.NAMES, "cannot decode")
    assert stage.due_in_s() == pytest.approx(REARM_S)
    stage.now += REARM_S
    stage.look()
    assert stage.listened == 3


def test_a_kernel_that_refuses(stage: Stage) -> None:
    """Without inotify it polls, says so once, and asks the kernel again after minutes only."""
    stage.refusal = OSError("OS file watch limit reached")
    stage.hint(Hint.FOLDERS)
    told = [message for _ in range(5) for message in stage.look() if isinstance(message, Mode)]
    assert told == [Mode("polling", "OS file watch limit reached", 1)]
    assert stage.due_in_s() == POLLING_S
    stage.refusal = None
    stage.now += RETRY_S
    assert Mode("inotify", "OS file watch limit reached", 1) in stage.look()
    assert stage.due_in_s() == INTERVAL_S


def test_polling_a_slow_folder(stage: Stage) -> None:
    """Polling takes a tenth of the time at most, and is no rarer than the interval."""
    stage.refusal, stage.scan_s = OSError("no"), 2.0
    stage.hint(Hint.FOLDERS)
    stage.look()
    assert stage.due_in_s() == 2.0 * CONTENT_SHARE
    stage.scan_s = 20.0
    stage.look()
    assert stage.due_in_s() == INTERVAL_S


def test_a_folder_that_goes_while_it_begins_to_listen(stage: Stage) -> None:
    """It is no refusal: the next try follows soon."""
    stage.refusal = FileNotFoundError("sub")
    stage.hint(Hint.FOLDERS)
    assert not any(isinstance(message, Mode) for message in stage.look())
    assert stage.due_in_s() == pytest.approx(REARM_S)


def test_a_network_mount(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the kernel does not know who writes."""
    device = stage.root.stat().st_dev
    monkeypatch.setattr(worker_module, "network_devices", lambda: frozenset({device}))
    assert stage.look()[0] == Mode("polling", "the folder is on a network file system", 0)
    assert stage.due_in_s() == POLLING_S
    assert not stage.hints.is_listening
