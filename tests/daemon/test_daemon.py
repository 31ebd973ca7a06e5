"""The whole daemon on a fake llama-server that fails as it is told: what only a misbehaving one can show."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import free_port
from fakes.builder import OLD_BUILD
from fakes.waiting import PATIENCE_S, eventually
from llamavisor.api import CONNECT_TIMEOUT_S
from llamavisord.control import HEARTBEAT_S
from llamavisord.tiny_model import write_tiny_model
from promtool import complaints
from running import RunningDaemon, UnixConnection, config_of, run_serve, start_with

Fake = Callable[..., FakeLlamaServer]
Start = Callable[..., RunningDaemon]


@contextmanager
def following(daemon: RunningDaemon, path: str) -> Iterator[HTTPResponse]:
    """A stream that has begun; hung up on at the end."""
    with closing(UnixConnection(daemon.socket)) as connection:
        connection.request("GET", path)
        with connection.getresponse() as stream:
            yield stream


def events_until(name: str, stream: HTTPResponse) -> list[str]:
    """The names of the events of a stream up to the first of this name."""
    heard: list[str] = []
    while name not in heard:
        line = stream.readline().decode()
        assert line, f"the stream ended before {name}"
        heard += [line.split()[1]] if line.startswith("event:") else []
    return heard


def raw_answer(daemon: RunningDaemon, request: bytes) -> bytes:
    """Everything that comes back until the daemon hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(daemon.socket))
        connection.sendall(request)
        pieces: list[bytes] = []
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                pieces.append(piece)
        return b"".join(pieces)


def is_watcher(pid: int) -> bool:
    """Whether a process looks at a models folder; such a one is there as long as the daemon is."""
    with suppress(psutil.Error):
        return "llamavisor.watch.worker" in psutil.Process(pid).cmdline()
    return False


# --- faults of the router ---------------------------------------------------------------------------------------------


def test_unknown_option_names_option_and_binary(start: Start, tmp_path: Path) -> None:
    """A typed option that this build does not know is told with its name, the binary, and what to do."""
    with start(flags=("--gpu-layers", "all"), missing_options=["--n-gpu-layers", "--gpu-layers", "-ngl"]) as daemon:
        failed = daemon.wait_for_router("failed")
        assert "gpu_layers" in failed["reason"]
        assert "fake0/llama-server" in failed["reason"]
        assert failed["hint"]


def test_replaced_binary_makes_way(start: Start, tmp_path: Path) -> None:
    """A llama-server that is replaced on disk loads nothing more, and is restarted once it holds no model."""
    with start(serve="router") as daemon:
        before = daemon.wait_for_router("ready")["pid"]
        assert daemon.cli("load", "alpha").returncode == 0
        FakeLlamaServer.make(tmp_path / "fake0")
        assert "replaced" in daemon.wait_for_router("degraded")["reason"]
        assert daemon.cli("load", "beta").returncode == 1
        assert daemon.model("alpha")["state"] == "loaded"
        assert daemon.cli("unload", "alpha").returncode == 0
        assert daemon.wait_for_router("ready")["pid"] != before
        assert 'llamavisor_router_restarts_total{reason="upgrade",router="main"} 1.0' in daemon.metrics()
        assert daemon.cli("load", "beta").returncode == 0


def test_replaced_binary_makes_way_at_once_behind_the_gateway(start: Start, tmp_path: Path) -> None:
    """Nobody is being answered, as is known there: it is restarted, and what was loaded is loaded again."""
    with start() as daemon:
        before = daemon.wait_for_router("ready")["pid"]
        assert daemon.cli("load", "alpha").returncode == 0
        FakeLlamaServer.make(tmp_path / "fake0")
        eventually(lambda: daemon.router()["pid"] not in {None, before}, what="a fresh process")
        daemon.wait_for_model("alpha", "loaded")
        assert 'llamavisor_router_restarts_total{reason="upgrade",router="main"} 1.0' in daemon.metrics()
        assert daemon.cli("load", "beta").returncode == 0


