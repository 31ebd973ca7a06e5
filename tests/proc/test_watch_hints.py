"""What the kernel hints at, and what it does not."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamavisor.catalog.walk import MAX_DEPTH
from llamavisor.watch import hints as hints_module
from llamavisor.watch.hints import STEP_MS, Hint, Hints, add_linked, find_folders, is_about_name

PATIENCE_MS = 15_000
QUIET_MS = 10 * STEP_MS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file and a folder in it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "file").write_bytes(b"x")
    return root


@pytest.fixture
def hints() -> Iterator[Hints]:
    """Ears that are closed after the test."""
    hints = Hints()
    yield hints
    hints.stop()
    os.close(hints.wakeup)


def hear(hints: Hints, *, within_ms: int = PATIENCE_MS) -> tuple[Hint, str]:
    """The next hint, or nothing."""
    poll = select.poll()
    poll.register(hints.wakeup, select.POLLIN)
    poll.poll(within_ms)
    return hints.take()


def test_what_is_heard(root: Path, hints: Hints) -> None:
    """Names that come and go, content that changes, and folders that go are told apart."""
    hints.listen(find_folders(str(root)))
    (root / "new").write_bytes(b"")
    assert hear(hints) == (Hint.NAMES, "")
    with (root / "file").open("ab", buffering=0) as file:
        file.write(b"y")
    assert hear(hints) == (Hint.CONTENT, "")
    (root / "file").rename(root / "sub" / "file")
    assert hear(hints) == (Hint.NAMES, "")
    (root / "sub" / "file").unlink()
    assert hear(hints) == (Hint.NAMES, "")
    shutil.rmtree(root / "sub")
    assert hear(hints) == (Hint.FOLDERS, "")


def test_reading_is_not_heard(root: Path, hints: Hints) -> None:
    """Else every look would ask for the next one."""
    hints.listen(find_folders(str(root)))
    (root / "file").read_bytes()
    list(root.iterdir())
    find_folders(str(root))
    assert hear(hints, within_ms=QUIET_MS) == (Hint.NOTHING, "")


def test_a_name_that_is_not_utf8(root: Path, hints: Hints) -> None:
    """It makes it deaf, which it says, and it can listen again though the name is still there."""
    hints.listen(find_folders(str(root)))
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).write_bytes(b"")
    hint, failure = hear(hints)
    assert hint is Hint.NAMES
    assert is_about_name(failure)
    assert not hints.is_listening
    hints.listen(find_folders(str(root)))
    (root / "new").write_bytes(b"")
    assert hear(hints) == (Hint.NAMES, "")


def test_other_folders(root: Path, hints: Hints) -> None:
    """What it listens to is known, and a failure of what it listened to before is not held against it."""
    folders = find_folders(str(root))
    hints.listen(folders)
    assert hints.covers(folders, within_s=60)
    assert not hints.covers(folders, within_s=0)
    replaced = hints._stop
    hints.listen({str(root): folders[str(root)]})
    hints.tell(replaced, Hint.NAMES, "too late")
    assert hints.take() == (Hint.NAMES, "")
    assert hints.is_listening
    assert not hints.covers(folders, within_s=60)
    (root / "sub" / "new").write_bytes(b"")
    assert hear(hints, within_ms=QUIET_MS) == (Hint.NOTHING, "")


def test_a_folder_that_is_not_there(root: Path, hints: Hints) -> None:
    """It says so, and listens to nothing."""
    with pytest.raises(FileNotFoundError):
        hints.listen({str(root / "none"): (1, 2)})
    assert not hints.is_listening


def test_which_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No links, no dots, nothing that is not UTF-8, the upper ones first, and neither too deep nor too many."""
    (root / "link").symlink_to("/")
    (root / ".hidden").mkdir()
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).mkdir()
    deep = root / "sub" / "/".join("d" * (MAX_DEPTH + 3))
    deep.mkdir(parents=True)
    found = list(find_folders(str(root)))
    assert found[:2] == [str(root), str(root / "sub")]
    assert len(found) == MAX_DEPTH + 1
    monkeypatch.setattr(hints_module, "MAX_FOLDERS", 2)
    assert list(find_folders(str(root))) == found[:2]


def test_folders_behind_links(root: Path, hints: Hints, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes into one is heard, and that it is deleted; the same folder is not taken twice."""
    out = root.with_name("out")
    (out / "deep").mkdir(parents=True)
    (root / "link").symlink_to(out)
    folders = find_folders(str(root))
    found = add_linked(folders, [str(root / "link"), str(root / "link" / "deep"), str(out), str(root / "gone")])
    assert list(found) == [*folders, str(root / "link"), str(root / "link" / "deep")]
    hints.listen(found)
    (out / "deep" / "new").write_bytes(b"")
    assert hear(hints) == (Hint.NAMES, "")
    shutil.rmtree(out)
    heard = Hint.NOTHING
    while heard is not Hint.FOLDERS:
        heard = hear(hints)[0]
        assert heard is not Hint.NOTHING
    monkeypatch.setattr(hints_module, "MAX_FOLDERS", len(folders))
    assert add_linked(folders, [str(root.parent)]) == folders


def test_no_folder(tmp_path: Path) -> None:
    """A folder that is not there has no folders."""
    assert find_folders(str(tmp_path / "none")) == {}
