"""`llamavisor rm` and `llamavisor du` as people use them, against a whole daemon with files of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

from fakes.waiting import PATIENCE_S, eventually
from hub_cache import HubCache
from llamavisor.hub import Listing, Record, RemoteFile
from llamavisor.hub.staging import Staging
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon, config_of, start_with
from terminal import INTERRUPT, Terminal


@pytest.fixture
def daemon(start: Callable[..., RunningDaemon]) -> Iterator[RunningDaemon]:
    """A daemon on a fake llama-server with the models alpha, beta and gamma."""
    with start() as running:
        running.wait_for_router("ready")
        yield running


def on_a_terminal(daemon: RunningDaemon, *words: str) -> Terminal:
    """A command as a person gives it, who is asked and answers."""
    env = {**daemon.env, "LLAMAVISOR_SOCKET": str(daemon.socket), "TERM": "dumb", "COLUMNS": "200"}
    return Terminal([sys.executable, "-m", "llamavisord", *words], env)


def names(models_dir: Path) -> set[str]:
    """The files in the models folder."""
    return {path.name for path in models_dir.iterdir()}


def delete(daemon: RunningDaemon, name: str, query: str = "") -> tuple[int, dict[str, object]]:
    """Status and body of a removal by the API."""
    return daemon.call("DELETE", f"/control/v1/models/{name}{query}")


def ask_gateway(port: int, query: str) -> tuple[int, dict[str, object]]:
    """Status and body of DELETE /models as a client of the gateway asks for it."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("DELETE", f"/models{query}")
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_rm_asks_and_takes_no_for_an_answer(daemon: RunningDaemon, models_dir: Path) -> None:
    """On a terminal the files and bytes are named, and whatever is not yes leaves them where they are."""
    size = (models_dir / "alpha.gguf").stat().st_size
    with on_a_terminal(daemon, "rm", "alpha") as terminal:
        terminal.until("[y/N]")
        assert f"{models_dir}/alpha.gguf" in terminal.seen
        assert f"Remove 1 file, {size / 1024:.1f} KiB for good?" in terminal.seen
        terminal.type("\n")
        assert terminal.wait() == 1
    assert "alpha.gguf" in names(models_dir)


def test_an_interrupt_is_no_yes(daemon: RunningDaemon, models_dir: Path) -> None:
    """What is said of it begins a line of its own, and not behind the question."""
    with on_a_terminal(daemon, "rm", "alpha") as terminal:
        terminal.until("[y/N] ")
        terminal.type(INTERRUPT)
        assert terminal.wait() == 130
    assert terminal.seen.endswith("[y/N] ^C\nllamavisor: interrupted\n")
    assert "alpha.gguf" in names(models_dir)


def test_rm_removes_what_was_agreed_to(daemon: RunningDaemon, models_dir: Path) -> None:
    """After a yes the file is gone, nobody lists the model, and an event says what was removed."""
    with on_a_terminal(daemon, "rm", "alpha") as terminal:
        terminal.until("[y/N]")
        terminal.type("y\n")
        assert terminal.wait() == 0
    assert names(models_dir) == {"beta.gguf", "gamma.gguf"}
    assert "alpha" not in {entry["name"] for entry in daemon.models().values() if entry["router"] is None}
    assert daemon.events("ModelDeleted")[-1]["files"] == [str(models_dir / "alpha.gguf")]
    daemon.wait_for_event("ModelRemoved", lambda event: event["model"] == "alpha")


def test_rm_refuses_what_was_not_agreed_to(daemon: RunningDaemon, models_dir: Path) -> None:
    """A file that is replaced while a person thinks about it is not the one that was agreed to: it stays."""
    with on_a_terminal(daemon, "rm", "alpha") as terminal:
        terminal.until("[y/N]")
        write_tiny_model(models_dir / "new", ["another"])
        (models_dir / "new").rename(models_dir / "alpha.gguf")
        terminal.type("y\n")
        assert terminal.wait() == 1
        assert "others than a moment ago" in terminal.seen
    assert "alpha.gguf" in names(models_dir)


