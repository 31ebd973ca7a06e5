"""`llamavisor pull` and what stands behind it, on a whole daemon that asks a Hub of our own."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from fakes import FakeLlamaServer
from fakes.hub_server import Fault, HubFile, HubServer, Repository
from fakes.waiting import PATIENCE_S, eventually
from ggufs import STRING, U32, GgufFile, Tensor
from llamavisor.hub import Why
from llamavisor.hub.staging import NAME as STAGING
from llamavisord.cli.pull import SEEN_S
from llamavisord.exit_codes import ExitCode
from llamavisord.problem_documents import HUB_STATUS
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon, UnixConnection, config_of
from terminal import INTERRUPT, Terminal

PULLS = "/control/v1/pulls"
TOKEN = "hf_secret"
LARGE = 3_000_000


def noise(seed: str, size: int) -> bytes:
    """Bytes that are nothing in particular."""
    return hashlib.shake_128(seed.encode()).digest(size)


def header(context: int = 131072, *, layers: int = 2, width: int = 64) -> bytes:
    """The header of a model with heads of 16 numbers."""
    values = [
        ("general.architecture", (STRING, "llama")),
        ("llama.context_length", (U32, context)),
        ("llama.block_count", (U32, layers)),
        ("llama.embedding_length", (U32, width)),
        ("llama.attention.head_count", (U32, width // 16)),
        ("tokenizer.ggml.model", (STRING, "gpt2")),
    ]
    return GgufFile(values, [Tensor("token_embd.weight")]).encode()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub with a model of three quantizations, one with a projector, a private one, and a tiny one that runs."""
    write_tiny_model(tmp_path / "tiny", ["I", "am", "new"])
    tiny = HubFile((tmp_path / "tiny").read_bytes())
    repositories = {
        "user/repo": Repository(
            {
                "M-Q4_K_M.gguf": HubFile(header() + noise("q4", LARGE)),
                "M-Q8_0.gguf": HubFile(header() + noise("q8", 2 * LARGE)),
                "M-F16.gguf": HubFile(header(), size=10 * 2**40),
                "README.md": HubFile(b"# M", is_lfs=False),
            },
            revisions=("v1",),
        ),
        "user/sees": Repository(
            {
                "S-Q4_K_M.gguf": HubFile(header(8192) + noise("s", LARGE)),
                "mmproj-F16.gguf": HubFile(noise("p", LARGE)),
            }
        ),
        "user/tiny": Repository({"tiny-Q8_0.gguf": tiny}),
        "user/broken": Repository({"B-Q4_K_M.gguf": HubFile(b"no model at all" * 100)}),
        "user/private": Repository({"P-Q4_K_M.gguf": tiny}, is_private=True),
    }
    with HubServer(repositories, tokens=(TOKEN,)) as server:
        yield server


Begin = Callable[..., RunningDaemon]


@pytest.fixture
def begin(hub: HubServer, tmp_path: Path, fake_llama_server: Callable[..., FakeLlamaServer]) -> Begin:
    """Makes a daemon on a fake llama-server and an empty models folder, which asks that Hub."""
    binary = fake_llama_server()
    (tmp_path / "pulled").mkdir()

    def make(config: str | None = None, **env: str) -> RunningDaemon:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", **env}
        return RunningDaemon(tmp_path, tmp_path / "pulled", binary, options=(), env=env, config=config)

    return make


@pytest.fixture
def daemon(begin: Begin) -> Iterator[RunningDaemon]:
    """One that runs."""
    with begin() as running:
        running.wait_for_router("ready")
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The models folder."""
    return tmp_path / "pulled"


def order(daemon: RunningDaemon, spec: str, **more: object) -> tuple[int, dict[str, Any]]:
    """Status and body of a pull that is asked for."""
    return daemon.call("POST", PULLS, body=json.dumps({"spec": spec, **more}).encode())


def pull_of(daemon: RunningDaemon, model: str) -> dict[str, Any]:
    """The pull of that model as the list shows it."""
    return next(each for each in daemon.call("GET", PULLS)[1]["pulls"] if each["model"] == model)


def wait_for(daemon: RunningDaemon, model: str, state: str) -> dict[str, Any]:
    """Wait until its pull is in that state."""
    eventually(lambda: pull_of(daemon, model)["state"] == state, what=f"a pull that is {state}")
    return pull_of(daemon, model)


def visible(folder: Path) -> set[str]:
    """What anybody sees in the models folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def stalled(hub: HubServer, folder: Path, size: int = 1_000_000) -> Callable[[], bool]:
    """From now on the store sends so much of a file and falls silent; whether that much is on the disk."""
    hub.faults.append(Fault(stall_after=size, path="/repos/"))
    return lambda: any(path.stat().st_size == size for path in folder.glob(f"{STAGING}/files/*.part"))


