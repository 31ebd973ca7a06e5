"""What llamavisor relies on in a llama-server router and its models, asked of the fake one and of the true one alike.

A difference between the two is a bug of the fake; what a new llama-server does otherwise is news for llamavisor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import psutil

from fakes.bare_router import PRESET, BareRouter, make_slow, refusal
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model

FILE_NOT_FOUND = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
LOADING_MODEL = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
SAYS = {"alpha": " I am alpha", "beta": " I am beta", "gamma": " I am gamma"}


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
        assert (answer.status, answer.json) == (400, refusal(400, "model is not found"))
    answer = router.call("POST", unload, {"model": "alpha"})
    assert (answer.status, answer.json) == (400, refusal(400, "model is not running"))
    router.load("alpha")
    answer = router.call("POST", load, {"model": "alpha"})
    assert (answer.status, answer.json) == (400, refusal(400, "model is already running"))
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
    failed = refusal(500, "model name=garbage failed to load", "server_error")
    assert (answer.status, answer.json) == (500, failed)
    assert "failed to load model" in router.stdout
    assert "failed" not in router.models(reload=True)["garbage"]["status"]


def test_a_loading_model_is_killed_by_an_unload(start: Callable[..., BareRouter], models_dir: Path) -> None:
    """While it loads it answers 503, and unloading it then looks like a crash: exit code 1."""
    make_slow(models_dir, "slow")
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
    make_slow(models_dir, "slow")
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
        limit = refusal(500, "model limit reached, try again later", "server_error")
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
    assert (answer.status, answer.json) == (500, refusal(500, message, "server_error"))
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
        missing = refusal(400, "model name is missing from the request")
        unknown = refusal(400, "model 'nope' not found")
        unloaded = refusal(400, "model is not loaded")
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
        assert (answer.status, answer.json) == (501, refusal(501, message, "not_supported_error"))


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