@pytest.mark.parametrize(("role", "reason"), [("", "not as a router")])
def test_single_model_server_is_refused(start: Start, role: str, reason: str) -> None:
    """What comes up but is not a router is not ours to use: it is ended and the router is FAILED."""
    with start(role=role) as daemon:
        assert reason in daemon.wait_for_router("failed")["reason"]
        watchers = {pid for pid in psutil.pids() if is_watcher(pid)}
        eventually(
            lambda: {process.pid for process in daemon.processes()} <= watchers, what="the end of the wrong server"
        )


def test_program_that_is_no_llama_server(tmp_path: Path, models_dir: Path) -> None:
    """A program that is something else altogether is FAILED with what to do, and is not started as a router."""
    with RunningDaemon(tmp_path, models_dir, "/bin/true", options=()) as daemon:
        failed = daemon.wait_for_router("failed")
        assert "/bin/true" in failed["reason"] or os.path.realpath("/bin/true") in failed["reason"]
        assert daemon.events("RouterSpawned") == []


# --- faults of models -------------------------------------------------------------------------------------------------


def test_build_without_events_is_polled(start: Start) -> None:
    """A build without the event stream is asked for its list instead: loads and ends are seen all the same."""
    with start(**OLD_BUILD) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        eventually(lambda: daemon.model("alpha")["pid"], what="the pid of the child")
        os.kill(daemon.model("alpha")["pid"], signal.SIGKILL)
        assert daemon.wait_for_event("ModelUnloaded")["reason"] == "crashed"


@pytest.mark.parametrize("status", [403, 501])
def test_refused_event_stream_is_polled(start: Start, status: int) -> None:
    """A router that refuses the event stream, for whatever reason, is asked for its list, and a warning says so."""
    with start(answers={"/models/sse": {"status": status, "body": "no"}}) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        assert f"({status})" in daemon.wait_for_event("Warned")["text"]


def test_failed_load_without_events(start: Start) -> None:
    """A load that fails between two looks at the list is told as failed, not waited for for ever."""
    with start(model={"load_failures": -1}, **OLD_BUILD) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 1
        assert daemon.model("alpha")["state"] == "failed"


def test_slow_load_shows_progress(start: Start) -> None:
    """A load that takes a while is shown with its progress, and is done when the router says loaded."""
    with start(model={"load_s": 1.0}) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.call("POST", "/control/v1/models/alpha/load")[0] == 202
        eventually(lambda: daemon.model("alpha")["progress"], what="some progress")
        assert daemon.model("alpha")["state"] == "loading"
        assert daemon.cli("load", "alpha").returncode == 0
        assert len(daemon.events("ModelLoading")) == 1


def test_unload_cancels_a_load(start: Start) -> None:
    """A load that is not wanted any more is cancelled by an unload, and whoever waited for it is told."""
    with start(model={"load_stalls": True}) as daemon:
        daemon.wait_for_router("ready")
        daemon.call("POST", "/control/v1/models/alpha/load")
        daemon.wait_for_model("alpha", "loading")
        assert daemon.cli("unload", "alpha").returncode == 0
        assert daemon.model("alpha")["state"] == "unloaded"


def test_model_that_had_served_comes_back(start: Start) -> None:
    """A model that crashes after having served for ten seconds is loaded again before anybody asks for it."""
    with start(model={"exit_after_s": 10.5}) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        eventually(lambda: len(daemon.events("ModelLoaded")) == 2, what="a second load")
        assert daemon.events("ModelUnloaded")[0]["reason"] == "crashed"


