"""The shipped units under a real systemd, installed as an administrator installs them, with the true llama-server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest

from fakes.bare_router import free_port
from fakes.waiting import eventually
from llamavisord.tiny_model import write_tiny_model
from systemd.installed import PROGRAM, START_S, UNIT, Installed, open_to_all
from systemd.sandbox import Systemd

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

Make = Callable[..., Installed]


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    """One for this test."""
    folder = tmp_path / "systemd"
    folder.mkdir()
    with Systemd(folder) as systemd:
        open_to_all(systemd)
        yield systemd


@pytest.fixture
def service(systemd: Systemd, llama_server: Path) -> Installed:
    """A llamavisor that is installed and runs, with one model, "alpha"."""
    service = Installed(systemd, llama_server)
    service.configure(gateway='drain = "1s"')
    service.install("--now")
    service.put("alpha")
    return service


def test_a_new_service(systemd: Systemd, llama_server: Path) -> None:
    """A first configuration, a user, a folder for models; it is READY when it is up, says how it is, and serves."""
    service = Installed(systemd, llama_server)
    said = systemd.run(PROGRAM, "install-service", "--dry-run", "--models-dir", "/srv/gguf").stdout
    assert "would write /etc/llamavisor/llamavisor.toml" in said
    assert '  | models_dir = "/srv/gguf"' in said
    assert not systemd.run("ls", "/etc/llamavisor", check=False).stdout

    service.models_dir = "/srv/gguf"
    systemd.run(PROGRAM, "install-service", "--models-dir", "/srv/gguf")
    assert f'models_dir = "{service.models_dir}"' in systemd.run("cat", service.config).stdout
    assert systemd.run("stat", "--format=%a %U %G", "/srv/gguf").stdout == "2775 root llamavisor\n"
    assert systemd.run("stat", "--format=%a %U %G", service.config).stdout == "640 root llamavisor\n"
    service.configure()
    service.install("--now")
    assert service.show("ActiveState", "Type", "User") == {
        "ActiveState": "active",
        "Type": "notify",
        "User": "llamavisor",
    }
    assert systemd.show(UNIT, "TasksMax", "LimitMEMLOCK", "OOMPolicy", "KillMode") == {
        "TasksMax": "infinity",
        "LimitMEMLOCK": "infinity",
        "OOMPolicy": "continue",
        "KillMode": "mixed",
    }
    again = service.install()
    assert not [line for line in again.splitlines() if line.startswith(("write", "make", "remove"))], again

    service.put("alpha")
    assert service.ask("alpha") == (200, "I am alpha")
    eventually(lambda: service.show("StatusText")["StatusText"] == "router main is ready with 1 of 1 models loaded")
    for pid in service.pids():
        assert systemd.run("stat", "--format=%U", f"/proc/{pid}").stdout == "llamavisor\n"


def test_events_are_entries_of_the_journal_with_fields(service: Installed) -> None:
    """They are found by MODEL, ROUTER and EVENT, as grave as they are; and no second time as a line of output."""
    assert service.ask("alpha") == (200, "I am alpha")
    found = service.systemd.run("journalctl", "--output=json", "MODEL=alpha", "ROUTER=main", "EVENT=ModelLoaded").stdout
    (entry,) = map(json.loads, found.splitlines())
    assert entry["MESSAGE"].startswith("model alpha: loaded on main after ")
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["_SYSTEMD_UNIT"]) == ("6", "llamavisor", UNIT)
    assert service.systemd.journal(UNIT).count(entry["MESSAGE"]) == 1
    service.systemd.run("systemctl", "kill", "--signal=KILL", "--kill-who=all", UNIT)
    eventually(lambda: "the last one did not end in order" in service.systemd.journal(UNIT))
    warned = service.systemd.run(
        "journalctl", "--output=cat", "--priority=warning", f"--unit={UNIT}", "EVENT=Warned"
    ).stdout
    assert "the last one did not end in order" in warned


def test_hardened_and_correct(service: Installed) -> None:
    """Systemd finds nothing wrong with the units, and thinks them safe: 2.0 or better with GPUs, 1.5 without."""
    systemd = service.systemd
    units = [UNIT, "llamavisor.socket", "llamavisor@one.service", "llamavisor-nvidia.service"]
    checked = systemd.run("systemd-analyze", "verify", *units)
    assert checked.stdout + checked.stderr == ""
    service.install("--no-gpu")
    assert exposure(systemd) <= 1.5
    service.install("--gpu")
    assert exposure(systemd) <= 2.0
    systemd.run("systemctl", "restart", UNIT)
    assert service.ask("alpha") == (200, "I am alpha")


def exposure(systemd: Systemd) -> float:
    """What systemd makes of the unit, from 0 for safe to 10."""
    said = systemd.run("systemd-analyze", "security", "--no-pager", UNIT).stdout.splitlines()
    return float(said[-1].partition(f"{UNIT}: ")[2].split()[0])


def test_a_reload_is_in_force_when_it_returns_or_fails(service: Installed) -> None:
    """`systemctl reload` waits for it; one that is refused fails, and nothing has changed."""
    pid = service.main_pid
    service.configure("models_max = 2")
    service.systemd.run("systemctl", "reload", UNIT)
    assert "at most 2" in service.cli("status").stdout
    service.configure("models_max = 'many'")
    refused = service.systemd.run("systemctl", "reload", UNIT, check=False)
    assert refused.returncode != 0
    assert "models_max" in service.systemd.journal(UNIT)
    assert "at most 2" in service.cli("status").stdout
    assert service.show("ActiveState")["ActiveState"] == "active"
    assert service.main_pid == pid
    eventually(
        lambda: service.show("StatusText")["StatusText"].endswith("; the last change of the configuration is refused")
    )


def test_the_watchdog_ends_a_daemon_that_is_stopped(service: Installed) -> None:
    """A daemon under SIGSTOP is killed with all that it had started, and the next one serves with the same models."""
    assert service.ask("alpha") == (200, "I am alpha")
    service.systemd.write_unit(f"{UNIT}.d/90-test.conf", "[Service]\nWatchdogSec=4s\nTimeoutAbortSec=1s\n")
    service.systemd.run("systemctl", "restart", UNIT)
    before = service.pids()
    service.systemd.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", UNIT)
    eventually(lambda: service.show("NRestarts")["NRestarts"] == "1", within_s=30)
    eventually(service.is_up)
    assert "Watchdog timeout" in service.systemd.journal(UNIT)
    assert not set(before) & set(service.pids())
    assert service.ask("alpha") == (200, "I am alpha")


def test_a_stop_ends_open_streams_within_the_deadline(service: Installed) -> None:
    """They have `drain`, then an event that says so; systemd kills nobody, and nothing is left."""
    service.put("forever", loop=True)
    events = service.stream("forever")
    next(events)
    began = time.monotonic()
    service.systemd.run("systemctl", "stop", "llamavisor.socket", UNIT, timeout_s=START_S)
    assert time.monotonic() - began < 30
    assert '"error"' in list(events)[-1]
    assert service.show("ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert service.pids() == []
    assert "stop-sigterm' timed out" not in service.systemd.journal(UNIT)


def test_nothing_survives_a_sigkill_of_the_daemon(service: Installed) -> None:
    """Its routers and their models are gone with it; the next daemon is there at once, and what was loaded is."""
    assert service.ask("alpha") == (200, "I am alpha")
    eventually(lambda: '"alpha"' in service.systemd.run("cat", "/var/lib/llamavisor/ledger.json").stdout)
    before = service.pids()
    assert len(before) >= 4  # daemon, watcher, router, model
    service.systemd.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", UNIT)
    eventually(lambda: service.show("NRestarts")["NRestarts"] == "1")
    eventually(service.is_up)
    assert not set(before) & set(service.pids())
    eventually(lambda: service.models()["alpha"] == "loaded")


def test_a_client_that_comes_while_it_is_down_is_served(service: Installed) -> None:
    """The socket unit listens: a request starts the daemon and is answered, and so is a command."""
    service.systemd.run("systemctl", "stop", UNIT, timeout_s=START_S)
    assert service.show("ActiveState")["ActiveState"] == "inactive"
    assert service.ask("alpha") == (200, "I am alpha")
    assert service.show("ActiveState")["ActiveState"] == "active"
    service.systemd.run("systemctl", "stop", UNIT, timeout_s=START_S)
    assert service.cli("status").stdout.startswith("llamavisor ")
    assert service.show("ActiveState")["ActiveState"] == "active"


def test_no_client_is_refused_while_it_restarts(service: Installed) -> None:
    """Connections that are made the whole time are taken, each of them, and their requests answered."""
    refused: list[OSError] = []
    made: list[int] = []
    with connecting(service.port, refused, made):
        service.install("--now")  # as after an upgrade
        service.systemd.run("systemctl", "restart", UNIT, timeout_s=START_S)
        assert service.ask("alpha") == (200, "I am alpha")
        service.systemd.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", UNIT)
        eventually(lambda: service.show("NRestarts")["NRestarts"] == "1")
        assert service.ask("alpha") == (200, "I am alpha")
    assert refused == []
    assert len(made) > 20


@contextmanager
def connecting(port: int, refused: list[OSError], made: list[int]) -> Iterator[None]:
    """Make one connection after the other, as long as the block lasts."""
    ended = threading.Event()

    def connect() -> None:
        while not ended.wait(0.02):
            try:
                with closing(socket.create_connection(("127.0.0.1", port), 10)):
                    made.append(port)
            except OSError as error:
                refused.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_another_port_is_taken_over(service: Installed) -> None:
    """By the socket unit when it is installed again, and by the daemon itself where nobody wants that unit."""
    before, service.port = service.port, free_port()
    service.configure()
    service.install()  # what runs is taken over with --now alone
    service.systemd.run("systemctl", "restart", UNIT, timeout_s=START_S)
    told = service.cli("status").stdout
    assert f"{service.port} has no effect: the socket unit of systemd listens on {before}" in told
    service.install("--now")
    assert service.ask("alpha") == (200, "I am alpha")
    assert "has no effect" not in service.cli("status").stdout
    service.port = free_port()
    service.configure()
    service.install("--now", "--no-socket-unit")
    eventually(service.is_up)
    assert service.ask("alpha") == (200, "I am alpha")
    assert service.systemd.show("llamavisor.socket", "ActiveState")["ActiveState"] == "inactive"


def test_a_stranger_on_its_port(systemd: Systemd, llama_server: Path) -> None:
    """The socket unit fails, and the daemon is up all the same, says so, and takes the port when it is free."""
    service = Installed(systemd, llama_server)
    service.configure()
    with socket.create_server(("127.0.0.1", service.port)):
        service.install("--now")
        assert service.show("ActiveState")["ActiveState"] == "active"
        eventually(
            lambda: f"cannot listen on 127.0.0.1:{service.port}: the port is taken" in service.cli("status").stdout
        )
        assert systemd.show("llamavisor.socket", "ActiveState")["ActiveState"] == "failed"
    service.put("alpha")
    assert service.ask("alpha") == (200, "I am alpha")


def test_a_control_socket_that_was_deleted_and_a_daemon_that_was_killed(service: Installed) -> None:
    """What the killed one had bound in its place is a stale file to the next, which commands reach."""
    service.systemd.run("rm", "/run/llamavisor/control.sock")
    service.systemd.run("systemctl", "restart", UNIT, timeout_s=START_S)
    service.systemd.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", UNIT)
    eventually(lambda: service.show("NRestarts")["NRestarts"] == "1")
    eventually(service.is_up)


def test_who_may_command_and_drop_models(service: Installed) -> None:
    """Members of the group may; others reach neither the socket nor the folder."""
    systemd = service.systemd
    systemd.run("useradd", "--create-home", "--groups=llamavisor", "alice")
    systemd.run("useradd", "--create-home", "bob")
    assert "is ready" in service.cli("status", user="alice").stdout
    assert service.cli("status", user="bob", check=False).returncode == 77
    drop = ("setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "sh", "-c")
    systemd.run(*drop, f"umask 077; cp {service.models_dir}/alpha.gguf {service.models_dir}/hers.gguf")
    systemd.run(*drop, f"umask 022; cp {service.models_dir}/alpha.gguf {service.models_dir}/beta.gguf")
    eventually(lambda: {service.models().get(name) for name in ("beta", "hers")} == {"unloaded"})
    assert systemd.run("stat", "--format=%G", f"{service.models_dir}/beta.gguf").stdout == "llamavisor\n"


def test_keys_are_a_credential(service: Installed) -> None:
    """A file that root alone reads, and that the daemon is handed; without one there are no keys."""
    assert service.ask("alpha") == (200, "I am alpha")
    service.systemd.write("/etc/credstore/llamavisor.keys", "sk-0123456789abcdef\n")
    service.systemd.run("chmod", "600", "/etc/credstore/llamavisor.keys")
    service.systemd.run("systemctl", "restart", UNIT, timeout_s=START_S)
    assert service.ask("alpha")[0] == 401
    assert service.ask("alpha", key="sk-0123456789abcdef") == (200, "I am alpha")


def test_models_in_a_home(systemd: Systemd, llama_server: Path) -> None:
    """Homes are hidden from it, but for the folder of models in one."""
    systemd.run("useradd", "--create-home", "alice")
    systemd.run("mkdir", "/home/alice/models")
    systemd.write("/home/alice/diary", "dear diary")
    service = Installed(systemd, llama_server, models_dir="/home/alice/models")
    service.configure()
    service.install("--now")
    service.put("alpha")
    assert service.ask("alpha") == (200, "I am alpha")
    seen = systemd.run("nsenter", f"--target={service.main_pid}", "--mount", "ls", "/home/alice").stdout
    assert seen == "models\n"


def test_several_on_one_machine(service: Installed, llama_server: Path) -> None:
    """Each instance has a configuration, a state, a socket and a unit of its own."""
    other = Installed(service.systemd, llama_server, name="lab", models_dir="/srv/lab")
    other.configure()
    other.install("--instance", "lab", "--now")
    there = "/run/llamavisor-lab/control.sock"
    eventually(lambda: other.show("StatusText")["StatusText"] == "router main is ready with 0 of 0 models loaded")
    assert f":{other.port}" in other.cli("--socket", there, "status").stdout
    assert service.ask("alpha") == (200, "I am alpha")
    assert service.systemd.run("ls", "/var/lib/llamavisor-lab").stdout
    assert service.is_up()  # its socket is its own
    other.install("--instance", "lab", "--remove")
    service.systemd.run("test", "-e", "/etc/systemd/system/llamavisor-nvidia.service")


def test_a_configuration_that_makes_no_sense(service: Installed) -> None:
    """It ends with what is wrong in the journal, and is not started again and again, by clients neither."""
    service.configure("models_max = 'many'")
    service.systemd.run("systemctl", "restart", UNIT, check=False)
    eventually(lambda: service.show("ActiveState")["ActiveState"] == "failed")
    assert service.show("ExecMainStatus", "NRestarts") == {"ExecMainStatus": "78", "NRestarts": "0"}
    assert "models_max" in service.systemd.journal(UNIT)
    with pytest.raises((OSError, HTTPException)):
        service.ask("alpha")
    service.configure()
    service.systemd.run("systemctl", "restart", UNIT)
    assert service.ask("alpha") == (200, "I am alpha")


def test_device_nodes_are_made_before_it_starts(service: Installed) -> None:
    """Where the tool of NVIDIA's driver is, it is run as root before the daemon; elsewhere nobody misses it."""
    systemd = service.systemd
    systemd.write("/usr/bin/nvidia-modprobe", '#!/bin/sh\necho "made by $(id -u): $*"\n')
    systemd.run("chmod", "755", "/usr/bin/nvidia-modprobe")
    systemd.run("systemctl", "restart", UNIT, timeout_s=START_S)
    assert "made by 0: -c 0 -u" in systemd.journal("llamavisor-nvidia.service")


