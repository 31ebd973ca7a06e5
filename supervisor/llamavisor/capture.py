"""The output of a short-lived program, bounded in time and in bytes."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from anyio import NoEventLoopError, from_thread

from llamavisor.errors import BinaryError

LIMIT_BYTES = 4 * 1024 * 1024
_CHUNK_BYTES = 64 * 1024
_CANCEL_POLL_S = 0.1
"""How soon a program that nobody waits for any more is killed."""
_REAP_S = 5.0
"""A killed process is gone at once, unless a driver holds it in the kernel; then it is left behind."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What a program said, and how it ended.

    Attributes:
        returncode: its exit status, or minus the signal that killed it.
        stdout: its output; what is not UTF-8 is replaced.
        stderr: its messages, likewise.
    """

    returncode: int
    stdout: str
    stderr: str


def capture(
    argv: Sequence[str], env: Mapping[str, str], *, timeout_s: float, limit_bytes: int = LIMIT_BYTES
) -> Captured:
    """Runs a program to its end and returns its output. Blocking: call it in a worker thread.

    The program gets a session of its own and no input. It is killed when `timeout_s` is over or when both
    streams together exceed `limit_bytes`; what it leaves in its process group is killed in any case.

    Raises:
        OSError: the program could not be started; nothing is left behind.
        BinaryError: it did not end in time, or said too much.
    """
    process = subprocess.Popen(
        list(argv),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        outputs = _read(process, " ".join(argv), timeout_s, limit_bytes)
    finally:
        # Not reaped yet, so that the pid and its group are still the program's own.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_REAP_S)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    stdout, stderr = (bytes(output).decode(errors="replace") for output in outputs)
    return Captured(process.returncode, stdout, stderr)


def _read(
    process: subprocess.Popen[bytes], command: str, timeout_s: float, limit_bytes: int
) -> tuple[bytearray, bytearray]:
    """Both streams until the program has ended: what it left running may hold them open for longer."""
    deadline = time.monotonic() + timeout_s
    outputs = bytearray(), bytearray()
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ)
            for pipe, output in zip((process.stdout, process.stderr), outputs, strict=True):
                if pipe is not None:
                    os.set_blocking(pipe.fileno(), False)
                    selector.register(pipe.fileno(), selectors.EVENT_READ, output)
            has_ended = False
            while not has_ended:
                _check_cancelled()
                ready = selector.select(min(_CANCEL_POLL_S, max(0.0, deadline - time.monotonic())))
                if not ready and time.monotonic() >= deadline:
                    raise BinaryError(
                        f"{command} did not end within {timeout_s:g} s", hint="Run it by hand to see why."
                    )
                has_ended = any(key.data is None for key, _ in ready)
                for key in list(selector.get_map().values()) if has_ended else [key for key, _ in ready]:
                    if key.data is not None and not _drain(key.fd, key.data, limit_bytes):
                        selector.unregister(key.fd)
                if sum(map(len, outputs)) > limit_bytes:
                    raise BinaryError(f"{command} printed more than {limit_bytes} bytes")
    finally:
        os.close(pidfd)
    return outputs


def _check_cancelled() -> None:
    """Give up when the task that waits for this worker thread was cancelled: the daemon must not wait for a probe."""
    with suppress(NoEventLoopError):  # outside a worker thread there is nobody to cancel us
        from_thread.check_cancelled()


def _drain(fd: int, output: bytearray, limit_bytes: int) -> bool:
    """Takes what the pipe holds now, up to a little over the limit; False once it is at its end."""
    while len(output) <= limit_bytes:
        try:
            chunk = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        output += chunk
    return True
