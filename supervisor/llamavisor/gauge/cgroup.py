"""What our cgroup may take of the machine's memory, version 1 and version 2; see cgroups(7).

The kernel counts and limits at every level of the tree, so every level up to the root is looked at, as far up as this
process sees: from within a container the levels above it are hidden, and so are their limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAX_DEPTH = 64
_ESCAPE = re.compile(r"\\([0-7]{3})")
_UNLIMITED = 1 << 62
"""Version 1 writes "no limit" as the largest multiple of a page below 2^63."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Where the files of our cgroup are.

    Attributes:
        version: 1 or 2.
        folder: of our own cgroup.
        top: of the uppermost one that can be seen.
    """

    version: int
    folder: Path
    top: Path

    def levels(self) -> Iterator[Path]:
        """Our cgroup, the one that it is in, and so on, as far as their limits hold for us."""
        folder = self.folder
        for _ in range(_MAX_DEPTH):
            yield folder
            if folder == self.top:
                return
            folder = folder.parent
            # Before Linux 5.11 a version 1 cgroup could be told not to count what those below it take.
            if self.version == 1 and (_text(folder / "memory.use_hierarchy") or "").strip() == "0":
                return


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """What the limits of our cgroup, and of those that it is in, leave us.

    Attributes:
        limit_bytes: the smallest limit, None if there is none.
        room_bytes: how much more can be taken before any limit is met, page cache that can be dropped not counted as
            taken; None if there is no limit, or if it is unknown.
        high_bytes: the smallest memory.high, above which the kernel slows us down; None if there is none.
        problem: why a limit or the room is unknown; empty if all is known.
    """

    limit_bytes: int | None = None
    room_bytes: int | None = None
    high_bytes: int | None = None
    problem: str = ""


def find_cgroup(root: Path, *, pid: str = "self") -> Membership | None:
    """The cgroup that counts this process's memory, None if there is none or its files are not mounted."""
    ours = parse_membership(_text(root / "proc" / pid / "cgroup") or "")
    if ours is None:
        return None
    version, path = ours
    for mount_root, mount_point in parse_mounts(_text(root / "proc" / pid / "mountinfo") or "", version):
        top = root / mount_point.lstrip("/")
        parts = Path(path).parts
        beneath = Path(mount_root).parts
        # Without a cgroup namespace a container sees the host's path but mounts only its own part of the tree; with a
        # namespace that we are outside of, the path begins with "..". In both cases the mount itself is the best guess.
        inside = parts[: len(beneath)] == beneath and ".." not in parts
        folder = top.joinpath(*parts[len(beneath) :]) if inside else top
        return Membership(version, folder if folder.is_dir() else top, top)
    return None


def read_cgroup(root: Path, *, pid: str = "self") -> CgroupMemory:
    """What our cgroup's limits leave us now. Blocks for well under a millisecond, mostly."""
    ours = find_cgroup(root, pid=pid)
    if ours is None:
        return CgroupMemory()
    if ours.version == 2:
        names = "memory.max", "memory.current", "inactive_file"
    else:
        names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    limits: list[int] = []
    rooms: list[int] = []
    highs: list[int] = []
    problem = ""
    for folder in ours.levels():
        limit = _limit(folder / names[0])
        high = _limit(folder / "memory.high") if ours.version == 2 else None
        if isinstance(high, int):
            highs.append(high)
        if isinstance(limit, str):
            problem = limit
            continue
        stat = parse_stat(_text(folder / "memory.stat") or "") if limit is not None or ours.version == 1 else {}
        # Version 1 tells of the limits above too, even of those levels that cannot be seen from within a container.
        limit = min(_UNLIMITED if limit is None else limit, stat.get("hierarchical_memory_limit", _UNLIMITED))
        if limit >= _UNLIMITED:
            continue
        limits.append(limit)
        usage = parse_number(_text(folder / names[1]) or "")
        if usage is None:
            problem = f"{folder / names[1]} does not tell a number"
            continue
        rooms.append(max(0, limit - max(0, usage - stat.get(names[2], 0))))
    return CgroupMemory(
        limit_bytes=min(limits, default=None),
        room_bytes=min(rooms, default=None) if not problem else None,
        high_bytes=min(highs, default=None),
        problem=problem,
    )


def oom_kills(root: Path, *, pid: str = "self") -> int | None:
    """How many processes of our cgroup (version 2: and of those in it) the kernel has killed for want of memory.

    Only the difference between two readings means something. None if the kernel does not tell.
    """
    ours = find_cgroup(root, pid=pid)
    if ours is None:
        return None
    name = "memory.events" if ours.version == 2 else "memory.oom_control"
    return parse_stat(_text(ours.folder / name) or "").get("oom_kill")


def parse_membership(text: str) -> tuple[int, str] | None:
    """Version and path of the cgroup that counts memory, from /proc/PID/cgroup; None if there is none."""
    unified: str | None = None
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator or not path.startswith("/"):
            continue
        if "memory" in controllers.split(","):
            return 1, path
        if not controllers:
            unified = path
    return None if unified is None else (2, unified)


def parse_mounts(text: str, version: int) -> list[tuple[str, str]]:
    """Root and mount point of every mount that shows memory cgroups of this version, from /proc/PID/mountinfo."""
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, about = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(about) < 3:
            continue
        if about[0] == "cgroup2" if version == 2 else about[0] == "cgroup" and "memory" in about[2].split(","):
            found.append((_unescape(fields[3]), _unescape(fields[4])))
    return found


def parse_stat(text: str) -> dict[str, int]:
    """Lines of a name and a number, such as memory.stat has; others are left out."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        number = parse_number(value)
        if name and number is not None:
            found[name] = number
    return found


def parse_number(text: str) -> int | None:
    """A whole number that is not negative, as the kernel writes it; None if it is anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def _limit(path: Path) -> int | str | None:
    """A limit; None if there is none; in words, why it is unknown."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:  # the root of version 2 has no limit
        return None
    except OSError as exc:
        return f"{path} cannot be read: {exc.strerror}"
    if text == "max":
        return None
    number = parse_number(text)
    if number is None:
        return f"{path} does not tell a number"
    return number if number < _UNLIMITED else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _unescape(path: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), path)
