"""`llamavisor doctor` on faults that are made for it, without a daemon and with one."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import pytest
from trio.testing import MockClock

from fakes.bare_router import free_port
from fakes.control_stub import ControlStub, device, folder, gateway, memory, model, router, status
from fakes.waiting import eventually
from llamavisor.ledger import NAME as LEDGER
from llamavisor.ledger import Ledger
from llamavisor.pins import Pins
from llamavisord.cli import main
from llamavisord.cli.errors import UnreachableError
from llamavisord.doctor import CHECKS, Case, Check, Finding, Grade, case, examine, open_case
from llamavisord.doctor.account import Account
from llamavisord.doctor.examination import OPENING_S
from llamavisord.doctor.finding import Findings, ok
from llamavisord.exit_codes import ExitCode
from llamavisord.places import has_systemd
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon, config_of, start_with

NOBODY = pwd.getpwnam("nobody")
Start = Callable[..., RunningDaemon]
_T = TypeVar("_T")


@pytest.fixture
def environ(tmp_path: Path, fake_llama_server: Callable[..., Path]) -> dict[str, str]:
    """An environment of its own, with a fake llama-server."""
    home = tmp_path / "home"
    home.mkdir()
    server = os.fspath(fake_llama_server())
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LLAMAVISOR_LLAMA_SERVER": server}


@pytest.fixture
def configure(tmp_path: Path, write: Callable[[str], Path]) -> Callable[..., Path]:
    """Writes a configuration of a machine where all is well, but for what is said."""
    (tmp_path / "models").mkdir()
    write_tiny_model(tmp_path / "models" / "alpha.gguf", ["I", "am", "alpha"])

    def configure(extra: str = "", *, port: int | None = None, **keys: str) -> Path:
        lines = {
            "models_dir": str(tmp_path / "models"),
            "socket": str(tmp_path / "control.sock"),
            "state_dir": str(tmp_path / "state"),
            **keys,
        }
        text = "\n".join(f'{key} = "{value}"' for key, value in lines.items())
        return write(f"{text}\nport = {port or free_port()}\n{extra}\n[metrics]\nport = {free_port()}\n")

    return configure


@pytest.fixture
def examined(environ: dict[str, str]) -> Callable[..., list[Finding]]:
    """Makes one check, or several, of a configuration; `changes` are made to the case."""

    def examined(file: Path | None, *names: str, socket: Path | None = None, **changes: object) -> list[Finding]:
        def opened() -> Case:
            found = open_case(environ, config_file=file, socket=str(socket) if socket else None)
            return replace(found, **changes)  # type: ignore[arg-type]

        checks = [check for check in CHECKS if check.name in names]
        assert len(checks) == len(names)
        return [finding for each in anyio.run(examine, opened, checks) for finding in each.findings]

    return examined


def graded(findings: list[Finding], grade: Grade) -> list[str]:
    """The texts of that grade."""
    return [finding.text for finding in findings if finding.grade is grade]


def only(findings: list[Finding], grade: Grade) -> Finding:
    """The one finding of that grade."""
    (found,) = [finding for finding in findings if finding.grade is grade]
    return found


Configure = Callable[..., Path]
Examined = Callable[..., list[Finding]]


# The whole of it


def test_a_machine_without_a_fault(
    configure: Configure, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No problem: exit code 0, every check has said something, and nothing was made or changed."""
    file = configure()
    for name in ("LLAMAVISOR_SOCKET", "LLAMAVISOR_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    before = sorted(file.parent.rglob("*"))
    assert main(["doctor", "--config", str(file), "--json"]) == ExitCode.OK
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["counts"]["problem"] == 0
    assert {finding["check"] for finding in told["findings"]} == {check.name for check in CHECKS}
    assert {finding["grade"] for finding in told["findings"]} <= {grade.value for grade in Grade}
    # The fake llama-server keeps a diary.
    assert [path for path in sorted(file.parent.rglob("*")) if "fake" not in str(path)] == [
        path for path in before if "fake" not in str(path)
    ]


def test_a_problem_is_told_with_what_to_do(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1; a line with the grade, the check and the text, and the hint below."""
    monkeypatch.setenv("LLAMAVISOR_LLAMA_SERVER", "/nowhere/llama-server")
    assert main(["doctor", "--config", str(configure())]) == ExitCode.FAILED
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("problem  llama-server")]
    assert '"/nowhere/llama-server": No such file or directory' in lines[at]
    assert lines[at + 1].strip().startswith("-> Set llama_server to its path")
    assert lines[-1].startswith("1 problem, ")


def test_a_configuration_that_cannot_be_used(examined: Examined, configure: Configure) -> None:
    """Every mistake is a problem, and what needs a configuration says that it was not looked at."""
    findings = examined(configure('colour = "red"\nmodels_max = -1'), "configuration", "models", "clock")
    assert len(graded(findings, Grade.PROBLEM)) == 2
    assert any("colour" in text for text in graded(findings, Grade.PROBLEM))
    assert any(text.startswith("not looked at") for text in graded(findings, Grade.NOTE))


def on_time(work: Callable[[MockClock], Awaitable[_T]]) -> _T:
    """What `work` returns, with a clock that stands still but for what it makes it jump."""
    clock = MockClock()
    return anyio.run(work, clock, backend="trio", backend_options={"clock": clock})


def test_a_check_that_hangs_costs_its_deadline_and_no_other_check(configure: Configure) -> None:
    """What it had found is told, and that it gave no answer; the others are whole, and nobody waits for it."""
    hanging, release, ended = threading.Event(), threading.Event(), threading.Event()

    def hang(_: Case) -> Findings:
        yield ok("found before")
        hanging.set()
        release.wait(60)
        ended.set()

    def fail(_: Case) -> Findings:
        raise ValueError("a bug")
        yield

    checks = [
        Check("hangs", hang, deadline_s=0.1, needs_config=False),
        Check("fails", fail, needs_config=False),
        Check("works", lambda _: iter([ok("all is well")]), needs_config=False),
    ]
    file = configure()

    async def whole(clock: MockClock) -> list[tuple[str, list[str]]]:
        async def pass_deadline() -> None:
            await anyio.to_thread.run_sync(hanging.wait, 60)
            clock.jump(0.2)

        async with anyio.create_task_group() as group:
            group.start_soon(pass_deadline)
            examined = await examine(lambda: open_case({}, config_file=file), checks)
        return [(each.check, [finding.text for finding in each.findings]) for each in examined]

    found = on_time(whole)
    assert not ended.is_set()
    release.set()
    assert found == [
        ("hangs", ["found before", "no answer within 0.1 s"]),
        ("fails", ["could not be looked at: ValueError: a bug"]),
        ("works", ["all is well"]),
    ]


def test_a_configuration_that_hangs(tmp_path: Path) -> None:
    """A file that nobody ever writes to the end, as one on a dead mount: that is the one problem which is told."""
    file = tmp_path / "llamavisor.toml"
    os.mkfifo(file)
    opening, ended = threading.Event(), threading.Event()

    def opened() -> Case:
        opening.set()
        try:
            return open_case({}, config_file=file)
        finally:
            ended.set()

    async def whole(clock: MockClock) -> list[Finding]:
        async def pass_deadline() -> None:
            await anyio.to_thread.run_sync(opening.wait, 60)
            clock.jump(OPENING_S + 1)

        async with anyio.create_task_group() as group:
            group.start_soon(pass_deadline)
            (told,) = await examine(opened)
        return told.findings

    def let_go() -> bool:
        """Whether the thread has ended; a reader finds the file empty, as often as it reads it."""
        with suppress(OSError):  # nobody reads it at this moment
            os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        return ended.is_set()

    findings = on_time(whole)
    assert not ended.is_set()
    eventually(let_go, what="end of who read it")
    assert "the configuration cannot be read" in only(findings, Grade.PROBLEM).text


# llama-server and what is asked of it


def test_a_program_that_is_no_llama_server(examined: Examined, configure: Configure) -> None:
    """It is named with the reason."""
    found = only(examined(configure(llama_server="/usr/bin/env"), "llama-server"), Grade.PROBLEM)
    assert "/usr/bin/env is not a" in found.text
    assert found.hint


def test_options_that_nothing_heeds(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """Without a GPU: how several share a model, budgets of one, layers on one; and a pinned model that cannot fit."""
    extra = """
memory = { RAM = "1MiB", CUDA0 = "1GiB" }
[defaults]
tensor_split = [1, 2]
threads = 5000
gpu_layers = 99
[model.alpha]
pin = true
gpu_layers = "auto"
[model.beta]
devices = ["CUDA7"]
"""
    findings = examined(configure(extra), "options")
    warnings, problems = graded(findings, Grade.WARNING), graded(findings, Grade.PROBLEM)
    assert any("tensor_split, and router main sees no GPU" in text for text in warnings)
    assert any("threads = 5000" in text for text in warnings)
    assert any("memory names CUDA0" in text for text in warnings)
    assert any('[model."beta"] matches no model' in text for text in warnings)
    assert "router main asks for a GPU by gpu_layers, and llama-server sees none" in problems
    assert '[model."beta"] asks for CUDA7, and llama-server sees no GPU' in problems
    assert any("the pinned models (alpha) want" in text and "may take 1.0 MiB" in text for text in problems)
    assert not any('[model."alpha"] asks' in text for text in problems)


def test_an_option_that_this_build_does_not_know(examined: Examined, configure: Configure) -> None:
    """It is a problem, as it is for `config check`."""
    findings = examined(configure('[defaults]\nargs = ["--no-such-option"]'), "options")
    assert "--no-such-option" in only(findings, Grade.PROBLEM).text


def test_options_that_all_are_heeded(examined: Examined, configure: Configure) -> None:
    """That is said, and that pinned models fit."""
    findings = examined(configure("[model.alpha]\npin = true"), "options")
    assert graded(findings, Grade.OK) == [
        "router main: the pinned models (alpha) fit at once",
        "all that is configured can be heeded on this machine",
    ]
    assert len(findings) == 2


def test_pins_are_held_against_what_they_may_grow_to(examined: Examined, configure: Configure) -> None:
    """As admission does, which sets aside a model's prompt cache with it."""
    pinned = 'memory = { RAM = "1GiB" }\n[model.alpha]\npin = true\nargs = ["--cache-ram", "%d"]'
    fits = graded(examined(configure(pinned % 64), "options"), Grade.OK)
    assert "router main: the pinned models (alpha) fit at once" in fits
    found = only(examined(configure(pinned % 4096), "options"), Grade.PROBLEM)
    assert "the pinned models (alpha) want 4.0 GiB of RAM, and models may take 1.0 GiB" in found.text


def test_what_was_pinned_by_name_is_reckoned_with(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """By the ledger of the last daemon, which is left as it is; a word by name goes before what is written."""
    file = configure('memory = { RAM = "1MiB" }')
    (tmp_path / "state").mkdir()
    pins = Pins()
    ledger = Ledger(tmp_path / "state" / LEDGER, [pins])
    assert examined(file, "options") == [ok("all that is configured can be heeded on this machine")]
    pins.wish("alpha", is_pinned=True)
    assert ledger.flush().is_written
    assert "the pinned models (alpha) want" in only(examined(file, "options"), Grade.PROBLEM).text
    pins.wish("alpha", is_pinned=False)
    assert ledger.flush().is_written
    file = configure('memory = { RAM = "1MiB" }\n[model.alpha]\npin = true')
    assert examined(file, "options") == [ok("all that is configured can be heeded on this machine")]
    (tmp_path / "state" / LEDGER).write_text("no ledger")
    assert "the pinned models (alpha) want" in only(examined(file, "options"), Grade.PROBLEM).text
    assert os.listdir(tmp_path / "state") == [LEDGER]  # a daemon puts aside what it cannot use


# Files and folders


def test_broken_files_are_named(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """A file that is no GGUF, with the reason."""
    (tmp_path / "models" / "junk.gguf").write_bytes(b"no model at all" * 100)
    warnings = graded(examined(configure(), "models"), Grade.WARNING)
    assert any(text.startswith("junk is invalid: ") for text in warnings)


def test_a_folder_that_the_daemons_user_may_not_read(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """The folder that bars the way is told with its mode and owner, and the user's name."""
    closed = tmp_path / "closed"
    (closed / "models").mkdir(parents=True)
    closed.chmod(0o700)
    file = configure(models_dir=str(closed / "models"))
    account = Account(NOBODY.pw_uid, frozenset({NOBODY.pw_gid}), "nobody")
    if os.geteuid() == NOBODY.pw_uid:
        pytest.skip("this is nobody")
    found = only(examined(file, "models", account=account), Grade.PROBLEM)
    assert found.text.startswith(f"{closed / 'models'} cannot be read by nobody: ")
    assert "is drwx------" in found.text


def test_folders_that_are_none(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """A models folder that is not there, one that is a file, and an empty one."""
    missing = only(examined(configure(models_dir=str(tmp_path / "none")), "models"), Grade.PROBLEM)
    assert missing.text == f"{tmp_path / 'none'} is not there"
    (tmp_path / "file").touch()
    file = only(examined(configure(models_dir=str(tmp_path / "file")), "models"), Grade.PROBLEM)
    assert file.text == f"{tmp_path / 'file'} is no folder"
    (tmp_path / "empty").mkdir()
    findings = examined(configure(models_dir=str(tmp_path / "empty")), "models")
    assert f"no model in {tmp_path / 'empty'}" in graded(findings, Grade.NOTE)
    assert any("llamavisor pull" in finding.hint for finding in findings)


def test_a_state_folder_that_cannot_be_written(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """Whose it is, and that everybody could read it, is told; a file in its place is a problem."""
    (tmp_path / "state").mkdir(mode=0o755)
    assert "is open to everybody" in only(examined(configure(), "state"), Grade.WARNING).text
    (tmp_path / "state").chmod(0o700)
    account = Account(NOBODY.pw_uid, frozenset({NOBODY.pw_gid}), "nobody")
    if os.geteuid() != NOBODY.pw_uid:
        found = only(examined(configure(), "state", account=account), Grade.PROBLEM)
        assert "(state) cannot be written by nobody: " in found.text
    (tmp_path / "state").rmdir()
    (tmp_path / "state").touch()
    assert "is in the way" in only(examined(configure(), "state"), Grade.PROBLEM).text


def test_the_token_of_the_hub_is_never_told(examined: Examined, configure: Configure, environ: dict[str, str]) -> None:
    """Whether there is one, and whether others can read it; not one letter of it."""
    file = configure()
    assert "none" in only(examined(file, "token"), Grade.NOTE).text
    token = Path(environ["HOME"]) / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("hf_secret", encoding="ascii")
    token.chmod(0o644)
    findings = examined(file, "token")
    assert only(findings, Grade.WARNING).hint == f"chmod 600 {token}"
    token.chmod(0o600)
    findings += examined(file, "token")
    assert graded(findings, Grade.OK) == [f"{token}, readable for its owner alone"]
    environ["HF_TOKEN"] = "hf_secret"
    findings += examined(file, "token")
    assert "in the environment (HF_TOKEN)" in graded(findings, Grade.OK)
    assert "hf_secret" not in repr(findings)


def test_the_token_of_the_service(
    examined: Examined, configure: Configure, environ: dict[str, str], tmp_path: Path
) -> None:
    """The service has a credential or what its own user has left at home; what is said by who asks is not its own."""
    environ["HF_TOKEN"] = "hf_secret"
    file, root, home = configure(), tmp_path / "root", tmp_path / "service"
    (root / "run/systemd/system").mkdir(parents=True)
    account = Account(NOBODY.pw_uid, frozenset({NOBODY.pw_gid}), "nobody", home)
    seen = partial(examined, file, "token", is_service=True, root=root, account=account)
    credential = root / "etc/credstore/huggingface.token"
    assert only(seen(), Grade.NOTE).hint.startswith(f"put one into {credential}, readable for root alone")
    encrypted = root / "etc/credstore.encrypted/huggingface.token"
    left = home / ".cache/huggingface/token"
    for path in (credential, encrypted, left):
        path.parent.mkdir(parents=True, mode=0o755)
    encrypted.touch(mode=0o600)
    assert "LoadCredentialEncrypted=huggingface.token" in only(seen(), Grade.NOTE).hint
    left.touch(mode=0o644)
    assert only(seen(), Grade.WARNING).hint == f"chmod 600 {left}"
    credential.touch(mode=0o644)
    assert only(seen(), Grade.WARNING).hint == f"chmod 600 {credential}"
    credential.parent.chmod(0o700)  # then the mode of what is in it opens it to nobody
    assert graded(seen(), Grade.OK) == [f"{credential}, a credential of the service"]


def test_the_token_in_a_container(examined: Examined, configure: Configure, environ: dict[str, str]) -> None:
    """Without systemd a credential is where the environment says, whatever place the configuration has."""
    folder = Path(environ["HOME"], "secrets")
    folder.mkdir()
    token = folder / "huggingface.token"
    token.touch(mode=0o600)
    environ["CREDENTIALS_DIRECTORY"] = str(folder)
    findings = examined(configure(), "token", is_service=True, root=Path(environ["HOME"]))
    assert graded(findings, Grade.OK) == [f"{token}, readable for its owner alone"]


# Ports and the socket


def test_a_port_that_somebody_holds(examined: Examined, configure: Configure) -> None:
    """Who it is, is told."""
    with closing(socket.create_server(("127.0.0.1", 0))) as holder:
        port = holder.getsockname()[1]
        found = only(examined(configure(port=port), "ports"), Grade.PROBLEM)
    assert f"the gateway at 127.0.0.1:{port}: port {port} on 127.0.0.1 is taken by " in found.text
    assert f"(pid {os.getpid()})" in found.text


def test_a_socket_that_nobody_listens_on(examined: Examined, configure: Configure, tmp_path: Path) -> None:
    """No socket is a note, as no daemon need run; one that is left behind, or no socket at all, is a problem."""
    file, path = configure(), tmp_path / "control.sock"
    assert only(examined(file, "socket"), Grade.NOTE).text == f"no daemon runs: there is no {path}"
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
    assert "nobody listens on it" in only(examined(file, "socket"), Grade.PROBLEM).text
    path.unlink()
    path.touch()
    assert "no daemon at" in only(examined(file, "socket"), Grade.PROBLEM).text


# With a daemon


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[ControlStub]:
    """A scripted daemon."""
    with ControlStub(tmp_path / "control.sock") as stub:
        yield stub


def test_a_daemon_is_asked_where_it_knows_better(
    examined: Examined, configure: Configure, stub: ControlStub, tmp_path: Path
) -> None:
    """Its routers, its folders, its devices, its files, and a configuration that it has refused."""
    file = configure()
    models_dir = str(tmp_path / "models")
    stub.answer(
        "GET",
        "/control/v1/status",
        status(
            [router(state="backoff", build=None, reason="it ended", hint="see why", models_dir=models_dir)],
            [model("beta", path=f"{models_dir}/beta.gguf", file_state="invalid", problem="it is cut off")],
            pid=os.getpid(),
            version="9.9.9",
            config_path=str(file),
            config_error="f.toml:1: bad",
            gateway=gateway(urls=[]),
            metrics_url=None,
            folders=[folder(models_dir, mode="polling", mode_reason="no inotify watch is left")],
            memory=memory(device(), device("CUDA0 (NVIDIA)", free_bytes=None, reason="its driver does not answer")),
        ),
    )
    findings = examined(file, "configuration", "llama-server", "memory", "models", "ports", "socket")
    problems, warnings = graded(findings, Grade.PROBLEM), graded(findings, Grade.WARNING)
    assert "router main is backoff: it ended" in problems
    assert any("has refused a reload" in text and "f.toml:1: bad" in text for text in problems)
    assert any("the gateway at 127.0.0.1" in text and "does not listen" in text for text in problems)
    assert any("no inotify watch is left" in text for text in warnings)
    assert "beta is invalid: it is cut off" in warnings
    assert any("its driver does not answer" in text for text in warnings)
    assert any(text.startswith("the daemon is 9.9.9") for text in warnings)
    assert any(text.startswith("RAM: 14.0 GiB of 32.0 GiB free") for text in graded(findings, Grade.OK))


def test_the_token_of_a_daemon(start: Start, examined: Examined, environ: dict[str, str]) -> None:
    """A daemon is asked what it has, and says where it is from; what who asks has is nothing to it."""
    daemon = start()
    daemon.env["HF_TOKEN"] = "hf_secret"
    with daemon:
        findings = examined(None, "token", socket=daemon.socket)
        status, body = daemon.call("GET", "/control/v1/hub/token")
    assert graded(findings, Grade.OK) == ["the daemon has it in its environment (HF_TOKEN)"]
    assert (status, body) == (200, {"origin": "environment"})
    environ["HF_TOKEN"] = "hf_other"
    daemon.env.pop("HF_TOKEN")
    with daemon:
        findings += examined(None, "token", socket=daemon.socket)
    assert "there is one now, which the daemon does not have" in only(findings, Grade.NOTE).text
    assert "hf_" not in repr(findings)


def test_a_home_that_hangs(start: Start) -> None:
    """Where the token is from is told late or not at all, takes one thread, and keeps nobody else waiting."""
    daemon = start()
    hang = "import threading, llamavisord.control as control\ncontrol.TOKEN_S = 0.2"
    start_with(daemon, f"{hang}\ncontrol.find_origin = lambda environ: threading.Event().wait()")
    with daemon:
        answers = [daemon.call("GET", "/control/v1/hub/token") for _ in range(3)]
        assert [(status, body["code"]) for status, body in answers] == [(504, "wait_timeout")] * 3
        assert daemon.status()["pid"] == daemon.pid


@pytest.fixture
def configured(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., Path], free_port: int
) -> RunningDaemon:
    """A daemon that has a configuration file."""
    binary = fake_llama_server()
    keys = f'state_dir = "{tmp_path / "state"}"\nllama_server = "{binary}"'
    return RunningDaemon(tmp_path, models_dir, binary, config=config_of(models_dir, free_port, keys))


def test_with_a_daemon_of_another_configuration(configured: RunningDaemon, tmp_path: Path) -> None:
    """The file that is named is judged by itself, and it is said that the daemon that runs has another one."""
    other = tmp_path / "other.toml"
    with configured as daemon:
        daemon.wait_for_gateway()
        other.write_text(daemon.config.read_text().replace(str(daemon.state_dir), f"{tmp_path}/elsewhere"))
        done = daemon.cli("doctor", "--json", "--config", str(other), timeout_s=90)
    told = json.loads(done.stdout)
    texts = [finding["text"] for finding in told["findings"]]
    assert f"the daemon that runs (pid {daemon.pid}) has another configuration: {daemon.config}" in texts
    assert f"{tmp_path}/elsewhere (state) is not there yet, and can be made" in texts
    taken = f"taken by the daemon (pid {daemon.pid}), which runs with another configuration"
    assert len([text for text in texts if text.endswith(taken)]) >= 1
    assert not [text for text in texts if "has been changed since" in text or "the daemon says" in text]
    assert told["counts"]["problem"] == 0, [each for each in told["findings"] if each["grade"] == "problem"]


@pytest.mark.parametrize("serve", ["gateway", "router"])
def test_with_a_daemon_that_hangs(configured: RunningDaemon, serve: str) -> None:
    """It is one problem, said with what to do; what it and its routers hold is no problem of ports."""
    if serve == "router":
        configured.env["LLAMAVISOR_SERVE"] = "router"
    with configured as daemon:
        daemon.wait_for_router("ready")
        if serve == "gateway":
            daemon.wait_for_gateway()
        daemon.signal(signal.SIGSTOP)
        try:
            done = daemon.cli("doctor", "--json", "--config", str(daemon.config), timeout_s=90)
        finally:
            daemon.signal(signal.SIGCONT)
    findings = json.loads(done.stdout)["findings"]
    (found,) = [each for each in findings if each["grade"] == "problem"]
    assert found["text"] == f"the daemon (pid {daemon.pid}) does not answer"
    assert found["hint"] == f"somebody has stopped it: `kill -CONT {daemon.pid}` has it go on"
    taken = [each["text"] for each in findings if each["check"] == "ports" and each["grade"] == "note"]
    assert any(f"taken by the daemon (pid {daemon.pid}), which does not answer" in text for text in taken)
    assert not [each for each in findings if "systemctl" in (each["hint"] or "")] or has_systemd()


def test_a_daemon_that_hangs_is_asked_once(
    examined: Examined, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is to be known of it costs one answer that does not come, and a look at who it is."""
    monkeypatch.setattr(case, "STATUS_S", 0.1)
    with closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.bind(str(tmp_path / "control.sock"))
        silent.listen(64)
        silent.setblocking(False)
        findings = examined(configure(), *(check.name for check in CHECKS))
        asked = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
    assert f"the daemon (pid {os.getpid()}) does not answer" in graded(findings, Grade.PROBLEM)
    assert asked == 2


def test_with_a_daemon_of_somebody_else(
    examined: Examined, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not for who asks to write is no problem, and nobody is told to take it over."""
    path = tmp_path / "control.sock"
    path.touch()
    silence = UnreachableError(f"not permitted to use {path}", exit_code=ExitCode.NOT_PERMITTED)
    nobody = Account.of(NOBODY.pw_uid, frozenset({NOBODY.pw_gid}))
    monkeypatch.setattr(Account, "mine", lambda: nobody)
    (tmp_path / "state").mkdir(mode=0o700)
    findings = examined(configure(), "state", silence=silence, account=nobody)
    (token,) = examined(configure(), "token", silence=silence, account=nobody)
    assert (token.grade, token.hint) == (Grade.NOTE, "ask as root")
    owner = pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() != NOBODY.pw_uid:
        text = f"{tmp_path}/state (state) is not yours to write: the daemon runs as {owner}"
        assert only(findings, Grade.NOTE).text == text
    assert not graded(findings, Grade.PROBLEM)
    assert not [finding for finding in findings if "chown" in finding.hint]


def test_with_a_real_daemon(configured: RunningDaemon) -> None:
    """It is examined through its socket: its configuration, ports and folders are as it says, and nothing is wrong."""
    with configured as daemon:
        daemon.wait_for_gateway()
        done = daemon.cli("doctor", "--json", "--config", str(daemon.config), timeout_s=90)
    told = json.loads(done.stdout)
    texts = [finding["text"] for finding in told["findings"]]
    assert [text for text in texts if text.endswith("the daemon listens")]
    assert any(f"answers, pid {daemon.pid}" in text for text in texts)
    assert told["counts"]["problem"] == 0, [each for each in told["findings"] if each["grade"] == "problem"]
    assert done.returncode == 0


def test_pins_as_a_daemon_has_them(configured: RunningDaemon, free_port: int) -> None:
    """What was pinned at run time counts while it runs and after; and what it took there is what it is to take."""

    def told() -> list[str]:
        done = configured.cli("doctor", "--json", "--config", str(configured.config), timeout_s=90)
        return [finding["text"] for finding in json.loads(done.stdout)["findings"] if "pinned" in finding["text"]]

    ledger = configured.state_dir / LEDGER
    with configured as daemon:
        daemon.wait_for_router("ready")
        assert told() == []
        assert daemon.cli("pin", "alpha").returncode == 0
        assert told() == ["router main: the pinned models (alpha) fit at once"]
        assert daemon.status()["memory"]["pinned"] == ["alpha"]
        daemon.chat("alpha", port=free_port)
        records = eventually(
            lambda: ledger.exists() and json.loads(ledger.read_text())["sections"]["footprints"],
            what="a measurement",
            within_s=60,  # it is made some seconds after the answer, and written down some seconds later
        )
    assert told() == ["router main: the pinned models (alpha) fit at once"]  # as the ledger says
    kept = json.loads(ledger.read_text())
    kept["sections"]["footprints"] = [{**each, "bytes": [{"RAM": 2**50}]} for each in records]
    ledger.write_text(json.dumps(kept))
    (text,) = told()
    assert text.startswith("router main: the pinned models (alpha) want ")


def test_a_build_without_a_gpu_beside_one_with(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., Path]
) -> None:
    """What one router of a daemon sees, the other does not: each is judged by what it sees itself."""
    with_gpu = fake_llama_server(devices=["SYCL0: Intel(R) Arc(TM) A770 Graphics (16000 MiB, 15000 MiB free)"])
    text = (
        f'llama_server = "{with_gpu}"\nport = {free_port()}\n[defaults]\ngpu_layers = 9\n[metrics]\nenabled = false\n'
    )
    for name, binary in (("gpu", with_gpu), ("cpu", fake_llama_server())):
        text += f'[[router]]\nname = "{name}"\nmodels_dir = "{models_dir}"\nllama_server = "{binary}"\n'
    with RunningDaemon(tmp_path, models_dir, with_gpu, config=text) as daemon:
        eventually(lambda: all(router["devices"] for router in daemon.status()["routers"]), what="devices")
        done = daemon.cli("doctor", "--json", "--config", str(daemon.config), timeout_s=90)
    found = {(each["grade"], each["text"]) for each in json.loads(done.stdout)["findings"]}
    texts = {text for grade, text in found if grade in ("warning", "problem")}
    assert ("ok", "router gpu sees SYCL0") in found
    assert any("llama-server of router cpu sees no GPU" in text for text in texts)
    assert "router cpu asks for a GPU by gpu_layers, and llama-server sees none" in texts
    assert not [text for text in texts if "router gpu" in text]


@pytest.mark.real
def test_with_the_true_llama_server(configure: Configure, environ: dict[str, str], llama_server: Path) -> None:
    """Its version and options are told, and what a pinned model takes is worked out by its own tool."""
    file = configure("[model.alpha]\npin = true", llama_server=str(llama_server))
    done = subprocess.run(
        [sys.executable, "-m", "llamavisord", "doctor", "--json", "--config", str(file)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    texts = [finding["text"] for finding in json.loads(done.stdout)["findings"]]
    assert any(str(llama_server.resolve()) in text and "router mode" in text for text in texts)
    assert "router main: the pinned models (alpha) fit at once" in texts
