"""Who takes the disk of a models folder, and what of it may be cleaned away."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_cache import HubCache
from llamavisor.catalog import Entry, Scanner
from llamavisor.hub import Listing, Record, RemoteFile
from llamavisor.hub.staging import Staging
from llamavisor.quantizer import STAGING as DRAFTS
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


def tidy(root: Path, *, age_s: float = 2 * OLD_S, keep_revisions: bool = False, is_dry: bool = False) -> Cleaned:
    """Clean up after all has been still for so long."""
    return clean(str(root), entries(root), keep_revisions=keep_revisions, is_dry=is_dry, now=time.time() + age_s)


def staged(root: Path, name: str = "x") -> Path:
    """The draft of something that is quantized, or was."""
    path = root / f"{DRAFTS}{name}" / "draft.gguf"
    path.parent.mkdir()
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
        ".llamavisor-quantize-x": Kind.STAGING,
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
    assert tidy(root).gone == ()


# --- cleaning -------------------------------------------------------------------------------------------------------


def test_old_staging_goes_and_young_stays(root: Path) -> None:
    """What nobody has changed for a day goes with its folder; what is younger may be taken up again."""
    path = staged(root)
    assert tidy(root, age_s=OLD_S / 2).gone == ()
    assert path.exists()
    assert tidy(root, is_dry=True).size_bytes == 5000
    assert path.exists()
    assert [each.rel for each in tidy(root).gone] == [".llamavisor-quantize-x"]
    assert not path.parent.exists()


def test_what_somebody_writes_stays(root: Path) -> None:
    """A file that is open for writing is left alone however old it is, and its neighbour goes."""
    path, other = staged(root), staged(root, "y")
    with path.open("ab"):
        assert [each.rel for each in tidy(root).gone] == [".llamavisor-quantize-y"]
    assert (path.exists(), other.exists()) == (True, False)
    assert len(tidy(root).gone) == 1


def pulled(root: Path, name: str, *, is_under_way: bool = False) -> Record:
    """A pull of which some bytes have come."""
    file = RemoteFile(f"{name}.gguf", 9000, hashlib.sha256(name.encode()).hexdigest())
    listing = Listing(repository="user/repo", revision="main", commit="c0ffee", choices=())
    record = Record.of(listing, name, (file,)).model_copy(update={"is_under_way": is_under_way})
    staging = Staging(root)
    staging.write(record)
    staging.part_of(record, file).partial.write_bytes(b"x" * 5000)
    return record


def test_pulls_are_told_by_their_models(root: Path) -> None:
    """Whatever dots are in their names each is for itself, with its id and whether somebody wants it now."""
    left, wanted = pulled(root, "Qwen2.5-7B"), pulled(root, "Qwen2.5-14B", is_under_way=True)
    told = {each.model: each for each in look(root).leftovers}
    assert {each.kind for each in told.values()} == {Kind.PULL}
    assert [(told[name].pull, told[name].is_under_way) for name in ("Qwen2.5-7B", "Qwen2.5-14B")] == [
        (left.key, False),
        (wanted.key, True),
    ]
    assert all(each.size_bytes >= 5000 for each in told.values())


def test_pulls_are_given_up_when_they_were_left_for_long(root: Path) -> None:
    """What is under way stays however long it waits for its turn; a young one can be taken up again."""
    left, wanted = pulled(root, "Qwen2.5-7B"), pulled(root, "Qwen2.5-14B", is_under_way=True)
    assert tidy(root, age_s=OLD_S / 2).gone == ()
    assert [each.pull for each in tidy(root, is_dry=True).gone] == [left.key]
    assert len(Staging(root).records()) == 2
    assert [each.pull for each in tidy(root).gone] == [left.key]
    assert [each.pull for each in look(root).leftovers] == [wanted.key]
    assert Staging(root).records() == [wanted]


def test_what_else_lies_in_the_folder_of_the_pulls_is_told_and_stays(root: Path) -> None:
    """A file that somebody has put there takes room, but is nobody's to remove."""
    pulled(root, "Qwen2.5-7B")
    (root / ".llamavisor-pull" / "notes").write_bytes(b"x" * 70_000)
    other = next(each for each in look(root).leftovers if each.kind is Kind.OTHER)
    assert (other.rel, other.size_bytes) == (".llamavisor-pull", 70_000)
    tidy(root)
    assert (root / ".llamavisor-pull" / "notes").exists()


def test_cleaning_takes_nothing_else(root: Path) -> None:
    """Broken files, downloads of others and notes are for a person to remove."""
    write_tiny_model(root / "alpha.gguf", ["a"])
    for name in ("half.gguf.partial", "notes.txt", "bad.gguf"):
        (root / name).write_bytes(b"nope")
    assert tidy(root).gone == ()
    assert len(list(root.iterdir())) == 4


@pytest.mark.parametrize("name", [".llamavisor-quantize-x", ".llamavisor-pull"])
def test_a_staging_folder_that_is_a_link_is_not_entered(root: Path, tmp_path: Path, name: str) -> None:
    """Whoever puts a link there does not get another folder cleaned."""
    outside = tmp_path / "outside"
    (outside / "x").mkdir(parents=True)
    (outside / "x" / "precious").write_bytes(b"x")
    (root / name).symlink_to(outside)
    tidy(root)
    assert (outside / "x" / "precious").exists()


def test_a_leftover_that_may_not_be_removed_is_told_with_the_reason(root: Path) -> None:
    """What another user has left of a quantization stays, as only its owner may write there."""
    path = staged(root)
    path.parent.chmod(0o555)
    drop = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    code = (
        "import sys; from llamavisor.storage.cleaning import clean\n"
        "print(clean(sys.argv[1], [], keep_revisions=False, is_dry=False, now=float('inf')).problems)"
    )
    said = subprocess.run(
        [*drop, sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert said == f"('{path.parent.name}: Permission denied',)\n"
    assert path.exists()


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
    assert tidy(root, keep_revisions=True).gone == ()
    (gone,) = tidy(root).gone
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


def test_what_a_pull_shares_with_a_model_is_the_models(tmp_path: Path) -> None:
    """A file that a model has and a pull keeps, too, is counted once: it is there as long as the model is."""
    write_tiny_model(tmp_path / "alpha.gguf", ["a"])
    size = (tmp_path / "alpha.gguf").stat().st_size
    staging = Staging(tmp_path)
    record = Record.model_validate(
        {
            "repository": "user/alpha",
            "revision": "main",
            "commit": "a" * 40,
            "name": "beta",
            "files": [{"path": "beta.gguf", "size": size, "digest": "0" * 64}],
        }
    )
    staging.write(record)
    os.link(tmp_path / "alpha.gguf", staging.part_of(record, record.files[0]).whole)
    told = account(str(tmp_path), entries(tmp_path))
    assert [share.size_bytes for share in told.models] == [size]
    assert told.leftover_bytes < size