def on_a_terminal(daemon: RunningDaemon, *words: str) -> Terminal:
    """A command as a person gives it, who watches."""
    env = {**daemon.env, "LLAMAVISOR_SOCKET": str(daemon.socket), "COLUMNS": "120"}
    return Terminal([sys.executable, "-m", "llamavisord", *words], env)


def test_a_model_is_pulled_and_served(daemon: RunningDaemon, folder: Path) -> None:
    """It is said which quantization is taken and where the model is; a moment later it answers."""
    done = daemon.cli("pull", "user/tiny")
    assert (done.returncode, done.stderr) == (0, "")
    usual, last = done.stdout.splitlines()
    assert usual == "user/tiny: Q8_0 is taken, which is usual; --list has all"
    assert last.startswith("tiny-Q8_0: pulled, ")
    assert last.endswith(f": {folder}/tiny-Q8_0.gguf")
    assert daemon.cli("load", "tiny-Q8_0").returncode == 0
    assert daemon.chat("tiny-Q8_0")
    assert daemon.cli("pull", "--cancel", "tiny-Q8_0").stdout == "tiny-Q8_0: had ended already\n"
    again = daemon.cli("pull", "user/tiny:q8_0")
    assert again.stdout == f"tiny-Q8_0: is there already: {folder}/tiny-Q8_0.gguf\n"


def test_a_model_that_no_router_can_be_told_of(daemon: RunningDaemon, folder: Path) -> None:
    """While the routers are stopped nobody waits for one: the model is there, and so is the answer.

    It is routers that are stopped, and models that are unloaded.
    """
    assert "`llamavisor unload`" in daemon.cli("stop", "tiny-Q8_0").stderr
    assert daemon.cli("stop", "main").returncode == 0
    began = time.monotonic()
    done = daemon.cli("pull", "user/tiny")
    assert (done.returncode, (folder / "tiny-Q8_0.gguf").exists()) == (0, True)
    assert time.monotonic() - began < SEEN_S


def test_what_a_repository_holds(daemon: RunningDaemon, hub: HubServer) -> None:
    """Sizes, quantizations, the context from the headers, which one is usual, and what fits: nothing is downloaded."""
    shown = daemon.cli("pull", "user/repo", "--list")
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[-1]: line.split() for line in shown.stdout.splitlines() if line.endswith(".gguf")}
    assert rows["M-Q4_K_M.gguf"][:6] == ["*", "Q4_K_M", "2.9", "MiB", "-", "131072"]
    assert rows["M-Q4_K_M.gguf"][-2:] == ["yes", "M-Q4_K_M.gguf"]
    assert rows["M-F16.gguf"] == ["F16", "10.0", "TiB", "-", "131072", "10.0", "TiB", "no", "M-F16.gguf"]
    assert "* is what is pulled: Q4_K_M" in shown.stdout
    assert "of RAM of router main" in shown.stdout
    assert sum(asked.sent[0] for asked in hub.downloads()) <= 3 * 64 * 1024
    status, body = daemon.call("GET", "/control/v1/hub?repo=user/sees")
    assert status == 200
    (model,) = body["models"]
    assert (model["projector"]["path"], model["chosen"], model["n_ctx_train"]) == ("mmproj-F16.gguf", True, 8192)
    assert (body["router"], model["fits"]) == ("main", True)
    assert model["needed_bytes"]["RAM"] > model["size_bytes"] + LARGE
    _, body = daemon.call("GET", "/control/v1/hub?repo=user/sees&mmproj=false")
    (alone,) = body["models"]
    assert (alone["projector"], model["needed_bytes"]["RAM"] - alone["needed_bytes"]["RAM"]) == (None, LARGE)
    assert "mmproj" not in daemon.cli("pull", "user/sees", "--list", "--no-mmproj").stdout


