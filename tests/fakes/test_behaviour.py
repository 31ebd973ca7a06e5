"""The fake llama-server misbehaves exactly as it is told to."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest

from fakes import OLD_BUILD, FakeLlamaServer
from fakes.bare_router import PRESET, BareRouter
from fakes.waiting import eventually

MakeFake = Callable[..., FakeLlamaServer]


@pytest.fixture
def start(fake_llama_server: MakeFake, tmp_path: Path, models_dir: Path) -> Callable[..., BareRouter]:
    """Makes routers that behave as told, not yet started."""

    def make(preset: str = PRESET, **behaviour: object) -> BareRouter:
        return BareRouter(fake_llama_server(**behaviour), tmp_path / "router", models_dir, preset=preset)

    return make


@contextmanager
def _ending_badly(router: BareRouter) -> Iterator[None]:
    """A router that is expected to end before it answers."""
    router.start()
    try:
        yield
    finally:
        router.stop()


def _sleepers(parent: int) -> list[psutil.Process]:
    """The grandchildren that the fake started, found below `parent`."""
    try:
        return [one for one in psutil.Process(parent).children(recursive=True) if one.name() == "sleep"]
    except psutil.NoSuchProcess:
        return []


def _times_out(router: BareRouter, path: str, *, port: int | None = None) -> bool:
    connection = HTTPConnection("127.0.0.1", port or router.port, timeout=1.0)
    try:
        connection.request("GET", path)
        connection.getresponse()
    except TimeoutError:
        return True
    finally:
        connection.close()
    return False


def test_an_unknown_behaviour_is_refused(fake_llama_server: MakeFake) -> None:
    """A misspelt key fails the test that uses it, for routers and for models."""
    with pytest.raises(TypeError, match="no behaviour 'strat_s'"):
        fake_llama_server(strat_s=1)
    with pytest.raises(TypeError, match="no behaviour 'load'"):
        fake_llama_server(models={"alpha": {"load": 1}})


def test_it_remembers_how_it_was_started(start: Callable[..., BareRouter], fake_llama_server: MakeFake) -> None:
    """Every start of a router and of a model is recorded, with its arguments and its environment."""
    with start() as router:
        router.load("alpha")
        fake = FakeLlamaServer(Path(router.command[0]))
        (start_of_router,) = fake.starts()
        (start_of_model,) = fake.model_starts()
    assert start_of_router["argv"] == router.command
    assert start_of_router["env"]["LLAMA_CACHE"].endswith("/cache")
    assert start_of_router["pid"] == router.pid
    assert "--alias" in start_of_model["argv"]
    assert start_of_model["env"]["LLAMA_SERVER_ROUTER_PORT"] == str(router.port)


@pytest.mark.parametrize(("how", "status"), [(3, 3), ("SIGSEGV", -signal.SIGSEGV)])
def test_start_failures(start: Callable[..., BareRouter], how: int | str, status: int) -> None:
    """The first starts fail as told, with the last words as told; the next one succeeds."""
    router = start(start_failures=2, start_exit=how, start_line="no luck today")
    for _ in range(2):
        with _ending_badly(router):
            assert router.wait() == status
    assert router.stderr.count("no luck today\n") == 2
    with router:
        assert set(router.models()) == {"alpha", "beta", "gamma"}


def test_behaviour_can_change_between_starts(start: Callable[..., BareRouter]) -> None:
    """What is said anew holds for the next start."""
    router = start(start_failures=-1)
    with _ending_badly(router):
        assert router.wait() == 1
    FakeLlamaServer(Path(router.command[0])).change()
    with router:
        assert router.call("GET", "/health").status == 200


def test_a_slow_start(start: Callable[..., BareRouter]) -> None:
    """It does not listen before its time, and then answers 503 for a while."""
    router = start(start_s=0.3, unready_s=0.3)
    begin = time.monotonic()
    with _ending_badly(router):
        refused = eventually(lambda: _answer_or_none(router), what="a listening router")
        assert time.monotonic() - begin >= 0.3
        assert refused.status == 503
        eventually(lambda: router.call("GET", "/health").status == 200)
        assert time.monotonic() - begin >= 0.6


def _answer_or_none(router: BareRouter) -> object:
    try:
        return router.call("GET", "/health")
    except OSError:
        return None


@pytest.mark.parametrize(("how", "status"), [(0, 0), (7, 7), ("SIGKILL", -signal.SIGKILL)])
def test_an_end_after_a_while(start: Callable[..., BareRouter], how: int | str, status: int) -> None:
    """It ends by itself as told, also with 0."""
    with start(exit_after_s=0.2, exit_with=how) as router:
        assert router.wait() == status


def test_an_end_after_some_requests(start: Callable[..., BareRouter]) -> None:
    """Requests for models count, others do not; the last one is not answered."""
    with start(exit_after_requests=2) as router:
        router.models()
        assert router.chat("alpha").status == 200
        with pytest.raises(OSError, match=r"without response|reset"):
            router.chat("alpha")
        assert router.wait() == -signal.SIGKILL


def test_a_hang_of_everything(start: Callable[..., BareRouter]) -> None:
    """A hanging router accepts connections and answers nothing."""
    with start(hang_after_s=0.2) as router:
        eventually(lambda: _times_out(router, "/health"))
        router.signal(signal.SIGKILL)


def test_a_hang_of_some_paths(start: Callable[..., BareRouter]) -> None:
    """It can be healthy to look at and do nothing."""
    with start(hang_after_s=0.0, hang_paths=["/models"]) as router:
        assert _times_out(router, "/models")
        assert router.call("GET", "/health").status == 200


def test_a_deaf_router(start: Callable[..., BareRouter]) -> None:
    """It takes no notice of SIGTERM."""
    with start(ignore_sigterm=True) as router:
        router.signal(signal.SIGTERM)
        time.sleep(0.1)
        assert router.call("GET", "/health").status == 200
        router.signal(signal.SIGKILL)
        assert router.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["group", "setsid"])
def test_a_grandchild(start: Callable[..., BareRouter], kind: str) -> None:
    """It leaves a process behind, in its own group or outside of it."""
    with start(grandchild=kind) as router:
        (sleeper,) = eventually(lambda: _sleepers(router.pid))
        assert (psutil.Process(sleeper.pid).ppid(), _group(sleeper.pid) == router.pid) == (router.pid, kind == "group")
        router.signal(signal.SIGKILL)
        router.wait()
        assert sleeper.is_running()
        sleeper.kill()
        sleeper.wait()


def _group(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[2])


def test_zombies(start: Callable[..., BareRouter]) -> None:
    """It does not wait for processes that it has started."""
    with start(zombies=3) as router:
        eventually(lambda: [one.status() for one in psutil.Process(router.pid).children()] == ["zombie"] * 3)


def test_answers_that_are_none(start: Callable[..., BareRouter]) -> None:
    """A path can answer anything, any amount of it, or late."""
    answers = {
        "/props": {"status": 502, "type": "text/html", "body": "<html>bad gateway</html>"},
        "/models": {"body": "x" * 65536, "repeat": 160},
        "/v1/models": {"delay_s": 0.3},
    }
    with start(answers=answers) as router:
        garbage = router.call("GET", "/props")
        assert (garbage.status, garbage.text) == (502, "<html>bad gateway</html>")
        assert garbage.headers["Content-Type"] == "text/html"
        assert len(router.call("GET", "/models").text) == 160 * 65536
        begin = time.monotonic()
        assert len(router.call("GET", "/v1/models").json["data"]) == 3
        assert time.monotonic() - begin >= 0.3


def test_floods(start: Callable[..., BareRouter]) -> None:
    """It prints line after line, or one line without an end."""
    with start(log_lines_per_s=10_000, log_giant_line_bytes=5_000_000) as router:
        eventually(lambda: len(router.stderr) > 5_100_000)
        assert router.call("GET", "/health").status == 200


def test_an_old_build(start: Callable[..., BareRouter], fake_llama_server: MakeFake) -> None:
    """An old build has no event stream, and neither shows nor takes the newer options."""
    fake = fake_llama_server(**OLD_BUILD)
    shown = subprocess.run([fake, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--load-mode" not in shown
    assert "--models-preset" in shown
    version = subprocess.run([fake, "--version"], capture_output=True, text=True, check=True).stderr
    assert version.startswith("version: 10034 (0123abcd)\n")
    with start(**OLD_BUILD) as router:
        assert router.call("GET", "/models/sse").status == 404
    with _ending_badly(router := start("[*]\nload-mode = mmap\n", **OLD_BUILD)):
        assert router.wait() == 1
        assert "option 'load-mode' not recognized in preset '*'" in router.stderr


def test_devices_that_appear_late(fake_llama_server: MakeFake) -> None:
    """The first calls show no device, later ones show them."""
    fake = fake_llama_server(devices=["CUDA0: Fake (24000 MiB, 23000 MiB free)"], devices_after_calls=2)
    shown = [subprocess.run([fake, "--list-devices"], capture_output=True, text=True, check=True) for _ in range(3)]
    assert ["CUDA0" in one.stdout for one in shown] == [False, False, True]


def test_a_server_that_is_no_router(start: Callable[..., BareRouter]) -> None:
    """/props has no role."""
    with start(role="") as router:
        assert "role" not in router.call("GET", "/props").json


def test_a_slow_load(start: Callable[..., BareRouter]) -> None:
    """A slow load tells of its progress all the while."""
    with start(models={"alpha": {"load_s": 3.0}}) as router, router.events() as events:
        begin = time.monotonic()
        router.load("alpha")
        assert time.monotonic() - begin >= 3.0
        values = [event["data"]["progress"]["value"] for event in events.all if "progress" in event["data"]]
        assert len(values) >= 5
        assert values == sorted(values)
        begin = time.monotonic()
        router.load("beta")
        assert time.monotonic() - begin < 3.0


def test_a_load_that_stalls(start: Callable[..., BareRouter]) -> None:
    """It comes half way and no further."""
    with start(model={"load_stalls": True}) as router, router.events() as events:
        assert router.call("POST", "/models/load", {"model": "alpha"}).status == 200
        events.wait_for(lambda event: event["data"].get("progress", {}).get("value") == 0.5)
        assert router.status("alpha") == "loading"


@pytest.mark.parametrize(("how", "exit_code"), [(9, 9), ("SIGABRT", 1)])
def test_loads_that_fail(start: Callable[..., BareRouter], how: int | str, exit_code: int) -> None:
    """The first loads of a model fail as told; the next one succeeds."""
    with start(models={"alpha": {"load_failures": 1, "load_exit": how}}) as router, router.events() as events:
        assert router.call("POST", "/models/load", {"model": "alpha"}).status == 200
        assert events.wait_for_status("alpha", "unloaded")["data"]["exit_code"] == exit_code
        router.load("alpha")


def test_models_that_end_by_themselves(start: Callable[..., BareRouter]) -> None:
    """A model ends after a while, or with a request."""
    models = {"alpha": {"exit_after_s": 0.1, "exit_with": 5}, "beta": {"exit_after_requests": 2}}
    with start(models=models) as router, router.events() as events:
        assert router.call("POST", "/models/load", {"model": "alpha"}).status == 200
        assert events.wait_for_status("alpha", "unloaded")["data"]["exit_code"] == 5
        assert router.chat("beta").status == 200
        assert router.chat("beta").text == "proxy error: Failed to read connection"
        assert events.wait_for_status("beta", "unloaded")["data"]["exit_code"] == 1


def test_models_that_hang(start: Callable[..., BareRouter]) -> None:
    """A hanging model accepts connections and answers nothing; the router does not notice."""
    with start(models={"alpha": {"hang_after_requests": 1}, "beta": {"hang_after_s": 0.0}}) as router:
        for name in ("alpha", "beta"):
            process = router.load(name)
            if name == "alpha":
                assert not _times_out(router, "/metrics", port=process.port)
                assert router.chat(name).status == 200
            assert _times_out(router, "/metrics", port=process.port)
            assert router.status(name) == "loaded"


def test_a_slow_speaker(start: Callable[..., BareRouter]) -> None:
    """Every word takes its time, and an unload meanwhile has to wait for the stop-timeout."""
    with start("[*]\nstop-timeout = 1\n", models={"alpha": {"token_s": 0.2}}) as router, router.events() as events:
        begin = time.monotonic()
        assert router.chat("alpha").status == 200
        assert time.monotonic() - begin >= 0.6
        connection = HTTPConnection("127.0.0.1", router.port)
        connection.request("POST", "/v1/chat/completions", '{"model":"alpha","stream":true,"messages":[]}')
        with connection.getresponse() as response:
            assert response.readline().startswith(b"data: ")
            assert router.call("POST", "/models/unload", {"model": "alpha"}).status == 200
            assert response.read().endswith(b"proxy error: Failed to read connection")
        connection.close()
        assert events.wait_for_status("alpha", "unloaded")["data"]["exit_code"] == 1


def test_a_model_that_grows(start: Callable[..., BareRouter]) -> None:
    """Every answer costs memory, which is used and not given back."""
    with start(models={"alpha": {"grow_mib": 32}}) as router:
        process = psutil.Process(router.load("alpha").pid)
        before = process.memory_info().rss
        for count in (1, 2):
            assert router.chat("alpha").status == 200
            assert process.memory_info().rss - before > count * 31 * 2**20


def test_a_model_that_will_not_end(start: Callable[..., BareRouter]) -> None:
    """It takes no notice of an unload until it is killed, nor of the router's death."""
    with start("[*]\nstop-timeout = 1\n", model={"ignore_exit": True}) as router, router.events() as events:
        router.load("alpha")
        assert router.call("POST", "/models/unload", {"model": "alpha"}).status == 200
        assert events.wait_for_status("alpha", "unloaded")["data"]["exit_code"] == 1
        survivor = psutil.Process(router.load("alpha").pid)
        router.signal(signal.SIGKILL)
        router.wait()
        time.sleep(0.1)
        assert survivor.status() != psutil.STATUS_ZOMBIE


def test_a_model_whose_end_nobody_sees(start: Callable[..., BareRouter]) -> None:
    """While another process holds its output open, a dead model is "loaded" to the router."""
    with start(models={"alpha": {"grandchild": "setsid", "grandchild_holds_output": True}}) as router:
        process = psutil.Process(router.load("alpha").pid)
        (sleeper,) = _sleepers(router.pid)
        process.kill()
        eventually(lambda: process.status() == psutil.STATUS_ZOMBIE)
        time.sleep(0.1)
        assert router.status("alpha") == "loaded"
        sleeper.kill()
        sleeper.wait()
        eventually(lambda: router.status("alpha") == "unloaded")