def test_a_service_of_one_user(systemd: Systemd, llama_server: Path) -> None:
    """Without root, under the systemd of a user: it is up, commanded by way of their runtime folder, and serves."""
    systemd.run("useradd", "--create-home", "alice")
    systemd.write_unit("alice.service", USER_MANAGER)
    systemd.run("systemctl", "start", "alice.service")
    be_alice = ["setpriv", "--reuid=alice", "--regid=alice", "--init-groups", "env", "-C", "/", "HOME=/home/alice"]
    be_alice += ["XDG_RUNTIME_DIR=/run/alice", "PATH=/usr/bin:/bin"]
    own = Installed(systemd, llama_server, models_dir="/home/alice/models")
    own.config = "/home/alice/.config/llamavisor/llamavisor.toml"
    first = systemd.run(*be_alice, PROGRAM, "install-service", "--user").stdout
    assert "write /home/alice/.config/systemd/user/llamavisor.service" in first
    assert systemd.run("cat", own.config).stdout.count('models_dir = "/home/alice/models"') == 1
    own.configure()
    systemd.run("chown", "alice:", own.config)
    systemd.run(*be_alice, PROGRAM, "install-service", "--user", "--now", timeout_s=START_S)
    shown = systemd.run(*be_alice, "systemctl", "--user", "show", UNIT, "--property=ActiveState", "--property=MainPID")
    assert "ActiveState=active" in shown.stdout
    write_tiny_model(systemd.folder / "alpha.gguf", ["I", "am", "alpha"])
    systemd.run("cp", systemd.folder / "alpha.gguf", "/home/alice/models/alpha.gguf")
    eventually(lambda: "alpha" in systemd.run(*be_alice, PROGRAM, "models").stdout)
    loaded = systemd.run(*be_alice, PROGRAM, "load", "alpha", "--timeout", "15s")
    assert "alpha: loaded" in loaded.stdout
    assert own.ask("alpha") == (200, "I am alpha")
    checked = systemd.run(*be_alice, "systemd-analyze", "--user", "verify", UNIT, "llamavisor.socket")
    assert checked.stdout + checked.stderr == ""


