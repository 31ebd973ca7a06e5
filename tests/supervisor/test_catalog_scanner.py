"""What a models folder's scanner tells, on real files and with clocks of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggufs import STRING, GgufFile, Tensor, small_model
from llamavisor.catalog import EntryState, Scan, Scanner
from llamavisor.catalog import disk as disk_module
from llamavisor.catalog import walk as walk_module
from llamavisor.catalog.disk import Disk, disk_of
from llamavisor.catalog.guard import AGAIN_S
from llamavisor.catalog.scanner import REREAD_S
from llamavisor.catalog.settle import HOLE_S, STILL_S
from llamavisord.tiny_model import write_tiny_model

READY, SETTLING, INVALID = EntryState.READY, EntryState.SETTLING, EntryState.INVALID
MODEL = small_model(tensors=[Tensor("a.weight", (1024, 64), 0, 262144)]).encode_header() + b"\x01" * 262144


class Looking:
    """A folder, its scanner, and the time, which passes only when it is told to.

    Args:
        root: the folder.
        how: options of the scanner.
    """

    def __init__(self, root: Path, **how: object) -> None:
        self.root = root
        self.now = 1000.0
        self.offset = 0.0
        root.mkdir(exist_ok=True)
        self.scanner = Scanner(str(root), monotonic=lambda: self.now, wall=self.wall, **how)

    def wall(self) -> float:
        """Just now, as if nothing here were older than this moment."""
        newest = max((status.st_ctime for status in map(os.lstat, self.root.rglob("*"))), default=0.0)
        return newest + self.offset

    def scan(self, after_s: float = 0.0) -> Scan:
        """A look, so many seconds after the last."""
        self.now += after_s
        return self.scanner.scan()

    def states(self, after_s: float = 0.0) -> dict[str, EntryState]:
        """What is there after a look."""
        assert not self.scan(after_s).problem
        return {entry.name: entry.state for entry in self.scanner.entries}

    def reason(self, name: str) -> str:
        """Why an entry is not ready."""
        return next(entry.reason for entry in self.scanner.entries if entry.name == name)


@pytest.fixture
def looking(tmp_path: Path) -> Looking:
    """An empty folder."""
    return Looking(tmp_path / "models")


def put(path: Path, raw: bytes = MODEL) -> Path:
    """Writes a file as a copy does: in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def move_in(looking: Looking, rel: str, raw: bytes = MODEL) -> Path:
    """Renames a file into the folder that was written elsewhere, a little earlier."""
    staged = put(looking.root.parent / "staged", raw)
    os.utime(staged, ns=(0, staged.stat().st_mtime_ns - 1000))
    path = looking.root / rel
    path.parent.mkdir(exist_ok=True)
    return staged.rename(path)


def test_a_file_that_is_moved_in_is_ready_at_once(looking: Looking) -> None:
    """And is told once; a look at what has not changed tells nothing and reads nothing."""
    move_in(looking, "a.gguf")
    first = looking.scan()
    assert [(entry.name, entry.state) for entry in first.changed] == [("a", READY)]
    assert (first.headers_read, first.file_count, first.again_in_s) == (1, 1, None)
    again = looking.scan(100)
    assert (again.changed, again.removed, again.headers_read, again.file_count) == ((), (), 0, 1)


def test_a_tiny_model_is_ready_when_it_is_still(looking: Looking) -> None:
    """F1: a real model is not announced before, and the look that announces it is asked for."""
    write_tiny_model(looking.root.parent / "a.gguf", ["a"])
    put(looking.root / "a.gguf", (looking.root.parent / "a.gguf").read_bytes())
    first = looking.scan()
    assert [entry.state for entry in first.changed] == [SETTLING]
    assert first.again_in_s == pytest.approx(STILL_S)
    assert looking.states(first.again_in_s) == {"a": READY}


