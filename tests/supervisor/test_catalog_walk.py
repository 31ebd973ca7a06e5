"""Which files are found in a models folder, whatever else lies there."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from llamavisor.catalog import walk as module
from llamavisor.catalog.walk import MAX_DEPTH, Tree, Walker


def walk(root: Path, *link_dirs: Path) -> Tree:
    """One walk."""
    return Walker(str(root), [str(path) for path in link_dirs]).walk()


def rels(tree: Tree) -> list[str]:
    """What files were found."""
    return sorted(found.rel for found in tree.files.values())


def reasons(tree: Tree) -> dict[str, str]:
    """What oddities were found, and what is said of them."""
    return {odd.rel: odd.reason for odd in tree.oddities.values()}


def put(path: Path, text: str = "x") -> Path:
    """A file, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_only_what_calls_itself_gguf_is_found(tmp_path: Path) -> None:
    """In any case and at any depth; hidden files and folders are not looked at."""
    for rel in ("a.gguf", "B.GGUF", "f/c.gguf", "f/g/h/d.gguf", "x.gguf/y.gguf", "note.txt", ".h.gguf", ".h/a.gguf"):
        put(tmp_path / rel)
    assert rels(walk(tmp_path)) == ["B.GGUF", "a.gguf", "f/c.gguf", "f/g/h/d.gguf", "x.gguf/y.gguf"]


def test_what_is_no_file_is_reported_and_never_opened(tmp_path: Path) -> None:
    """A FIFO without a writer would stop whoever opens it for ever."""
    os.mkfifo(tmp_path / "fifo.gguf")
    os.symlink("/dev/null", tmp_path / "null.gguf")
    os.mkfifo(tmp_path / "ignored")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "sock.gguf"))
        tree = walk(tmp_path, Path("/dev"))
    assert reasons(tree) == {
        "fifo.gguf": "this is a FIFO, not a file",
        "null.gguf": "this is a device, not a file",
        "sock.gguf": "this is a socket, not a file",
    }


def test_links_inside_the_folder_are_followed_once(tmp_path: Path) -> None:
    """A link to a file is found; a folder that is reached twice is found under its own name, and loops end."""
    put(tmp_path / "f/a.gguf")
    os.symlink("f/a.gguf", tmp_path / "b.gguf")
    os.symlink("f", tmp_path / "again")
    os.symlink("..", tmp_path / "f/up")
    os.symlink(".", tmp_path / "self")
    tree = walk(tmp_path)
    assert rels(tree) == ["b.gguf", "f/a.gguf"]
    assert not tree.oddities


def test_links_that_lead_nowhere_are_reported(tmp_path: Path) -> None:
    """Only when they call themselves model files."""
    os.symlink("gone", tmp_path / "dangling.gguf")
    os.symlink("loop.gguf", tmp_path / "loop.gguf")
    os.symlink("gone", tmp_path / "ignored")
    assert reasons(walk(tmp_path)) == {
        "dangling.gguf": 'a link to "gone", which does not exist',
        "loop.gguf": "a link to itself",
    }


def test_links_that_lead_outside_need_leave(tmp_path: Path) -> None:
    """Each is reported once with what to write; with leave it is like any other, and no sibling of that folder is."""
    root, out = tmp_path / "models", tmp_path / "out"
    put(out / "a.gguf")
    put(tmp_path / "outer/b.gguf")
    root.mkdir()
    os.symlink(out / "a.gguf", root / "a.gguf")
    os.symlink(out, root / "folder")
    os.symlink(tmp_path / "outer/b.gguf", root / "b.gguf")
    tree = walk(root)
    assert not tree.files
    assert reasons(tree)["folder"] == (
        f'a link to "{out}", outside of the models folder; allow it with link_dirs = ["{out}"]'
    )
    assert f'allow it with link_dirs = ["{out}"]' in reasons(tree)["a.gguf"]
    allowed = walk(root, out)
    assert rels(allowed) == ["a.gguf", "folder/a.gguf"]
    assert list(reasons(allowed)) == ["b.gguf"]