def test_what_a_model_will_take_is_known_before_it_is_here(daemon: RunningDaemon) -> None:
    """What the list tells of a model is what admission reckons with once it is here, options and caches included."""
    _, body = daemon.call("GET", "/control/v1/hub?repo=user/tiny")
    (model,) = body["models"]
    assert (model["n_ctx"], model["fits"]) == (4096, True)
    assert daemon.cli("pull", "user/tiny").returncode == 0
    told = daemon.cli("evict", "--dry-run", "tiny-Q8_0", "--json")
    assert told.returncode == 0, told.stderr
    needed = json.loads(told.stdout)["needed_bytes"]
    assert model["needed_bytes"].keys() == needed.keys() == {"RAM"}
    assert abs(model["needed_bytes"]["RAM"] - needed["RAM"]) < 64 * 1024


def test_small_files_may_need_much_memory(begin: Begin, hub: HubServer, folder: Path, free_port: int) -> None:
    """A model whose files alone would go in and whose context does not is told not to fit; one without header, nothing.

    The tables of the configuration count: with half the context it fits.
    """
    deep = header(layers=32, width=4096)  # 2 * 2 * 32 * 4096 bytes for each token
    hub.repositories["user/deep"] = Repository(
        {"D-Q8_0.gguf": HubFile(deep + noise("d", LARGE)), "E-Q8_0.gguf": HubFile(b"no header at all" * 100)}
    )
    with begin(LLAMAVISOR_MEMORY="2200MiB") as daemon:
        daemon.wait_for_router("ready")
        _, body = daemon.call("GET", "/control/v1/hub?repo=user/deep")
        deep_one, odd_one = body["models"]
        assert (deep_one["fits"], deep_one["n_ctx"]) == (False, 4096)
        assert deep_one["needed_bytes"]["RAM"] > 2 * 2 * 32 * 4096 * 4096 > body["budget_bytes"]["RAM"] - 2**29
        assert (odd_one["fits"], odd_one["n_ctx"], odd_one["needed_bytes"]) == (None, None, {})
    rule = 'memory = "2200MiB"\n[model."D-*"]\nctx_size = 2048\n'
    with begin(config_of(folder, free_port, rule)) as daemon:
        daemon.wait_for_router("ready")
        _, body = daemon.call("GET", "/control/v1/hub?repo=user/deep")
        assert [(model["fits"], model["n_ctx"]) for model in body["models"]] == [(True, 2048), (None, None)]


def test_the_projector_comes_along_unless_it_is_not_wanted(daemon: RunningDaemon, folder: Path) -> None:
    """A model of several files is a folder, seen only when all of them are there."""
    assert daemon.cli("pull", "user/sees", "--no-mmproj", "--name", "blind").returncode == 0
    assert visible(folder) == {"blind.gguf"}
    assert daemon.cli("pull", "user/sees").returncode == 0
    assert {path.name for path in (folder / "S-Q4_K_M").iterdir()} == {"S-Q4_K_M.gguf", "mmproj-F16.gguf"}


REFUSED = [
    (["user/nothing"], "there is no such repository, or it is private", ExitCode.NOT_FOUND),
    (["user/private"], "a token is needed: HF_TOKEN", ExitCode.NOT_FOUND),
    (["user/repo:Q4_K"], "Did you mean Q4_K_M?", ExitCode.NOT_FOUND),
    (["user/repo:Q4_K", "--list"], "Did you mean Q4_K_M?", ExitCode.NOT_FOUND),
    (["user/repo", "--revision", "v2"], "there is no such revision", ExitCode.NOT_FOUND),
    (["user/repo", "--file", "*Q5*"], "has no GGUF file like", ExitCode.NOT_FOUND),
    (["../repo"], "is no name on the Hub", ExitCode.USAGE),
    (["user/tiny", "--name", "../up"], "is no name for a model", ExitCode.USAGE),
    (["user/tiny", "--name", "a#b"], "holds a '#'", ExitCode.USAGE),
    (["user/tiny", "--name", "a,b"], "holds a ','", ExitCode.USAGE),
    (["user/tiny", "--name=-a"], "begins with '-'", ExitCode.USAGE),
    (["user/tiny", "--name", ""], "--name names nothing", ExitCode.USAGE),
    (["user/repo:F16"], "Make room, or take a smaller quantization", ExitCode.FAILED),
    (["user/tiny", "--router", "gpu7"], "no router", ExitCode.NOT_FOUND),
    ([], "name either what to pull", ExitCode.USAGE),
    (["user/tiny", "--drop"], "--drop goes with --cancel", ExitCode.USAGE),
    (["--cancel", "nobody"], "there is no pull 'nobody'", ExitCode.NOT_FOUND),
]


