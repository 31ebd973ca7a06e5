"""What llamavisor relies on in a llama-server router as a process, asked of the fake one and of the true one alike.

A difference between the two is a bug of the fake; what a new llama-server does otherwise is news for llamavisor.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from fakes.bare_router import PRESET, BareRouter, make_slow, refusal
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model

# The program


def test_help_shows_the_options_of_every_launch(program: str) -> None:
    """--help prints, on standard output, every option that a router is started with whatever the configuration says."""
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    for spelling in ("--host", "--port", "--models-dir", "--models-preset", "--models-max", "--no-models-autoload"):
        assert re.search(rf"^(-.* )?{spelling}\b", shown, re.MULTILINE), spelling
    for spelling in ("--timeout", "--threads-http", "--log-colors", "--model", "--alias", "--metrics"):
        assert re.search(rf"^(-.* )?{spelling}\b", shown, re.MULTILINE), spelling


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


def test_an_empty_folder_is_norefusal(program: str, tmp_path: Path) -> None:
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
    lists = [router.call("GET", path).json for path in ("/models", "/v1/models")]
    for each in lists:
        assert each["object"] == "list"
        assert all(isinstance(model.pop("created"), int) for model in each["data"])  # the second of the answer
    assert lists[0] == lists[1]
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
        assert answer.json["choices"][0]["message"]["content"] == " I am alpha"
        assert answer.json["model"] == "org/name:Q4"


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
    with start(preset="[*]\nthreads = 1\nstop-timeout = 3\n") as router, router.events() as events:
        process = router.load("alpha")
        psutil.Process(process.pid).suspend()
        begin = time.monotonic()
        assert router.call("POST", "/models/unload", {"model": "alpha"}).status == 200
        assert router.status("alpha") == "loaded"
        answer = router.call("POST", "/models/load", {"model": "alpha"})
        assert (answer.status, answer.json) == (400, refusal(400, "model is already running"))
        assert router.call("POST", "/models/unload", {"model": "alpha"}).status == 200
        assert events.wait_for_status("alpha", "unloaded")["data"]["exit_code"] == 1
        assert time.monotonic() - begin >= 2.9
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
    """SIGTERM ends the router with 0, its models before it, and before those its event streams, cleanly."""
    processes = [router.load("alpha"), router.load("beta")]
    with router.events() as events:
        told = len(events.all)
        router.signal(signal.SIGTERM)
        assert router.wait() == 0
        assert not any(psutil.pid_exists(process.pid) for process in processes)
        eventually(lambda: events.has_ended, what="the end of the event stream")
        assert events.all[told:] == []


def test_sigterm_to_a_router_with_a_loading_model(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """SIGTERM does not wait for a load: the loading model is killed."""
    make_slow(models_dir, "slow")
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


def _answer_if(answer: object, status: int) -> object:
    return answer if answer.status == status else None


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