def test_rm_without_a_terminal_needs_yes(daemon: RunningDaemon, models_dir: Path) -> None:
    """A script that cannot be asked is told which flag it lacks, with the exit code of a wrong command line."""
    assert daemon.cli("rm", "nobody").stderr == "llamavisor: no model 'nobody'; see `llamavisor models`\n"
    assert daemon.cli("rm", "").stderr.startswith("llamavisor: no model has an empty name")
    refused = daemon.cli("rm", "alpha")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert "alpha.gguf" in names(models_dir)
    assert daemon.cli("rm", "alpha", "--yes").stdout.startswith("alpha: removed, 1 file")
    assert "alpha.gguf" not in names(models_dir)


def test_rm_of_a_mistyped_name_says_what_is_near(daemon: RunningDaemon, models_dir: Path) -> None:
    """In the words of the other commands."""
    done = daemon.cli("rm", "--yes", "alpah")
    assert (done.returncode, done.stderr) == (3, "llamavisor: no model 'alpah'; did you mean alpha?\n")


def test_rm_without_a_daemon_says_so(tmp_path: Path) -> None:
    """Before it says that nobody can be asked."""
    argv = [sys.executable, "-m", "llamavisord", "rm", "alpha", "--socket", str(tmp_path / "none")]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 4
    assert done.stderr.startswith("llamavisor: no daemon at ")


def test_rm_dry_run_removes_nothing(daemon: RunningDaemon, models_dir: Path) -> None:
    """It shows the plan, with what is in the way, and asks nobody."""
    assert daemon.cli("load", "alpha").returncode == 0
    shown = daemon.cli("rm", "--dry-run", "alpha")
    assert shown.returncode == 0
    assert f"{models_dir}/alpha.gguf" in shown.stdout
    assert "it is loaded on router main" in shown.stdout
    assert len(names(models_dir)) == 3


def test_rm_of_several_goes_on_after_one_that_is_not_there(daemon: RunningDaemon, models_dir: Path) -> None:
    """One name that nobody has does not keep the others, and decides the exit code."""
    done = daemon.cli("rm", "--yes", "nobody", "alpha", "beta")
    assert done.returncode == 3
    assert "no model 'nobody'" in done.stderr
    assert names(models_dir) == {"gamma.gguf"}


def test_the_last_model_goes_like_any_other(daemon: RunningDaemon, models_dir: Path) -> None:
    """An empty folder may be an unmounted disk, but not right after the last file was removed by us."""
    answer = daemon.cli("rm", "--yes", "--json", "alpha", "beta", "gamma")
    assert [each["model"] for each in json.loads(answer.stdout)] == ["alpha", "beta", "gamma"]
    assert names(models_dir) == set()
    eventually(lambda: not daemon.models(), what="an empty list")
    assert not [text for text in daemon.status()["warnings"] if "unmounted" in text]


def test_a_loaded_model_is_removed_by_force_alone(daemon: RunningDaemon, models_dir: Path) -> None:
    """It is refused with the reason and the way out; by force it is unloaded before its file goes."""
    assert daemon.cli("load", "alpha").returncode == 0
    refused = daemon.cli("rm", "--yes", "alpha")
    assert refused.returncode == 1
    assert "it is loaded on router main; --force" in refused.stderr
    assert delete(daemon, "alpha")[1]["code"] == "model_in_use"
    assert "alpha.gguf" in names(models_dir)
    assert daemon.cli("rm", "--yes", "--force", "alpha").returncode == 0
    assert "alpha.gguf" not in names(models_dir)
    kinds = [event["event"] for event in daemon.events() if event.get("model") == "alpha"]
    assert kinds.index("ModelUnloaded") < kinds.index("ModelDeleted")


