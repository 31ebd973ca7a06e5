"""The files in which a kernel tells about memory, in a folder: what it says is what the test says."""

from __future__ import annotations

from pathlib import Path


class Kernel:
    """One that has killed before, and whose cgroups are of version 2.

    Args:
        root: what a `Meter` takes for the root of the file system.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._write("proc/self/cgroup", "0::/ours\n")
        self._write("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self.kills(3)

    def __repr__(self) -> str:
        return f"<Kernel {self.root}>"

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def kills(self, count: int) -> None:
        """It has killed so many processes of ours since it runs."""
        self._write("sys/fs/cgroup/ours/memory.events", f"low 0\noom {count}\noom_kill {count}\n")

    def hides(self, name: str) -> None:
        """It does not tell this."""
        (self.root / name).unlink()

    def pressure(self, full: float) -> None:
        """So much work stands still."""
        line = f"avg10={full:.2f} avg60=0.00 avg300=0.00 total=0"
        self._write("proc/pressure/memory", f"some {line}\nfull {line}\n")

    def process(self, pid: int, *, pss: int | None, anonymous: int = 0, file: int = 0) -> None:
        """A process, with its sizes in bytes; without a PSS for one that may not be looked into."""
        if pss is not None:
            self._write(f"proc/{pid}/smaps_rollup", f"Rss: 9 kB\nPss: {pss // 1024} kB\n")
        rss = f"RssAnon: {anonymous // 1024} kB\nRssFile: {file // 1024} kB\nRssShmem: 4 kB\nVmSwap: 0 kB\n"
        self._write(f"proc/{pid}/status", rss)