def test_a_file_that_was_just_copied_is_loaded(start: Start, models_dir: Path) -> None:
    """`cp x.gguf DIR && llamavisor load x` is what people write: the file is seen, and waited for."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        write_tiny_model(models_dir / "fresh.gguf", ["I", "am", "fresh"])
        told = daemon.cli("load", "fresh")
        assert (told.returncode, told.stdout) == (0, "fresh: loaded (router main)\n")
        (models_dir / "junk.gguf").write_bytes(b"junk" * 1000)
        told = daemon.cli("load", "junk")
        assert told.returncode == 3
        assert "model junk is invalid" in told.stderr


def test_a_new_file_is_served_without_anybody_asking(start: Start, models_dir: Path) -> None:
    """A file that is put into the folder can be loaded soon after, and what is loaded stays where it is."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        child = daemon.model("alpha")["pid"]
        write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
        added = daemon.wait_for_event("ModelAdded", lambda event: event["model"] == "delta")
        assert 0 < added["wait_s"] < PATIENCE_S
        assert daemon.cli("load", "delta").returncode == 0
        assert daemon.model("alpha")["pid"] == child
        assert 'llamavisor_model_servable_seconds_count{router="main"} 1.0' in daemon.metrics()


def test_after_a_reload_what_is_new_is_listed(start: Start, models_dir: Path) -> None:
    """`llamavisor reload` looks at the folder itself, and comes back when its routers know what is there."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        for name in ("delta", "epsilon"):
            write_tiny_model(models_dir / f"{name}.gguf", ["I", "am", name])
            assert daemon.cli("reload").returncode == 0
            assert daemon.model(name)["router"] == "main"


def test_a_broken_file_is_told_and_harms_nobody(start: Start, models_dir: Path) -> None:
    """It is listed with what is wrong with it, cannot be loaded for that reason, and goes with its file."""
    (models_dir / "junk.gguf").write_bytes(b"junk" * 1000)
    old = time.time() - 100
    os.utime(models_dir / "junk.gguf", (old, old))
    with start() as daemon:
        daemon.wait_for_router("ready")
        junk = daemon.model("junk")
        assert (junk["state"], junk["router"], junk["file_state"]) == ("invalid", None, "invalid")
        assert junk["problem"]
        status, problem = daemon.call("POST", "/control/v1/models/junk/load")
        assert (status, problem["code"]) == (404, "model_not_found")
        assert junk["problem"] in problem["detail"]
        row = next(line for line in daemon.cli("models").stdout.splitlines() if line.startswith("junk"))
        assert row.endswith(junk["problem"])
        assert daemon.cli("show", "junk").returncode == 0
        (models_dir / "junk.gguf").unlink()
        eventually(
            lambda: (
                not any(model["name"] == "junk" and model["state"] != "gone" for model in daemon.status()["models"])
            ),
            what="the end of it",
        )


def test_everything_about_a_model(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """Header, file, options with their tables, and the command line that the router tells."""
    extra = '[defaults]\nctx_size = 1024\n[model."al*"]\nctx_size = 512\n[model.alpha]\naliases = ["first/one"]\n'
    config = config_of(models_dir, free_port(), extra)
    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config) as daemon:
        daemon.wait_for_router("ready")
        status, told = daemon.call("GET", "/control/v1/models/first%2Fone")
        assert (status, told["model"]["name"], told["model"]["aliases"]) == (200, "alpha", ["first/one"])
        assert told["files"][0]["path"] == str(models_dir / "alpha.gguf")
        assert told["files"][0]["size_bytes"] == (models_dir / "alpha.gguf").stat().st_size
        assert told["header"]["architecture"] == told["model"]["architecture"] == "llama"
        assert told["effective"]["main"]["ctx-size"] == "512"
        assert told["origins"]["main"]["ctx-size"] == '[model."al*"]'
        assert told["origins"]["main"]["alias"] == '[model."alpha"]'
        ours = "automatic (fits the memory budget)"
        assert told["layers"]["main"] == [ours, "[defaults]", '[model."al*"]', '[model."alpha"]']
        assert daemon.cli("load", "alpha").returncode == 0
        command = daemon.call("GET", "/control/v1/models/alpha?router=main")[1]["command"]["main"]
        assert command[command.index("--ctx-size") + 1] == "512"
        shown = daemon.cli("show", "alpha").stdout
        assert "--ctx-size 512" in shown
        assert daemon.cli("show", "alpha", "--template").returncode == 1  # our models have none
        assert daemon.call("GET", "/control/v1/models/beta")[1]["origins"]["main"]["ctx-size"] == "[defaults]"
        status, problem = daemon.call("GET", "/control/v1/models/alpa")
        assert (status, problem["code"], problem["hint"]) == (404, "model_not_found", "did you mean alpha?")
        assert daemon.call("GET", "/control/v1/models/alpha?router=x")[1]["code"] == "router_not_found"
        assert daemon.cli("stop").returncode == 0
        assert daemon.call("GET", "/control/v1/models/alpha")[1]["command"] == {"main": None}


# --- devices ----------------------------------------------------------------------------------------------------------


def test_late_device_is_waited_for(start: Start) -> None:
    """A device whose driver loads late is waited for, and the load that was asked for meanwhile is done then."""
    with start(
        options=("--device", "CUDA0"), devices=["CUDA0: A card (24000 MiB, 23000 MiB free)"], devices_after_calls=3
    ) as daemon:
        eventually(lambda: "CUDA0" in (daemon.router()["reason"] or ""), what="a router that waits for its device")
        assert daemon.router()["state"] == "starting"
        assert daemon.cli("load", "alpha").returncode == 0
        assert daemon.router()["state"] == "ready"


# --- the control API --------------------------------------------------------------------------------------------------


def test_problems_have_codes(start: Start) -> None:
    """Every refusal is a problem document with a stable code, and nothing shows a traceback."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        cases: list[tuple[str, str, bytes | None, int, str]] = [
            ("GET", "/nothing", None, 404, "not_found"),
            ("DELETE", "/control/v1/status", None, 405, "method_not_allowed"),
            ("POST", "/control/v1/models/nope/load", None, 404, "model_not_found"),
            ("POST", "/control/v1/models/a%2Fb:c/load", None, 404, "model_not_found"),
            ("POST", "/control/v1/models/alpha/load?router=nope", None, 404, "router_not_found"),
            ("POST", "/control/v1/routers/nope/restart", None, 404, "router_not_found"),
            ("POST", "/control/v1/models/alpha/load?wait=soon", None, 400, "bad_request"),
            ("POST", "/control/v1/models/alpha/load?wait=nan", None, 400, "bad_request"),
            ("GET", "/control/v1/events?since=-1", None, 400, "bad_request"),
            ("GET", "/control/v1/logs?lines=1e9", None, 400, "bad_request"),
            ("GET", "/control/v1/events?since=%C2%B2", None, 400, "bad_request"),
            ("GET", "/control/v1/events?since=" + "9" * 5000, None, 400, "bad_request"),
            ("GET", "/control/v1/logs?lines=%C2%B2", None, 400, "bad_request"),
            ("POST", "/control/v1/models/a%0Ab%1B[2J/load", None, 404, "model_not_found"),
            ("POST", "/control/v1/models/%0A/unload", None, 404, "model_not_found"),
            ("POST", "/control/v1/routers/a%0Ab/restart", None, 404, "router_not_found"),
            ("GET", "/no%0Athing", None, 404, "not_found"),
            ("POST", "/control/v1/reload", b"[]", 400, "bad_request"),
            ("POST", "/control/v1/reload", b"x" * 65537, 413, "body_too_large"),
        ]
        for method, path, body, status, code in cases:
            told, problem = daemon.call(method, path, body=body)
            assert (told, problem["code"], problem["status"]) == (status, code, status), path
            assert problem["detail"].isprintable(), path
        assert "Traceback" not in daemon.log.read_text()


