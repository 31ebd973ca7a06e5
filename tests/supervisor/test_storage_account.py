"""Who takes the disk of a models folder, and what of it may be cleaned away."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from hub_cache import HubCache
from llamavisor.catalog import Entry, Scanner
from llamavisor.storage import Account, Cleaned, Kind
from llamavisor.storage.account import account
from llamavisor.storage.anchor import Anchor
from llamavisor.storage.cleaning import OLD_S, clean
from llamavisord.tiny_model import write_tiny_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def entries(root: Path, **how: object) -> tuple[Entry, ...]:
    """The models in the folder, as if all had been still for a while."""
    scanner = Scanner(str(root), wall=lambda: time.time() + 60, **how)
    scanner.scan()
    return scanner.entries


def look(root: Path, **how: object) -> Account:
    """Who takes the disk."""
    return account(str(root), entries(root, **how))


def kinds(seen: Account) -> dict[str, Kind]:
    """What is no model, by its path."""
    return {each.rel: each.kind for each in seen.leftovers}


def tidy(root: Path, *, age_s: float = 2 * OLD_S, revisions: bool = False, is_dry: bool = False) -> Cleaned:
    """Clean up after all has been still for so long."""
    return clean(str(root), entries(root), revisions=revisions, is_dry=is_dry, now=time.time() + age_s)


def staged(root: Path, name: str = "x") -> Path:
    """A file that a download has staged."""
    path = root / ".llamavisor-staging" / name / "part"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 5000)
    return path


def test_a_content_is_counted_once(root: Path) -> None:
    """Two names of one content are no two models, and a link takes nothing."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    size = (root / "alpha.gguf").stat().st_size
    (root / "again.gguf").hardlink_to(root / "alpha.gguf")
    (root / "third.gguf").symlink_to("alpha.gguf")
    seen = look(root)
    assert seen.models_bytes == size
    assert seen.leftover_bytes == 0
    assert [share.size_bytes for share in seen.models] == [size]


def test_what_lies_outside_is_not_counted(root: Path, tmp_path: Path) -> None:
    """A model that is a link to another disk takes nothing of this one, and its file is marked."""
    outside = tmp_path / "outside"
    outside.mkdir()
    write_tiny_model(outside / "alpha.gguf", ["a"])
    (root / "alpha.gguf").symlink_to(outside / "alpha.gguf")
    (share,) = look(root, link_dirs=[str(outside)]).models
    assert (share.size_bytes, share.files[0].is_outside, share.files[0].size_bytes > 0) == (0, True, True)


def test_what_is_no_model_is_told_by_what_it_seems_to_be(root: Path) -> None:
    """Staged, half downloaded, broken, or anything else; the largest first."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    staged(root)
    (root / "more").mkdir()
    (root / "more" / "half.gguf.partial").write_bytes(b"x" * 9000)
    (root / "notes.txt").write_bytes(b"x" * 7000)
    (root / "bad.gguf").write_bytes(b"nope")
    seen = look(root)
    assert kinds(seen) == {
        "more/half.gguf.partial": Kind.PARTIAL,
        "notes.txt": Kind.OTHER,
        ".llamavisor-staging/x": Kind.STAGING,
        "bad.gguf": Kind.BROKEN,
    }
    assert [each.size_bytes for each in seen.leftovers] == [9000, 7000, 5000, 4]
    assert next(each.model for each in seen.leftovers if each.kind is Kind.BROKEN) == "bad"
    assert seen.leftover_bytes == 21004
    assert seen.disk is not None


def test_a_file_with_holes_takes_what_was_written(root: Path) -> None:
    """A download that was given its full size at once does not look like the largest thing there is."""
    with (root / "half.part").open("wb") as file:
        file.truncate(1024**3)
        file.write(b"x" * 4096)
    assert look(root).leftover_bytes <= 64 * 1024


def test_an_old_revision_takes_what_only_it_leads_to(root: Path) -> None:
    """Of two revisions the one that no model needs is told with its own blob, not with the one that both have."""
    cache = HubCache(root)
    sizes = {name: cache.blob(name).stat().st_size for name in ("old", "new", "both")}
    cache.link("r1", "tiny-Q8_0.gguf", "old")
    cache.link("r2", "tiny-Q8_0.gguf", "new")
    for revision in ("r1", "r2"):
        cache.link(revision, "other-Q4_0.gguf", "both")
    cache.ref("main", "r2")
    seen = look(root)
    (old,) = seen.leftovers
    assert (old.kind, old.rel, old.size_bytes) == (Kind.REVISION, f"{cache.folder.name}/snapshots/r1", sizes["old"])
    assert seen.models_bytes == sizes["new"] + sizes["both"]


def test_a_revision_that_stands_in_is_not_old(root: Path) -> None:
    """While an update is on its way the files that it lacks are served from the revision before: that is needed."""
    cache = HubCache(root)
    cache.blob("b1")
    cache.link("r1", "tiny-Q8_0.gguf", "b1")
    (cache.folder / "snapshots" / "r2").mkdir()
    cache.ref("main", "r2")
    assert look(root).leftovers == ()
    assert tidy(root, revisions=True).gone == ()


# --- cleaning -------------------------------------------------------------------------------------------------------


def test_old_staging_goes_and_young_stays(root: Path) -> None:
    """What nobody has changed for a day goes with its folder; what is younger may be taken up again."""
    path = staged(root)
    assert tidy(root, age_s=OLD_S / 2).gone == ()
    assert path.exists()
    assert tidy(root, is_dry=True).size_bytes == 5000
    assert path.exists()
    assert [each.rel for each in tidy(root).gone] == [".llamavisor-staging/x"]
    assert not path.parent.exists()


def test_what_somebody_writes_stays(root: Path) -> None:
    """A file that is open for writing is left alone however old it is, and its neighbour goes."""
    path, other = staged(root), staged(root, "y")
    with path.open("ab"):
        assert [each.rel for each in tidy(root).gone] == [".llamavisor-staging/y"]
    assert (path.exists(), other.exists()) == (True, False)
    assert len(tidy(root).gone) == 1


def test_what_somebody_has_locked_stays(root: Path) -> None:
    """A download that pauses holds its lock without writing."""
    path = staged(root)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert tidy(root).gone == ()
    assert path.exists()


def test_a_lock_speaks_for_its_download(root: Path) -> None:
    """Of two shared files the one whose lock is held stays, with its lock; the locks of what goes stay as well."""
    folder = root / ".llamavisor-pull" / "files"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.part").write_bytes(b"x" * 100)
        (folder / f"{name}.lock").touch()
    with (folder / "a.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [each.rel for each in tidy(root).gone] == [".llamavisor-pull/files/b"]
    assert {path.name for path in folder.iterdir()} == {"a.part", "a.lock", "b.lock"}
    assert kinds(look(root)) == {".llamavisor-pull/files/a": Kind.STAGING}


def test_cleaning_takes_nothing_else(root: Path) -> None:
    """Broken files, downloads of others and notes are for a person to remove."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    for name in ("half.gguf.partial", "notes.txt", "bad.gguf"):
        (root / name).write_bytes(b"nope")
    assert tidy(root, revisions=True).gone == ()
    assert len(list(root.iterdir())) == 4


