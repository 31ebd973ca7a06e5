"""What llamavisor relies on in a llama-server router, asked of the fake one and of the true one alike.

A difference between the two is a bug of the fake; what a new llama-server does otherwise is news for llamavisor.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.bare_router import PRESET, BareRouter
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model

FILE_NOT_FOUND = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
LOADING_MODEL = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
SAYS = {"alpha": " I am alpha", "beta": " I am beta", "gamma": " I am gamma"}


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
def program(request: pytest.FixtureRequest, fake_llama_server: Callable[..., FakeLlamaServer]) -> str:
    """A llama-server: first the fake, then the true one."""
    if request.param == "real":
        return str(request.getfixturevalue("llama_server"))
    return str(fake_llama_server(models={"slow": {"load_s": 3.0}}))


@pytest.fixture
def start(program: str, tmp_path: Path, models_dir: Path) -> Callable[..., BareRouter]:
    """Makes routers over `models_dir`, not yet started."""

    def make(folder: str = "router", **how: object) -> BareRouter:
        return BareRouter(program, tmp_path / folder, models_dir, **how)

    return make


@pytest.fixture
def router(start: Callable[..., BareRouter]) -> Iterator[BareRouter]:
    """A router that answers."""
    with start() as router:
        yield router


def _error(status: int, message: str, kind: str = "invalid_request_error") -> dict[str, object]:
    return {"error": {"code": status, "message": message, "type": kind}}


# The program


def test_help_shows_every_option_that_we_use(program: str) -> None:
    """The options of our command lines and presets are in --help, in the words of build b11434."""
    asked = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    ours = Path(__file__).parent.joinpath("server", "help.txt").read_text(encoding="utf-8")
    blocks = re.findall(r"^(?!-----)-.*(?:\n(?!-|\n).*)*", ours, re.MULTILINE)
    assert len(blocks) > 100
    assert [block for block in blocks if block not in asked] == []


def test_version_goes_to_stderr(program: str) -> None:
    """--version exits with 0 and says on standard error which version and which build this is."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert re.search(r"^version: \S+ \((build \d+, commit )?\w+\)$", done.stderr, re.MULTILINE)


def test_list_devices_without_a_gpu(program: str) -> None:
    """--list-devices exits with 0 and lists devices, or "(none)", indented under a heading."""
    done = subprocess.run([program, "--list-devices"], capture_output=True, text=True, check=True)
    heading, *devices = done.stdout.splitlines()
    assert heading == "Available devices:"
    assert devices
    assert all(device.startswith("  ") for device in devices)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--nosuch"], "error: invalid argument: --nosuch"),
        (["--ctx-size"], 'error while handling argument "--ctx-size": expected value for argument'),
        (["--ctx-size", "many"], 'error while handling argument "--ctx-size": stoi'),
        (["--flash-attn", "maybe"], 'error while handling argument "--flash-attn": error: unknown value for'),
    ],
)
def test_a_bad_argument_ends_the_start(start: Callable[..., BareRouter], argument: list[str], message: str) -> None:
    """An argument that llama-server does not understand makes it exit with 1 and name it."""
    router = start(arguments=argument)
    router.start()
    try:
        assert router.wait() == 1
        assert message in router.stderr
    finally:
        router.stop()


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("[*]\nnosuchkey = 1\n", "option 'nosuchkey' not recognized in preset '*'"),
        ("[alpha]\nnosuchkey = 1\n", "option 'nosuchkey' not recognized in preset 'alpha'"),
        ("[alpha\n", "failed to parse server config file: "),
        ("[*]\nload-on-startup = 1\n", "number of models to load on startup (3) exceeds models_max (1)"),
    ],
)
def test_a_bad_preset_ends_the_start(start: Callable[..., BareRouter], preset: str, message: str) -> None:
    """One bad key anywhere in the preset makes the whole router exit with 1 and name it."""
    router = start(preset=preset, arguments=["--models-max", "1"])
    router.start()
    try:
        assert router.wait() == 1
        assert f"failed to initialize router models: {message}" in router.stderr
    finally:
        router.stop()