def test_force_lets_an_answer_end_first(start: Callable[..., RunningDaemon], models_dir: Path) -> None:
    """A model that is answering is removed when its answer has ended, and the client gets all of it."""
    with start(model={"token_s": 0.5}) as daemon, ThreadPoolExecutor(1) as threads:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        answer = threads.submit(daemon.chat, "alpha")
        eventually(lambda: "in use" in str(delete(daemon, "alpha")[1]), what="a model in use")
        assert daemon.cli("rm", "--yes", "--force", "alpha").returncode == 0
        assert answer.result() == "I am alpha"
        assert "alpha.gguf" not in names(models_dir)


def test_force_that_takes_too_long_removes_nothing(start: Callable[..., RunningDaemon], models_dir: Path) -> None:
    """When the answer does not end in time the command says so, and no file is touched."""
    with start(model={"token_s": 3.0}) as daemon, ThreadPoolExecutor(1) as threads:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        answer = threads.submit(daemon.chat, "alpha")
        eventually(lambda: "in use" in str(delete(daemon, "alpha")[1]), what="a model in use")
        late = daemon.cli("rm", "--yes", "--force", "--timeout", "0.2s", "alpha")
        assert (late.returncode, "nothing was removed" in late.stderr) == (5, True)
        assert "alpha.gguf" in names(models_dir)
        assert answer.result() == "I am alpha"


def test_a_pinned_model_is_removed_by_force_alone(daemon: RunningDaemon, models_dir: Path) -> None:
    """Whoever pinned it wants it to stay, loaded or not."""
    assert daemon.cli("pin", "alpha").returncode == 0
    refused = daemon.cli("rm", "--yes", "alpha")
    assert (refused.returncode, "it is pinned" in refused.stderr) == (1, True)
    assert daemon.cli("rm", "--yes", "--force", "alpha").returncode == 0
    assert "alpha.gguf" not in names(models_dir)


def test_clients_that_hammer_a_model_never_meet_half_a_removal(daemon: RunningDaemon, models_dir: Path) -> None:
    """Under requests that load the model again and again it is removed or not, and answers are whole."""
    refusals: list[str] = []

    def hammer() -> list[str]:
        answers = []
        for _ in range(30):
            try:
                answers.append(daemon.chat("alpha"))
            except AssertionError as refusal:
                refusals.append(str(refusal))
        return answers

    with ThreadPoolExecutor(2) as threads:
        clients = [threads.submit(hammer) for _ in range(2)]
        codes = []
        while not all(client.done() for client in clients):
            codes.append(daemon.cli("rm", "--yes", "--force", "alpha").returncode)
        answers = {answer for client in clients for answer in client.result()}
    assert answers <= {"I am alpha"}
    # A load that begins in the very milliseconds finds no file: its client is told to come again.
    expected = ("not found", "it is not loaded for now")
    assert [refusal for refusal in refusals if not any(words in refusal for words in expected)] == []
    assert set(codes) <= {0, 1, 3}
    assert ("alpha.gguf" not in names(models_dir)) is (0 in codes)
    if 0 in codes:
        eventually(lambda: ask_gateway(daemon.port, "?model=alpha")[0] == 500, what="a model that nobody knows")


def test_two_folders_with_one_name_have_to_be_told_apart(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., Path], free_port: int
) -> None:
    """A model that two models folders have is removed from the one that is named."""
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other / "alpha.gguf", ["a"])
    routers = f'[[router]]\nname = "one"\n[[router]]\nname = "two"\nmodels_dir = "{other}"\n'
    config = config_of(models_dir, free_port, f"{routers}")
    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config) as daemon:
        daemon.wait_for_router("ready", "one")
        daemon.wait_for_router("ready", "two")
        refused = daemon.cli("rm", "--yes", "alpha")
        assert (refused.returncode, "--folder" in refused.stderr) == (1, True)
        assert daemon.cli("rm", "--yes", "alpha", "--folder", str(other)).returncode == 0
        assert (names(other), "alpha.gguf" in names(models_dir)) == (set(), True)