def test_a_slow_copy_is_ready_after_its_last_byte(looking: Looking) -> None:
    """F1: as long as it grows it settles; its header is not read at every look."""
    path = looking.root / "a.gguf"
    reads = 0
    with path.open("wb") as file:
        for begin in range(0, len(MODEL), len(MODEL) // 40 + 1):
            file.write(MODEL[begin : begin + len(MODEL) // 40 + 1])
            file.flush()
            scan = looking.scan(REREAD_S / 4)
            reads += scan.headers_read
            assert [entry.state for entry in looking.scanner.entries] == [SETTLING]
    assert reads <= 12
    assert looking.states(STILL_S - 0.1) == {"a": SETTLING}
    assert looking.states(0.2) == {"a": READY}


def test_a_stalled_copy_is_cut_off_until_it_goes_on(looking: Looking) -> None:
    """F2: what is missing is told in bytes."""
    path = put(looking.root / "a.gguf", MODEL[:5000])
    assert looking.states() == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": INVALID}
    assert looking.reason("a").startswith(f"it holds 5000 of at least {len(MODEL)} bytes")
    put(path)
    assert looking.states(STILL_S) == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": READY}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "web page"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 100, "tensors"),
        (b"GG", "cut off"),
    ],
)
def test_junk_is_invalid_with_its_reason(looking: Looking, raw: bytes, why: str) -> None:
    """F2: and read no more than twice."""
    put(looking.root / "a.gguf", raw)
    assert sum(looking.scan(STILL_S).headers_read for _ in range(5)) <= 2
    assert looking.states() == {"a": INVALID}
    assert why in looking.reason("a")


def test_a_preallocated_copy_settles_while_blocks_are_missing(looking: Looking) -> None:
    """As SMB, aria2 and rsync --inplace copy: the size is right from the beginning."""
    path = looking.root / "a.gguf"
    with path.open("wb") as file:
        file.truncate(len(MODEL))
        file.write(MODEL[:100_000])
    assert looking.states() == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": SETTLING}
    assert looking.reason("a").startswith("bytes are missing at ")
    with path.open("r+b") as file:
        file.write(MODEL)
    assert looking.states(60) == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": READY}


def test_room_that_was_only_reserved_is_missing_too(looking: Looking) -> None:
    """The kernel knows blocks that were never written from zeros."""
    with (looking.root / "a.gguf").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, len(MODEL))
        file.write(MODEL[:100_000])
    looking.states()
    assert looking.states(STILL_S) == {"a": SETTLING}
    assert looking.states(HOLE_S) == {"a": READY}, "sparse for good"


def test_a_large_tail_of_zeros_settles(looking: Looking) -> None:
    """A copy that writes zeros first: three megabytes are copied in three seconds at least."""
    model = small_model(tensors=[Tensor("a.weight", (1024, 768), 0, 3_145_728)])
    put(looking.root / "a.gguf", model.encode())
    looking.states()
    assert looking.states(STILL_S) == {"a": SETTLING}
    assert looking.states(1.2) == {"a": READY}