def test_wait_that_is_too_short(start: Start) -> None:
    """A command that is not done in time is told so, goes on, and the command line ends with 5."""
    with start(model={"load_s": 2.0}) as daemon:
        daemon.wait_for_router("ready")
        status, problem = daemon.call("POST", "/control/v1/models/alpha/load?wait=0.2")
        assert (status, problem["code"]) == (504, "wait_timeout")
        assert daemon.cli("load", "alpha", "--timeout", "0.1s").returncode == 5
        daemon.wait_for_model("alpha", "loaded")


def test_loading_twice_is_one_load(start: Start) -> None:
    """A model that is loaded already is no error and is not loaded again."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        assert daemon.call("POST", "/control/v1/models/alpha/load?wait=true")[1]["changed"] is True
        assert daemon.call("POST", "/control/v1/models/alpha/load?wait=true")[1]["changed"] is False
        twice = daemon.cli("load", "alpha")
        assert twice.returncode == 0
        assert "already" in twice.stdout + twice.stderr
        assert len(daemon.events("ModelLoading")) == 1


def test_events_are_replayed_by_number(start: Start) -> None:
    """Whoever comes back with the last number it saw gets what followed, without a gap and without a repetition."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        every = daemon.events()
        assert [event["id"] for event in every] == sorted({event["id"] for event in every})
        headers = {"Last-Event-ID": str(every[2]["id"])}
        text = daemon.call("GET", "/control/v1/events?follow=false", headers=headers)[1]
        later = [json.loads(line[5:])["id"] for line in text.splitlines() if line.startswith("data:")]
        assert later[: len(every) - 3] == [event["id"] for event in every[3:]]


