"""Which file systems are somewhere else: their clocks are not ours, and a writer's pauses look like its end."""

from __future__ import annotations

import os
from pathlib import Path

MOUNTINFO = "/proc/self/mountinfo"
"""What is mounted where, as proc(5) describes it."""

_NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "prl_fs",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
    }
)
"""Types of file systems that another machine, or the host of a virtual one, writes to as well."""


def is_network_type(name: str) -> bool:
    """Whether a file system of this type is somewhere else. All of FUSE may be (sshfs, rclone), but for `fuseblk`."""
    return name in _NETWORK or name.startswith("fuse.") or name == "fuse"


def network_devices(mountinfo: str = MOUNTINFO) -> frozenset[int]:
    """The st_dev of all mounted network file systems; none when that cannot be told."""
    try:
        return parse(Path(mountinfo).read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError:
        return frozenset()


def parse(mountinfo: str) -> frozenset[int]:
    """The same from the text of that file; lines that are not understood count for nothing."""
    found: set[int] = set()
    for line in mountinfo.splitlines():
        mount, _, rest = line.partition(" - ")
        fields, kind = mount.split(" "), rest.partition(" ")[0]
        if len(fields) > 2 and is_network_type(kind):
            major, _, minor = fields[2].partition(":")
            if major.isdecimal() and minor.isdecimal():
                found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)
