"""How soon a new file is servable, and what a folder of ten thousand files costs."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from gguf_header import large_model
from report import Row, median_s, ms, timed_s

from fakes.waiting import eventually
from llamavisor.catalog import EntryState
from llamavisor.catalog.scanner import Scanner
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

RUNS = 7
ASK_S = 0.01
RENAMED_S = 0.5
WRITTEN_S = 3.0
WRITE_S = 1.0
"""How long the slow writer takes."""
SIZES = (1_000, 3_000, 10_000)
FIRST_S, AGAIN_S = 5.0, 0.5
CACHED_S = 0.001
LATENCY_S = 0.1


def measure(folder: Path, llama_server: Path) -> Iterator[Row]:
    """From a file to an answer, then looks at large folders.

    Args:
        folder: a place for files, on a local file system; 1.5 GB.
        llama_server: the real one.
    """
    for what, put, allowed_s in (
        ("file renamed in to first chat, beyond its load", renamed, RENAMED_S),
        ("last byte of a slow copy to first chat, likewise", slowly_written, WRITTEN_S),
    ):
        seconds = statistics.median(servable_s(folder / put.__name__, llama_server, put))
        yield Row(what, ms(seconds), "", ms(allowed_s), seconds < allowed_s)
    yield from scans(folder / "scans")
    yield latency(folder / "drop", llama_server)


def servable_s(folder: Path, llama_server: Path, put: Callable[[Path], float]) -> Iterator[float]:
    """Seconds from a file's being complete to its first answer, less the time of its load, for several files."""
    models = folder / "models"
    models.mkdir(parents=True)
    with RunningDaemon(folder, models, llama_server) as daemon:
        daemon.wait_for_router("ready")
        for run in range(RUNS):
            name = f"model{run}"
            complete = put(models / f"{name}.gguf")
            while not answers(daemon.port, name):
                time.sleep(ASK_S)
            total = time.time() - complete
            loaded = daemon.wait_for_event("ModelLoaded", lambda event: event["model"] == name)  # noqa: B023
            yield total - (loaded["load_s"] or 0.0)


def renamed(path: Path) -> float:
    """Write the file elsewhere on the disk, and rename it to where it belongs."""
    draft = path.parents[1] / path.name
    write_tiny_model(draft, ["hello"])
    time.sleep(0.1)
    began = time.time()
    draft.rename(path)
    return began


def slowly_written(path: Path) -> float:
    """Write the file where it belongs, in pieces."""
    draft = path.parents[1] / path.name
    write_tiny_model(draft, ["hello"])
    content = draft.read_bytes()
    with path.open("wb") as file:
        for at in range(0, len(content), len(content) // 10):
            file.write(content[at : at + len(content) // 10])
            file.flush()
            time.sleep(WRITE_S / 10)
    return path.stat().st_mtime


def answers(port: int, model: str) -> bool:
    """Whether a chat with the model succeeds."""
    body = json.dumps({"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]})
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False


def scans(folder: Path) -> Iterator[Row]:
    """Looks at folders of rising size; a yardstick is what the size before took, scaled to this one."""
    per_file: dict[str, float] = {}
    folder.mkdir()
    write_tiny_model(folder / "tiny.gguf", ["tiny"])
    tiny = (folder / "tiny.gguf").read_bytes()
    for count in SIZES:
        models = folder / str(count)
        models.mkdir()
        for at in range(count):
            (models / f"m{at}.gguf").write_bytes(tiny)
        scanner = Scanner(str(models), wall=lambda: time.time() + 3600)  # files that have been there for long
        first, again = timed_s(scanner.scan), median_s(scanner.scan, runs=5)
        assert sum(entry.state is EntryState.READY for entry in scanner.entries) == count
        for what, seconds, most in (("first", first, FIRST_S), ("unchanged", again, AGAIN_S)):
            scaled = ms(per_file[what] * count) if what in per_file else ""
            per_file[what] = seconds / count
            allowed = most * count / SIZES[-1]
            yield Row(f"{what} look at {count:,} files", ms(seconds), scaled, ms(allowed), seconds < allowed)
    big = folder / "big"
    big.mkdir()
    (big / "big.gguf").write_bytes(large_model().encode())
    scanner = Scanner(str(big), wall=lambda: time.time() + 3600)
    scanner.scan()
    cached = median_s(scanner.scan)
    yield Row(
        "unchanged look at one file with 128k tokens", f"{cached * 1e3:.2f} ms", "", ms(CACHED_S), cached < CACHED_S
    )


def latency(folder: Path, llama_server: Path) -> Row:
    """The longest answer of the control socket while ten thousand files are dropped and told to the router."""
    models, heap = folder / "models", folder / "heap"
    for each in (models, heap):
        each.mkdir(parents=True)
    write_tiny_model(heap / "m.gguf", ["tiny"])
    tiny = (heap / "m.gguf").read_bytes()
    for at in range(SIZES[-1]):
        (heap / f"m{at}.gguf").write_bytes(tiny)
    times: list[float] = []
    is_over = threading.Event()
    with RunningDaemon(folder, models, llama_server) as daemon:
        daemon.wait_for_router("ready")

        def ask() -> None:
            while not is_over.is_set():
                times.append(timed_s(lambda: daemon.call("GET", "/livez")))
                time.sleep(ASK_S)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for path in sorted(heap.iterdir()):
                os.rename(path, models / path.name)
            eventually(lambda: len(daemon.models()) >= SIZES[-1], what="ten thousand models", within_s=60)
            time.sleep(1)
        finally:
            is_over.set()
            asking.join()
    longest = max(times)
    return Row("longest answer while 10,000 files are dropped", ms(longest), "", ms(LATENCY_S), longest < LATENCY_S)