def test_a_staging_folder_that_is_a_link_is_not_entered(root: Path, tmp_path: Path) -> None:
    """Whoever puts a link there does not get another folder cleaned."""
    outside = tmp_path / "outside"
    (outside / "x").mkdir(parents=True)
    (outside / "x" / "precious").write_bytes(b"x")
    (root / ".llamavisor-staging").symlink_to(outside)
    tidy(root)
    assert (outside / "x" / "precious").exists()


def test_a_link_within_staging_goes_and_its_target_stays(root: Path, tmp_path: Path) -> None:
    """A staged link is removed as a link."""
    (tmp_path / "precious").write_bytes(b"x")
    path = staged(root)
    (path.parent / "link").symlink_to(tmp_path / "precious")
    tidy(root)
    assert not path.parent.exists()
    assert (tmp_path / "precious").exists()


def test_an_old_revision_goes_with_its_blobs_and_refs(root: Path) -> None:
    """What leads to it and what it alone leads to is gone; the other revision serves as before."""
    cache = HubCache(root)
    for name in ("old", "new"):
        cache.blob(name)
    cache.link("r1", "deep/er/README.md", "old")
    cache.link("r2", "tiny-Q8_0.gguf", "new")
    cache.ref("main", "r2")
    cache.ref("v1", "r1")
    (cache.folder / ".no_exist" / "r1").mkdir(parents=True)
    (cache.folder / ".no_exist" / "r1" / "config.json").touch()
    assert tidy(root).gone == ()
    (gone,) = tidy(root, revisions=True).gone
    assert gone.kind is Kind.REVISION
    left = {str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*") if not path.is_dir()}
    assert left == {"blobs/new", "refs/main", "snapshots/r2/tiny-Q8_0.gguf"}
    assert not (cache.folder / "snapshots" / "r1").exists()


def test_a_tree_without_end_is_left_at_some_depth(root: Path) -> None:
    """Folders below folders below folders: the walk ends."""
    path = root
    for _ in range(60):
        path /= "d"
    path.mkdir(parents=True)
    (path / "deep.bin").write_bytes(b"x" * 100)
    with Anchor(str(root)) as anchor:
        assert list(anchor.walk()) == []


def test_links_in_a_circle_and_pipes_are_no_leftovers(root: Path) -> None:
    """What takes nothing of the disk is not told, and nothing waits for the other end of a pipe."""
    (root / "notes.txt").write_bytes(b"x" * 100)
    loop = root / "loop"
    loop.symlink_to(".")
    os.mkfifo(root / "pipe")
    assert kinds(look(root)) == {"notes.txt": Kind.OTHER}
