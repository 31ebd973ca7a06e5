"""How the files of a model leave the disk: all of them, and nothing else, whatever is swapped meanwhile."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from ggufs import GgufFile, Tensor
from hub_cache import HubCache
from llamavisor.catalog import Entry, Scanner
from llamavisor.errors import FilesChangedError, NotRemovableError
from llamavisor.storage.anchor import Anchor
from llamavisor.storage.removal import Removal, carry_out, plan
from llamavisord.tiny_model import write_tiny_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def entries(root: Path, **how: object) -> dict[str, Entry]:
    """The models in the folder, by name, as if all had been still for a while."""
    scanner = Scanner(str(root), wall=lambda: time.time() + 60, **how)
    scanner.scan()
    return {entry.name: entry for entry in scanner.entries}


def plan_for(root: Path, name: str, **how: object) -> Removal:
    """What the removal of a model takes away."""
    known = entries(root, **how)
    return plan(str(root), known[name], [each for each in known.values() if each.name != name])


def remove(root: Path, name: str, **how: object) -> Removal:
    """Remove a model."""
    removal = plan_for(root, name, **how)
    carry_out(removal)
    return removal


def paths(root: Path) -> set[str]:
    """All that is in the folder and is no folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir()}


def projector(path: Path) -> None:
    """Write a projector."""
    values = [("general.architecture", (8, "clip")), ("clip.has_vision_encoder", (7, True))]
    path.write_bytes(GgufFile(values, [Tensor("v.patch_embd.weight")]).encode())


def test_a_single_file_goes_and_its_neighbour_stays(root: Path) -> None:
    """Of two files in the folder the one that is meant goes, and its size is what is freed."""
    for name in ("alpha", "beta"):
        write_tiny_model(root / f"{name}.gguf", [name])
    size = (root / "alpha.gguf").stat().st_size
    assert remove(root, "alpha").size_bytes == size
    assert paths(root) == {"beta.gguf"}


def test_a_folder_goes_with_what_was_all_of_it(root: Path) -> None:
    """A model's own folder goes when nothing is left in it, and the folder above it stays."""
    (root / "family" / "alpha").mkdir(parents=True)
    write_tiny_model(root / "family" / "alpha" / "alpha.gguf", ["a"])
    remove(root, "alpha")
    assert not (root / "family" / "alpha").exists()
    assert (root / "family").is_dir()


def test_a_folder_stays_with_what_else_is_in_it(root: Path) -> None:
    """Notes beside a model are not its files: they stay, and their folder with them."""
    (root / "alpha").mkdir()
    write_tiny_model(root / "alpha" / "alpha.gguf", ["a"])
    (root / "alpha" / "notes.txt").write_text("mine", encoding="utf-8")
    remove(root, "alpha")
    assert paths(root) == {"alpha/notes.txt"}


def test_a_projector_goes_with_the_last_model_that_uses_it(root: Path) -> None:
    """A projector between two models stays with the first removal, which says so, and goes with the second."""
    (root / "pair").mkdir()
    for name in ("one-Q4_K_M", "two-Q8_0"):
        write_tiny_model(root / "pair" / f"{name}.gguf", [name])
    projector(root / "pair" / "mmproj-F16.gguf")
    first = min(entries(root))
    removal = remove(root, first)
    assert removal.kept == (str(root / "pair" / "mmproj-F16.gguf"),)
    assert len(paths(root)) == 2
    remove(root, next(iter(entries(root))))
    assert paths(root) == set()
    assert not (root / "pair").exists()


def test_a_companion_that_a_table_names_for_another_stays(root: Path) -> None:
    """A projector that the configuration names for another model is kept, although no other file needs it."""
    (root / "alpha").mkdir()
    write_tiny_model(root / "alpha" / "alpha.gguf", ["a"])
    projector(root / "alpha" / "mmproj-F16.gguf")
    path = str(root / "alpha" / "mmproj-F16.gguf")
    removal = plan(str(root), entries(root)["alpha"], [], {path})
    assert removal.kept == (path,)
    assert [file.rel for file in removal.files] == ["alpha/alpha.gguf"]


