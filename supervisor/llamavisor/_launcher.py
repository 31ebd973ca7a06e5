"""Runs between our fork and llama-server: sets what a process can only set for itself, then becomes llama-server.

Started as `python -I -S _launcher.py PARENT_PID ERROR_FD PROGRAM ARGUMENT...`. A preexec hook could do the same, but it
runs Python between fork and exec in a copy of a program with threads, which may deadlock.

- The parent-death signal: when the daemon dies, however it dies, llama-server gets SIGTERM.
- No core dumps: a crashing child stays "loaded" until its dump is written (RLIMIT_CORE alone does not hold for a dump
  that is piped to a program, hence the filter).
- An error of execve goes back through ERROR_FD as its number; the descriptor closes by itself when execve succeeds.
"""

import _signal  # type: ignore[import-not-found] # without the enums of `signal`, which take 3 ms of every restart
import ctypes
import os
import resource
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Prepare this process and replace it by the program."""
    parent, error_fd, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(error_fd, False)
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the daemon died before the signal was armed
            os._exit(0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            with open("/proc/self/coredump_filter", "wb", buffering=0) as file:  # noqa: PTH123
                file.write(b"0")
        except OSError:
            pass  # a kernel without core dumps has no filter either
        for ignored in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores these, and execve would pass that on
            _signal.signal(ignored, _signal.SIG_DFL)
        os.execve(program[0], program, os.environ)  # noqa: S606
    except OSError as error:
        os.write(error_fd, str(error.errno).encode("ascii"))
        os._exit(127)


if __name__ == "__main__":
    main()