USER_MANAGER = """
[Service]
User=alice
Type=notify
Delegate=yes
RuntimeDirectory=alice
Environment=XDG_RUNTIME_DIR=/run/alice HOME=/home/alice
ExecStart=/lib/systemd/systemd --user
KillMode=mixed
TasksMax=infinity
"""
"""What user@.service is, without PAM, which would ask a login manager."""


def test_it_is_taken_away_again(service: Installed) -> None:
    """Units go; configuration, models and state are a person's."""
    service.install("--remove")
    assert service.show("LoadState")["LoadState"] == "not-found"
    left = service.systemd.run("find", "/etc/systemd/system", "-name", "llamavisor*").stdout
    assert left == ""
    for kept in (service.config, f"{service.models_dir}/alpha.gguf", "/var/lib/llamavisor/instance"):
        service.systemd.run("test", "-e", kept)


def test_the_doctor_knows_the_service(service: Installed) -> None:
    """It says how the unit is, whether systemd listens where the configuration says, and what it sees without root."""

    def examined(user: str = "root") -> dict[str, list[str]]:
        told = json.loads(service.cli("doctor", "--json", user=user, check=False).stdout)
        found: dict[str, list[str]] = {}
        for finding in told["findings"]:
            found.setdefault(f"{finding['check']}: {finding['grade']}", []).append(finding["text"])
        return found

    well = examined()
    assert not [texts for grade, texts in well.items() if grade.endswith("problem")], well
    assert f"{UNIT} is active (running), enabled" in well["service: ok"]
    address = f"127.0.0.1:{service.port}, [::1]:{service.port}"
    assert f"llamavisor.socket listens on {address}, as the configuration says" in well["service: ok"]
    assert "/srv/models can be read by the user llamavisor" in well["models: ok"]
    assert "/var/lib/llamavisor (state) can be written by llamavisor" in well["state: ok"]
    unprivileged = examined("daemon")
    assert any("not permitted to use" in text for text in unprivileged.pop("socket: problem"))
    assert not [texts for grade, texts in unprivileged.items() if grade.endswith("problem")], unprivileged
    assert all("most likely by the daemon" in text for text in unprivileged["ports: note"])
    assert "/var/lib/llamavisor (state) can be written by llamavisor" in unprivileged["state: ok"]

    service.systemd.run("chmod", "600", service.config)
    assert any("may not be read" in text for text in examined("daemon")["configuration: note"])
    assert any("cannot be read by llamavisor" in text for text in examined()["configuration: problem"])

    service.systemd.run("systemctl", "stop", "llamavisor.socket", UNIT)
    service.port = free_port()
    service.configure()
    service.systemd.run("systemctl", "start", "llamavisor.socket")
    service.systemd.run("chmod", "o=,g=", service.models_dir)
    ill = examined()
    assert any("and the configuration says" in text for text in ill["service: problem"])
    assert any("/srv/models cannot be read by llamavisor: " in text for text in ill["models: problem"])