def test_events_are_followed(start: Start) -> None:
    """A follower hears of an event while it happens."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        last = daemon.status()["event_id"]
        with following(daemon, f"/control/v1/events?since={last}") as stream:
            daemon.call("POST", "/control/v1/models/alpha/load")
            events_until("ModelLoaded", stream)


def test_events_are_those_that_are_kept_unless_all_are_wanted(start: Start) -> None:
    """A follower hears no probes and no progress, which would bury what happens, except who asks for them."""
    with start(model={"load_s": 1.0}) as daemon:
        daemon.wait_for_router("ready")
        with (
            following(daemon, "/control/v1/events") as some,
            following(daemon, "/control/v1/events?all=true") as everything,
        ):
            events_until("RouterProbed", everything)
            daemon.call("POST", "/control/v1/models/alpha/load")
            assert "ModelProgress" in events_until("ModelLoaded", everything)
            heard = events_until("ModelLoaded", some)
            assert "ModelLoading" in heard
            assert not {"RouterProbed", "ModelProgress"} & set(heard)


def test_readers_who_left_are_forgotten(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """Followers that hang up while nothing happens cost the daemon nothing any more: neither a file nor a task."""
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), options=())
    counted = tmp_path / "tasks"
    start_with(
        daemon,
        "import anyio, asyncio, pathlib\n"
        "async def count(daemon):\n"
        "    while True:\n"
        f"        pathlib.Path({str(counted)!r}).write_text(f'{{len(asyncio.all_tasks()):6}}')\n"
        "        await anyio.sleep(0.05)\n"
        "app._measure_lag = count",
    )
    with daemon:
        daemon.wait_for_router("ready")
        process = psutil.Process(daemon.pid)

        def held() -> tuple[int, int]:
            return process.num_fds(), int(eventually(counted.read_text, what="a count that is written"))

        time.sleep(0.5)  # what served us so far ends
        files, tasks = held()
        for path in ("/control/v1/logs?follow=true", "/control/v1/events"):
            with ExitStack() as readers:
                for _ in range(20):
                    readers.enter_context(following(daemon, path))
                eventually(lambda: held() >= (files + 20, tasks + 20), what="all of them at once")
            left = time.monotonic()
            eventually(lambda: held()[0] <= files and held()[1] <= tasks, what="nothing that serves them")
            assert time.monotonic() - left < HEARTBEAT_S / 2
        assert "Traceback" not in daemon.log.read_text()


def test_stream_that_breaks_is_cut_off(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """A bug amid a stream is in the log, and its reader sees an answer that is not whole, not a second one."""
    code = (
        "import sys, llamavisord.control as control; from llamavisord.cli import main\n"
        "def bug(published): raise ZeroDivisionError('a bug')\n"
        "control._sse = bug; sys.exit(main())\n"
    )
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), options=())
    daemon.program = [sys.executable, "-c", code]
    with daemon:
        daemon.wait_for_router("ready")
        answer = raw_answer(daemon, b"GET /control/v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.count(b"HTTP/1.1") == 1
        assert answer.startswith(b"HTTP/1.1 200")
        assert not answer.endswith(b"0\r\n\r\n")
        assert "ZeroDivisionError: a bug" in daemon.log.read_text()


@pytest.mark.parametrize(
    "request_text",
    [b"G@T / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n"],
    ids=["method", "line", "tls"],
)
def test_what_is_no_http_is_no_traceback(start: Start, request_text: bytes) -> None:
    """Whoever speaks something else is answered 400; the daemon's log is not his to fill."""
    with start() as daemon:
        # On a connection that has asked for something already aiohttp is less forgiving.
        polite = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
        for text in (request_text, polite + request_text):
            assert b"HTTP/1.0 400" in raw_answer(daemon, text)
        assert "Traceback" not in daemon.log.read_text()
        assert daemon.call("GET", "/livez")[0] == 200