def test_all_parts_go_also_of_a_model_that_lacks_some(root: Path) -> None:
    """The parts that are there of a model that is not whole are all removed."""
    values = [("split.count", (2, 3)), ("split.no", (2, 0)), ("general.architecture", (8, "llama"))]
    for number in (1, 3):
        values[1] = ("split.no", (2, number - 1))
        (root / f"big-0000{number}-of-00003.gguf").write_bytes(GgufFile(values, [Tensor("t")]).encode())
    assert len(remove(root, "big").files) == 2
    assert paths(root) == set()


def test_a_link_goes_and_what_it_leads_to_outside_stays(root: Path, tmp_path: Path) -> None:
    """Of a model that is a link to an allowed folder outside the link alone is removed, and frees nothing."""
    outside = tmp_path / "outside"
    outside.mkdir()
    write_tiny_model(outside / "alpha.gguf", ["a"])
    (root / "alpha.gguf").symlink_to(outside / "alpha.gguf")
    removal = remove(root, "alpha", link_dirs=[str(outside)])
    assert (removal.size_bytes, removal.files[0].is_link) == (0, True)
    assert paths(root) == set()
    assert (outside / "alpha.gguf").is_file()


def test_nothing_goes_that_lies_behind_a_linked_folder(root: Path, tmp_path: Path) -> None:
    """A model in a folder outside, to which a link leads, is refused: its files are not in the models folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    write_tiny_model(outside / "alpha.gguf", ["a"])
    (root / "more").symlink_to(outside)
    with pytest.raises(NotRemovableError, match="through a link to another folder"):
        remove(root, next(iter(entries(root, link_dirs=[str(outside)]))), link_dirs=[str(outside)])
    assert (outside / "alpha.gguf").is_file()


def test_a_link_that_leads_nowhere_can_be_removed(root: Path) -> None:
    """A broken link, which is told as invalid, is removed like any other file."""
    (root / "alpha.gguf").symlink_to("nowhere.gguf")
    remove(root, "alpha")
    assert paths(root) == set()


def test_what_is_no_file_is_not_removed(root: Path) -> None:
    """A FIFO that calls itself a model stays."""
    os.mkfifo(root / "pipe.gguf")
    with pytest.raises(NotRemovableError, match="no regular file"):
        remove(root, "pipe")
    assert paths(root) == {"pipe.gguf"}


@pytest.mark.parametrize("path", ["../outside.gguf", "a/../../outside.gguf", "/etc/passwd", "./x.gguf"])
def test_a_path_that_climbs_out_leads_nowhere(root: Path, path: str) -> None:
    """Whatever a path says, nothing outside of the folder is opened by it."""
    (root.parent / "outside.gguf").write_bytes(b"x")
    with Anchor(str(root)) as anchor, pytest.raises(OSError, match="no path below"):
        anchor.unlink(path, (0, 0, 0))
    assert (root.parent / "outside.gguf").exists()


# --- what is swapped between the look and the removal ---------------------------------------------------------------


def test_a_file_swapped_for_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    """A link in the place of the file that was planned is another thing: nothing is removed, here or there."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    write_tiny_model(tmp_path / "precious.gguf", ["b"])
    removal = plan_for(root, "alpha")
    (root / "alpha.gguf").unlink()
    (root / "alpha.gguf").symlink_to(tmp_path / "precious.gguf")
    with pytest.raises(FilesChangedError):
        carry_out(removal)
    assert (tmp_path / "precious.gguf").is_file()
    assert (root / "alpha.gguf").is_symlink()


def test_a_file_that_moved_out_and_left_a_link_stays_there(root: Path, tmp_path: Path) -> None:
    """If the very file was moved elsewhere before the plan, with a link to it left, only the link goes."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    known = entries(root)
    (root / "alpha.gguf").rename(tmp_path / "alpha.gguf")
    (root / "alpha.gguf").symlink_to(tmp_path / "alpha.gguf")
    carry_out(plan(str(root), known["alpha"], []))
    assert paths(root) == set()
    assert (tmp_path / "alpha.gguf").is_file()


def test_a_folder_swapped_for_a_link_is_not_entered(root: Path, tmp_path: Path) -> None:
    """A model's folder that is swapped for a link to a folder with the same file leads to nothing being removed."""
    (root / "alpha").mkdir()
    write_tiny_model(root / "alpha" / "alpha.gguf", ["a"])
    removal = plan_for(root, "alpha")
    outside = tmp_path / "outside"
    shutil.move(root / "alpha", outside)
    (root / "alpha").symlink_to(outside)
    with pytest.raises(NotRemovableError, match="through a link"):
        carry_out(removal)
    assert (outside / "alpha.gguf").is_file()


