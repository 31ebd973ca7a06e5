"""The folders that the daemon writes to: its state and its logs."""

from __future__ import annotations

import os
from pathlib import Path

from llamavisor.catalog.disk import disk_of
from llamavisor.units import format_size
from llamavisord.doctor.account import Account
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning

LEAST_BYTES = 64 * 1024**2
"""Less, and what is learned cannot be written down for long."""
_WRITE = os.W_OK | os.X_OK


def look(case: Case) -> Findings:
    """Each that differs."""
    assert case.config is not None  # noqa: S101 (the check needs one)
    state_dir, log_dir = case.config.state_dir, case.config.log_dir
    yield from _judge("state", state_dir, case)
    # What is kept of the logs: the file that is written to and two older ones, of each router.
    logs = 3 * case.config.log_size_bytes * len(case.config.routers)
    if not log_dir.is_relative_to(state_dir):
        yield from _judge("logs", log_dir, case)
    there = _there(log_dir)
    disk = disk_of(str(there))
    if disk is None:
        return
    if disk.free_bytes < LEAST_BYTES:
        text = f"{there} has {format_size(disk.free_bytes)} free: what is learned of models cannot be kept"
        yield problem(text, "make room")
    elif disk.free_bytes < logs:
        text = f"{there} has {format_size(disk.free_bytes)} free, and logs may take {format_size(logs)}"
        yield warning(text, "make room, or set a smaller log_size")
    else:
        yield ok(f"{format_size(disk.free_bytes)} free for state and logs")


def _judge(what: str, folder: Path, case: Case) -> Findings:
    there, account = _there(folder), case.account
    try:
        status = there.stat()
        bar = account.barred(there, _WRITE)
    except OSError as error:
        yield warning(f"{folder} ({what}) cannot be seen: {error.strerror}", "ask as root, or as the daemon's user")
        return
    if not there.is_dir():
        yield problem(f"{there} is in the way: it is no folder, and {folder} ({what}) is to be one", "move it away")
    elif bar and case.owner is not None:
        yield note(f"{folder} ({what}) is not yours to write: the daemon runs as {case.owner}", "ask as root")
    elif bar:
        hint = f"chown {account.name} {folder}, or name another folder"
        yield problem(f"{folder} ({what}) cannot be written by {account.name}: {bar}", hint)
    elif there != folder:
        yield ok(f"{folder} ({what}) is not there yet, and can be made")
    elif status.st_uid != account.uid:
        hint = f"chown -R {account.name} {folder}"
        yield warning(f"{folder} ({what}) belongs to {Account.of(status.st_uid).name}, not to {account.name}", hint)
    elif status.st_mode & 0o007:
        text = f"{folder} ({what}) is open to everybody: what llama-server logs may hold what people have asked"
        yield warning(text, f"chmod o= {folder}")
    else:
        yield ok(f"{folder} ({what}) can be written by {account.name}")


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