def test_stop_and_start_by_hand(start: Start) -> None:
    """A stopped router stays down, says so to whoever wants a model, and comes back when started."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("stop", "main").returncode == 0
        assert daemon.router()["state"] == "stopped"
        status, problem = daemon.call("POST", "/control/v1/models/alpha/load?wait=true")
        assert (status, problem["code"]) == (503, "router_not_ready")
        assert daemon.call("POST", "/control/v1/routers/main/stop?wait=true")[1]["changed"] is False
        assert daemon.cli("start", "main").returncode == 0
        assert daemon.router()["state"] == "ready"
        assert daemon.router()["restarts"] == 0


def test_control_stays_quick_while_a_router_hangs(start: Start) -> None:
    """A router that answers nothing any more is DEGRADED, and the control socket goes on answering."""
    with start() as daemon:
        os.kill(daemon.wait_for_router("ready")["pid"], signal.SIGSTOP)
        eventually(lambda: daemon.router()["state"] == "degraded", what="a degraded router", within_s=60)
        for method, path in (
            ("GET", "/livez"),
            ("GET", "/control/v1/status"),
            ("POST", "/control/v1/models/alpha/load"),
            ("GET", "/control/v1/logs"),
        ):
            began = time.monotonic()
            daemon.call(method, path)
            assert time.monotonic() - began < CONNECT_TIMEOUT_S - 1, path


# --- configuration ----------------------------------------------------------------------------------------------------


def test_reload_touches_only_what_changed(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """A reload restarts the changed router with its models, adds and removes others, and leaves the rest alone.

    Options of models are no reason to restart a router.
    """
    ports = [free_port() for _ in range(3)]

    def config(*names: str, mark: int = 1, ctx_size: int = 512) -> str:
        tables = "".join(
            f'[[router]]\nname = "{name}"\nport = {port}\n'
            + (f'ctx_size = {ctx_size}\nenv = {{ MARK = "{mark}" }}\n' if name == "b" else "")
            for name, port in zip(("a", "b", "c"), ports, strict=True)
            if name in names
        )
        return config_of(models_dir, 1, tables).replace("port = 1\n", "", 1)

    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config("a", "b"), serve="router") as daemon:
        kept, changed = (daemon.wait_for_router("ready", name)["pid"] for name in ("a", "b"))
        daemon.call("POST", "/control/v1/models/alpha/load?router=b&wait=true")
        daemon.config.write_text(config("a", "b", "c", mark=2))
        assert daemon.call("POST", "/control/v1/reload")[1]["changed"] == ["b", "c"]
        daemon.wait_for_router("ready", "c")
        assert daemon.wait_for_event("RouterRecovered")["models"] == ["alpha"]
        assert daemon.router("a")["pid"] == kept
        assert daemon.router("b")["pid"] != changed
        before = daemon.router("b")["pid"]
        daemon.config.write_text(config("a", "b", "c", mark=2, ctx_size=1024))
        told = daemon.call("POST", "/control/v1/reload")[1]
        assert (told["changed"], "alpha" in told["models"]) == ([], True)
        assert daemon.router("b")["pid"] == before
        daemon.config.write_text(config("a"))
        assert sorted(daemon.call("POST", "/control/v1/reload")[1]["changed"]) == ["b", "c"]
        assert [router["name"] for router in daemon.status()["routers"]] == ["a"]
        assert daemon.router("a")["pid"] == kept


@pytest.mark.parametrize("what", ["missing", "file"])
def test_models_folder_that_cannot_be_used(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake, what: str
) -> None:
    """A models folder that is missing or a file is FAILED with the reason; mended, it recovers by itself."""
    folder = tmp_path / "other"
    if what == "file":
        folder.write_text("not a folder")
    with RunningDaemon(tmp_path, folder, fake_llama_server(), options=()) as daemon:
        failed = daemon.wait_for_router("failed")
        assert str(folder) in failed["reason"]
        assert failed["hint"]
        if what == "file":
            folder.unlink()
        shutil.copytree(models_dir, folder)
        daemon.wait_for_router("ready")


# --- the daemon itself ------------------------------------------------------------------------------------------------


def test_second_daemon_with_the_same_state(start: Start, tmp_path: Path, models_dir: Path) -> None:
    """Two daemons with one state folder would kill each other's routers: the second one is refused."""
    with start() as first:
        pid = first.wait_for_router("ready")["pid"]
        second = RunningDaemon(tmp_path, models_dir, "/bin/true", flags=["--socket", str(tmp_path / "other.sock")])
        second.log = tmp_path / "second.log"
        assert run_serve(second)[0] == 75
        assert first.router()["pid"] == pid