def test_the_gateway_removes_in_llama_servers_words(daemon: RunningDaemon, models_dir: Path) -> None:
    """DELETE /models removes a loaded model, and says of one that is not there, or pinned, what llama-server would."""
    assert daemon.cli("load", "alpha").returncode == 0
    assert daemon.cli("pin", "beta").returncode == 0
    assert ask_gateway(daemon.port, "?model=alpha") == (200, {"success": True})
    assert names(models_dir) == {"beta.gguf", "gamma.gguf"}
    for query, status, message in (
        ("", 400, "model must be a non-empty string"),
        ("?model=nobody", 500, "model name=nobody is not found"),
        ("?model=beta", 500, "model name=beta is not removable (pinned)"),
    ):
        kind = "invalid_request_error" if status == 400 else "server_error"
        assert ask_gateway(daemon.port, query) == (
            status,
            {"error": {"code": status, "message": message, "type": kind}},
        )
    assert names(models_dir) == {"beta.gguf", "gamma.gguf"}


def test_the_gateway_forces_nothing_but_an_unload(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., Path], free_port: int
) -> None:
    """A file that a table names for another model stays, loaded or not, and the log says why; rm --force removes it."""
    needed = models_dir / "alpha.gguf"
    config = config_of(models_dir, free_port, f'[model.beta]\ndraft = "{needed}"')
    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config) as daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("load", "alpha").returncode == 0
        message = "model name=alpha is not removable (see the log of llamavisor)"
        refusal = {"error": {"code": 500, "message": message, "type": "server_error"}}
        assert ask_gateway(free_port, "?model=alpha") == (500, refusal)
        (warned,) = [event["text"] for event in daemon.events("Warned") if event["subject"] == "model alpha"]
        assert f'the file {needed} that [model."beta"] names' in warned
        assert daemon.model("alpha")["state"] == "loaded"
        assert needed.is_file()
        assert daemon.cli("rm", "--yes", "--force", "alpha").returncode == 0
        assert not needed.exists()


def test_the_gateway_removes_for_an_admin_alone(
    tmp_path: Path, models_dir: Path, fake_llama_server: Callable[..., Path], free_port: int
) -> None:
    """A key that may only use models removes none."""
    keys = tmp_path / "keys"
    keys.write_text("user sk-0123456789 models=*\n", encoding="ascii")
    config = config_of(models_dir, free_port, f'api_key_file = "{keys}"')
    with RunningDaemon(tmp_path, models_dir, fake_llama_server(), config=config) as daemon:
        daemon.wait_for_router("ready")
        with closing(HTTPConnection("127.0.0.1", free_port, timeout=PATIENCE_S)) as connection:
            connection.request("DELETE", "/models?model=alpha", headers={"x-api-key": "sk-0123456789"})
            assert connection.getresponse().status == 403
        assert "alpha.gguf" in names(models_dir)


def test_a_request_that_makes_no_sense_removes_nothing(daemon: RunningDaemon, models_dir: Path) -> None:
    """What is neither true nor false is refused, and so is the token of another plan."""
    for query, code in (
        ("?force=perhaps", "bad_request"),
        ("?dry_run=1", "bad_request"),
        ("?wait=-1", "bad_request"),
        ("?token=x", "files_changed"),
        ("?folder=/nowhere", "model_not_found"),
    ):
        assert delete(daemon, "alpha", query)[1]["code"] == code
    assert len(names(models_dir)) == 3


def test_du_shows_who_takes_the_disk(daemon: RunningDaemon, models_dir: Path) -> None:
    """The models by size, what is none, and what is free; as JSON in bytes."""
    (models_dir / "notes.bin").write_bytes(b"x" * 70_000)
    (models_dir / "half.gguf.partial").write_bytes(b"x" * 80_000)
    (models_dir / "bad.gguf").write_bytes(b"nope")
    eventually(lambda: "bad" in daemon.models(), what="the broken file")
    shown = daemon.cli("du").stdout
    assert " in 3 models, " in shown
    assert all(word in shown for word in ("alpha.gguf", "partial", "broken", "notes.bin", " free"))
    (folder,) = json.loads(daemon.cli("du", "--json").stdout)["folders"]
    assert folder["path"] == str(models_dir)
    assert folder["models_bytes"] == sum(
        (models_dir / f"{name}.gguf").stat().st_size for name in ("alpha", "beta", "gamma")
    )
    kinds = {Path(each["path"]).name: each["kind"] for each in folder["leftovers"]}
    assert kinds == {"notes.bin": "other", "half.gguf.partial": "partial", "bad.gguf": "broken"}
    assert folder["free_bytes"] > 0


