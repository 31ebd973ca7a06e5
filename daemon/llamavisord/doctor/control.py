"""The control socket: whether it is there, whether a daemon answers on it, and who may use it."""

from __future__ import annotations

import grp
import stat
from contextlib import suppress

import psutil

from llamavisord import __version__
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning
from llamavisord.exit_codes import ExitCode


def look(case: Case) -> Findings:
    """There are four cases.

    1. A daemon answers, with the configuration that is meant or with another one.
    2. There is one, and it does not answer.
    3. There is no socket: none runs, which is no fault.
    4. There is one, and nobody can be spoken to on it.
    """
    if case.other is not None:
        yield ok(f"{case.socket}: llamavisor {case.other['version']} answers, pid {case.pid}, another configuration")
        return
    if case.status is not None:
        version = case.status["version"]
        yield ok(f"{case.socket}: llamavisor {version} answers, pid {case.pid}, user {case.account.name}")
        if version != __version__:
            yield warning(f"the daemon is {version}, and this command is {__version__}", "restart the daemon")
        yield from _who_may(case)
        return
    silence = case.silence
    if silence is None:
        return
    if case.is_hung and case.pid is not None:
        yield problem(f"the daemon (pid {case.pid}) does not answer", _wake(case, case.pid))
        return
    try:
        is_there = case.socket.lstat() is not None
    except PermissionError:
        is_there = True
    except OSError:
        is_there = False
    if silence.exit_code is ExitCode.UNREACHABLE and not is_there:
        yield note(f"no daemon runs: there is no {case.socket}", silence.hint)
    else:
        yield problem(str(silence), silence.hint)


def _wake(case: Case, pid: int) -> str:
    """What to do about a daemon that does not answer."""
    with suppress(psutil.Error):
        if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
            return f"somebody has stopped it: `kill -CONT {pid}` has it go on"
    if case.has_systemd:
        return "`journalctl -u llamavisor -e` shows what it did last; `systemctl restart llamavisor` starts it anew"
    return f"its log shows what it did last; `kill -ABRT {pid}` has it tell there where it hangs, and ends it"


def _who_may(case: Case) -> Findings:
    try:
        status = case.socket.stat()
    except OSError:  # reached by another path, as from a container
        return
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o006:
        yield warning(f"{case.socket} has mode {mode:o}: everybody on this machine may command the daemon", "chmod o=")
    elif mode & 0o060:
        try:
            group = grp.getgrgid(status.st_gid).gr_name
        except KeyError:
            group = str(status.st_gid)
        yield ok(f"its user, root and the members of the group {group} may command it")
