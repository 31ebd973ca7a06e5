"""F1 to F15: what happens to files and folders, injected for real on a real file system, with the real llama-server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest

from fakes.waiting import PATIENCE_S, eventually
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

pytestmark = pytest.mark.real


@pytest.fixture
def daemon(tmp_path: Path, models_dir: Path, llama_server: Path) -> Iterator[RunningDaemon]:
    """A daemon with three models."""
    with RunningDaemon(tmp_path, models_dir, llama_server) as running:
        running.wait_for_router("ready")
        yield running


def model_bytes(folder: Path, *words: str, **how: int) -> bytes:
    """The content of a model that says these words."""
    path = folder / ".draft.gguf"
    write_tiny_model(path, list(words), **how)
    content = path.read_bytes()
    path.unlink()
    return content


def state_of(daemon: RunningDaemon, name: str) -> str | None:
    """What the list of models says of one, None when it is not in there."""
    model = daemon.models().get(name)
    return None if model is None else str(model["state"])


def problem_of(daemon: RunningDaemon, name: str) -> str:
    """What is wrong with a model."""
    return str(daemon.models()[name]["problem"])


def served_by_the_router(daemon: RunningDaemon) -> set[str]:
    """What any client sees in the router's own list."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", "/v1/models")
        return {model["id"] for model in json.load(connection.getresponse())["data"]}


def worker_of(daemon: RunningDaemon) -> psutil.Process:
    """The process that looks at the models folder."""
    found = [process for process in daemon.processes() if "llamavisor.watch.worker" in process.cmdline()]
    assert len(found) == 1, found
    return found[0]


def pid_of(daemon: RunningDaemon, name: str) -> int:
    """The process of a loaded model."""
    return int(eventually(lambda: daemon.model(name)["pid"], what=f"the pid of {name}"))