def test_what_cannot_be_pulled_is_told_in_one_line(daemon: RunningDaemon, folder: Path) -> None:
    """With what there is instead or what to do, an exit code that says whose fault it is, and nothing on the disk."""
    for words, said, code in REFUSED:
        done = daemon.cli("pull", *words)
        assert (done.returncode, done.stdout) == (code, ""), words
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1, words
    assert visible(folder) == set()


def test_refusals_of_the_hub_have_a_status_of_their_own(daemon: RunningDaemon, hub: HubServer) -> None:
    """One code for programs, `why` in one word, and how long to leave the Hub alone if it says so."""
    for fault, status, why in (
        (Fault(at="hub", status=403), 403, "forbidden"),
        (Fault(at="hub", status=429, headers={"Retry-After": "1000"}), 429, "busy"),
        (Fault(at="hub", status=418), 403, "forbidden"),
    ):
        hub.faults = [fault]
        with closing(UnixConnection(daemon.socket)) as connection:
            connection.request("POST", PULLS, b'{"spec": "user/tiny"}')
            response = connection.getresponse()
            body = json.loads(response.read())
        assert (response.status, body["code"], body["why"]) == (status, "hub_failed", why)
        assert response.getheader("Retry-After") == fault.headers.get("Retry-After")


def test_an_order_that_makes_no_sense_is_refused(daemon: RunningDaemon) -> None:
    """With the key that is wrong; other commands still take no body."""
    for text, said in (
        (b"{", "Invalid JSON"),
        (b"{}", "spec"),
        (b'{"spec": 7}', "spec"),
        (b'{"spec": "user/tiny", "quant": "Q8_0"}', "quant"),
        (b'{"spec": "user/tiny", "mmproj": "no"}', "mmproj"),
    ):
        status, problem = daemon.call("POST", PULLS, body=text)
        assert (status, problem["code"]) == (400, "bad_request"), text
        assert said in problem["detail"]
    assert daemon.call("DELETE", f"{PULLS}/x", body=b'{"drop": true}')[0] == 400


def test_a_model_that_cannot_be_served_is_told_at_once(daemon: RunningDaemon, folder: Path) -> None:
    """What came is what the Hub has, and stays; that it is no model is not found out by the first request."""
    done = daemon.cli("pull", "user/broken")
    assert done.returncode == ExitCode.FAILED
    assert "B-Q4_K_M cannot be served: it is invalid: " in done.stderr
    assert visible(folder) == {"B-Q4_K_M.gguf"}


