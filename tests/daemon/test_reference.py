"""The reference page: it is what the code says now, it is the same everywhere, and nothing is missing in it."""

from __future__ import annotations

import ast
import dataclasses
import enum
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

import llamavisor
import llamavisord
from fakes.waiting import eventually
from llamavisor.errors import LlamavisorError
from llamavisor.events import Event
from llamavisord.cli import main, program
from llamavisord.config import Config
from llamavisord.daemon import Daemon
from llamavisord.document import Document
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.problem_documents import STATUS
from llamavisord.problems import ConfigError
from llamavisord.reference import page
from llamavisord.reference.docstrings import SilentError, members, told
from llamavisord.reference.types import words
from running import RunningDaemon

REPOSITORY = Path(__file__).parents[2]
VARIABLE = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)+|HOME|TERM|PATH|COLUMNS|TMPDIR|LANG")
Start = Callable[..., RunningDaemon]


@pytest.fixture(scope="module")
def text() -> str:
    """The page as the code makes it."""
    return page()


def part(text: str, heading: str, *, level: int = 2) -> str:
    """What stands below a heading, up to the next of its level or a higher one."""
    _, found, rest = text.partition(f"\n{'#' * level} {heading}\n")
    assert found, f"no {heading}"
    return re.split(rf"\n#{{2,{level}}} ", rest)[0]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables in a text, by what stands in their first column."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {first.strip(" `"): [cell.strip() for cell in others] for first, *others in lines}


# --- what it is worth -------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_code_says(text: str) -> None:
    """REFERENCE.md is what would be generated now."""
    written = (REPOSITORY / "REFERENCE.md").read_text(encoding="utf-8")
    # Not a plain assert: the difference of two long texts takes minutes to be shown.
    if written != text:
        pytest.fail("REFERENCE.md is stale: run `make reference`", pytrace=False)


@pytest.mark.parametrize(
    "environ",
    [
        {"COLUMNS": "40", "LANG": "C", "HOME": "/nowhere", "NO_COLOR": "1"},
        {"COLUMNS": "200", "LC_ALL": "POSIX", "XDG_RUNTIME_DIR": "/run/user/1", "STATE_DIRECTORY": "/elsewhere"},
        {"LLAMAVISOR_PORT": "99999", "LLAMAVISOR_CONFIG": "/nowhere.toml", "PYTHONHASHSEED": "1"},
    ],
)
def test_the_page_is_the_same_everywhere(environ: dict[str, str], tmp_path: Path, text: str) -> None:
    """No terminal, language, home, folder or variable of ours has any influence on what is printed."""
    paths = os.pathsep.join(str(Path(package.__path__[0]).parent) for package in (llamavisor, llamavisord))
    argv = [sys.executable, "-m", "llamavisord.reference"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": paths, **environ}
    printed = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, check=True)
    assert printed.stdout == text.encode("utf-8")
    assert not printed.stderr


def test_tables_are_whole(text: str) -> None:
    """Every row has as many cells as the heading of its table, and the first of them has something in it."""
    width = 0
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert cells in {0, width or cells}, line
        assert not cells or line.split("|")[1].strip(), line
        width = cells


def test_links_lead_somewhere(text: str) -> None:
    """Every link within the page has its heading."""
    headings = {
        re.sub(r"[^a-z0-9 _-]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert links
    assert links <= headings


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_every_command_is_on_it(text: str) -> None:
    """Each command that can be run has a section with its arguments."""
    commands = part(text, "Commands")
    for name in set(program._COMMANDS) - {"config"}:
        assert f"\n### `llamavisor {name}`\n" in commands
    assert "\n### `llamavisor config check`\n" in commands
    assert "\n### `llamavisor config show`\n" in commands
    load_section = rows(part(commands, "`llamavisor load`", level=3))
    assert load_section["--timeout TIME"][0] == "`10m`"
    assert load_section["--wait, --no-wait"] == ["`--wait`", "whether to wait until it is done"]


def test_every_flag_of_help_is_on_it(text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What `--help` of a command tells of, its section tells of too."""
    monkeypatch.setenv("COLUMNS", "200")
    commands = part(text, "Commands")
    for heading in re.findall(r"^### `llamavisor (.*)`$", commands, re.MULTILINE):
        assert main([*heading.split(), "--help"]) == ExitCode.OK
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
        section = part(commands, f"`llamavisor {heading}`", level=3)
        assert {flag for flag in flags - {"--help", "--threads"} if flag not in section} == set()


def test_every_exit_code_is_on_it(text: str) -> None:
    """Each exit code has a row with its meaning."""
    told_of = rows(part(text, "Exit codes"))
    assert {int(code) for code in told_of if code.isdecimal()} == {int(code) for code in ExitCode}
    assert told_of["78"] == ["The configuration is not valid, or could not be started with (EX_CONFIG)."]


def keys(model: type[BaseModel], heading: str = "The top of the file") -> Iterator[tuple[str, str, str]]:
    """All keys of a file with the heading of their table and their meaning."""
    for name, field in model.model_fields.items():
        tables = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        inner = next((each for each in tables if issubclass(each, BaseModel)), None)
        if inner is None:
            yield heading, name, field.description or ""
        else:
            shape = str(field.annotation)
            written = f"[[{name}]]" if shape.startswith("list") else f"[{name}]"
            yield from keys(inner, f'`[{name}."NAME"]`' if shape.startswith("dict") else f"`{written}`")


@pytest.mark.parametrize(
    ("heading", "key", "meaning"), [pytest.param(*each, id=".".join(each[:2])) for each in keys(Document)]
)
def test_every_key_is_on_it(text: str, heading: str, key: str, meaning: str) -> None:
    """Each key of each table has a row with its docstring, in its own section or in one that this one names."""
    configuration = part(text, "Configuration")
    own = part(configuration, heading, level=3)
    shared = part(configuration, "Options of models", level=3) if "(#options-of-models)" in own else ""
    top = part(configuration, "The top of the file", level=3) if f"`{key}`" in own else ""
    row = {**rows(top), **rows(shared), **rows(own)}[key]
    assert meaning
    assert plainly(row[-1]) == plainly(meaning)
    assert row[0]


def plainly(text: str) -> str:
    """Text without what Markdown makes of it."""
    return " ".join(text.replace("\\", "").split())


DEFAULTS = {
    "serve": '`"gateway"`',
    "models_max": "`4`",
    "port": "`8080`",
    "min_residency": '`"1m"`',
    "log_size": '`"64MiB"`',
    "link_dirs": "none",
    "models_dir": "",
    "socket": "`$XDG_RUNTIME_DIR/llamavisor/control.sock` (root: `/run/llamavisor/control.sock`)",
    "state_dir": "`~/.local/state/llamavisor` (root: `/var/lib/llamavisor`)",
}


def test_defaults_are_told_as_people_write_them(text: str) -> None:
    """With units, without this machine's folders, and for root where they differ."""
    top = rows(part(part(text, "Configuration"), "The top of the file", level=3))
    assert {key: top[key][1] for key in DEFAULTS} == DEFAULTS


CHANGES = {
    "serve": ('serve = "router"', "restart"),
    "host": ('host = "::1"', "restart"),
    "port": ("port = 8081", "restart"),
    "socket": ('socket = "/elsewhere.sock"', "restart"),
    "state_dir": ('state_dir = "/elsewhere"', "restart"),
    "log_level": ('log_level = "debug"', "restart"),
    "log_size": ('log_size = "1MiB"', "restart"),
    "models_dir": ('models_dir = "/other"', "reload, routers"),
    "llama_server": ('llama_server = "/other/llama-server"', "reload, routers"),
    "models_max": ("models_max = 7", "reload"),
    "memory": ('memory = "1GiB"', "reload, models"),
    "link_dirs": ('link_dirs = ["/more"]', "reload"),
    "on_overwrite": ('on_overwrite = "keep"', "reload"),
    "min_residency": ("min_residency = 1", "reload"),
    "oversize": ('oversize = "refuse"', "reload"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_a_change_takes_is_told_truly(text: str, write: Callable[[str], Path], key: str) -> None:
    """A key that is said to need a restart is refused by a reload, one that restarts routers changes what they are."""
    line, change = CHANGES[key]
    old = load(write('models_dir = "/m"\n'), {})
    new = load(write(f"{line}\n" if key == "models_dir" else f'models_dir = "/m"\n{line}\n'), {})
    top = rows(part(part(text, "Configuration"), "The top of the file", level=3))
    assert top[key][-2] == change
    assert is_refused(old, new) == (change == "restart")
    if change != "restart":
        routers = [each.fleet_settings(router_key="key").routers[0].without_models() for each in (old, new)]
        assert (routers[0] != routers[1]) == (change == "reload, routers")


def is_refused(old: Config, new: Config) -> bool:
    """Whether a reload from one configuration to another is refused."""
    try:
        Daemon._refuse_fixed(cast("Daemon", SimpleNamespace(config=old)), new)
    except ConfigError:
        return True
    return False


def test_every_variable_is_on_it(text: str) -> None:
    """Whatever the sources look up by a name of its own in an environment has a row, or is among those handed on."""
    environment = part(text, "Environment")
    found = set()
    for package in (llamavisor, llamavisord):
        for path in Path(package.__path__[0]).rglob("*.py"):
            found |= set(looked_up(ast.parse(path.read_text(encoding="utf-8"))))
    assert {"LLAMAVISOR_SOCKET", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PATH"} <= found
    found -= {"SC_CLK_TCK"}  # of sysconf
    assert {name for name in found if f"`{name}`" not in environment} == {"CUDA_DEVICE_ORDER"}
    assert "`CUDA_*`" in environment


def looked_up(tree: ast.Module) -> Iterator[str]:
    """Names in `env.get("NAME")`, `environ["NAME"]`, `"NAME" in environ` and the like, whatever is called."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Call(args=[ast.Constant(value=str(name)), *_])
                | ast.Subscript(slice=ast.Constant(value=str(name)), ctx=ast.Load())
                | ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In() | ast.NotIn()])
            ) if VARIABLE.fullmatch(name):
                yield name


def test_every_event_is_on_it(text: str) -> None:
    """Each kind of event has a row with all its fields."""
    told_of = rows(part(text, "Events"))
    kinds = {each for each in every(Event) if each.__module__.startswith("llamavisor")}
    assert len(kinds) > 50
    for kind in kinds:
        level, _, shown = told_of[kind.__name__]
        for field in dataclasses.fields(kind):
            assert f"`{field.name}` " in shown
        assert ("not kept" in level) != kind.is_kept
    assert "`load_s` number, seconds or null" in told_of["ModelLoaded"][-1]
    assert "`bytes` integer, bytes" in told_of["ModelGrown"][-1]
    assert "`speed_bytes_per_s` number, bytes per second" in told_of["PullProgress"][-1]


def every(base: type[Any]) -> set[type[Any]]:
    """All classes below one."""
    return {found for each in base.__subclasses__() for found in {each, *every(each)}}


def test_every_problem_code_is_on_it(text: str) -> None:
    """Each code of an error has a row, unless it never comes to the control socket."""
    told_of = rows(part(text, "Problem codes").partition("The status of `hub_failed`")[0])
    elsewhere = {
        *("activation", "already_running", "socket_unusable"),  # there is no control socket then
        "body_refused",  # of the gateway
        "quantize_failed",  # of a command alone
        *("gguf_invalid", "usage_unknown"),  # told as the state of a model
        *("option_invalid", "llama_server_unusable", "spawn_failed"),  # told as the state of a router
    }
    codes = {each.code for each in every(LlamavisorError) if each.__module__.startswith("llamavisor")}
    assert codes - elsewhere <= set(told_of)
    assert {code: int(told_of[code][0]) for code in STATUS} == {
        str(code): int(status) for code, status in STATUS.items()
    }


def test_every_metric_of_a_daemon_is_on_it(text: str, start: Start) -> None:
    """Whatever a running daemon exposes has a row with its type and its labels, and no others."""
    told_of = rows(part(text, "Metrics"))
    with start() as daemon:
        daemon.cli("load", "alpha")
        eventually(lambda: "llamavisor_model_loads_total" in daemon.metrics(), what="a load that is counted")
        families = list(text_string_to_metric_families(daemon.metrics()))
    assert len(families) > 40
    for family in families:
        if family.name.startswith("llamacpp:"):  # whatever the llama-server at hand says of itself
            assert "`llamacpp:*`" in part(text, "Metrics")
            continue
        name = family.name + {"counter": "_total"}.get(family.type, "")
        kind, labels, *_ = told_of[name]
        assert kind in {family.type, "info"}
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(re.findall(r"`(\w+)`", labels)), name


# --- what the page is made of -----------------------------------------------------------------------------------------


class _Silent(enum.Enum):
    """An enum of which a member says nothing."""

    TOLD = "told"
    """It is told."""
    UNTOLD = "untold"


def test_what_has_no_docstring_is_an_error() -> None:
    """No page is made in which something that people use is not explained."""
    with pytest.raises(SilentError, match=r"_Silent\.UNTOLD"):
        members(_Silent)
    with pytest.raises(SilentError, match="has no docstring"):
        told(lambda: None)


def test_a_type_without_words_is_an_error() -> None:
    """Whoever makes a type for a key has to say in words what may be written."""
    with pytest.raises(TypeError, match="give it a Field"):
        words(bytes)
    assert words(int | None) == "whole number"
