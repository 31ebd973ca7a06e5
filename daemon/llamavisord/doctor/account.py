"""The user that a daemon runs as, and what the modes of files let that user do."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine.

    Attributes:
        uid: user id.
        groups: ids of all groups that it is in.
        name: what it is called.
        home: its folder, `/` if it has none.
    """

    uid: int
    groups: frozenset[int]
    name: str
    home: Path = Path("/")

    @classmethod
    def of(cls, uid: int, groups: frozenset[int] | None = None) -> Account:
        """The user with this id; its groups as the user database has them, if they are not given."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return cls(uid, groups or frozenset(), str(uid))
        if groups is None:
            groups = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(uid, groups, entry.pw_name, Path(entry.pw_dir))

    @classmethod
    def mine(cls) -> Account:
        """Who asks."""
        return cls.of(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))

    def may(self, status: os.stat_result, want: int) -> bool:
        """Whether the mode of a file grants `want`, made of os.R_OK, os.W_OK and os.X_OK. Pure.

        Access lists are not looked at; they can only be asked about one's own self.
        """
        if self.uid == 0:
            return True
        if status.st_uid == self.uid:
            granted = status.st_mode >> 6
        elif status.st_gid in self.groups:
            granted = status.st_mode >> 3
        else:
            granted = status.st_mode
        return granted & want == want

    def barred(self, path: Path, want: int) -> str:
        """What keeps the user from `path`, empty if nothing does: the first folder above it, or itself.

        Raises:
            OSError: it is not there, or who asks may not see it.
        """
        real = path.resolve(strict=True)
        if self.uid == os.geteuid():
            if os.access(real, want, effective_ids=True):
                return ""
        else:
            for folder in reversed(real.parents):
                if not self.may(status := folder.stat(), os.X_OK):
                    return _told(folder, status)
            if self.may(real.stat(), want):
                return ""
        return _told(real, real.stat())


def _told(path: Path, status: os.stat_result) -> str:
    mode = stat.filemode(status.st_mode)
    owner, group = Account.of(status.st_uid, frozenset()).name, _group(status.st_gid)
    return f"{path} is {mode} {owner}:{group}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
