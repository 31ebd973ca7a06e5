"""What llama.cpp itself says of GGUF files: its own reader, called in a process that may die of them.

Run as a program, it is that process: the reader's library is its argument, paths come in and verdicts go out, one
JSON text to a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


class Verdicts:
    """Asks llama.cpp for its verdicts; a process that a file has killed is replaced."""

    def __init__(self, library: Path) -> None:
        self._argv = [sys.executable, "-I", "-S", __file__, str(library)]
        self._child: subprocess.Popen[str] | None = None

    def __repr__(self) -> str:
        return f"<Verdicts {self._child and self._child.pid}>"

    def ask(self, path: Path) -> dict[str, int] | None:
        """How many values and tensors a file has and where their data begins; None when it is refused."""
        if self._child is None:
            self._child = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        self._child.stdin.write(f"{json.dumps(os.fspath(path))}\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:  # an assertion in llama.cpp has ended it, which is a refusal too
            self.close()
            return None
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.communicate()
            self._child = None


@contextlib.contextmanager
def verdicts_of(llama_server: Path) -> Iterator[Verdicts | None]:
    """The verdicts of the library beside a llama-server, None when it is linked into the program."""
    library = llama_server.with_name("libggml-base.so")
    if not library.exists():
        yield None
        return
    verdicts = Verdicts(library)
    try:
        yield verdicts
    finally:
        verdicts.close()


class _Params(ctypes.Structure):
    """`gguf_init_params` of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _answer(library: str) -> None:
    ggml = ctypes.CDLL(library)
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Params]
    for name in ("gguf_get_n_kv", "gguf_get_n_tensors", "gguf_get_data_offset", "gguf_free"):
        getattr(ggml, name).argtypes = [ctypes.c_void_p]
        getattr(ggml, name).restype = ctypes.c_int64
    for line in sys.stdin:
        gguf = ggml.gguf_init_from_file(os.fsencode(json.loads(line)), _Params(no_alloc=True, ctx=None))
        verdict = gguf and {
            "values": ggml.gguf_get_n_kv(gguf),
            "tensors": ggml.gguf_get_n_tensors(gguf),
            "data_offset": ggml.gguf_get_data_offset(gguf),
        }
        if gguf:
            ggml.gguf_free(gguf)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    _answer(sys.argv[1])
