"""A module `pynvml` for processes that ask NVIDIA's driver: one card, and every way in which a driver fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_MODULE = """
import os
class NVMLError(Exception): pass
class NVMLError_NotSupported(NVMLError): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class Answer:
    def __init__(self, **fields): self.__dict__.update(fields)
HERE = os.path.dirname(__file__)
def do(what):
    return os.path.exists(os.path.join(HERE, what))
def nvmlInit():
    if do("absent"): raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetPciInfo(handle): return Answer(busId="00000000:01:00.0")
def nvmlDeviceGetUUID(handle): return "GPU-1111"
def nvmlDeviceGetName(handle): return "NVIDIA GeForce RTX 3090"
def nvmlDeviceGetMigMode(handle): raise NVMLError_NotSupported("Not Supported")
def nvmlDeviceGetMemoryInfo(handle):
    os.write(1, b"a foreign library may print\\n")
    if do("crash"): os.abort()
    if do("raise"): raise TypeError("not an NVMLError")
    if do("hang"): open(os.path.join(HERE, "hang")).read()
    return Answer(total=24 << 30, used=5 << 30, free=18 << 30)
def nvmlDeviceGetComputeRunningProcesses(handle): return [Answer(pid=7, usedGpuMemory=1 << 30)]
def nvmlDeviceGetGraphicsRunningProcesses(handle): raise NVMLError_NotSupported("Not Supported")
"""


class FakeNvml:
    """A folder with the module in it, to be put on PYTHONPATH. It works until it is told to fail.

    Args:
        folder: where it goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "pynvml.py").write_text(_MODULE, encoding="utf-8")

    def __repr__(self) -> str:
        return f"<FakeNvml {sorted(path.name for path in self.folder.iterdir())}>"

    def fails(self, how: Literal["absent", "crash", "raise", "hang"]) -> None:
        """Fail from now on: there is no driver, it kills who asks, raises what is no NVMLError, or never answers."""
        if how == "hang":
            os.mkfifo(self.folder / how)
        else:
            (self.folder / how).touch()

    def works(self) -> None:
        """Work again; who hangs has his answer."""
        for path in self.folder.iterdir():
            if path.is_fifo():
                fifo = os.open(path, os.O_RDWR)  # who waits for a writer sees one, and then the end of it
                path.unlink()
                os.close(fifo)
            elif path.suffix != ".py" and path.is_file():
                path.unlink()
