"""One process tree of ours: start it, know when it ends, and end it so that nothing is left.

A program is started in a session of its own with a marker in its environment. Its end is seen by pidfd (a few
milliseconds, no thread, no signal handler), and it is reaped by its own pid alone: `waitpid(-1)` would steal the exit
statuses of others. What it leaves behind is found by descent (this process is a subreaper, so that orphans come to us)
and by the marker, never by name or path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio

from llamavisor import procfs
from llamavisor.errors import SpawnError
from llamavisor.started import Started
from llamavisor.threads import run_in_thread
from llamavisor.vitals import Vitals, read_vitals

TERM_GRACE_S = 10.0
"""How long a process may take to end after SIGTERM before it is killed."""
KILL_GRACE_S = 5.0
"""How long a killed process may take to vanish; longer means that the kernel holds it (a driver, a dead disk)."""
EXEC_TIMEOUT_S = 10.0
_POLL_S = 0.005

INSTANCE_VARIABLE = "LLAMAVISOR_INSTANCE"
SPAWN_VARIABLE = "LLAMAVISOR_SPAWN"

_PR_SET_CHILD_SUBREAPER = 36
_LAUNCHER = str(Path(__file__).with_name("_launcher.py"))
_TRANSIENT = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, errno.EINTR})


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: with an exit code, or by a signal; exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def of_wait(cls, status: int) -> ExitStatus:
        """From a wait status, see wait(2)."""
        if os.WIFSIGNALED(status):
            return cls(signal=os.WTERMSIG(status))
        return cls(code=os.waitstatus_to_exitcode(status))

    def __str__(self) -> str:
        """As a person reads it."""
        if self.signal is None:
            return f"exit code {self.code}"
        try:
            return signal.Signals(self.signal).name
        except ValueError:  # a real-time signal has no name
            return f"signal {self.signal}"


@dataclass(eq=False, slots=True)
class Process:
    """A running program that we started, with the session around it.

    Attributes:
        identity: which process it is.
        marker: the entry NAME=VALUE in the environment of this process and of all that it starts.
        ended: set once the process itself has ended; what it started may still live.
    """

    identity: procfs.Identity
    marker: str
    ended: anyio.Event
    status: ExitStatus | None = None
    _popen: subprocess.Popen[bytes] = field(repr=False, kw_only=True)
    _pidfd: int = field(repr=False, kw_only=True)
    _own: set[int] = field(repr=False, kw_only=True)
    _reaped: Callable[[], None] = field(repr=False, kw_only=True)

    @property
    def pid(self) -> int:
        """The process id, which is its session's and its group's too."""
        return self.identity.pid

    async def wait(self) -> ExitStatus:
        """Wait until the process has ended. It stays a zombie, so that its group can still be signalled safely.

        Called by one task alone; others wait for `ended`, or `poll`.
        """
        while (status := self.poll()) is None:
            await anyio.wait_readable(self._pidfd)
        return status

    def poll(self) -> ExitStatus | None:
        """How the process ended, None while it runs."""
        if self.status is None:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if info is not None:
                exited = info.si_code == os.CLD_EXITED
                self.status = ExitStatus(code=info.si_status) if exited else ExitStatus(signal=info.si_status)
                self.ended.set()
        return self.status

    def vitals(self) -> Vitals | None:
        """What the process has done so far, None once it has ended."""
        return read_vitals(self.pid) if self.status is None else None

    def signal(self, number: int) -> None:
        """Send a signal to this process alone; no effect once it has ended."""
        if self.status is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def terminate(self, *, grace_s: float = TERM_GRACE_S) -> bool:
        """Ask the process to end, and kill it and its group when it does not.

        SIGCONT follows SIGTERM because a stopped process does not see SIGTERM before it is continued.

        Returns:
            True if it ended by itself, False if it had to be killed.
        """
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        if await self._ends_within(grace_s):
            return True
        self.kill()
        await self._ends_within(KILL_GRACE_S)
        return False

    async def _ends_within(self, seconds: float) -> bool:
        with anyio.move_on_after(seconds):
            while self.poll() is None:
                await anyio.sleep(_POLL_S)
            return True
        return False

    def kill(self) -> None:
        """Kill the process and all of its group at once; no effect once it has been reaped."""
        if self._popen.returncode is None:  # until it is reaped nobody else can have its group's number
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    async def clear(self) -> Leftovers:
        """Kill and reap all that is left of an ended process: its group, its descendants, itself.

        Bounded by `KILL_GRACE_S`. Safe to call more than once.
        """
        self.kill()
        killed: set[int] = set()
        # Once found, a stray is kept in sight until it is gone: a killed one has no environment to know it by.
        strays: set[procfs.Identity] = set()
        with anyio.move_on_after(KILL_GRACE_S):
            while True:
                found = self._find_strays()
                strays |= found
                self._reap()
                strays = {stray for stray in strays if not self._is_gone(stray)}
                if not strays:
                    if found:  # what has just gone may have left children, which are ours now
                        continue
                    break
                for stray in strays:
                    known = procfs.stat(stray.pid)
                    if known is None or known.is_zombie:
                        continue
                    if known.session != self.pid:
                        killed.add(stray.pid)  # it called setsid: a killpg would have missed it
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(stray.pid, signal.SIGKILL)
                await anyio.sleep(_POLL_S)
        survivors = sorted([*(stray.pid for stray in strays), *([] if self.poll() else [self.pid])])
        return Leftovers(killed=tuple(sorted(killed)), survivors=tuple(survivors))

    def _find_strays(self) -> set[procfs.Identity]:
        """The processes of our session and those with our marker, besides this process itself, that were handed to us.

        Their own children are handed to us when they end: to walk through all threads of a process that serves a model
        takes milliseconds.
        """
        strays = set()
        for pid in procfs.children(os.getpid()):
            known = procfs.stat(pid)
            if pid == self.pid or known is None:
                continue
            if known.session == self.pid or procfs.has_environment(pid, self.marker):
                strays.add(procfs.Identity(pid, known.start_ticks, procfs.boot_id()))
        return strays

    def _is_gone(self, stray: procfs.Identity) -> bool:
        """Whether a stray has ended and been reaped, which is ours to do once its parent is gone."""
        return _reap_adopted(stray.pid, self._own) or not stray.is_current

    def _reap(self) -> None:
        """Collect the exit status of the process itself, which frees its pid and its group's number."""
        if self._popen.returncode is None and self.poll() is not None:
            self._popen.wait()
            self._reaped()
            os.close(self._pidfd)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What `Process.clear` found besides the process group itself.

    Attributes:
        killed: pids of processes that had left the session and were killed.
        survivors: pids of what could not be killed in time; the kernel holds them.
    """

    killed: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.killed or self.survivors)


class Spawner:
    """Starts processes that carry the marker of one daemon, and keeps their account.

    Args:
        instance: id of this installation of the daemon; what carries it was started by it.
        started: what is known of processes beyond the daemon's own life.
    """

    def __init__(self, instance: str, started: Started | None = None) -> None:
        self.instance = instance
        self.started = Started() if started is None else started
        self._own: set[int] = set()
        self._zombies: set[procfs.Identity] = set()

    def __repr__(self) -> str:
        return f"<Spawner {self.instance} own={sorted(self._own)}>"

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], output: Path, cwd: Path | None = None
    ) -> Process:
        """Start `argv[0]`, an absolute path, as the leader of its own session.

        Its standard output and error are appended to the file `output`, never to a pipe: a pipe that nobody drains
        stops llama-server for ever while /health says 200. Its standard input is /dev/null.

        Called from the main thread's event loop: the parent-death signal is bound to the thread that starts it.

        Raises:
            SpawnError: the process could not be started; says whether trying again makes sense.
        """
        marker = f"{SPAWN_VARIABLE}={uuid.uuid4().hex}"
        name, _, value = marker.partition("=")
        full_env = {**env, INSTANCE_VARIABLE: self.instance, name: value}
        with _open_log(output) as log:
            try:
                error_read, error_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as exc:
                raise _spawn_error(argv[0], exc) from exc
            try:
                popen, pidfd = _start(argv, full_env, log, cwd, error_write)
            except BaseException:
                os.close(error_read)
                raise
            finally:
                os.close(error_write)
        try:
            try:
                await _await_exec(error_read, argv[0])
                identity = procfs.identify(popen.pid)
                if identity is None:  # ours stays at least a zombie until we reap it: there is no descriptor
                    raise _spawn_error(argv[0], OSError(errno.EMFILE, os.strerror(errno.EMFILE)))  # noqa: TRY301
            except BaseException:
                os.close(pidfd)
                _abandon(popen)
                raise
        finally:
            os.close(error_read)
        self._own.add(popen.pid)
        self.started.add(identity)
        reaped = partial(self._reaped, identity)
        return Process(identity, marker, anyio.Event(), _popen=popen, _pidfd=pidfd, _own=self._own, _reaped=reaped)

    def _reaped(self, identity: procfs.Identity) -> None:
        self._own.discard(identity.pid)
        self.started.remove(identity)

    def reap_orphans(self) -> list[int]:
        """Reap the ended processes that were handed to us because their parent died before them.

        Called every second. Only what was a zombie the last time already is touched: whoever started a process waits
        for it and has reaped it long before; what nobody waits for is ours to reap.
        """
        zombies = set()
        for pid in procfs.children(os.getpid()):
            identity, known = procfs.identify(pid), procfs.stat(pid)
            if identity is not None and known is not None and known.is_zombie and pid not in self._own:
                zombies.add(identity)
        reaped = [zombie.pid for zombie in zombies & self._zombies if _reap_adopted(zombie.pid, self._own)]
        self._zombies = zombies
        return reaped

    async def sweep(self) -> Leftovers:
        """Kill what an earlier daemon of this installation left running, and wait until it has gone.

        Called once, before any port is bound, by a daemon that holds the lock of its installation: whoever started what
        carries our marker is dead then. So it is with what the ledger names, if it is still that very process.
        """
        marker = f"{INSTANCE_VARIABLE}={self.instance}"
        found = await run_in_thread(_marked, marker)
        known = [identity for identity in self.started.before if _is_alive(identity) and identity.pid != os.getpid()]
        found = list(dict.fromkeys([*found, *known]))
        for identity in found:
            if identity.is_current:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(identity.pid, signal.SIGKILL)
        remaining = found
        with anyio.move_on_after(KILL_GRACE_S):
            while remaining := [identity for identity in remaining if _is_alive(identity)]:
                await anyio.sleep(_POLL_S)
        return Leftovers(
            killed=tuple(identity.pid for identity in found),
            survivors=tuple(identity.pid for identity in remaining),
        )


def become_subreaper() -> None:
    """Have the orphans of everything that this process starts handed to it instead of to init; see prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _marked(marker: str) -> list[procfs.Identity]:
    identities: Iterable[procfs.Identity | None] = (
        procfs.identify(pid) for pid in procfs.all_pids() if procfs.has_environment(pid, marker)
    )
    return [identity for identity in identities if identity is not None and identity.pid != os.getpid()]