def test_a_token_opens_private_repositories(begin: Begin, hub: HubServer) -> None:
    """That of the daemon's environment; neither the log nor the events nor the answers ever show it."""
    with begin(HF_TOKEN=TOKEN) as daemon:
        done = daemon.cli("pull", "user/private", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["pull"]["state"] == "done"
        told = done.stdout + done.stderr + json.dumps(daemon.events()) + daemon.log.read_text()
    assert TOKEN not in told


def test_offline_nobody_is_asked(begin: Begin, hub: HubServer) -> None:
    """HF_HUB_OFFLINE is heeded."""
    with begin(HF_HUB_OFFLINE="1") as daemon:
        status, body = order(daemon, "user/tiny")
        assert (status, body["why"]) == (409, "offline")
    assert hub.asked == []


def test_bars_are_drawn_for_every_file(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """On a terminal there is one line for each file and one for all, redrawn in place, with speed and time left."""
    is_stalled = stalled(hub, folder)
    stalled(hub, folder)
    with on_a_terminal(daemon, "pull", "user/sees") as terminal:
        eventually(is_stalled)
        terminal.until("S-Q4_K_M.gguf   [#######")
        terminal.until("mmproj-F16.gguf [#######")
        terminal.until("all 2 files")
        terminal.until("\x1b[3A")
        terminal.until("B/s")
        hub.released.set()
        terminal.until("S-Q4_K_M: pulled")
        assert terminal.wait() == 0
    last = terminal.seen.rpartition("\x1b[3A")[2]
    assert last.count("100%") == 3
    assert "user/sees: Q4_K_M is taken" in terminal.seen


def test_without_a_terminal_there_are_no_bars(daemon: RunningDaemon) -> None:
    """What a script sees are lines of text."""
    done = daemon.cli("pull", "user/repo:q4_k_m")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("M-Q4_K_M: pulled, 2.9 MiB")
    assert "\x1b" not in done.stdout


def test_an_interrupt_lets_it_go_on(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """Ctrl-C ends the watching alone, and says how to end the pull; that comes to its end by itself."""
    is_stalled = stalled(hub, folder)
    with on_a_terminal(daemon, "pull", "user/repo") as terminal:
        eventually(is_stalled)
        terminal.until("M-Q4_K_M.gguf [")
        terminal.type(INTERRUPT)
        terminal.until("M-Q4_K_M goes on coming; `llamavisor pull --cancel M-Q4_K_M-")
        assert terminal.wait() == ExitCode.INTERRUPTED
    assert pull_of(daemon, "M-Q4_K_M")["state"] == "under_way"
    hub.released.set()
    wait_for(daemon, "M-Q4_K_M", "done")
    assert visible(folder) == {"M-Q4_K_M.gguf"}


def test_a_detached_pull_is_listed_and_cancelled(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """`pulls` shows how far it is; cancelled it keeps what came, and the same pull goes on with that."""
    assert daemon.cli("pulls").stdout == "no pulls: `llamavisor pull USER/REPO` begins one\n"
    is_stalled = stalled(hub, folder)
    begun = daemon.cli("pull", "user/repo", "--detach")
    assert begun.returncode == 0
    assert "2.9 MiB under way as M-Q4_K_M-" in begun.stdout
    eventually(is_stalled)
    key = pull_of(daemon, "M-Q4_K_M")["id"]
    (row,) = [line.split() for line in daemon.cli("pulls").stdout.splitlines() if line.endswith(key)]
    assert row[:4] == ["M-Q4_K_M", "under", "way", "33%"]
    assert "llamavisor_pulls 1.0\n" in daemon.metrics()
    cancelled = daemon.cli("pull", "--cancel", key)
    assert cancelled.stdout == f"{key}: cancelled, and what came is kept\n"
    assert pull_of(daemon, "M-Q4_K_M")["state"] == "cancelled"
    assert daemon.cli("pull", "user/repo").returncode == 0
    assert hub.downloads()[-1].range.startswith("bytes=1000000-")
    assert daemon.cli("pull", "--cancel", key).stdout == f"{key}: had ended already\n"
    counted = daemon.metrics()
    assert "llamavisor_pulls 0.0\n" in counted
    for outcome, count in (("cancelled", 1.0), ("done", 1.0), ("failed", 0.0)):
        assert f'llamavisor_pulls_ended_total{{outcome="{outcome}"}} {count}\n' in counted


def test_what_is_dropped_leaves_nothing(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """A watching command is told, and ends; nothing of it is left on the disk."""
    is_stalled = stalled(hub, folder)
    with on_a_terminal(daemon, "pull", "user/repo") as terminal:
        eventually(is_stalled)
        key = pull_of(daemon, "M-Q4_K_M")["id"]
        assert "removed" in daemon.cli("pull", "--cancel", key, "--drop").stdout
        terminal.until("M-Q4_K_M was cancelled")
        assert terminal.wait() == ExitCode.FAILED
    assert visible(folder) == set()
    assert [path for path in (folder / STAGING).rglob("*") if path.is_file() and path.stat().st_size] == []


def test_one_pull_for_all_who_want_the_same(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """A second one joins in; the bytes come once."""
    is_stalled = stalled(hub, folder)
    (first, begun), (second, joined) = order(daemon, "user/repo"), order(daemon, "user/repo:Q4_K_M")
    assert (first, second) == (202, 202)
    assert begun["pull"]["id"] == joined["pull"]["id"]
    assert (begun["usual"], joined["usual"]) == (True, False)
    eventually(is_stalled)
    hub.released.set()
    wait_for(daemon, "M-Q4_K_M", "done")
    assert order(daemon, "user/repo")[0] == 202
    wait_for(daemon, "M-Q4_K_M", "done")
    assert pull_of(daemon, "M-Q4_K_M")["was_there"]


def test_a_failed_pull_is_told_of(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """The command that watches says why, the list keeps it, and nothing of it is served."""
    hub.faults = [Fault(flip=2_000_000, times=2)]
    done = daemon.cli("pull", "user/repo")
    assert done.returncode == ExitCode.FAILED
    assert "what comes has another hash than the Hub says" in done.stderr
    listed = daemon.cli("pulls").stdout
    assert "failed" in listed
    assert "another hash" in listed
    assert visible(folder) == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_ends_goes_on_when_it_is_back(
    begin: Begin, hub: HubServer, folder: Path, number: signal.Signals
) -> None:
    """Killed or ended amid a pull: nobody sees half a model, and the next daemon fetches only what is missing."""
    is_stalled = stalled(hub, folder)
    with begin() as daemon:
        assert daemon.cli("pull", "user/repo", "--detach").returncode == 0
        eventually(is_stalled)
        daemon.signal(number)
        assert daemon.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        assert visible(folder) == set()
        daemon.start()
        eventually(daemon.is_live)
        wait_for(daemon, "M-Q4_K_M", "done")
        assert visible(folder) == {"M-Q4_K_M.gguf"}
        assert hub.downloads()[-1].range.startswith("bytes=1000000-")


def test_who_watches_outlives_a_restart_of_the_daemon(begin: Begin, hub: HubServer, folder: Path) -> None:
    """The bars go on where the next daemon goes on, and the command ends well."""
    is_stalled = stalled(hub, folder)
    with begin() as daemon, on_a_terminal(daemon, "pull", "user/repo") as terminal:
        eventually(is_stalled)
        terminal.until("M-Q4_K_M.gguf [")
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start()
        terminal.until("M-Q4_K_M: pulled")
        assert terminal.wait() == 0


def test_a_pull_that_was_cancelled_is_known_to_the_next_daemon(begin: Begin, hub: HubServer, folder: Path) -> None:
    """It does not go on by itself, is listed as paused, and can be dropped."""
    is_stalled = stalled(hub, folder)
    with begin() as daemon:
        key = order(daemon, "user/repo")[1]["pull"]["id"]
        eventually(is_stalled)
        assert daemon.call("DELETE", f"{PULLS}/{quote(key)}")[0] == 200
    with begin() as daemon:
        assert pull_of(daemon, "M-Q4_K_M")["state"] == "left"
        assert daemon.cli("pull", "--cancel", key, "--drop").returncode == 0
        assert daemon.call("GET", PULLS)[1] == {"pulls": [], "problems": []}


def test_who_asks_a_model_too_early_is_told_how_to_have_it(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """One of the Hub is to be pulled; one that is on its way is waited for."""
    asked = daemon.cli("run", "user/repo", "hi")
    assert (asked.returncode, "`llamavisor pull user/repo`" in asked.stderr) == (ExitCode.NOT_FOUND, True)
    is_stalled = stalled(hub, folder)
    assert daemon.cli("pull", "user/repo", "--detach").returncode == 0
    eventually(is_stalled)
    asked = daemon.cli("run", "M-Q4_K_M", "hi")
    assert (asked.returncode, "on its way" in asked.stderr) == (ExitCode.NOT_FOUND, True)
    hub.released.set()


def test_a_closed_terminal_stops_nothing(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """Whoever watches may be killed: the daemon brings it all the same."""
    is_stalled = stalled(hub, folder)
    env = {**daemon.env, "LLAMAVISOR_SOCKET": str(daemon.socket)}
    with subprocess.Popen([sys.executable, "-m", "llamavisord", "pull", "user/repo"], env=env) as watching:
        eventually(is_stalled)
        watching.kill()
    hub.released.set()
    wait_for(daemon, "M-Q4_K_M", "done")


def test_every_router_has_a_folder_to_pull_into(
    hub: HubServer, tmp_path: Path, models_dir: Path, free_port: int, fake_llama_server: Callable[..., FakeLlamaServer]
) -> None:
    """The first one if none is named; the list tells of all."""
    other = tmp_path / "other"
    other.mkdir()
    routers = f'[[router]]\nname = "one"\n[[router]]\nname = "two"\nmodels_dir = "{other}"\n'
    config = config_of(models_dir, free_port, routers)
    with RunningDaemon(
        tmp_path, models_dir, fake_llama_server(), config=config, env={"HF_ENDPOINT": hub.url}
    ) as daemon:
        daemon.wait_for_router("ready", "one")
        daemon.wait_for_router("ready", "two")
        assert daemon.cli("pull", "user/tiny", "--router", "two").returncode == 0
        assert visible(other) == {"tiny-Q8_0.gguf"}
        assert daemon.cli("pull", "user/tiny", "--name", "here").returncode == 0
        assert "here.gguf" in visible(models_dir)
        listed = daemon.call("GET", PULLS)[1]["pulls"]
        assert {each["folder"] for each in listed} == {str(models_dir), str(other)}


@contextmanager
def asked(daemon: RunningDaemon, method: str, path: str, body: object = None) -> Iterator[HTTPResponse]:
    """What the gateway answers."""
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=PATIENCE_S)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body))
        yield connection.getresponse()


def ask(daemon: RunningDaemon, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Status and body of that."""
    with asked(daemon, method, path, body) as response:
        return response.status, json.loads(response.read())


def until(stream: HTTPResponse, event: str) -> list[dict[str, Any]]:
    """The events of a stream up to the first of this kind."""
    told: list[dict[str, Any]] = []
    while not told or told[-1]["event"] != event:
        line = stream.readline()
        assert line, f"the stream ended after {told}"
        told += [json.loads(line[5:])] if line.startswith(b"data:") else []
    return told


def test_a_client_of_the_gateway_has_a_model_downloaded(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """With llama-server's answers and events: it is listed as downloading, then under its own name, and answers."""
    is_stalled = stalled(hub, folder)
    daemon.wait_for_gateway()
    with asked(daemon, "GET", "/models/sse") as stream:
        assert ask(daemon, "POST", "/models", {"model": "user/repo"}) == (200, {"success": True})
        assert until(stream, "model_status")[-1] == {
            "model": "user/repo",
            "event": "model_status",
            "data": {"status": "downloading"},
        }
        status, refused = ask(daemon, "POST", "/models", {"model": "user/repo"})
        assert (status, refused["error"]["message"]) == (400, "model 'user/repo' already exists")
        eventually(is_stalled)
        listed = {item["id"]: item["status"]["value"] for item in ask(daemon, "GET", "/models")[1]["data"]}
        assert listed == {"user/repo": "downloading"}
        (progress,) = until(stream, "download_progress")[-1]["data"]["progress"].items()
        assert progress[0].endswith("/M-Q4_K_M.gguf")
        hub.released.set()
        told = until(stream, "download_finished")
        assert {each["model"] for each in told} <= {"user/repo", "*"}
    daemon.wait_for_model("M-Q4_K_M", "unloaded")
    assert [item["id"] for item in ask(daemon, "GET", "/models")[1]["data"]] == ["M-Q4_K_M"]


def test_a_client_of_the_gateway_gives_a_download_up(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """By the call that unloads, as with llama-server; what came is kept."""
    is_stalled = stalled(hub, folder)
    daemon.wait_for_gateway()
    with asked(daemon, "GET", "/models/sse") as stream:
        assert ask(daemon, "POST", "/models", {"model": "user/repo"})[0] == 200
        eventually(is_stalled)
        assert ask(daemon, "POST", "/models/unload", {"model": "user/repo"}) == (200, {"success": True})
        until(stream, "download_failed")
    assert pull_of(daemon, "M-Q4_K_M")["state"] == "cancelled"
    assert ask(daemon, "GET", "/models")[1]["data"] == []


def test_a_client_is_told_that_a_download_has_failed(daemon: RunningDaemon) -> None:
    """The reason is in the log: it is the business of who looks after the machine."""
    daemon.wait_for_gateway()
    with asked(daemon, "GET", "/models/sse") as stream:
        assert ask(daemon, "POST", "/models", {"model": "user/nothing"})[0] == 200
        until(stream, "download_failed")
    assert "no such repository" in daemon.wait_for_event("Warned", lambda event: "pull" in event["subject"])["text"]


def test_no_download_of_a_client_ends_the_daemon(begin: Begin, tmp_path: Path) -> None:
    """A token that cannot be read, or whatever else is wrong here, is the end of that download alone."""
    with begin(HF_TOKEN_PATH=str(tmp_path)) as daemon:
        daemon.wait_for_router("ready")
        daemon.wait_for_gateway()
        with asked(daemon, "GET", "/models/sse") as stream:
            assert ask(daemon, "POST", "/models", {"model": "user/repo"})[0] == 200
            until(stream, "download_failed")
        told = daemon.wait_for_event("Warned", lambda event: "pull" in event["subject"])["text"]
        assert told == "the token of `hf auth login` cannot be read: Is a directory"
        status, refused = order(daemon, "user/repo")
        assert (status, refused["why"]) == (403, "unauthorized")


def test_what_somebody_else_has_begun_goes_on(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """A client that joined a pull of an administrator gives up its own interest in it, and nothing else."""
    is_stalled = stalled(hub, folder)
    assert order(daemon, "user/repo")[0] == 202
    eventually(is_stalled)
    daemon.wait_for_gateway()
    with asked(daemon, "GET", "/models/sse") as stream:
        assert ask(daemon, "POST", "/models", {"model": "user/repo"})[0] == 200
        until(stream, "download_progress")
        assert ask(daemon, "POST", "/models/unload", {"model": "user/repo"}) == (200, {"success": True})
        until(stream, "download_failed")
    assert pull_of(daemon, "M-Q4_K_M")["state"] == "under_way"
    hub.released.set()
    wait_for(daemon, "M-Q4_K_M", "done")


def test_clients_cannot_have_downloads_without_end(daemon: RunningDaemon, hub: HubServer, folder: Path) -> None:
    """Sixteen at once, though all be one pull, and who wants more is told to come again."""
    is_stalled = stalled(hub, folder)
    daemon.wait_for_gateway()
    words = [f"{where}user/repo:{q}4_{k}_{m}" for where in ("", "hf.co/") for q in "qQ" for k in "kK" for m in "mM"]
    for word in words:
        assert ask(daemon, "POST", "/models", {"model": word}) == (200, {"success": True})
    status, refused = ask(daemon, "POST", "/models", {"model": "user/repo"})
    assert (status, refused["error"]["message"]) == (503, "too many downloads")
    eventually(is_stalled)
    assert len(ask(daemon, "GET", "/models")[1]["data"]) == 16
    hub.released.set()
    wait_for(daemon, "M-Q4_K_M", "done")


def test_what_a_person_wants_to_know(begin: Begin, hub: HubServer, folder: Path) -> None:
    """That it does not fit, that nothing comes, that the daemon is gone; a model's name will do to end its pull."""
    hub.repositories["user/large"] = Repository({"L-Q4_K_M.gguf": HubFile(header(4096), size=200 * 1024**2)})
    is_stalled = stalled(hub, folder)
    with begin(LLAMAVISOR_MEMORY="64MiB") as daemon:
        daemon.wait_for_router("ready")
        with on_a_terminal(daemon, "pull", "user/large") as terminal:
            terminal.until("200.0 MiB do not go into the 64.0 MiB of RAM of router main; --list shows what does")
            eventually(is_stalled)
            terminal.until("nothing for ")
            stalled(hub, folder)  # the next daemon is to be at it when it is asked
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            terminal.until("the daemon does not answer")
            daemon.start()
            eventually(daemon.is_live)
            eventually(lambda: daemon.call("GET", PULLS)[1]["pulls"])
            assert daemon.cli("pull", "--cancel", "L-Q4_K_M", "--drop").stdout.endswith("what came is removed\n")
            terminal.until("was cancelled")
        assert daemon.call("GET", PULLS)[1]["pulls"] == []
        refused = daemon.cli("pull", "--cancel", "L-Q4_K_M", "--drop")
        assert "there is no pull 'L-Q4_K_M'" in refused.stderr


def test_every_failure_of_the_hub_has_a_status() -> None:
    """None of them ends as a bug."""
    assert set(HUB_STATUS) == set(Why)