def test_name_cannot_forge_a_line_of_the_log(start: Start, models_dir: Path) -> None:
    """One event is one line of the log, without a character that commands a terminal, whatever a file is called."""
    for name in ("a\n2030-01-01 ERROR forged\x1b[2J", "b\x1b[2J"):
        write_tiny_model(models_dir / f"{name}.gguf", ["I", "am"])
    with start() as daemon:
        daemon.wait_for_router("ready")
        odd = [model for model in daemon.status()["models"] if "[2J" in model["name"]]
        assert [(model["state"], model["name"].isprintable()) for model in odd] == [("invalid", True)] * 2
        for model in odd:
            assert daemon.call("POST", f"/control/v1/models/{quote(model['name'], safe='')}/load")[0] == 404
        log = daemon.log.read_text()
    assert "forged" in log
    assert not any(line.startswith("2030") for line in log.splitlines())
    assert "\x1b" not in log


def test_metrics_port_that_is_taken(start: Start) -> None:
    """A taken metrics port is a warning and no reason to let models go; it is served once it is free."""
    daemon = start()
    with socket.create_server(("127.0.0.1", daemon.metrics_port)) as holder, daemon:
        daemon.wait_for_router("ready")
        eventually(lambda: any("metrics" in warning for warning in daemon.status()["warnings"]), what="a warning")
        holder.close()
        eventually(lambda: daemon.status()["warnings"] == [], what="metrics that are served")
        assert "llamavisor_build_info" in daemon.metrics()


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_tell_what_happened(start: Start) -> None:
    """States are 0 or 1, and loads, unloads, restarts and their times are counted."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        daemon.cli("load", "alpha")
        daemon.cli("unload", "alpha")
        daemon.call("POST", "/control/v1/routers/main/restart?wait=true")
        metrics = daemon.metrics()
    for line in (
        'llamavisor_router_state{router="main",state="ready"} 1.0',
        'llamavisor_router_state{router="main",state="failed"} 0.0',
        'llamavisor_router_consecutive_failures{router="main"} 0.0',
        'llamavisor_router_restarts_total{reason="requested",router="main"} 1.0',
        'llamavisor_router_start_duration_seconds_count{router="main"} 2.0',
        'llamavisor_model_state{model="alpha",router="main",state="unloaded"} 1.0',
        'llamavisor_model_loads_total{model="alpha",result="loaded",router="main"} 1.0',
        'llamavisor_model_load_duration_seconds_count{model="alpha",router="main"} 1.0',
        'llamavisor_model_unloads_total{model="alpha",reason="requested",router="main"} 1.0',
        "llamavisor_config_last_reload_successful 1.0",
    ):
        assert line in metrics
    for name in (
        "router_start_timestamp_seconds",
        "event_loop_lag_seconds",
        "config_last_reload_success_timestamp_seconds",
    ):
        assert f"llamavisor_{name}" in metrics
    assert "process_resident_memory_bytes" in metrics
    assert "_created" not in metrics


def test_series_of_what_has_gone_are_gone(tmp_path: Path, models_dir: Path, fake_llama_server: Fake) -> None:
    """Counters of a model that is not listed any more, and of a router that a reload removed, do not stay for ever."""
    one, two, metrics = free_port(), free_port(), free_port()
    text = f'models_dir = "{models_dir}"\n[metrics]\nport = {metrics}\n[[router]]\nname = "one"\nport = {one}\n'
    both = f'{text}[[router]]\nname = "two"\nport = {two}\n'
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=both, serve="router")
    daemon.metrics_port = metrics
    with daemon:
        for name in ("one", "two"):
            daemon.wait_for_router("ready", name)
            for model in ("alpha", "beta"):
                assert daemon.call("POST", f"/control/v1/models/{model}/load?router={name}&wait=true")[0] == 200
        shown = daemon.metrics()
        for labels in ('model="alpha",result="loaded",router="one"', 'model="alpha",result="loaded",router="two"'):
            assert f"llamavisor_model_loads_total{{{labels}}} 1.0" in shown
        assert daemon.call("POST", "/control/v1/models/alpha/unload?router=one&wait=true")[0] == 200
        (models_dir / "alpha.gguf").unlink()
        daemon.config.write_text(text)
        assert daemon.call("POST", "/control/v1/reload")[0] == 200
        shown = daemon.metrics()
    assert 'router="two"' not in shown
    assert 'model="alpha"' not in shown
    assert 'llamavisor_model_loads_total{model="beta",result="loaded",router="one"} 1.0' in shown


def test_promtool_finds_nothing_to_mend(start: Start) -> None:
    """The exposition is as Prometheus's own linter wants it."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        daemon.cli("load", "alpha")
        eventually(lambda: "llamacpp:" in daemon.metrics(), what="what the model says")
        metrics = daemon.metrics()
    assert complaints(metrics) == []