def test_du_cleans_after_asking(start: Callable[..., RunningDaemon], models_dir: Path) -> None:
    """Staging leftovers go after a yes, old revisions too but with --keep-revisions, and what a model needs stays."""
    draft = models_dir / ".llamavisor-quantize-x"
    draft.mkdir()
    (draft / "alpha-Q4_0.gguf").write_bytes(b"x" * 5000)
    cache = HubCache(models_dir)
    for number in (1, 2):
        cache.blob(f"b{number}")
        cache.link(f"r{number}", "tiny-Q8_0.gguf", f"b{number}")
    cache.ref("main", "r2")
    daemon = start()
    start_with(daemon, "import llamavisor.storage.cleaning as cleaning; cleaning.OLD_S = 0")
    with daemon:
        daemon.wait_for_router("ready")
        assert daemon.cli("du", "--clean").returncode == 2
        with on_a_terminal(daemon, "du", "--clean", "--keep-revisions") as terminal:
            terminal.until("Remove 1 leftovers, 4.9 KiB, for good? [y/N]")
            terminal.type("n\n")
            assert terminal.wait() == 1
        with on_a_terminal(daemon, "du", "--clean", "--keep-revisions") as terminal:
            terminal.until("[y/N]")
            terminal.type("y\n")
            assert terminal.wait() == 0
        assert not draft.exists()
        assert (cache.folder / "snapshots" / "r1").exists()
        assert daemon.cli("du", "--clean", "--yes").returncode == 0
        assert not (cache.folder / "snapshots" / "r1").exists()
        assert (cache.folder / "blobs" / "b2").exists()
        assert not (cache.folder / "blobs" / "b1").exists()
        assert daemon.chat("user/repo:Q8_0")
        assert len(daemon.events("StorageCleaned")) == 2


def test_du_tells_of_pulls(start: Callable[..., RunningDaemon], models_dir: Path) -> None:
    """What was left of one is shown with what it is going to be, and the way out; cleaning says what it gives up."""
    name = "Qwen2.5-7B"
    listing = Listing(repository="user/repo", revision="main", commit="c0ffee", choices=())
    record = Record.of(listing, name, (RemoteFile(f"{name}.gguf", 9000, "0" * 64),))
    staging = Staging(models_dir)
    staging.write(record.model_copy(update={"is_under_way": False}))
    staging.part_of(record, record.files[0]).partial.write_bytes(b"x" * 5000)
    daemon = start()
    start_with(daemon, "import llamavisor.storage.cleaning as cleaning; cleaning.OLD_S = 0")
    with daemon:
        daemon.wait_for_router("ready")
        shown = daemon.cli("du").stdout
        assert f".llamavisor-pull/{record.key}: {name}, was left" in shown
        assert f"`pull --cancel {record.key} --drop` removes it" in shown
        ((left,),) = [each["leftovers"] for each in json.loads(daemon.cli("du", "--json").stdout)["folders"]]
        assert (left["kind"], left["model"], left["pull"], left["under_way"]) == ("pull", name, record.key, False)
        assert daemon.cli("pull", "--cancel", record.key).returncode == 0
        planned = daemon.cli("du", "--clean", "--dry-run").stdout
        assert "pulls that were left more than a day ago are given up" in planned
        assert staging.records()
        assert daemon.cli("du", "--clean", "--yes").stdout.endswith(
            f"removed 1 leftovers, {left['size_bytes'] / 1024:.1f} KiB\n"
        )
        assert staging.records() == []
        assert "was left" not in daemon.cli("du").stdout


def test_du_flags_that_mean_nothing_are_refused(daemon: RunningDaemon) -> None:
    """--keep-revisions without --clean would look as if it had done something."""
    assert daemon.cli("du", "--keep-revisions").returncode == 2