def test_what_is_written_within_one_tick_of_the_clock_is_seen(looking: Looking) -> None:
    """A file that comes to rest is read once more: its times may be those of the first, partial reading."""
    path = put(looking.root / "a.gguf", MODEL[:50] + bytes(len(MODEL) - 50))
    status = path.stat()
    assert looking.states() == {"a": SETTLING}
    put(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    looking.scanner._tree.files.clear()
    assert looking.states(STILL_S) == {"a": READY}


def test_files_that_were_there_before_are_ready_at_the_first_look(looking: Looking) -> None:
    """A daemon that starts waits for none of them."""
    put(looking.root / "a.gguf")
    put(looking.root / "b.gguf", MODEL[:100])
    looking.offset = 3600
    assert looking.states() == {"a": READY, "b": INVALID}


def test_a_network_mount_is_given_more_time(tmp_path: Path) -> None:
    """The device of this folder is said to be an NFS server's."""
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - nfs4 server:/x rw\n")
    looking = Looking(tmp_path / "models", mountinfo=str(mounts))
    move_in(looking, "a.gguf")
    assert looking.states() == {"a": SETTLING}
    assert looking.states(9.9) == {"a": SETTLING}
    assert looking.states(0.2) == {"a": READY}


def test_aria2_is_waited_for(looking: Looking) -> None:
    """Until its control file is gone, whatever the file looks like."""
    move_in(looking, "a.gguf")
    control = put(looking.root / "a.gguf.aria2", b"")
    assert looking.states(1e4) == {"a": SETTLING}
    control.unlink()
    assert looking.states(1) == {"a": READY}


def test_a_replaced_file_is_another_content(looking: Looking) -> None:
    """F3: by rename at once, F5: in place once it is still; each time the id is another."""
    move_in(looking, "a.gguf")
    (first,) = looking.scan().changed
    move_in(looking, "a.gguf", MODEL + b"pad")
    (second,) = looking.scan().changed
    assert second.state is READY
    assert second.files[0].id != first.files[0].id
    put(looking.root / "a.gguf", MODEL + b"more")
    assert looking.states(5) == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": READY}


def touch(path: Path, seconds: float = 0.0) -> None:
    """Sets the time of the last change to now, or so many seconds later: nothing else about the file changes."""
    path.touch()
    if seconds:
        os.utime(path, ns=(0, path.stat().st_ctime_ns + int(seconds * 1e9)))


def test_a_model_that_is_touched_stays_ready_as_it_was(looking: Looking) -> None:
    """Again and again, with the content that it had; once it is still it is READY with the new id."""
    path = move_in(looking, "a.gguf")
    (first,) = looking.scan().changed
    for again in range(3):
        touch(path, again)
        scan = looking.scan(0.4)
        assert (scan.changed, scan.removed) == ((), ())
        assert scan.again_in_s is not None
        assert scan.again_in_s <= STILL_S
    (second,) = looking.scan(STILL_S).changed
    assert second.state is READY
    assert second.files[0].id != first.files[0].id
    assert second.files[0].id.mtime_ns == path.stat().st_mtime_ns
    assert looking.scan(100) == Scan(file_count=1)


def test_a_model_that_is_written_over_settles(looking: Looking) -> None:
    """At once if its size changes, and if its header does as soon as that is read; also after it was touched."""
    path = move_in(looking, "a.gguf")
    looking.scan()
    touch(path)
    assert looking.states(5) == {"a": READY}
    put(path, MODEL + b"more")
    assert looking.states(0.1) == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": READY}
    other = bytearray(MODEL + b"more")
    other[other.index(b"llama")] = ord("b")
    put(path, bytes(other))
    assert looking.states(5) == {"a": SETTLING}
    assert looking.states(STILL_S) == {"a": READY}
    touch(path)
    assert looking.states(5) == {"a": READY}
    with path.open("r+b") as file:
        file.write(b"junk")
    assert looking.states(5) == {"a": INVALID}


def test_a_projector_and_a_draft_that_are_touched_stay_with_the_model(looking: Looking) -> None:
    """The model is not told without them, nor with anything new before they are still."""
    values = [("general.architecture", (STRING, "clip")), ("clip.vision.projection_dim", (4, 64))]
    move_in(looking, "f/m.gguf")
    beside = [
        move_in(looking, "f/mmproj.gguf", GgufFile(values=values, tensors=[Tensor("v.weight")]).encode()),
        move_in(looking, "f/mtp-m.gguf"),
    ]
    (first,) = looking.scan().changed
    assert first.projector is not None
    assert first.draft is not None
    for path in beside:
        touch(path)
    assert looking.scan(5).changed == ()
    (second,) = looking.scan(STILL_S).changed
    assert (second.state, second.notes) == (READY, ())
    assert second.projector is not None
    assert second.projector.id.mtime_ns == beside[0].stat().st_mtime_ns


def test_a_touched_model_keeps_its_time_on_a_network_mount(tmp_path: Path) -> None:
    """There it is ten seconds that it would be gone for."""
    mounts, device = tmp_path / "mountinfo", tmp_path.stat().st_dev
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - nfs4 server:/x rw\n")
    looking = Looking(tmp_path / "models", mountinfo=str(mounts))
    path = move_in(looking, "a.gguf")
    looking.scan()
    (first,) = looking.scan(11).changed
    touch(path)
    assert looking.scan(5).changed == ()
    assert looking.scan(9).changed == ()
    (second,) = looking.scan(2).changed
    assert (first.state, second.state) == (READY, READY)


def test_no_model_was_changed_in_the_future(looking: Looking) -> None:
    """Whatever somebody set its mtime to."""
    path = move_in(looking, "a.gguf")
    os.utime(path, (4e9, 4e9))
    (entry,) = looking.scan().changed
    assert entry.changed_at == pytest.approx(path.stat().st_ctime)


def test_an_update_in_the_hubs_cache_takes_no_model_away(looking: Looking) -> None:
    """`refs/main` names the new revision before its files are there."""
    repo = looking.root / "models--bob--Tiny"
    for revision in ("old", "new"):
        (repo / "snapshots" / revision).mkdir(parents=True)
    (repo / "refs").mkdir()
    staged = put(repo / "blobs/1")
    os.utime(staged, ns=(0, 0))
    (repo / "snapshots/old/Tiny-Q8_0.gguf").symlink_to("../../blobs/1")
    (repo / "refs/main").write_text("old")
    assert looking.states() == {"bob/Tiny:Q8_0": READY}
    (repo / "refs/main").write_text("new")
    assert looking.scan(5) == Scan(file_count=1)
    (repo / "snapshots/new/Tiny-Q8_0.gguf").symlink_to("../../blobs/1")
    (entry,) = looking.scan(5).changed
    assert (entry.name, entry.state, entry.path) == (
        "bob/Tiny:Q8_0",
        READY,
        str(repo / "snapshots/new/Tiny-Q8_0.gguf"),
    )


def test_a_renamed_file_is_not_read_again(looking: Looking) -> None:
    """It is another model, of the same content."""
    move_in(looking, "a.gguf")
    move_in(looking, "keep.gguf")
    looking.scan()
    (looking.root / "a.gguf").rename(looking.root / "b.gguf")
    scan = looking.scan()
    assert ([entry.name for entry in scan.changed], scan.removed, scan.headers_read) == (["b"], ("a",), 0)


def test_a_missing_shard_is_named_and_found(looking: Looking) -> None:
    """F10: and the model is ready when it comes."""
    for number in (1, 2):
        values = [
            ("general.architecture", (STRING, "llama")),
            ("split.no", (2, number - 1)),
            ("split.count", (2, 2)),
        ]
        raw = GgufFile(values=values, tensors=[Tensor("a.weight")]).encode()
        move_in(looking, f"a-0000{number}-of-00002.gguf", raw)
        if number == 1:
            assert looking.states() == {"a": EntryState.INCOMPLETE}
            assert looking.reason("a") == "part 2 of 2 is missing: a-00002-of-00002.gguf"
    assert looking.states() == {"a": READY}


def test_names_and_shapes_of_all_kinds_stop_nothing(looking: Looking) -> None:
    """F8 and F9: loops, FIFOs, and names that no preset can carry are told; the good model is ready."""
    move_in(looking, "good.gguf")
    for name in (b"\xff.gguf", b"a\nb.gguf", b"-rf.gguf", b"x" * 250 + b".gguf", "🦙.gguf".encode()):
        Path(os.fsdecode(os.path.join(os.fsencode(looking.root), name))).write_bytes(MODEL)
    os.mkfifo(looking.root / "fifo.gguf")
    os.symlink("loop.gguf", looking.root / "loop.gguf")
    os.symlink(".", looking.root / "folder.gguf")
    os.symlink("good.gguf", looking.root / "link.gguf")
    looking.offset = 60
    states = looking.states()
    assert {name for name, state in states.items() if state is READY} == {"good", "🦙", "x" * 250}
    assert {name for name, state in states.items() if state is INVALID} == {
        "\\udcff",
        "a\\nb",
        "-rf",
        "fifo",
        "loop",
        "link",
    }
    assert looking.reason("link") == "the same file as good, which serves it"


def test_an_emptied_folder_is_believed_at_the_second_look(looking: Looking) -> None:
    """F7: an unmounted disk leaves an empty folder. Not even many looks within two seconds are believed."""
    path = move_in(looking, "a.gguf")
    looking.scan()
    hidden = path.rename(looking.root.parent / "elsewhere")
    doubted = looking.scan(10)
    assert "all 1 model files are gone" in doubted.problem
    assert doubted.again_in_s == AGAIN_S
    assert looking.scan(0.5).problem
    hidden.rename(path)
    back = looking.scan(0.5)
    assert (back.problem, back.removed, back.headers_read) == ("", (), 0)
    assert [entry.state for entry in looking.scanner.entries] == [READY]
    path.unlink()
    assert looking.scan(10).problem
    assert looking.scan(AGAIN_S).removed == ("a",)


def test_a_folder_that_is_gone_takes_nothing_away(looking: Looking) -> None:
    """F7: deleted and made again it is looked at as before; the two looks have to follow each other."""
    move_in(looking, "a.gguf")
    looking.scan()
    aside = looking.root.rename(looking.root.parent / "aside")
    gone = looking.scan(5)
    assert gone.problem == "does not exist"
    assert (gone.changed, gone.removed) == ((), ())
    looking.root.mkdir()
    assert looking.scan(5).problem
    looking.root.rmdir()
    assert looking.scan(5).problem
    looking.root.mkdir()
    assert looking.scan(5).problem, "the first look again"
    looking.root.rmdir()
    aside.rename(looking.root)
    assert looking.scan(5) == Scan(file_count=1)


def test_a_folder_on_another_device_is_believed_at_the_second_look(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F7: another disk was mounted, or none is."""
    move_in(looking, "a.gguf")
    looking.scan()
    devices = looking.scanner._tree.devices
    devices[str(looking.root)] += 1
    move_in(looking, "b.gguf")
    assert "another device" in looking.scan(5).problem
    assert [entry.name for entry in looking.scan(AGAIN_S).changed] == ["b"]


def test_a_sick_folder_keeps_its_models(looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    """F7: a server that does not answer takes nothing away, and stops nothing else."""
    move_in(looking, "f/a.gguf")
    move_in(looking, "b.gguf")
    looking.scan()
    real = os.scandir

    def scandir(path: str) -> object:
        if path == str(looking.root / "f"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    monkeypatch.setattr(walk_module.os, "scandir", scandir)
    move_in(looking, "c.gguf")
    assert looking.states(5) == {"b": READY, "c": READY, "f": READY, "f/": INVALID}
    monkeypatch.undo()
    assert looking.scan(5).removed == ("f/",)


def test_a_look_tells_the_disk(looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size, and what others than root may write; a file system that does not tell has none."""
    told = {"f_frsize": 512, "f_bsize": 4096, "f_blocks": 100, "f_bfree": 50, "f_bavail": 40}
    monkeypatch.setattr(disk_module.os, "statvfs", lambda path: SimpleNamespace(**told, asked_for=path))
    assert looking.scan().disk == Disk(51_200, 20_480)
    told["f_blocks"] = 0
    assert looking.scan().disk is None
    monkeypatch.undo()
    real = looking.scan(5).disk
    assert real is not None
    assert 0 <= real.free_bytes <= real.total_bytes
    looking.root.rmdir()
    assert looking.scan(5).disk is None
    assert disk_of(str(looking.root)) is None


def test_a_sick_file_is_read_again(looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is no property of the content."""
    path = move_in(looking, "a.gguf")
    real = os.open

    def refuse(name: str, *args: object, **how: object) -> int:
        if name == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(name, *args, **how)

    monkeypatch.setattr(os, "open", refuse)
    scan = looking.scan()
    assert [entry.reason for entry in scan.changed] == ["it cannot be read: Input/output error"]
    assert scan.again_in_s is not None
    monkeypatch.undo()
    assert looking.states(scan.again_in_s + 0.01) == {"a": READY}


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user of this machine may enter, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_may_not_be_read_is_told_and_found_again(public_folder: Path) -> None:
    """F11: a file and a folder, without the right to read them; the others are unaffected. Then with it."""
    root = public_folder / "models"
    for rel in ("open.gguf", "secret.gguf", "known.gguf", "closed/a.gguf"):
        put(root / rel)
    script = textwrap.dedent(
        """
        import os, sys
        from llamavisor.catalog import Scanner
        root = sys.argv[1]
        ask, answer = 3, 4
        os.chdir("/")
        scanner = Scanner(root, wall=lambda: 4e9)
        os.setgroups([]) if os.getuid() == 0 else None
        os.setresuid(65534, 65534, 0) if os.getuid() == 0 else None
        def root_chmod(rel, mode):
            os.seteuid(0) if 0 in os.getresuid() else None
            os.chmod(os.path.join(root, rel), mode)
            os.seteuid(65534) if 0 in os.getresuid() else None
        def look():
            scan = scanner.scan()
            assert not scan.problem, scan.problem
            print(sorted((e.name, e.state.value, e.reason) for e in scanner.entries))
        root_chmod("secret.gguf", 0)
        root_chmod("closed", 0)
        look()
        root_chmod("known.gguf", 0)
        look()
        root_chmod("secret.gguf", 0o644)
        root_chmod("known.gguf", 0o644)
        root_chmod("closed", 0o755)
        look()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, second, third = (
        {name: (state, why) for name, state, why in eval(line)} for line in done.stdout.splitlines()
    )
    refused = "it cannot be read: Permission denied; let the user of this daemon read it"
    closed = "this folder cannot be looked into: Permission denied; "
    closed += "let the user of this daemon read and enter it, or move it away"
    assert first == {
        "closed/": ("invalid", closed),
        "known": ("ready", ""),
        "open": ("ready", ""),
        "secret": ("invalid", refused),
    }
    assert second["known"] == ("invalid", refused)
    assert second["open"] == ("ready", "")
    assert third == dict.fromkeys(("closed", "known", "open", "secret"), ("ready", ""))


def test_ten_thousand_looks_are_the_same_as_one(looking: Looking) -> None:
    """The difference between looks adds up to what is there, whatever happens between them."""
    told: dict[str, EntryState] = {}
    for step in range(60):
        name = f"{step % 7}.gguf"
        path = looking.root / ("f" if step % 3 else ".") / name
        if path.exists():
            path.unlink()
        elif step % 2:
            move_in(looking, f"{'f' if step % 3 else '.'}/{name}")
        else:
            put(path)
        for _ in range(2):
            scan = looking.scan(AGAIN_S)
            told.update((entry.name, entry.state) for entry in scan.changed)
            for gone in scan.removed:
                del told[gone]
    fresh = Looking(looking.root)
    fresh.offset = 3600
    assert told == fresh.states()


def test_unchanged_files_cost_one_stat_each(looking: Looking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened but folders; a new file costs its own header and no other."""
    for number in range(50):
        put(looking.root / f"{number}.gguf")
    looking.offset = 60
    assert looking.scan().headers_read == 50
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **how: opened.append(path) or real(path, *args, **how))
    looking.scan(100)
    assert not opened
    move_in(looking, "new.gguf")
    assert [entry.name for entry in looking.scan(100).changed] == ["new"]
    assert opened == [str(looking.root / "new.gguf")]


def test_only_what_the_worker_needs_is_loaded() -> None:
    """The worker starts quickly and is small: none of the daemon's libraries."""
    heavy = "{'pydantic', 'anyio', 'psutil', 'httpx', 'asyncio', 'logging', 'aiohttp'}"
    code = f"import sys, llamavisor.catalog.scanner as s; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