def test_a_missing_folder_ends_the_start(program: str, tmp_path: Path) -> None:
    """A models folder that is not there makes the router exit with 1."""
    router = BareRouter(program, tmp_path / "router", tmp_path / "nowhere")
    router.start()
    try:
        assert router.wait() == 1
        assert "nowhere' does not exist or is not a directory" in router.stderr
    finally:
        router.stop()


def test_a_taken_port_ends_the_start(start: Callable[..., BareRouter], router: BareRouter) -> None:
    """A second router on the same port exits with 1 and says which port."""
    second = start("second", port=router.port)
    second.start()
    try:
        assert second.wait() == 1
        assert f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {router.port}" in second.stderr
    finally:
        second.stop()
    assert router.call("GET", "/health").status == 200


def test_an_empty_folder_is_no_error(program: str, tmp_path: Path) -> None:
    """A router without a single model is ready; its first reload that finds one tells no event."""
    folder = tmp_path / "models"
    folder.mkdir()
    with BareRouter(program, tmp_path / "router", folder) as router, router.events() as events:
        assert router.models() == {}
        assert "no models found on the system" in router.stderr
        write_tiny_model(folder / "first.gguf", ["first"])
        assert set(router.models(reload=True)) == {"first"}
        assert set(router.models(reload=True)) == {"first"}
        events.wait_for(lambda event: event["event"] == "models_reload")
        assert len(events.all) == 1


# What the router says of itself


def test_health_and_props(router: BareRouter) -> None:
    """/health says only that it lives, /props that it is a router."""
    for path in ("/health", "/v1/health"):
        answer = router.call("GET", path)
        assert (answer.status, answer.json) == (200, {"status": "ok"})
    props = router.call("GET", "/props").json
    assert props["role"] == "router"
    assert props["max_instances"] == 4
    assert props["models_autoload"] is True
    assert isinstance(props["build_info"], str)


def test_the_list_of_models(router: BareRouter) -> None:
    """GET /models has every model with its state and with the command line that it would be started with."""
    answer = router.call("GET", "/models")
    assert answer.json["object"] == "list"
    assert router.call("GET", "/v1/models").json["data"] == answer.json["data"]
    models = router.models()
    assert list(models) == ["alpha", "beta", "gamma"]
    alpha = models["alpha"]
    assert alpha.keys() >= {"id", "aliases", "tags", "created", "status", "architecture", "source", "can_remove"}
    assert "meta" not in alpha
    assert alpha["source"] == "models_dir"
    assert set(alpha["status"]) == {"value", "args", "preset"}
    assert alpha["status"]["value"] == "unloaded"
    arguments = alpha["status"]["args"]
    assert arguments[arguments.index("--port") + 1] == "0"
    assert arguments[arguments.index("--alias") + 1] == "alpha"
    assert arguments[arguments.index("--model") + 1].endswith("/alpha.gguf")
    assert arguments[arguments.index("--threads") + 1] == "1"
    assert "stop-timeout = 3\n" in alpha["status"]["preset"]


def test_argv_beats_a_section_and_a_section_beats_the_common_one(start: Callable[..., BareRouter]) -> None:
    """What the router gets on its command line goes over every section, and that over the common section."""
    preset = f"{PRESET}ctx-size = 1024\nbatch-size = 64\n[alpha]\nc = 512\nb = 32\n"
    with start(preset=preset, arguments=["--batch-size", "128"]) as router:
        for name, n_ctx in (("alpha", "512"), ("beta", "1024")):
            arguments = router.models()[name]["status"]["args"]
            assert arguments[arguments.index("--ctx-size") + 1] == n_ctx
            assert arguments[arguments.index("--batch-size") + 1] == "128"
        assert router.models()["alpha"]["source"] == "preset"