def test_a_link_that_is_pointed_elsewhere_is_judged_again(tmp_path: Path) -> None:
    """Where links lead is remembered, but not beyond a change."""
    root, outside = tmp_path / "models", put(tmp_path / "b.gguf")
    put(root / "f/a.gguf")
    link = root / "l.gguf"
    link.symlink_to(root / "f/a.gguf")
    walker = Walker(str(root))
    assert "l.gguf" in rels(walker.walk())
    link.unlink()
    link.symlink_to(outside)
    assert list(reasons(walker.walk())) == ["l.gguf"]


def test_the_models_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """Its files are inside of it all the same."""
    put(tmp_path / "real/a.gguf")
    os.symlink("a.gguf", tmp_path / "real/b.gguf")
    os.symlink("real", tmp_path / "models")
    tree = walk(tmp_path / "models")
    assert sorted(tree.files) == [f"{tmp_path}/models/a.gguf", f"{tmp_path}/models/b.gguf"]


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.gguf", b"a\nb.gguf", b"-rf.gguf", b"x" * 250 + b".gguf", "🦙.gguf".encode(), b"\x1b[31m.gguf"]
)
def test_any_name_is_found(tmp_path: Path, name: bytes) -> None:
    """A path leads to its file again, whatever bytes it has."""
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
        pass
    (found,) = walk(tmp_path).files.values()
    assert os.fsencode(found.rel) == name
    assert os.stat(found.path).st_ino == found.inode


