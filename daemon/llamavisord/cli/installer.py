"""Carries out the steps of an installation, or only tells them."""

from __future__ import annotations

import grp
import os
import struct
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llamavisord.cli.errors import CommandError
from llamavisord.cli.machine import is_roots_alone
from llamavisord.cli.render import Screen
from llamavisord.installation import Folder, Remove, Run, Step, Write

_BOOTED = Path("/run/systemd/system")
"""Is there if systemd is process 1; see sd_booted(3)."""
_COMMAND_TIMEOUT_S = 3600.0
"""A stop takes as long as the daemon lets answers go on."""
_ACL = "system.posix_acl_default"
_ACL_OF_GROUP = struct.pack("<I" + "HHI" * 3, 2, 1, 7, 2**32 - 1, 4, 7, 2**32 - 1, 0x20, 5, 2**32 - 1)
"""Owner and group rwx, others r-x, for what is made in a folder; see acl(5), linux/posix_acl_xattr.h. It stands in for
the umask, by which some would keep what they drop to themselves."""


class Installer:
    """Does one step after the other; the first that fails ends it, and another try takes up from there.

    Args:
        is_dry: nothing is done, only told.
    """

    def __init__(self, *, is_dry: bool) -> None:
        self._is_dry = is_dry
        self._screen = Screen()
        self._changed: set[Path] = set()

    def __repr__(self) -> str:
        return f"<Installer {'dry' if self._is_dry else ''}>"

    def carry_out(self, steps: Iterable[Step]) -> None:
        """Do them.

        Raises:
            CommandError: one cannot be done.
        """
        before = os.umask(0o022)  # that of a careful root would keep the service out of its own configuration
        try:
            for step in steps:
                try:
                    done = self._carry_out(step)
                except (OSError, LookupError) as error:
                    text = f"{_object_of(step)}: {_reason(error)}"
                    raise CommandError(text, hint="mend that and call it again") from error
                if done:
                    self._tell(step, done)
        finally:
            os.umask(before)

    def _tell(self, step: Step, done: str) -> None:
        self._screen.line(f"would {done}" if self._is_dry else done)
        if self._is_dry and isinstance(step, Write):
            for line in step.text.splitlines():
                self._screen.line(f"  | {line}")

    def _carry_out(self, step: Step) -> str | None:
        """What was, or would be, done; None if nothing."""
        match step:
            case Write():
                return self._write(step)
            case Remove():
                return self._remove(step)
            case Folder():
                return self._make(step)
            case Run():
                return self._run(step)

    def _write(self, step: Write) -> str | None:
        with suppress(FileNotFoundError):
            if step.is_theirs or step.path.read_text(encoding="utf-8", errors="replace") == step.text:
                step.path.stat()
                return None
        self._changed.add(step.path)
        if not self._is_dry:
            step.path.parent.mkdir(parents=True, exist_ok=True)
            draft = step.path.with_name(f".{step.path.name}.new")
            draft.unlink(missing_ok=True)
            draft.touch(0o600, exist_ok=False)
            with draft.open("w", encoding="utf-8") as file:
                file.write(step.text)
                if step.group is not None:
                    os.fchown(file.fileno(), -1, grp.getgrnam(step.group).gr_gid)
                os.fchmod(file.fileno(), step.mode)
            draft.replace(step.path)
        return f"write {step.path}"

    def _remove(self, step: Remove) -> str | None:
        if not os.path.lexists(step.path):
            return None
        self._changed.add(step.path)
        if not self._is_dry:
            step.path.unlink()
            if step.path.parent.suffix == ".d":
                with suppress(OSError):  # it holds something else
                    step.path.parent.rmdir()
        return f"remove {step.path}"

    def _make(self, step: Folder) -> str | None:
        if step.path.exists():
            return None
        if step.group is not None and not is_roots_alone(step.path):
            raise OSError(f"is not there, and not root alone can say what it is; make it: mkdir {step.path}")
        if not self._is_dry:
            step.path.mkdir(parents=True)
            if step.group is not None:
                os.chown(step.path, -1, grp.getgrnam(step.group).gr_gid)
                with suppress(OSError):  # a file system without such lists
                    os.setxattr(step.path, _ACL, _ACL_OF_GROUP)
            step.path.chmod(step.mode)  # last: a change of the group takes the bit away that passes it on
        return f"make the folder {step.path} (mode {step.mode:o}{f', group {step.group}' if step.group else ''})"

    def _run(self, step: Run) -> str | None:
        if step.only_after and self._changed.isdisjoint(step.only_after):
            return None
        told = " ".join(step.argv)
        if step.needs_systemd and not _BOOTED.exists():
            return f"leave out, as systemd does not run here: {told}"
        if not self._is_dry:
            try:
                done = subprocess.run(
                    step.argv, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S
                )
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"not done after {_COMMAND_TIMEOUT_S:.0f} s") from None
            if done.returncode != 0 and not step.may_fail:
                raise OSError(done.stderr.strip() or f"exit code {done.returncode}")
        return f"run {told}"


def _object_of(step: Step) -> str:
    return " ".join(step.argv) if isinstance(step, Run) else str(step.path)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