def test_f1_a_slow_copy_with_a_stall(daemon: RunningDaemon, models_dir: Path, tmp_path: Path) -> None:
    """F1: a file that is being written is not offered, be it that its copy stalls; it is once it is whole and still."""
    content = model_bytes(tmp_path, "I", "am", "slow")
    with (models_dir / "slow.gguf").open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        eventually(lambda: state_of(daemon, "slow") == "settling", what="a file that is settling")
        eventually(lambda: state_of(daemon, "slow") == "invalid", what="a copy that has stalled")
        assert f"of at least {len(content)} bytes" in problem_of(daemon, "slow")
        assert "slow" not in served_by_the_router(daemon)
        refused = daemon.cli("load", "slow")
        assert refused.returncode == 3
        assert "invalid" in refused.stderr
        for at in range(len(content) // 2, len(content), len(content) // 8):
            file.write(content[at : at + len(content) // 8])
            file.flush()
            assert "slow" not in served_by_the_router(daemon)
    daemon.wait_for_model("slow", "unloaded")
    assert daemon.chat("slow") == "I am slow"
    assert daemon.events("ModelAdded")[-1]["wait_s"] >= 2


def test_f1_a_preallocated_copy(daemon: RunningDaemon, models_dir: Path, tmp_path: Path) -> None:
    """F1: a copy that has its full size from the beginning is settling while blocks of it are missing."""
    content = model_bytes(tmp_path, "I", "am", "full")
    path = models_dir / "full.gguf"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        file.write(content[: len(content) // 2])
        file.flush()
        eventually(lambda: "missing" in (daemon.models().get("full") or {}).get("problem", ""), what="a hole is seen")
        assert state_of(daemon, "full") == "settling"
        file.write(content[len(content) // 2 :])
    daemon.wait_for_model("full", "unloaded")
    assert daemon.chat("full") == "I am full"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GGML" + bytes(range(1, 65)), "gguf"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1 << 62) + bytes(64), "tensor"),
        (b"GGUF" + struct.pack("<IQQ", 1, 1, 1) + bytes(64), "version"),
        (b"", "empty"),
    ],
    ids=["bad magic", "absurd count", "old version", "empty"],
)
def test_f2_junk(daemon: RunningDaemon, models_dir: Path, content: bytes, reason: str) -> None:
    """F2: what is no GGUF file is invalid with the reason, never offered, and harms nobody."""
    (models_dir / "junk.gguf").write_bytes(content)
    daemon.wait_for_model("junk", "invalid")
    assert reason in problem_of(daemon, "junk").lower()
    assert served_by_the_router(daemon) == {"alpha", "beta", "gamma"}
    assert daemon.chat("alpha") == "I am alpha"


def test_f3_replaced_by_rename_while_loaded(daemon: RunningDaemon, models_dir: Path) -> None:
    """F3: a loaded model whose file is replaced is loaded anew when it is idle; another one is not disturbed."""
    for name in ("alpha", "beta"):
        assert daemon.cli("load", name).returncode == 0
    other = pid_of(daemon, "beta")
    write_tiny_model(models_dir / "alpha.gguf", ["something", "new"])
    stale = daemon.wait_for_event("ModelStale", lambda event: event["change"] == "replaced")
    assert stale["model"] == "alpha"
    daemon.wait_for_event("ModelLoaded", lambda event: event["model"] == "alpha" and event["id"] > stale["id"])
    assert daemon.chat("alpha") == "something new"
    assert pid_of(daemon, "beta") == other
    assert daemon.router()["restarts"] == 0


def test_f4_cut_off_in_place_while_loaded(daemon: RunningDaemon, models_dir: Path) -> None:
    """F4: a file that is cut off under a running model crashes it; that is told as what it is, and others serve on."""
    for name in ("alpha", "beta"):
        assert daemon.cli("load", name).returncode == 0
    os.truncate(models_dir / "alpha.gguf", 4096)
    with suppress(AssertionError, OSError, HTTPException):  # whatever a client gets from a process that has died
        daemon.chat("alpha")
    unloaded = daemon.wait_for_event("ModelUnloaded", lambda event: event["model"] == "alpha")
    assert unloaded["reason"] == "file_changed"
    daemon.wait_for_model("alpha", "invalid")
    assert daemon.chat("beta") == "I am beta"
    assert daemon.router()["restarts"] == 0


def test_f5_overwritten_in_place_while_loaded(daemon: RunningDaemon, models_dir: Path, tmp_path: Path) -> None:
    """F5: a file that is written over under a running model is warned about, and the model loaded anew when idle."""
    assert daemon.cli("load", "alpha").returncode == 0
    content = model_bytes(tmp_path, "I", "is", "alpha")
    with (models_dir / "alpha.gguf").open("r+b") as file:
        file.write(content)
    stale = daemon.wait_for_event("ModelStale", lambda event: event["change"] == "overwritten")
    assert "in place" in stale["message"]
    daemon.wait_for_event("ModelLoaded", lambda event: event["model"] == "alpha" and event["id"] > stale["id"])
    assert daemon.chat("alpha") == "I is alpha"


def test_f6_deleted_while_loaded(daemon: RunningDaemon, models_dir: Path) -> None:
    """F6: a loaded model without its file serves through reloads and new files, and is gone once it is unloaded."""
    assert daemon.cli("load", "alpha").returncode == 0
    child = pid_of(daemon, "alpha")
    (models_dir / "alpha.gguf").unlink()
    eventually(lambda: daemon.model("alpha")["file_state"] == "gone", what="the catalog's word")
    assert daemon.cli("reload").returncode == 0
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    daemon.wait_for_model("delta", "unloaded")
    assert daemon.chat("alpha") == "I am alpha"
    assert pid_of(daemon, "alpha") == child
    assert daemon.cli("unload", "alpha").returncode == 0
    eventually(lambda: "alpha" not in served_by_the_router(daemon), what="a router without the model")
    assert daemon.cli("load", "alpha").returncode == 3


def test_f7_the_folder_goes_and_comes_back(daemon: RunningDaemon, models_dir: Path, tmp_path: Path) -> None:
    """F7: without its folder the daemon serves on and keeps what it knew; made anew, the folder is watched again."""
    assert daemon.cli("load", "alpha").returncode == 0
    away = tmp_path / "away"
    models_dir.rename(away)
    daemon.wait_for_event("FolderStale")
    assert daemon.chat("alpha") == "I am alpha"
    assert set(daemon.models()) == {"alpha", "beta", "gamma"}
    assert any(str(models_dir) in warning for warning in daemon.status()["warnings"])
    away.rename(models_dir)
    daemon.wait_for_event("FolderBack")
    shutil.rmtree(models_dir)
    models_dir.mkdir()
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    daemon.wait_for_model("delta", "unloaded")
    assert daemon.chat("delta") == "I am delta"
    assert daemon.chat("alpha") == "I am alpha"


def test_f7_an_emptied_folder_is_not_believed_at_once(daemon: RunningDaemon, models_dir: Path, tmp_path: Path) -> None:
    """F7: when everything vanishes in one look, nothing is dropped; it is when a second look says the same."""
    away = tmp_path / "away"
    away.mkdir()
    for path in models_dir.iterdir():
        path.rename(away / path.name)
    daemon.wait_for_event("FolderStale")
    assert daemon.events("ModelRemoved") == []
    eventually(lambda: len(daemon.events("ModelRemoved")) == 3, what="three models that are believed to be gone")


def test_f8_links(tmp_path: Path, models_dir: Path, llama_server: Path) -> None:
    """F8: loops and dangling links are walked past, no file is served twice, and what leads outside must be allowed."""
    outside, allowed = tmp_path / "outside", tmp_path / "allowed"
    for folder in (outside, allowed):
        folder.mkdir()
        write_tiny_model(folder / f"{folder.name}.gguf", ["I", "am", folder.name])
        (models_dir / f"{folder.name}.gguf").symlink_to(folder / f"{folder.name}.gguf")
    (models_dir / "loop").symlink_to(models_dir)
    (models_dir / "self.gguf").symlink_to("self.gguf")
    (models_dir / "dangling.gguf").symlink_to("nowhere.gguf")
    (models_dir / "twice.gguf").symlink_to("alpha.gguf")
    config = f'models_dir = "{models_dir}"\nlink_dirs = ["{allowed}"]\nport = %d\n[metrics]\nenabled = false\n'
    config += "[defaults]\nthreads = 1\n"
    daemon = RunningDaemon(tmp_path, models_dir, llama_server, config="")
    daemon.config.write_text(config % daemon.port, encoding="utf-8")
    with daemon:
        daemon.wait_for_router("ready")
        assert served_by_the_router(daemon) == {"alpha", "beta", "gamma", "allowed"}
        assert daemon.chat("allowed") == "I am allowed"
        assert "link_dirs" in problem_of(daemon, "outside")
        assert "alpha" in problem_of(daemon, "twice")


def test_f9_names(daemon: RunningDaemon, models_dir: Path) -> None:
    """F9: whatever files are called, nothing hangs, no name becomes a flag, and the watch goes on afterwards."""
    names = [
        b"latin-\xe9.gguf",
        b"two\nlines.gguf",
        b"--no-mmap.gguf",
        b"n" * 250 + b".gguf",
        "🦙 é.gguf".encode(),
        b"..gguf",
        b"a#b.gguf",
        b"a]b.gguf",
    ]
    whole = (models_dir / "alpha.gguf").read_bytes()
    for at, name in enumerate(names):
        path = os.path.join(os.fsencode(models_dir), name)
        with open(path, "wb") as file:
            file.write(whole + bytes(at))
    eventually(lambda: "🦙 é" in served_by_the_router(daemon), what="the llama")
    assert daemon.chat("🦙 é") == "I am alpha"
    assert served_by_the_router(daemon) == {"alpha", "beta", "gamma", "🦙 é", "n" * 250}
    listed = daemon.cli("models").stdout
    assert "latin-\\udce9" in listed
    assert "two\\nlines" in listed
    assert len([model for model in daemon.models().values() if model["state"] == "invalid"]) >= 5
    assert daemon.cli("show", "🦙 é").returncode == 0
    write_tiny_model(models_dir / "after.gguf", ["I", "am", "after"])
    daemon.wait_for_model("after", "unloaded")
    assert daemon.chat("after") == "I am after"
    assert daemon.router()["restarts"] == 0


def test_f10_a_missing_part(daemon: RunningDaemon, models_dir: Path, tmp_path: Path, llama_server: Path) -> None:
    """F10: a split model is incomplete with the name of the missing part, and served when that has come."""
    split = llama_server.with_name("llama-gguf-split")
    write_tiny_model(tmp_path / "whole.gguf", ["in", "three", "parts"])
    subprocess.run(
        [split, "--split", "--split-max-tensors", "5", tmp_path / "whole.gguf", tmp_path / "big"],
        check=True,
        capture_output=True,
    )
    parts = sorted(tmp_path.glob("big-*.gguf"))
    assert len(parts) == 3
    for part in (parts[0], parts[2]):
        part.rename(models_dir / part.name)
    daemon.wait_for_model("big", "incomplete")
    assert parts[1].name in problem_of(daemon, "big")
    assert "big" not in served_by_the_router(daemon)
    parts[1].rename(models_dir / parts[1].name)
    daemon.wait_for_model("big", "unloaded")
    assert daemon.chat("big") == "in three parts"


def test_f11_no_permission(models_dir: Path) -> None:
    """F11: a file and a folder that may not be read are told, and the others are found."""
    (models_dir / "secret.gguf").write_bytes((models_dir / "alpha.gguf").read_bytes())
    (models_dir / "secret.gguf").chmod(0)
    (models_dir / "closed").mkdir(mode=0)
    # As root permissions cannot fail: the look is taken by nobody, who is let in through open descriptors.
    code = (
        "import os, sys\n"
        "from llamavisor.catalog.scanner import Scanner\n"
        "os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for entry in Scanner('/proc/self/cwd').scan().changed: print(entry.name, entry.state.value, entry.reason)\n"
    )
    models_dir.chmod(0o755)
    told = subprocess.run([sys.executable, "-c", code, models_dir], capture_output=True, text=True, check=True).stdout
    (models_dir / "closed").chmod(0o700)
    lines = {line.split()[0]: line for line in told.splitlines()}
    assert [lines[name].split()[1] for name in ("alpha", "beta", "gamma")] == ["ready"] * 3
    assert "secret invalid" in lines["secret"]
    assert "ermission" in lines["secret"]
    assert any("closed" in line and "ermission" in line for line in lines.values())


@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_f12_no_inotify(tmp_path: Path, models_dir: Path, llama_server: Path, limit: str) -> None:
    """F12: where the kernel gives no watch, the folder is polled, with one warning and a metric."""
    daemon = RunningDaemon(tmp_path, models_dir, llama_server)
    script = f'echo 0 > /proc/sys/user/{limit}; exec "$@"'
    daemon.launcher = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"]
    with daemon:
        daemon.wait_for_router("ready")
        daemon.wait_for_event("WatcherChanged")
        write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
        daemon.wait_for_model("delta", "unloaded")
        assert daemon.chat("delta") == "I am delta"
        changed = daemon.events("WatcherChanged")
        assert [event["mode"] for event in changed] == ["polling"]
        assert f'llamavisor_watcher_mode{{folder="{models_dir}",mode="polling"}} 1.0' in daemon.metrics()


def test_f13_thousands_of_files_at_once(daemon: RunningDaemon, models_dir: Path, tmp_path: Path) -> None:
    """F13: two thousand files dropped at once are told to the router in few reloads, and commands are answered."""
    heap = tmp_path / "heap"
    heap.mkdir()
    whole = (models_dir / "alpha.gguf").read_bytes()
    for at in range(2000):
        (heap / f"m{at}.gguf").write_bytes(whole)
    time.sleep(0.1)  # the kernel's clock for files must have ticked before they are moved
    for path in heap.iterdir():
        path.rename(models_dir / path.name)
        if path.name.endswith("99.gguf"):
            assert daemon.status()["ready"]
    eventually(lambda: len(served_by_the_router(daemon)) == 2003, what="two thousand models")
    log = Path(daemon.router()["log_file"]).read_text(encoding="utf-8")
    reads = log.count("Available models (")
    assert 1 < reads < 20, "the router says so each time that it has read its preset"
    assert daemon.chat("m1234") == "I am alpha"


def test_f14_a_folder_that_hangs(daemon: RunningDaemon, models_dir: Path) -> None:
    """F14: a worker that hangs costs fresh news of its folder and nothing else; the daemon still ends in time."""
    worker = worker_of(daemon)
    os.kill(worker.pid, signal.SIGSTOP)
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    assert daemon.chat("alpha") == "I am alpha"
    assert daemon.cli("unload", "alpha").returncode == 0
    assert daemon.cli("restart").returncode == 0
    assert set(daemon.models()) == {"alpha", "beta", "gamma"}
    assert "delta" not in served_by_the_router(daemon)
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < 10


def test_f14_a_worker_that_hangs_for_a_while(daemon: RunningDaemon, models_dir: Path) -> None:
    """F14: once the folder answers again, what was missed is seen."""
    worker = worker_of(daemon)
    os.kill(worker.pid, signal.SIGSTOP)
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    assert daemon.status()["ready"]
    os.kill(worker.pid, signal.SIGCONT)
    daemon.wait_for_model("delta", "unloaded")
    assert worker_of(daemon).pid == worker.pid


def test_f14_a_worker_that_dies(daemon: RunningDaemon, models_dir: Path) -> None:
    """A worker that is killed is replaced, told, and misses nothing."""
    os.kill(worker_of(daemon).pid, signal.SIGKILL)
    daemon.wait_for_event("WatcherFailed")
    write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
    daemon.wait_for_model("delta", "unloaded")
    assert daemon.events("ModelRemoved") == []


def test_f15_a_router_that_does_not_hear_of_an_end(daemon: RunningDaemon, models_dir: Path) -> None:
    """F15: a killed model whose output somebody else holds is "loaded" for its router for ever: that is restarted."""
    for name in ("alpha", "beta"):
        assert daemon.cli("load", name).returncode == 0
    child, router = pid_of(daemon, "alpha"), daemon.router()["pid"]
    with open(f"/proc/{child}/fd/2", "wb", buffering=0):
        os.kill(child, signal.SIGKILL)
        daemon.wait_for_event("RouterDegraded", lambda event: "alpha has ended" in event["reason"])
        eventually(lambda: daemon.router()["pid"] not in {None, router}, what="a fresh router")
        daemon.wait_for_router("ready")
    for name in ("alpha", "beta"):
        daemon.wait_for_model(name, "loaded")
        assert daemon.chat(name) == f"I am {name}"
    assert daemon.router()["restarts"] == 1
    assert models_dir.is_dir()