def test_a_file_that_was_replaced_is_not_removed(root: Path) -> None:
    """Another file of the same name, renamed in after the look, stays, be it with the look or with the plan."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    known, removal = entries(root), plan_for(root, "alpha")
    write_tiny_model(root / "new", ["b"])
    (root / "new").rename(root / "alpha.gguf")
    with pytest.raises(FilesChangedError):
        carry_out(removal)
    with pytest.raises(FilesChangedError):
        plan(str(root), known["alpha"], [])
    assert paths(root) == {"alpha.gguf"}


def test_a_part_that_changed_keeps_all_of_them(root: Path) -> None:
    """If one part is not what was planned, no part is removed."""
    for number in (1, 2):
        values = [("split.count", (2, 2)), ("split.no", (2, number - 1)), ("general.architecture", (8, "llama"))]
        (root / f"big-0000{number}-of-00002.gguf").write_bytes(GgufFile(values, [Tensor("t")]).encode())
    removal = plan_for(root, "big")
    (root / "new").write_bytes(b"x")
    (root / "new").rename(root / "big-00002-of-00002.gguf")
    with pytest.raises(FilesChangedError):
        carry_out(removal)
    assert len(paths(root)) == 2


def test_the_token_tells_plans_apart(root: Path) -> None:
    """The same files have the same token, and another file under the same name has another."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    before = plan_for(root, "alpha").token
    assert plan_for(root, "alpha").token == before
    write_tiny_model(root / "new", ["b"])
    (root / "new").rename(root / "alpha.gguf")
    assert plan_for(root, "alpha").token != before


# --- the cache of the hub -------------------------------------------------------------------------------------------


def test_a_repository_goes_with_its_last_model(root: Path) -> None:
    """Of a model in a cache the link and the blob go, then all that the cache remembers of the repository."""
    cache = HubCache(root)
    size = cache.blob("b1").stat().st_size
    cache.link("r1", "tiny-Q8_0.gguf", "b1")
    cache.ref("main", "r1")
    assert remove(root, "user/repo:Q8_0").size_bytes == size
    assert not cache.folder.exists()


def test_a_blob_stays_with_the_revision_that_needs_it(root: Path) -> None:
    """A model goes from all revisions; the blob that another file still leads to stays."""
    cache = HubCache(root)
    cache.blob("b1")
    cache.blob("b2")
    cache.link("r1", "tiny-Q8_0.gguf", "b1")
    cache.link("r2", "tiny-Q8_0.gguf", "b2")
    cache.link("r2", "copy/other-Q4_0.gguf", "b1")
    cache.ref("main", "r2")
    cache.ref("old", "r1")
    remove(root, "user/repo:Q8_0")
    assert paths(cache.folder) == {"blobs/b1", "refs/main", "snapshots/r2/copy/other-Q4_0.gguf"}
    assert "user/repo:Q4_0" in entries(root)


def test_a_blob_that_a_link_elsewhere_needs_stays(root: Path) -> None:
    """A link outside of the repository to its blob makes that another model's, and the blob stays for it."""
    cache = HubCache(root)
    cache.blob("b1")
    cache.link("r1", "tiny-Q8_0.gguf", "b1")
    (root / "mine.gguf").symlink_to(cache.folder / "blobs" / "b1")
    known = entries(root)
    name = next(name for name in known if name != "mine")
    carry_out(plan(str(root), known[name], [known["mine"]]))
    assert (cache.folder / "blobs" / "b1").is_file()
    assert (root / "mine.gguf").resolve().is_file()


def test_a_blob_link_that_leads_out_of_the_cache_frees_nothing_there(root: Path, tmp_path: Path) -> None:
    """A link in a snapshot that leads elsewhere than into its own blobs is removed alone."""
    outside = tmp_path / "blobs"
    outside.mkdir()
    write_tiny_model(outside / "b1", ["a"])
    cache = HubCache(root)
    link = cache.folder / "snapshots" / "r1" / "tiny-Q8_0.gguf"
    link.parent.mkdir()
    link.symlink_to(outside / "b1")
    remove(root, "user/repo:Q8_0", link_dirs=[str(outside)])
    assert (outside / "b1").is_file()
    assert not link.is_symlink()
