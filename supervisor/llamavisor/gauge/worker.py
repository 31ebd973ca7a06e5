"""The process that asks GPU drivers, and the only one that ever does.

A driver that hangs holds whoever asks it inside the kernel, where not even SIGKILL reaches; a process with one thread
there does not end. NVML is also a foreign library, which may crash, and which goes stale when the driver is replaced.
Here all that happens to a process that can be killed, left behind and started anew, and not to the daemon.

Started as `python -P -m llamavisor.gauge.worker KIND ROOT`; ends when the daemon does, or closes the pipe.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from llamavisor.gauge.amd import find_amd, read_amd
from llamavisor.gauge.device import Reading
from llamavisor.gauge.nvidia import AbsentError, NvidiaReader, Nvml
from llamavisor.gauge.wire import Answer, decode_question, encode_answer

_PR_SET_PDEATHSIG = 1
Read = Callable[[float], tuple[Sequence[Reading], str]]
"""Given a time: the readings, and which devices are missing among them; see `NvidiaReader.read`."""


def answer(number: int, read: Read) -> Answer:
    """Read the devices; whatever goes wrong becomes the answer."""
    try:
        readings, failure = read(0.0)
        return Answer(number, tuple(readings), failure)
    except AbsentError as exc:
        return Answer(number, failure=str(exc), is_absent=True)
    except Exception as exc:  # noqa: BLE001 (a foreign library; what it raises is an answer like any other)
        return Answer(number, failure=str(exc) or type(exc).__name__)


def reader(kind: str, root: Path) -> Read:
    """What reads devices of this kind."""
    if kind == "amd":
        return lambda at: _read_amd(root, at)
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return _no_nvml
    return NvidiaReader(cast("Nvml", nvml)).read


def _read_amd(root: Path, at: float) -> tuple[Sequence[Reading], str]:
    if not find_amd(root):
        raise AbsentError("there is no AMD GPU")
    return read_amd(root, at), ""


def _no_nvml(_at: float) -> tuple[Sequence[Reading], str]:
    raise AbsentError("pynvml is not installed")


def main() -> None:
    """Be the worker."""
    # Only the end of the daemon ends this process: by this signal, or by the end of the pipe if it came before.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the daemon when a group gets them
        signal.signal(ignored, signal.SIG_IGN)
    writing = os.dup(1)
    os.dup2(2, 1)  # a stray print of a foreign library must not end up between two answers
    read = reader(sys.argv[1], Path(sys.argv[2]))
    with os.fdopen(0, "rb") as questions, os.fdopen(writing, "wb") as answers:
        for line in questions:
            number = decode_question(line)
            if number is None:
                return
            try:
                answers.write(encode_answer(answer(number, read)))
                answers.flush()
            except OSError:  # the daemon has gone
                return


if __name__ == "__main__":
    main()