def test_the_walk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In depth, in files and in folders; which files are left out does not depend on how the disk lists them."""
    put(tmp_path / "/".join(["d"] * MAX_DEPTH) / "deep.gguf")
    put(tmp_path / "/".join(["d"] * (MAX_DEPTH + 1)) / "too-deep.gguf")
    assert [os.path.basename(rel) for rel in rels(walk(tmp_path))] == ["deep.gguf"]
    for number in range(9):
        put(tmp_path / f"{number}.gguf")
    monkeypatch.setattr(module, "MAX_FILES", 4)
    tree = walk(tmp_path)
    assert rels(tree)[:4] == ["0.gguf", "1.gguf", "2.gguf", "3.gguf"]
    assert len(tree.files) <= 5
    assert "more than 4 model files" in reasons(tree)[""]
    monkeypatch.setattr(module, "MAX_FILES", 100)
    monkeypatch.setattr(module, "MAX_FOLDERS", 2)
    assert "more than 2 folders" in reasons(walk(tmp_path))[""]


def test_of_the_hubs_cache_one_revision_counts(tmp_path: Path) -> None:
    """The one of refs/main; without it the newest. The folder may be the cache, hold it, or be one repository."""
    repo = tmp_path / "hub/models--bob--Tiny"
    blob = put(repo / "blobs/0123")
    for revision in ("old", "new"):
        (repo / "snapshots" / revision).mkdir(parents=True)
        os.symlink("../../blobs/0123", repo / "snapshots" / revision / "m.gguf")
    os.utime(repo / "snapshots/old", (1, 1))
    for root in (tmp_path, tmp_path / "hub", repo):
        (found,) = walk(root).files.values()
        assert found.path == f"{repo}/snapshots/new/m.gguf"
        assert found.inode == blob.stat().st_ino
        assert found.snapshot is not None
        assert found.snapshot.repository == "bob/Tiny"
    put(repo / "refs/main", "old\n")
    assert list(walk(tmp_path).files) == [f"{repo}/snapshots/old/m.gguf"]
    (repo / "refs/main").unlink()
    os.mkfifo(repo / "refs/main")
    assert list(walk(tmp_path).files) == [f"{repo}/snapshots/new/m.gguf"]


def test_what_the_revision_that_counts_lacks_is_taken_from_the_newest_that_has_it(tmp_path: Path) -> None:
    """File by file; the parts of a split file stay together; what is broken in an older revision is not told."""
    repo = tmp_path / "models--bob--Tiny"
    put(repo / "refs/main", "main")
    held = {
        "main": ["a.gguf", "s-00001-of-00002.gguf"],
        "older": ["a.gguf", "b.gguf", "s-00001-of-00002.gguf", "s-00002-of-00002.gguf", "x/c.gguf"],
        "oldest": ["b.gguf", "x/c.gguf", "x/d.gguf", "t-00002-of-00003.gguf"],
    }
    broken = {"oldest": "z.gguf", "older": "a-broken.gguf", "main": "y.gguf"}
    for seconds, (revision, files) in enumerate(reversed(held.items())):
        for rel in files:
            put(repo / "snapshots" / revision / rel)
        os.symlink("gone", repo / "snapshots" / revision / broken[revision])
        os.utime(repo / "snapshots" / revision, (seconds, seconds))
    tree = walk(tmp_path)
    prefix = "models--bob--Tiny/snapshots/"
    assert [rel.removeprefix(prefix) for rel in rels(tree)] == [
        "main/a.gguf",
        "older/b.gguf",
        "older/s-00001-of-00002.gguf",
        "older/s-00002-of-00002.gguf",
        "older/x/c.gguf",
        "oldest/t-00002-of-00003.gguf",
        "oldest/x/d.gguf",
    ]
    assert list(reasons(tree)) == [f"{prefix}main/y.gguf"]


def test_what_links_lead_to_is_known(tmp_path: Path) -> None:
    """Folders behind them, and where the files that they name lie; none that may not be looked at, none within."""
    root, out, forbidden = tmp_path / "models", tmp_path / "out", tmp_path / "forbidden"
    for rel in ("one/a.gguf", "two/b.gguf", "two/c/d.gguf"):
        put(out / rel)
    put(forbidden / "e.gguf")
    put(root / "f/g.gguf")
    os.symlink(out / "one/a.gguf", root / "a.gguf")
    os.symlink(out / "two", root / "two")
    os.symlink(forbidden, root / "forbidden")
    os.symlink(forbidden / "e.gguf", root / "e.gguf")
    os.symlink("f/g.gguf", root / "g.gguf")
    assert walk(root, out).linked == {f"{out}/one", f"{root}/two", f"{root}/two/c"}


def test_a_control_file_of_a_downloader_is_noticed(tmp_path: Path) -> None:
    """aria2 keeps one beside each file that it is not done with."""
    put(tmp_path / "a.gguf")
    put(tmp_path / "b.gguf")
    put(tmp_path / "a.gguf.aria2")
    assert {found.rel: found.is_downloading for found in walk(tmp_path).files.values()} == {
        "a.gguf": True,
        "b.gguf": False,
    }


@pytest.mark.parametrize(("root", "problem"), [("missing", "does not exist"), ("file", "is not a folder")])
def test_a_folder_that_is_not_there_is_a_problem(tmp_path: Path, root: str, problem: str) -> None:
    """And not an empty folder. Its path stands before what is told, and is not repeated."""
    put(tmp_path / "file")
    assert walk(tmp_path / root).problem == problem


@pytest.fixture
def ill(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Lets the disk answer `ill(folder, errno)` for a folder."""
    real = os.scandir

    def make(folder: Path, code: int) -> None:
        def scandir(path: str) -> object:
            if path == str(folder):
                raise OSError(code, os.strerror(code))
            return real(path)

        monkeypatch.setattr(module.os, "scandir", scandir)

    return make


def test_a_disk_that_is_ill_is_no_empty_folder(tmp_path: Path, ill: Callable[[Path, int], None]) -> None:
    """The models folder: a problem. One below: nothing is known of it. One that vanished meanwhile: nothing is said."""
    put(tmp_path / "f/a.gguf")
    ill(tmp_path, errno.ESTALE)
    assert walk(tmp_path).problem == "cannot be read: Stale file handle"
    ill(tmp_path, errno.EACCES)
    assert walk(tmp_path).problem == f"cannot be read: Permission denied (uid {os.geteuid()})"
    ill(tmp_path / "f", errno.EIO)
    tree = walk(tmp_path)
    assert tree.unreachable == {f"{tmp_path}/f": "Input/output error"}
    assert "what was known of it is kept" in reasons(tree)["f"]
    ill(tmp_path / "f", errno.ENOENT)
    assert walk(tmp_path).oddities == {}
