"""RAM and what processes take of it: fake trees of files, and this machine."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from llamavisor.gauge import RAM, RAM_ID, Pressure, RamGauge, memory_of, memory_of_all, oom_kills
from llamavisor.gauge.cgroup import (
    find_cgroup,
    parse_membership,
    parse_mounts,
    parse_number,
    parse_stat,
    read_cgroup,
)
from llamavisor.gauge.device import unknown
from llamavisor.gauge.pressure import cgroup_pressure, machine_pressure, parse_pressure, worst_pressure
from llamavisor.gauge.ram import parse_meminfo, read_ram

MIB = 1024 * 1024
GIB = 1024 * MIB
MEMINFO = "MemTotal: {} kB\nMemFree: 12 kB\nMemAvailable: {} kB\nHugePages_Total:       0\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
NO_LIMIT = "9223372036854771712"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    """Write these files under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(root: Path, *, total: int = 64 * GIB, available: int = 48 * GIB) -> Path:
    """A machine with this much RAM, and no cgroups."""
    return tree(root, {"proc/meminfo": MEMINFO.format(total // 1024, available // 1024)})


def cgroup2(root: Path, path: str, levels: Mapping[str, Mapping[str, str]]) -> Path:
    """Puts us into the version 2 cgroup `path`; `levels` has the files of each folder."""
    tree(root, {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": V2_MOUNT})
    for folder, files in levels.items():
        tree(root / "sys/fs/cgroup" / folder.lstrip("/"), files)
    return root


def cgroup1(root: Path, path: str, levels: Mapping[str, Mapping[str, str]], *, mount_root: str = "/") -> Path:
    """Likewise version 1, beside a version 2 tree that counts no memory."""
    said = f"9:name=systemd:/\n4:cpu,memory:{path}\n0::/\n"
    tree(root, {"proc/self/cgroup": said, "proc/self/mountinfo": V2_MOUNT + V1_MOUNT.format(root=mount_root)})
    for folder, files in levels.items():
        tree(root / "sys/fs/cgroup/memory" / folder.lstrip("/"), files)
    return root


def limits(limit: object, usage: object, inactive: int = 0) -> dict[str, str]:
    """What a version 2 cgroup says."""
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 7\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}


def limits1(limit: object, usage: object, inactive: int = 0, above: object = NO_LIMIT) -> dict[str, str]:
    """What a version 1 cgroup says."""
    stat = f"inactive_file 1\nhierarchical_memory_limit {above}\ntotal_inactive_file {inactive}\n"
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": stat,
        "memory.use_hierarchy": "1\n",
    }


def numbers(root: Path) -> tuple[int | None, int | None, int | None]:
    """Total, used and free of a fake machine."""
    reading = read_ram(root, 0.0)
    return reading.total_bytes, reading.used_bytes, reading.free_bytes


def test_a_machine_without_cgroups_has_what_it_has(tmp_path: Path) -> None:
    """Total is MemTotal, free is MemAvailable, and the rest is used."""
    assert numbers(machine(tmp_path)) == (64 * GIB, 16 * GIB, 48 * GIB)


def test_the_limit_of_our_cgroup_counts_if_it_is_smaller(tmp_path: Path) -> None:
    """Page cache that can be dropped does not count as taken; a cgroup v2 without a limit changes nothing."""
    root = machine(tmp_path)
    levels = {"/": {}, "/a": limits("max", 5 * GIB), "/a/b": limits(8 * GIB, 5 * GIB, 2 * GIB)}
    cgroup2(root, "/a/b", levels)
    assert numbers(root) == (8 * GIB, 3 * GIB, 5 * GIB)


def test_every_level_above_counts(tmp_path: Path) -> None:
    """A parent with a larger limit that others have nearly used up leaves less than our own limit does."""
    root = machine(tmp_path)
    cgroup2(root, "/a/b", {"/a": limits(16 * GIB, 15 * GIB), "/a/b": limits(8 * GIB, 1 * GIB)})
    assert numbers(root) == (8 * GIB, 7 * GIB, 1 * GIB)


def test_a_machine_that_is_full_leaves_less_than_a_limit_does(tmp_path: Path) -> None:
    """Free is never more than the machine has available."""
    root = cgroup2(machine(tmp_path, available=GIB), "/a", {"/a": limits(8 * GIB, 0)})
    assert numbers(root) == (8 * GIB, 7 * GIB, 1 * GIB)


def test_no_more_is_free_than_there_is(tmp_path: Path) -> None:
    """A container's /proc/meminfo may be made up by somebody who is not careful."""
    assert numbers(machine(tmp_path, total=GIB, available=2 * GIB)) == (GIB, 0, GIB)


def test_a_limit_above_the_ram_of_the_machine_is_none(tmp_path: Path) -> None:
    """The smaller of the two counts, whichever it is."""
    root = cgroup2(machine(tmp_path), "/a", {"/a": limits(640 * GIB, GIB)})
    assert numbers(root) == (64 * GIB, 16 * GIB, 48 * GIB)


def test_a_cgroup_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    """A limit that was lowered below what is taken leaves nothing, and not less."""
    root = cgroup2(machine(tmp_path), "/a", {"/a": limits(GIB, 3 * GIB)})
    assert numbers(root) == (GIB, GIB, 0)


def test_memory_high_is_noted_and_limits_nothing(tmp_path: Path) -> None:
    """The smallest memory.high on the way up is told, for the kernel slows us down above it."""
    levels = {"/a": limits("max", 0) | {"memory.high": "4294967296"}, "/a/b": limits("max", 0) | {"memory.high": "max"}}
    reading = read_ram(cgroup2(machine(tmp_path), "/a/b", levels), 0.0)
    assert (reading.total_bytes, reading.high_bytes) == (64 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("files", "total"),
    [
        (limits(8 * GIB, "what"), 8 * GIB),
        ({"memory.max": f"{8 * GIB}"}, 8 * GIB),
        (limits("what", GIB), None),
        (limits("", GIB), None),
    ],
)
def test_what_a_cgroup_does_not_tell_is_unknown(tmp_path: Path, files: dict[str, str], total: int | None) -> None:
    """A limit or usage that cannot be read makes unknown what depends on it, and says why; it is never zero."""
    reading = read_ram(cgroup2(machine(tmp_path), "/a", {"/a": files}), 0.0)
    assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (total, None, None)
    assert "memory." in reading.reason
    assert read_cgroup(tmp_path).room_bytes is None


def test_room_is_unknown_when_one_level_does_not_tell(tmp_path: Path) -> None:
    """Another level's room would be an upper bound at best."""
    levels = {"/a": limits(16 * GIB, "what"), "/a/b": limits(8 * GIB, GIB)}
    ours = read_cgroup(cgroup2(machine(tmp_path), "/a/b", levels))
    assert (ours.limit_bytes, ours.room_bytes) == (8 * GIB, None)


def test_version_1_is_read_with_all_its_levels(tmp_path: Path) -> None:
    """The largest number that version 1 can write is no limit."""
    root = machine(tmp_path)
    levels = {
        "/": limits1(NO_LIMIT, 30 * GIB),
        "/a": limits1(16 * GIB, 14 * GIB, 1 * GIB),
        "/a/b": limits1(NO_LIMIT, 2 * GIB),
    }
    cgroup1(root, "/a/b", levels)
    assert numbers(root) == (16 * GIB, 13 * GIB, 3 * GIB)


def test_version_1_tells_of_limits_above_what_is_mounted(tmp_path: Path) -> None:
    """In a container without a cgroup namespace only its own part of the tree is there, under a path of the host."""
    levels = {"/": limits1(NO_LIMIT, 1 * GIB, above=4 * GIB)}
    root = cgroup1(machine(tmp_path), "/docker/0123", levels, mount_root="/docker/0123")
    assert numbers(root) == (4 * GIB, 1 * GIB, 3 * GIB)


def test_version_1_without_hierarchy_ends_where_it_does_not_count(tmp_path: Path) -> None:
    """A parent that does not count what its children take limits nothing."""
    levels = {"/a": limits1(GIB, 0) | {"memory.use_hierarchy": "0\n"}, "/a/b": limits1(8 * GIB, GIB)}
    assert numbers(cgroup1(machine(tmp_path), "/a/b", levels)) == (8 * GIB, GIB, 7 * GIB)


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/mounted/here"])
def test_a_path_outside_of_what_is_mounted_falls_back_to_the_mount(tmp_path: Path, path: str) -> None:
    """In a container the mount is the container's own cgroup, whatever /proc says."""
    root = cgroup2(machine(tmp_path), path, {"/": limits(8 * GIB, GIB)})
    assert numbers(root) == (8 * GIB, GIB, 7 * GIB)


@pytest.mark.parametrize(
    "meminfo", ["", "MemTotal: 0 kB\n", "MemAvailable: 5 kB\n", "MemTotal: -5 kB\nMemAvailable: 4 kB\n", None]
)
def test_a_machine_that_does_not_tell_is_unknown(tmp_path: Path, meminfo: str | None) -> None:
    """RAM is there in every reading, and its numbers are None with a reason."""
    if meminfo is not None:
        tree(tmp_path, {"proc/meminfo": meminfo})
    reading = read_ram(tmp_path, 1.5)
    assert (reading.device, reading.at, reading.is_known) == (RAM, 1.5, False)
    assert (reading.total_bytes, reading.used_bytes, reading.free_bytes) == (None, None, None)
    assert "MemTotal" in reading.reason or "meminfo" in reading.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/a b\n", (2, "/a b")),
        ("0::/\n4:memory:/x:y\n", (1, "/x:y")),
        ("5:cpu,memory,cpuset:/x\n", (1, "/x")),
        ("5:memoryless:/x\n", None),
        ("4:memory:\n", None),
        ("", None),
    ],
)
def test_whose_member_we_are(text: str, expected: tuple[int, str] | None) -> None:
    """Version 1 counts memory wherever its memory controller is mounted, else version 2."""
    assert parse_membership(text) == expected


def test_mount_points_are_unescaped() -> None:
    """The kernel writes a space as an octal escape."""
    assert parse_mounts(V2_MOUNT.replace("/sys/fs/cgroup", r"/sys/my\040cg"), 2) == [("/", "/sys/my cg")]


@given(st.text())
def test_readers_of_text_never_raise(text: str) -> None:
    """Whatever a file of the kernel says, what is no number is left out."""
    assert all(value >= 0 for value in parse_meminfo(text).values())
    assert all(value >= 0 for value in parse_stat(text).values())
    parse_membership(text)
    parse_mounts(text, 1)
    parse_mounts(text, 2)
    parse_pressure(text)
    number = parse_number(text)
    assert number is None or number == int(text.strip())


@given(st.dictionaries(st.sampled_from(["MemTotal", "MemAvailable"]), st.text() | st.integers(-1, 2**40).map(str)))
def test_unknown_ram_is_never_zero(said: dict[str, str]) -> None:
    """Numbers that are told come from a file that tells them."""
    known = parse_meminfo("".join(f"{name}: {value} kB\n" for name, value in said.items()))
    for name, value in known.items():
        assert value == int(said[name].split("\n")[0]) * 1024 or "\n" in said[name]


def test_oom_kills_are_counted_per_version(tmp_path: Path) -> None:
    """memory.events of version 2, memory.oom_control of version 1, and None where there is neither."""
    two = cgroup2(tmp_path / "two", "/a", {"/a": {"memory.events": "low 0\noom 3\noom_kill 2\n"}})
    one = cgroup1(tmp_path / "one", "/a", {"/a": {"memory.oom_control": "oom_kill_disable 0\noom_kill 5\n"}})
    none = cgroup2(tmp_path / "none", "/", {"/": {}})
    assert [oom_kills(root) for root in (two, one, none, tmp_path)] == [2, 5, None, None]


# Pressure

PSI = "some avg10=1.25 avg60=0.00 avg300=0.00 total=17\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=3\n"


def test_pressure_is_read_from_the_machine_and_the_cgroup(tmp_path: Path) -> None:
    """The higher of both counts: a limit of its own can starve a cgroup on a machine that has plenty."""
    within = {"memory.pressure": PSI.replace("1.25", "80.00").replace("0.50", "0.75")}
    root = cgroup2(tree(tmp_path, {"proc/pressure/memory": PSI}), "/a", {"/a": within})
    assert machine_pressure(root) == Pressure(1.25, 0.5)
    assert cgroup_pressure(root) == Pressure(80.0, 0.75)
    assert worst_pressure(root) == Pressure(80.0, 0.75)


@pytest.mark.parametrize("text", [None, "", "some avg10=1.00\n", "some avg10=x\nfull avg10=1.00\n"])
def test_a_kernel_without_pressure_tells_none(tmp_path: Path, text: str | None) -> None:
    """Unknown is None, never no pressure."""
    if text is not None:
        tree(tmp_path, {"proc/pressure/memory": text})
    assert machine_pressure(tmp_path) is None
    assert worst_pressure(tmp_path) is None


# Processes

ROLLUP = """\
555f1adb7000-7ffdd6870000 ---p 00000000 00:00 0                          [rollup]
Rss:                1780 kB
Pss:                 320 kB
Pss_Dirty:           112 kB
Pss_Anon:            112 kB
Pss_File:            200 kB
Pss_Shmem:             8 kB
Anonymous:           150 kB
Swap:                 40 kB
SwapPss:              20 kB
"""
STATUS = "Name:\tllama-server\nRssAnon:\t 150 kB\nRssFile:\t 1630 kB\nRssShmem:\t 9 kB\nVmSwap:\t 40 kB\n"


def test_a_process_is_read_by_its_share_of_shared_pages(tmp_path: Path) -> None:
    """What several processes have mapped is split among them, so that sums count it once."""
    memory = memory_of(7, root=tree(tmp_path, {"proc/7/smaps_rollup": ROLLUP, "proc/7/status": STATUS}))
    assert memory is not None
    kib = [memory.pss, memory.anonymous, memory.file, memory.swap, memory.shmem, memory.private]
    assert [number // 1024 for number in kib if number is not None] == [320, 112, 200, 20, 8, 132]


def test_a_process_that_may_not_be_looked_into_is_read_by_its_status(tmp_path: Path) -> None:
    """Then how its pages are shared is unknown, and so is the share of them all."""
    memory = memory_of(7, root=tree(tmp_path, {"proc/7/smaps_rollup": "", "proc/7/status": STATUS}))
    assert memory is not None
    assert memory.pss is None
    assert (memory.anonymous, memory.file, memory.swap, memory.shmem) == (150 * 1024, 1630 * 1024, 40 * 1024, 9 * 1024)


def test_a_process_that_has_gone_has_no_memory(tmp_path: Path) -> None:
    """Neither has a zombie, whose status has lost these lines."""
    root = tree(tmp_path, {"proc/8/status": "Name:\tdead\nState:\tZ (zombie)\n"})
    assert memory_of(7, root=root) is None
    assert memory_of(8, root=root) is None


def test_several_processes_are_added_up(tmp_path: Path) -> None:
    """A number that one of them does not tell is unknown for all; one that has gone counts nothing."""
    root = tree(tmp_path, {f"proc/{pid}/smaps_rollup": ROLLUP for pid in (1, 2)})
    assert memory_of_all([1, 2, 3], root=root).pss == 640 * 1024
    tree(tmp_path, {"proc/3/status": STATUS})
    together = memory_of_all([1, 2, 3], root=root)
    assert (together.pss, together.anonymous) == (None, (112 + 112 + 150) * 1024)


# This machine


def test_ram_of_this_machine() -> None:
    """Total is what the kernel says, or less by a limit; the three numbers fit together."""
    reading = read_ram(Path("/"), 0.0)
    assert reading.device.id == RAM_ID
    assert reading.total_bytes is not None
    assert reading.used_bytes is not None
    assert reading.free_bytes is not None
    assert reading.reason == ""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 64 * MIB < reading.total_bytes <= installed
    assert reading.used_bytes + reading.free_bytes == reading.total_bytes
    assert reading.used_bytes > MIB


def test_the_cgroup_of_this_machine() -> None:
    """If there is one, it is a folder that has us in it; its limits have no problem."""
    ours = find_cgroup(Path("/"))
    if ours is not None:
        assert ours.folder.is_dir()
        assert list(ours.levels())[-1] == ours.top or ours.version == 1
    assert read_cgroup(Path("/")).problem == ""


def test_memory_of_a_real_process_grows_with_what_it_takes() -> None:
    """64 MiB more are told as anonymous memory, and nearly nothing as files."""
    code = "import sys; held = bytearray(b'x') * (64 << 20); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        memory = memory_of(process.pid)
        process.communicate()
    assert memory is not None
    assert memory.anonymous is not None
    assert 64 * MIB <= memory.anonymous < 128 * MIB
    assert memory.private is not None
    assert memory.private >= memory.anonymous
    assert memory_of(process.pid) is None


def test_what_two_real_processes_have_mapped_counts_once(tmp_path: Path) -> None:
    """As the weights of a model that two children have mapped."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * (32 * MIB))
    code = (
        "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ);"
        f"sum(m[::{mmap.PAGESIZE}]); print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(weights)]
    started = [subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        together = memory_of_all(process.pid for process in started)
    finally:
        for process in started:
            process.communicate()
    assert together.file is not None
    assert 32 * MIB <= together.file < 56 * MIB


@pytest.mark.anyio
async def test_the_gauge_reads_ram_in_a_thread() -> None:
    """It tells exactly one device, as of the time of the loop."""
    before = anyio.current_time()
    (reading,) = await RamGauge().read()
    assert reading.is_known
    assert before <= reading.at <= anyio.current_time()


@pytest.mark.anyio
async def test_the_gauge_reads_by_what_it_is_given(virtual_time: MockClock) -> None:
    """What reads can be replaced."""
    gauge = RamGauge(Path("/elsewhere"), measure=lambda root, at: unknown(RAM, at, str(root)))
    (reading,) = await gauge.read()
    await gauge.aclose()
    assert reading.reason == "/elsewhere"