def test_what_is_and_is_not_a_model(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """Files and one level of folders are models; companions, other endings and dangling links are not."""
    alpha = models_dir / "alpha.gguf"
    folder = models_dir / "folder"
    folder.mkdir()
    (folder / "first-00001-of-00002.gguf").symlink_to(alpha)
    (folder / "second-00002-of-00002.gguf").symlink_to(alpha)
    for name in ("mmproj-x.gguf", "mtp-x.gguf", "X.GGUF", "x.gguf.part"):
        (models_dir / name).symlink_to(alpha)
    (models_dir / "dangling.gguf").symlink_to("nowhere")
    (models_dir / "linked.gguf").symlink_to(alpha)
    (models_dir / "empty.gguf").touch()
    with start() as router:
        models = router.models()
        assert set(models) == {"alpha", "beta", "gamma", "folder", "linked", "empty"}
        arguments = models["folder"]["status"]["args"]
        assert arguments[arguments.index("--model") + 1].endswith("/folder/first-00001-of-00002.gguf")


def test_a_section_makes_a_model_of_any_name(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """A section with a path is a model, and text after a colon in its name is put into capitals."""
    preset = f"{PRESET}[org/name:q4]\nmodel = {models_dir}/alpha.gguf\nalias = nick\n"
    with start(preset=preset) as router:
        assert router.models()["org/name:Q4"]["aliases"] == ["nick"]
        assert router.load("org/name:Q4").name == "org/name:Q4"
        answer = router.chat("nick")
        assert answer.json["choices"][0]["message"]["content"] == SAYS["alpha"]
        assert answer.json["model"] == "org/name:Q4"


# Loading and unloading


def test_a_load_as_the_events_tell_it(router: BareRouter) -> None:
    """A load is answered at once; the events tell of the start, the progress, and the end of loading."""
    with router.events() as events:
        answer = router.call("POST", "/models/load", {"model": "alpha"})
        assert (answer.status, answer.json) == (200, {"success": True})
        loaded = events.wait_for_status("alpha", "loaded")
        first, *progress, last = events.of("alpha")
        assert first == {"model": "alpha", "event": "model_status", "data": {"status": "loading"}}
        assert progress
        for event in progress:
            assert event["event"] == "status_change"
            assert event["data"]["status"] == "loading"
            assert event["data"]["progress"]["stages"] == ["text_model"]
            assert event["data"]["progress"]["current"] == "text_model"
        assert progress[0]["data"]["progress"]["value"] == 0.0
        assert last is loaded
        assert loaded["event"] == "status_change"
        info = loaded["data"]["info"]
        assert info["id"] == "alpha"
        assert set(info["meta"]) == set(router.models()["alpha"]["meta"])
        assert info["meta"]["n_ctx"] == 4096
        assert info["meta"]["n_vocab"] == 262


def test_an_unload_as_the_events_tell_it(router: BareRouter) -> None:
    """An unload is answered at once; the process ends with 0, and its old port stays in the list."""
    process = router.load("alpha")
    with router.events() as events:
        answer = router.call("POST", "/models/unload", {"model": "alpha"})
        assert (answer.status, answer.json) == (200, {"success": True})
        gone = events.wait_for_status("alpha", "unloaded")
        assert gone == {
            "model": "alpha",
            "event": "status_change",
            "data": {"status": "unloaded", "exit_code": 0},
        }
    assert not psutil.pid_exists(process.pid)
    status = router.models()["alpha"]["status"]
    assert "failed" not in status
    assert status["args"][status["args"].index("--port") + 1] == str(process.port)


def test_a_model_is_a_process_below_the_router(router: BareRouter) -> None:
    """Its command line has --port and --alias; it is in the router's group and listens on the loopback address."""
    process = router.load("alpha")
    assert [process] == router.processes()
    assert psutil.Process(process.pid).ppid() == router.pid
    arguments = router.models()["alpha"]["status"]["args"]
    assert arguments[arguments.index("--port") + 1] == str(process.port)
    sockets = psutil.Process(process.pid).net_connections("tcp")
    assert [tuple(one.laddr) for one in sockets if one.status == "LISTEN"] == [("127.0.0.1", process.port)]
    assert "LLAMA_SERVER_ROUTER_PORT" in psutil.Process(process.pid).environ()


def test_refusals(router: BareRouter) -> None:
    """What cannot be loaded or unloaded, in llama-server's own words."""
    load, unload = "/models/load", "/models/unload"
    for body in ({"model": "nope"}, {}, [1], {"model": 5}):
        answer = router.call("POST", load, body)
        assert (answer.status, answer.json) == (404, FILE_NOT_FOUND)
        answer = router.call("POST", unload, body)
        assert (answer.status, answer.json) == (400, _error(400, "model is not found"))
    answer = router.call("POST", unload, {"model": "alpha"})
    assert (answer.status, answer.json) == (400, _error(400, "model is not running"))
    router.load("alpha")
    answer = router.call("POST", load, {"model": "alpha"})
    assert (answer.status, answer.json) == (400, _error(400, "model is already running"))
    for body in ("{bad", ""):
        answer = router.call("POST", load, body)
        assert answer.status == 400
        assert answer.json["error"]["message"].startswith("[json.exception.parse_error.101] parse error at line 1")
    for method, path in (("GET", "/nope"), ("POST", "/models/status"), ("GET", "/v1/models/alpha")):
        answer = router.call(method, path, "{}" if method == "POST" else None)
        assert (answer.status, answer.json) == (404, FILE_NOT_FOUND)


def test_a_file_that_is_no_model(router: BareRouter, models_dir: Path) -> None:
    """A broken file is listed; its load fails with exit code 1, the list says so until a reload."""
    (models_dir / "garbage.gguf").write_bytes(b"hello")
    whole = (models_dir / "alpha.gguf").read_bytes()
    (models_dir / "partial.gguf").write_bytes(whole[:60_000])
    router.models(reload=True)
    with router.events() as events:
        for name in ("garbage", "partial"):
            assert router.call("POST", "/models/load", {"model": name}).status == 200
            gone = events.wait_for_status(name, "unloaded")
            assert gone["data"] == {"status": "unloaded", "exit_code": 1}
            status = eventually(lambda name=name: router.models()[name]["status"])
            assert (status["value"], status["exit_code"], status["failed"]) == ("unloaded", 1, True)
    answer = router.chat("garbage")
    failed = _error(500, "model name=garbage failed to load", "server_error")
    assert (answer.status, answer.json) == (500, failed)
    assert "failed to load model" in router.stdout
    assert "failed" not in router.models(reload=True)["garbage"]["status"]


def test_a_loading_model_is_killed_by_an_unload(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """While it loads it answers 503, and unloading it then looks like a crash: exit code 1."""
    _make_slow(models_dir, "slow")
    with start() as router, router.events() as events:
        assert router.call("POST", "/models/load", {"model": "slow"}).status == 200
        events.wait_for(lambda event: "progress" in event["data"])
        answer = router.chat("slow", query="?autoload=false")
        assert (answer.status, answer.json) == (503, LOADING_MODEL)
        assert router.call("POST", "/models/unload", {"model": "slow"}).status == 200
        assert events.wait_for_status("slow", "unloaded")["data"]["exit_code"] == 1
        assert router.models()["slow"]["status"]["failed"] is True


def test_the_load_limit(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """A load evicts the least recently used idle model, and is refused while all that run are loading."""
    _make_slow(models_dir, "slow")
    with start(arguments=["--models-max", "2"]) as router, router.events() as events:
        router.load("alpha")
        router.load("beta")
        assert router.chat("alpha").status == 200
        router.load("gamma")
        assert events.wait_for(lambda event: event["data"]["status"] == "unloaded")["model"] == "beta"
        assert {process.name for process in router.processes()} == {"alpha", "gamma"}
        router.unload("alpha")
        router.unload("gamma")
    with start(arguments=["--models-max", "1"]) as router:
        assert router.call("POST", "/models/load", {"model": "slow"}).status == 200
        answer = router.call("POST", "/models/load", {"model": "beta"})
        limit = _error(500, "model limit reached, try again later", "server_error")
        assert (answer.status, answer.json) == (500, limit)


def test_a_reload_sees_what_has_changed(router: BareRouter, models_dir: Path) -> None:
    """A new file appears, a removed one goes, and what runs unchanged is left alone."""
    process = router.load("alpha")
    with router.events() as events:
        write_tiny_model(models_dir / "delta.gguf", ["I", "am", "delta"])
        (models_dir / "gamma.gguf").unlink()
        assert "delta" not in router.models()
        assert set(router.models(reload=True)) == {"alpha", "beta", "delta"}
        told = events.wait_for(lambda event: event["model"] == "*")
        assert told == {"model": "*", "event": "models_reload"}
    assert router.processes() == [process]
    assert router.chat("delta").json["choices"][0]["message"]["content"] == " I am delta"


def test_a_reload_stops_what_has_changed(router: BareRouter, models_dir: Path) -> None:
    """A running model whose file is gone or whose options have changed has ended when a reload is answered."""
    router.load("alpha")
    router.load("beta")
    (models_dir / "alpha.gguf").unlink()
    router.preset.write_text(f"{PRESET}[beta]\nctx-size = 512\n", encoding="utf-8")
    models = router.models(reload=True)
    assert set(models) == {"beta", "gamma"}
    assert models["beta"]["status"]["value"] == "unloaded"
    assert router.processes() == []


def test_a_refused_reload_changes_nothing(router: BareRouter) -> None:
    """A preset that it does not understand makes a reload fail with the reason; all stays as it was."""
    process = router.load("alpha")
    good = router.preset.read_text(encoding="utf-8")
    router.preset.write_text("[*]\nnosuchkey = 1\n", encoding="utf-8")
    answer = router.call("GET", "/models?reload=1")
    message = "option 'nosuchkey' not recognized in preset '*'"
    assert (answer.status, answer.json) == (500, _error(500, message, "server_error"))
    router.preset.write_text(good, encoding="utf-8")
    assert set(router.models(reload=True)) == {"alpha", "beta", "gamma"}
    assert router.processes() == [process]


# Requests for models


def test_a_chat_loads_its_model(router: BareRouter) -> None:
    """A request for an unloaded model waits until it is loaded, and the model says its words."""
    for name, words in SAYS.items():
        answer = router.chat(name)
        assert answer.status == 200
        assert answer.json["choices"][0]["message"] == {"role": "assistant", "content": words}
        assert answer.json["model"] == name
    assert {process.name for process in router.processes()} == set(SAYS)


def test_a_chat_evicts_the_least_recently_used(start: Callable[..., BareRouter]) -> None:
    """At the limit a request makes room by ending the least recently used model, with exit code 0."""
    with start(arguments=["--models-max", "2"]) as router, router.events() as events:
        for name in ("alpha", "beta", "alpha", "gamma"):
            assert router.chat(name).status == 200
        gone = events.wait_for(lambda event: event["data"]["status"] == "unloaded")
        assert (gone["model"], gone["data"]["exit_code"]) == ("beta", 0)
        assert {process.name for process in router.processes()} == {"alpha", "gamma"}


def test_a_stream(router: BareRouter) -> None:
    """A stream is server-sent events, one word each, and ends with [DONE]."""
    answer = router.chat("alpha", stream=True)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    words = re.findall(r'"delta":\{"content":"([^"]*)"\}', answer.text)
    assert "".join(words) == SAYS["alpha"]


def test_an_endless_model_speaks_until_it_has_said_enough(router: BareRouter, models_dir: Path) -> None:
    """A looping model begins again after its last word, and stops at max_tokens."""
    write_tiny_model(models_dir / "endless.gguf", ["on", "and"], loop=True)
    router.models(reload=True)
    choice = router.chat("endless", max_tokens=5).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == " on and on and on"


def test_requests_that_no_model_gets(start: Callable[..., BareRouter]) -> None:
    """No name, an unknown one, an unloaded model that may not be loaded: 400, each in its words."""
    with start(arguments=["--no-models-autoload"]) as router:
        assert router.call("GET", "/props").json["models_autoload"] is False
        missing = _error(400, "model name is missing from the request")
        unknown = _error(400, "model 'nope' not found")
        unloaded = _error(400, "model is not loaded")
        assert router.call("POST", "/v1/chat/completions", {"messages": []}).json == missing
        assert router.call("GET", "/metrics").json == missing
        assert router.chat("nope").json == unknown
        assert router.call("GET", "/metrics?model=nope").json == unknown
        assert router.chat("alpha").json == unloaded
        assert router.call("GET", "/metrics?model=alpha").json == unloaded
        assert router.processes() == []
        assert router.chat("alpha", query="?autoload=true").status == 200


def test_metrics_of_a_model(router: BareRouter) -> None:
    """A model's metrics are to be had through the router and on its own port."""
    process = router.load("alpha")
    names = ("prompt_tokens_total", "tokens_predicted_total", "n_decode_total", "requests_processing")
    for path, port in (("/metrics?model=alpha", router.port), ("/metrics", process.port)):
        answer = router.call("GET", path, port=port)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        for name in names:
            assert re.search(rf"^llamacpp:{name} \d+$", answer.text, re.MULTILINE)


def test_metrics_that_nobody_asked_for(start: Callable[..., BareRouter]) -> None:
    """Without --metrics a model answers 501."""
    with start(preset="[*]\nthreads = 1\n") as router:
        answer = router.call("GET", "/metrics?model=alpha")
        message = "This server does not support metrics endpoint. Start it with `--metrics`"
        assert (answer.status, answer.json) == (501, _error(501, message, "not_supported_error"))


def test_sleep(start: Callable[..., BareRouter]) -> None:
    """An idle model falls asleep and keeps its process; a request wakes it, without news of what it is."""
    with start(preset=f"{PRESET}sleep-idle-seconds = 1\n") as router, router.events() as events:
        process = router.load("alpha")
        events.wait_for_status("alpha", "sleeping")
        assert router.status("alpha") == "sleeping"
        seen = len(events.all)
        assert router.chat("alpha").status == 200
        assert "info" not in events.wait_for_status("alpha", "loaded", since=seen)["data"]
        assert router.processes() == [process]


# The key


def test_the_api_key(start: Callable[..., BareRouter]) -> None:
    """With LLAMA_API_KEY in its environment the router asks for it but on /health, and its models do too."""
    with start(env={"LLAMA_API_KEY": "secret"}) as router:
        process = router.load("alpha")
        refused = {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}}
        nothing, wrong = {"X-Nothing": "1"}, {"Authorization": "Bearer other"}
        right = ({"Authorization": "Bearer secret"}, {"Authorization": "secret"}, {"X-Api-Key": "secret"})
        for port in (router.port, process.port):
            assert router.call("GET", "/health", headers=nothing, port=port).status == 200
            for headers in (nothing, wrong):
                answer = router.call("GET", "/v1/models", headers=headers, port=port)
                assert (answer.status, answer.json) == (401, refused)
            for headers in right:
                assert router.call("GET", "/v1/models", headers=headers, port=port).status == 200
        assert router.chat("alpha").status == 200
        assert "secret" not in router.call("GET", "/models").text


# Ends


def test_a_killed_model(router: BareRouter) -> None:
    """A model killed from outside is told of as unloaded with exit code 1, and the next request loads it again."""
    process = router.load("alpha")
    with router.events() as events:
        psutil.Process(process.pid).kill()
        gone = events.wait_for_status("alpha", "unloaded")
        assert gone["data"] == {"status": "unloaded", "exit_code": 1}
        assert router.models()["alpha"]["status"]["failed"] is True
    assert router.chat("alpha").status == 200
    assert router.process_of("alpha").pid != process.pid


def test_a_terminated_model_counts_as_loaded(router: BareRouter) -> None:
    """SIGTERM to a model stops its service and not its process: it is "loaded" until it is unloaded."""
    process = router.load("alpha")
    psutil.Process(process.pid).terminate()
    dead = eventually(lambda: _answer_if(router.chat("alpha"), 500), what="a dead model")
    assert dead.text == "proxy error: Could not establish connection"
    assert dead.headers["Content-Type"].startswith("application/json")
    assert router.status("alpha") == "loaded"
    router.unload("alpha")
    assert not psutil.pid_exists(process.pid)


def test_a_stopped_model_is_killed_after_its_stop_timeout(start: Callable[..., BareRouter]) -> None:
    """A model that does not react to an unload counts as loaded for its stop-timeout; then it is killed."""
    with start(preset="[*]\nthreads = 1\nstop-timeout = 1\n") as router, router.events() as events:
        process = router.load("alpha")
        psutil.Process(process.pid).suspend()
        begin = time.monotonic()
        assert router.call("POST", "/models/unload", {"model": "alpha"}).status == 200
        assert router.status("alpha") == "loaded"
        answer = router.call("POST", "/models/load", {"model": "alpha"})
        assert (answer.status, answer.json) == (400, _error(400, "model is already running"))
        assert router.call("POST", "/models/unload", {"model": "alpha"}).status == 200
        assert events.wait_for_status("alpha", "unloaded")["data"]["exit_code"] == 1
        assert time.monotonic() - begin >= 0.9
        assert "force-killing model instance name=alpha after timeout" in router.stderr


def test_a_model_that_dies_while_it_answers(router: BareRouter, models_dir: Path) -> None:
    """A stream whose model dies ends with one line of plain text and without [DONE]."""
    write_tiny_model(models_dir / "endless.gguf", ["on", "and"], loop=True)
    router.models(reload=True)
    process = router.load("endless")
    connection = HTTPConnection("127.0.0.1", router.port)
    with contextlib.closing(connection):
        body = {"model": "endless", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        connection.request("POST", "/v1/chat/completions", body=json.dumps(body))
        with connection.getresponse() as response:
            assert response.readline().startswith(b"data: ")
            psutil.Process(process.pid).kill()
            rest = response.read()
    assert rest.endswith(b"proxy error: Failed to read connection")
    assert b"[DONE]" not in rest


def test_sigterm_to_an_idle_router(router: BareRouter) -> None:
    """SIGTERM ends the router with 0, its models before it, and its event streams cleanly."""
    processes = [router.load("alpha"), router.load("beta")]
    with router.events() as events:
        router.signal(signal.SIGTERM)
        assert router.wait() == 0
        assert not any(psutil.pid_exists(process.pid) for process in processes)
        eventually(lambda: events.has_ended, what="the end of the event stream")


def test_sigterm_to_a_router_with_a_loading_model(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """SIGTERM does not wait for a load: the loading model is killed."""
    _make_slow(models_dir, "slow")
    with start() as router:
        assert router.call("POST", "/models/load", {"model": "slow"}).status == 200
        begin = time.monotonic()
        router.signal(signal.SIGTERM)
        assert router.wait() == 0
        assert time.monotonic() - begin < 2.5


def test_sigkill_to_a_router(router: BareRouter) -> None:
    """When the router is killed its models see the end of their standard input and end too."""
    processes = [router.load("alpha"), router.load("beta")]
    router.signal(signal.SIGKILL)
    assert router.wait() == -signal.SIGKILL
    eventually(lambda: not any(_is_alive(process.pid) for process in processes), what="the end of the models")


# What it prints


def test_log_lines(router: BareRouter) -> None:
    """The router's own log is on standard error, the models' logs on standard output, each line with a port."""
    process = router.load("alpha")
    assert f"listening on http://127.0.0.1:{router.port}\n" in router.stderr
    assert f"spawning server instance with name=alpha on port {process.port}\n" in router.stderr
    assert re.search(rf"^\[{process.port}\] .* model loaded$", router.stdout, re.MULTILINE)
    eventually(lambda: f"listening on http://127.0.0.1:{process.port}\n" in router.stdout)
    router.unload("alpha")
    eventually(lambda: "instance name=alpha exited with status 0\n" in router.stderr)
    for line in router.stderr.splitlines():
        assert re.match(r"\d+\.\d\d\.\d{3}\.\d{3} [IWE] ", line), line


def _make_slow(folder: Path, name: str) -> None:
    """A model that takes seconds to load: true llama-server has many layers to set up, the fake is told."""
    write_tiny_model(folder / f"{name}.gguf", ["slow"], n_layer=200, n_ctx=60_000)


def _answer_if(answer: object, status: int) -> object:
    return answer if answer.status == status else None


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
