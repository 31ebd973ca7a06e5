"""A file gets a name that nobody else has, whatever the file system knows."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from llamavisor import files
from llamavisor.files import put_new


class _NoRenameat2:
    """A C library without it."""

    def __init__(self, *_: object, **__: object) -> None: ...


class _Renameat2Refused:
    """A kernel that knows it, and a file system that does not."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def renameat2(self, *_: object) -> int:
        """Refuses."""
        ctypes.set_errno(errno.EINVAL)
        return -1


KINDS = ["links", "renameat2", "neither", "an old library"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system knows."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param != "links":
        monkeypatch.setattr(os, "link", refuse)
    if request.param in {"neither", "an old library"}:
        library = _Renameat2Refused if request.param == "neither" else _NoRenameat2
        monkeypatch.setattr(files.ctypes, "CDLL", library)
    return str(request.param)


def test_what_nobody_has(tmp_path: Path, kind: str) -> None:
    """The file has its new name, and no longer the old one."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("whole")
    put_new(source, target)
    assert (source.exists(), target.read_text()) == (False, "whole")


def test_what_somebody_has(tmp_path: Path, kind: str) -> None:
    """What has that name stays, and so does the file under its old one."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("whole")
    target.write_text("precious")
    with pytest.raises(FileExistsError):
        put_new(source, target)
    assert (source.read_text(), target.read_text()) == ("whole", "precious")


def test_what_cannot_be_done(tmp_path: Path, kind: str) -> None:
    """Where it cannot be done nothing has that name afterwards."""
    target = tmp_path / "target"
    with pytest.raises(FileNotFoundError):
        put_new(tmp_path / "none", target)
    assert not target.exists()


def test_no_moment_of_an_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without links, too, a file gets its name in one step where the kernel can do that."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("whole")
    put_new(source, target)
    assert target.read_text() == "whole"