def _is_alive(identity: procfs.Identity) -> bool:
    known = procfs.stat(identity.pid)
    is_it = known is not None and known.start_ticks == identity.start_ticks and identity.boot_id == procfs.boot_id()
    return is_it and known is not None and not known.is_zombie


def _reap_adopted(pid: int, own: set[int]) -> bool:
    """Reap `pid` if it is an ended child of ours that we did not start."""
    if pid in own:
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:  # still somebody else's child
        return False


def _open_log(path: Path) -> BinaryIO:
    """The log file, for appending and for our user alone: it may hold what people ask their models."""
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")
    except OSError as exc:
        hint = "make room, or let this user write there; the next try follows by itself"
        raise SpawnError(f"cannot write the log {path}: {exc.strerror}", hint=hint, is_permanent=False) from exc


def _start(
    argv: Sequence[str], env: Mapping[str, str], log: BinaryIO, cwd: Path | None, error_write: int
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the launcher of a program, which returns within a millisecond; the process and its pidfd."""
    try:
        popen = subprocess.Popen(
            [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), str(error_write), *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            env=env,
            pass_fds=(error_write,),
            start_new_session=True,
        )
    except OSError as exc:
        raise _spawn_error(sys.executable, exc) from exc
    try:
        return popen, os.pidfd_open(popen.pid)
    except OSError as exc:
        _abandon(popen)
        raise _spawn_error(argv[0], exc) from exc


async def _await_exec(error_read: int, program: str) -> None:
    """Wait until execve has closed the launcher's pipe; a number in it says why there was no execve."""
    number = errno.EAGAIN  # a machine too busy to run the launcher is short of something, and that may pass
    with anyio.move_on_after(EXEC_TIMEOUT_S):
        await anyio.wait_readable(error_read)
        number = int(os.read(error_read, 16) or b"0")
    if number:
        raise _spawn_error(program, OSError(number, os.strerror(number)))


def _abandon(popen: subprocess.Popen[bytes]) -> None:
    """Kill and reap a process that never became what it should."""
    with suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.kill()
    popen.wait()


def _spawn_error(program: str, error: OSError) -> SpawnError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _TRANSIENT:
        hint = "the machine is short of processes, files or memory; the next try follows by itself"
        return SpawnError(f"cannot start {program}: {reason}", hint=hint, is_permanent=False)
    hint = "check that the file is an executable llama-server for this machine"
    return SpawnError(f"cannot start {program}: {reason}", hint=hint, is_permanent=True)