def test_health_on_both_doors(start: Start) -> None:
    """/livez and /readyz answer on both doors, and tell a stopped router from a living daemon."""

    def on_metrics_port(path: str) -> int:
        with closing(socket.create_connection(("127.0.0.1", daemon.metrics_port))) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return int(connection.recv(100).split()[1])

    with start() as daemon:
        daemon.wait_for_router("ready")
        assert (daemon.call("GET", "/readyz")[0], on_metrics_port("/readyz")) == (200, 200)
        daemon.cli("stop", "main")
        assert (daemon.call("GET", "/readyz")[0], on_metrics_port("/readyz")) == (503, 503)
        assert (daemon.call("GET", "/livez")[0], on_metrics_port("/livez")) == (200, 200)


def test_status_of_everything_is_json(start: Start) -> None:
    """Every reading command prints JSON when asked, and nothing else on stdout."""
    with start() as daemon:
        daemon.wait_for_router("ready")
        told: dict[str, Any] = {
            name: json.loads(daemon.cli(name, "--json").stdout) for name in ("status", "models", "version")
        }
        told["show"] = json.loads(daemon.cli("show", "alpha", "--json").stdout)
        assert told["show"]["model"]["name"] == "alpha"
        assert told["status"]["routers"][0]["state"] == "ready"
        lines = daemon.cli("events", "--json").stdout.splitlines()
        assert json.loads(lines[0])["event"]
