"""What the service manager hears: of a socket as systemd makes it, and from a whole daemon."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fakes import FakeLlamaServer
from fakes.waiting import PATIENCE_S, eventually
from llamavisord.notify import Notifier
from running import RunningDaemon

Fake = Callable[..., FakeLlamaServer]


class Manager:
    """The socket of a service manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self.socket.settimeout(PATIENCE_S)

    def __repr__(self) -> str:
        return f"<Manager {self.address}>"

    def hear(self) -> list[str]:
        """The next message, line by line."""
        return self.socket.recv(4096).decode().split("\n")

    def hear_until(self, line: str) -> list[str]:
        """All lines up to one that matches this pattern."""
        heard: list[str] = []
        while not any(re.fullmatch(line, each) for each in heard):
            heard += self.hear()
        return heard


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """One that listens on a path, and one with an abstract name."""
    manager = Manager(str(tmp_path / "notify") if request.param == "path" else f"@llamavisor-test-{uuid.uuid4()}")
    yield manager
    manager.socket.close()


def test_each_message_is_as_systemd_wants_it(manager: Manager) -> None:
    """One datagram for one message, with the fields of sd_notify(3); a status is one line whatever it says."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    assert notifier
    notifier.ready()
    assert manager.hear() == ["READY=1"]
    notifier.status("router main is failed: two\nlines\nREADY=1")
    assert manager.hear() == [r"STATUS=router main is failed: two\nlines\nREADY=1"]
    notifier.alive()
    assert manager.hear() == ["WATCHDOG=1"]
    before = time.monotonic_ns() // 1000
    with notifier.reloading():
        reloading, monotonic = manager.hear()
        assert reloading == "RELOADING=1"
        assert before <= int(monotonic.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert manager.hear() == ["READY=1"]
    notifier.stopping(within_s=65.5)
    assert manager.hear() == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=65500000"]


def test_a_reload_that_fails_ends_too(manager: Manager) -> None:
    """Whatever becomes of a reload, the service manager hears that it is over."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    with pytest.raises(ValueError, match="no"), notifier.reloading():
        raise ValueError("no")
    assert [manager.hear()[0], manager.hear()[0]] == ["RELOADING=1", "READY=1"]


def test_what_is_meant_for_us_is_passed_on_to_nobody(manager: Manager) -> None:
    """The variables are taken out of the environment; those of others stay."""
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1", "HOME": "/"}
    Notifier(environ)
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    ("period_us", "pid", "watchdog_s"),
    [
        ("3000000", "ours", 3.0),
        ("3000000", None, 3.0),
        ("3000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_is_ours_or_not(period_us: str | None, pid: str | None, watchdog_s: float | None) -> None:
    """A watchdog counts when it has a period and waits for this process, or for nobody in particular."""
    told = {
        "NOTIFY_SOCKET": "@somewhere",
        "WATCHDOG_USEC": period_us,
        "WATCHDOG_PID": str(os.getpid()) if pid == "ours" else pid,
    }
    assert Notifier({name: text for name, text in told.items() if text is not None}).watchdog_s == watchdog_s


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative/path"])
def test_without_a_service_manager_nothing_is_done(address: str) -> None:
    """No address, or one of a kind that is not for us, is nobody to tell: there is no watchdog either."""
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000"} if address else {})
    assert not notifier
    assert notifier.watchdog_s is None
    notifier.ready()


def test_a_service_manager_that_has_gone(manager: Manager) -> None:
    """Telling it is no error when it listens no more."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    manager.socket.close()
    notifier.ready()
    Path(manager.address).unlink(missing_ok=True)
    notifier.ready()


def test_a_service_manager_that_does_not_read(manager: Manager) -> None:
    """Telling it never waits, and it can be told again once it has read."""
    notifier = Notifier({"NOTIFY_SOCKET": manager.address})
    began = time.monotonic()
    for number in range(2000):
        notifier.status(f"{number}")
    assert time.monotonic() - began < PATIENCE_S / 2
    manager.hear_until("STATUS=5")
    notifier.ready()
    manager.hear_until("READY=1")


@pytest.mark.parametrize("manager", ["abstract"], indirect=True)
def test_a_daemon_from_its_start_to_its_end(
    tmp_path: Path, models_dir: Path, fake_llama_server: Fake, manager: Manager
) -> None:
    """It is ready once it answers, says how its routers are, pings, tells of reloads good and bad, and of its end."""
    port = RunningDaemon(tmp_path, models_dir, "").port
    good = f'port = {port}\nmodels_dir = "{models_dir}"\n[metrics]\nenabled = false\n'
    env = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000000"}
    daemon = RunningDaemon(tmp_path, models_dir, fake_llama_server(start_s=1.5), config=good, env=env)
    daemon.start()
    try:
        first = manager.hear()
        assert first == ["READY=1"]
        assert daemon.is_live()
        heard = manager.hear_until("STATUS=router main is ready with 0 of 3 models loaded")
        assert "STATUS=router main is starting" in heard
        for process in psutil.Process(daemon.pid).children(recursive=True):
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(process.environ())
        daemon.call("POST", "/control/v1/models/alpha/load?wait=true")
        manager.hear_until("STATUS=router main is ready with 1 of 3 models loaded")
        began = time.monotonic()
        for _ in range(3):
            manager.hear_until("WATCHDOG=1")
        assert 0.5 < time.monotonic() - began < PATIENCE_S / 2
        assert daemon.call("POST", "/control/v1/reload")[0] == 200
        assert "READY=1" in manager.hear_until("RELOADING=1") + manager.hear_until("READY=1")
        daemon.config.write_text("port = true", encoding="utf-8")
        assert daemon.call("POST", "/control/v1/reload")[0] == 422
        manager.hear_until("RELOADING=1")
        manager.hear_until("READY=1")
        daemon.cli("restart", "main")
        eventually(lambda: "starting" in " ".join(manager.hear()))
        os.kill(daemon.pid, 15)
        assert "STOPPING=1" in manager.hear_until(r"EXTEND_TIMEOUT_USEC=\d+")
        assert daemon.wait() == 0
    finally:
        daemon.end()
