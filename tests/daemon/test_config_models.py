"""Tables of single models in a configuration file, and what the command line says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fakes import FakeLlamaServer
from ggufs import STRING, U32, GgufFile, Tensor
from llamavisord.cli import main
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.problems import ConfigError
from llamavisord.tiny_model import write_tiny_model

NOTHING: Mapping[str, str] = {}
HEAD = 'models_dir = "/m"\n'
TWO_ROUTERS = '[[router]]\nname = "r"\n[[router]]\nname = "s"\n'

Write = Callable[[str], Path]


def refusal(path: Path) -> list[str]:
    """The lines that a person sees, with the file's own path left out."""
    with pytest.raises(ConfigError) as caught:
        load(path, NOTHING)
    return [line.replace(f"{path}:", "") for line in str(caught.value).splitlines()]


def test_tables_become_rules_in_the_order_of_the_file(write: Write, tmp_path: Path) -> None:
    """Each with its options and absolute paths; no router's settings know of them."""
    text = """
[[router]]
name = "a"
[model."qwen*"]
ctx_size = 1024
args = ["--top-k", "1"]
lora = ["lora/x.gguf:0.5", "~/y.gguf"]
chat_template = "t.jinja"
[model.alpha]
aliases = ["first"]
load_on_start = true
mmproj = false
chat_template_kwargs = { enable_thinking = false }
router = "a"
"""
    path = write(HEAD + text)
    config = load(path, NOTHING)
    glob, alpha = config.rules
    assert (glob.pattern, glob.source, alpha.source) == ("qwen*", '[model."qwen*"]', '[model."alpha"]')
    assert glob.settings.lora == (f"{tmp_path}/lora/x.gguf:0.5", f"{Path.home()}/y.gguf")
    assert glob.settings.chat_template == f"{tmp_path}/t.jinja"
    assert (alpha.name, glob.name) == ("alpha", None)
    assert alpha.settings.model_dump(exclude_unset=True) == {
        "aliases": ("first",),
        "chat_template_kwargs": '{"enable_thinking":false}',
        "load_on_start": True,
        "mmproj": False,
        "router": ("a",),
    }
    before = load(write(HEAD + '[[router]]\nname = "a"\n'), NOTHING)
    assert before.routers == config.routers
    assert load(path, NOTHING).rules == before.rules == ()


def test_the_same_file_read_again_gives_equal_rules(write: Write) -> None:
    """A reload without a change touches nothing."""
    path = write(HEAD + '[model."*"]\nlora = ["x"]\nargs = ["--top-k", "1"]\n')
    assert load(path, NOTHING).rules == load(path, NOTHING).rules


def test_every_value_of_a_table_has_its_origin(write: Write) -> None:
    """Under the table's name as it is written, without secrets."""
    path = write(HEAD + '[model."a*"]\nctx_size = 1\nargs = ["--hf-token-x", "secret"]\n')
    shown = {each.key: (each.value, str(each.origin)) for each in load(path, NOTHING).settings}
    assert shown['model."a*".ctx_size'] == (1, f"{path}:3")
    assert shown['model."a*".args'] == (("--hf-token-x", "(set)"), f"{path}:4")


def test_links_and_overwritten_files(write: Write, tmp_path: Path) -> None:
    """Folders for links start at the file's folder; both keys have a default."""
    config = load(write('link_dirs = ["/mnt/a", "b"]\non_overwrite = "keep"\n' + HEAD), NOTHING)
    assert (config.link_dirs, config.on_overwrite) == ((Path("/mnt/a"), tmp_path / "b"), "keep")
    shown = {each.key: (each.value, str(each.origin)) for each in config.settings}
    assert shown["link_dirs"] == (("/mnt/a", f"{tmp_path}/b"), f"{config.path}:1")
    assert shown["on_overwrite"] == ("keep", f"{config.path}:2")
    config = load(write(HEAD), NOTHING)
    assert (config.link_dirs, config.on_overwrite) == ((), "reload")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[model.a]\nload_on_start = "yes"\n', '3: model.a.load_on_start: expected true or false, found "yes"'),
        ("[model.a]\nload_on_start = 1\n", "3: model.a.load_on_start: expected true or false, found 1"),
        ('[model.a]\npin = "yes"\n', '3: model.a.pin: expected true or false, found "yes"'),
        ("[model.a]\npin = 1\n", "3: model.a.pin: expected true or false, found 1"),
        ('[model.a]\nttl = "soon"\n', "3: model.a.ttl: expected a duration: a number of seconds, or text such as"),
        ("[model.a]\nttl = false\n", "3: model.a.ttl: expected a duration: a number of seconds, or text such as"),
        ("[model.a]\ntll = 5\n", "3: model.a.tll: unknown key, did you mean ttl?"),
        ('[model.a]\nmemory = "1GiB"\n', "3: model.a.memory: unknown key here: it belongs at the top of the file"),
        ('[model."*"]\nctx_sise = 1\n', '3: model."*".ctx_sise: unknown key, did you mean ctx_size?'),
        ("[model.a]\nload_on_startup = true\n", "3: model.a.load_on_startup: unknown key, did you mean load_on_start?"),
        ('[model.a]\nctx_size = "x"\n', '3: model.a.ctx_size: expected a whole number, found "x"'),
        ("[model.a]\nport = 1\n", "3: model.a.port: unknown key here: it belongs at the top of the file"),
        (
            '[model.a]\nenv = { A = "1" }\n',
            "3: model.a.env: models have the environment of their router: write a [[router]] with that env, and",
        ),
        ("[model]\nctx_size = 1\n", '3: model.ctx_size: expected a table for each name: [model."NAME"]'),
        ("model = 1\n", '2: model: expected a table for each name: [model."NAME"]'),
        ('[model."a*"]\naliases = ["b"]\n', '3: model."a*".aliases: one alias cannot name several models'),
        ('[model.a]\naliases = ["b,c"]\n', "3: model.a.aliases: the alias 'b,c' holds a ','"),
        ('[model.a]\nrouter = ["man"]\n', "3: model.a.router: no router is called man, did you mean main?"),
        ('[model.a]\nargs = ["--alias", "x"]\n', '3: [model."a"]: --alias in args is refused'),
        ('[model.a]\nargs = ["--no-ui"]\n', '3: [model."a"]: --no-ui in args is refused: it is about the router'),
        ('[model.a]\nctx_size = 1\nargs = ["-c", "2"]\n', '4: [model."a"]: ctx_size and -c set the same option'),
        ('[model.a]\ngrammar_file = "~nobody-x/g"\n', "2: model.a: no such user: ~nobody-x"),
        ('[model.a]\nmmproj = "we#ird"\n', '2: [model."a"]: the value'),
        ('[model.""]\nctx_size = 1\n', '2: model."": names no model'),
        ('[defaults]\nlora = ["x"]\n', '3: defaults.lora: unknown key here: it belongs in a [model."NAME"]'),
        ('[[router]]\nmmproj = "x"\n', '3: router[0].mmproj: unknown key here: it belongs in a [model."NAME"]'),
        ('on_overwrite = "stop"\n', "2: on_overwrite: expected 'reload', 'unload' or 'keep', found \"stop\""),
        ('link_dirs = "x"\n', "2: link_dirs: expected a list, in [ ]"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_with_its_line(write: Write, text: str, told: str) -> None:
    """One line that says where, what, and what to write instead."""
    (line,) = refusal(write(HEAD + text))
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[model.a]\naliases = ["x"]\n[model.b]\naliases = ["x"]\n',
            ["""5: model.b.aliases: 'x' is an alias of the model of [model."a"] too; each needs its own"""],
        ),
        (
            '[model.a]\naliases = ["b"]\n[model.b]\nctx_size = 1\n',
            ["""3: model.a.aliases: 'b' is the name of the model of [model."b"] too; each needs its own"""],
        ),
        ('[model.a]\naliases = ["a", "x", "x"]\n[model."[a]"]\naliases = ["x"]\n', []),
        (
            TWO_ROUTERS + '[model.a]\naliases = ["x"]\nrouter = "r"\n[model.b]\naliases = ["x"]\nrouter = "s"\n',
            [],
        ),
    ],
)
def test_aliases_of_models_in_one_router_differ(write: Write, text: str, told: list[str]) -> None:
    """Two models of one name would stop the router; in two routers they do not meet."""
    path = write(HEAD + text)
    if told:
        assert refusal(path) == told
    else:
        load(path, NOTHING)


# The command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder with one model, alpha."""
    models = tmp_path / "models"
    models.mkdir()
    write_tiny_model(models / "alpha.gguf", ["I", "am", "alpha"])
    return models


TABLES = """
[defaults]
ctx_size = 512
threads = 2
args = ["--top-k", "1", "--batch-size", "64", "--temp", "0.5"]
[[router]]
name = "a"
models_max = 1
ctx_size = 256
[[router]]
name = "b"
models_max = 2
[model."al*"]
batch_size = 128
args = ["--top-k", "2"]
[model.alpha]
ctx_size = 1024
aliases = ["first"]
router = ["a"]
"""


def test_config_show_model_says_what_it_gets_and_from_where(
    write: Write, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every table that has the last word on something, with its line; what was overridden is not shown."""
    path = write(f'models_dir = "{folder}"\n{TABLES}')
    assert main(["config", "show", str(path), "--model", "alpha", "--json"]) == ExitCode.OK
    out, err = capsys.readouterr()
    rows = [(each["router"], each["key"], each["value"], each["from"]) for each in json.loads(out)]
    assert rows == [
        ("a", "model", f"{folder}/alpha.gguf", f"{path}:1"),
        ("a", "kind", "model", f"{folder}/alpha.gguf"),
        ("a", "aliases", ["first"], f'[model."alpha"], {path}:19'),
        ("a", "batch_size", 128, f'[model."al*"], {path}:15'),
        ("a", "ctx_size", 1024, f'[model."alpha"], {path}:18'),
        ("a", "router", ["a"], f'[model."alpha"], {path}:20'),
        ("a", "threads", 2, f"[defaults], {path}:5"),
        ("a", "args", ["--temp", "0.5"], f"[defaults], {path}:6"),
        ("a", "args", ["--top-k", "2"], f'[model."al*"], {path}:16'),
    ]
    assert err == "llamavisor: router b: may not hold alpha: `router` in its [model] table names others\n"


def test_config_show_model_says_how_long_it_stays(
    write: Write, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last word on ttl and pin, with its table, also from tables that say nothing else."""
    tables = '[defaults]\nttl = "10m"\n[model."al*"]\nttl = 0\nctx_size = 512\n[model.alpha]\npin = true\n'
    path = write(f'models_dir = "{folder}"\n{tables}')

    def shown(model: str) -> dict[str, tuple[object, str]]:
        assert main(["config", "show", str(path), "--model", model, "--json"]) == ExitCode.OK
        return {each["key"]: (each["value"], each["from"]) for each in json.loads(capsys.readouterr().out)}

    alpha = shown("alpha")
    assert alpha["ttl"] == (0.0, f'[model."al*"], {path}:5')
    assert alpha["pin"] == (True, f'[model."alpha"], {path}:8')
    assert list(alpha) == ["model", "kind", "ctx_size", "pin", "ttl"]
    assert shown("beta") == {"ttl": (600.0, f"[defaults], {path}:3")}


def test_config_show_model_as_a_table(write: Write, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An alias leads to the model; a name that is not there gets what one of that name would get."""
    path = write(f'models_dir = "{folder}"\n{TABLES}')
    assert main(["config", "show", "--config", str(path), "--model", "first", "--router", "a"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert err == "llamavisor: first is an alias of alpha\n"
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert rows["KEY"] == ["VALUE", "FROM"]
    assert rows["router.a.ctx_size"] == ["1024", f'[model."alpha"], {path}:18']
    assert main(["config", "show", str(path), "--model", "albert"]) == ExitCode.OK
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert rows["router.a.ctx_size"] == ["256", f"[[router]] a, {path}:10"]
    assert rows["router.b.ctx_size"] == ["512", f"[defaults], {path}:4"]
    assert "router.a.model" not in rows
    assert err.splitlines()[0].endswith(f"{folder} has no such model; this is what one called albert would get")


def test_config_show_model_knows_what_kind_of_model_it_is(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an embedding model gets by itself is shown as that, and its own table beats it."""
    values = [("general.architecture", (STRING, "bert")), ("bert.context_length", (U32, 512))]
    (tmp_path / "bge.gguf").write_bytes(GgufFile(values=values, tensors=[Tensor("a.weight")]).encode())
    path = write('models_dir = "."\n[defaults]\nctx_size = 4096\n[model.bge]\nubatch_size = 64\n')
    assert main(["config", "show", str(path), "--model", "bge", "--json"]) == ExitCode.OK
    shown = {each["key"]: (each["value"], each["from"]) for each in json.loads(capsys.readouterr().out)}
    automatic = "automatic (an embedding model)"
    assert {key: shown[key] for key in ("kind", "ctx_size", "batch_size", "ubatch_size", "embeddings")} == {
        "kind": ("embedding", f"{tmp_path}/bge.gguf"),
        "ctx_size": (512, automatic),
        "batch_size": (512, automatic),
        "ubatch_size": (64, f'[model."bge"], {path}:5'),
        "embeddings": (True, automatic),
    }


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--model", "alpha", "--router", "c"], ExitCode.NOT_FOUND, "no router is called c"),
        (["--model", "alpha", "--router", "b"], ExitCode.NOT_FOUND, "no router may hold alpha"),
        (["--router", "b"], ExitCode.USAGE, "--router goes with --model"),
    ],
)
def test_config_show_model_of_nobody(
    write: Write, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: ExitCode, told: str
) -> None:
    """What makes no sense has an exit code and one line."""
    assert main(["config", "show", str(write(f'models_dir = "{folder}"\n{TABLES}')), *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err.splitlines()[-1]


def test_config_check_asks_the_llama_server_about_tables_of_models(
    write: Write,
    folder: Path,
    tmp_path: Path,
    fake_llama_server: Callable[..., FakeLlamaServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each table against each router that may hold its models, all problems at once."""
    head = f'models_dir = "{folder}"\nllama_server = "{fake_llama_server()}"\n'
    routers = '[[router]]\nname = "a"\nmodels_max = 1\n[[router]]\nname = "b"\nmodels_max = 2\n'
    bad = '[model.x]\nargs = ["--nope"]\nrouter = "b"\n[model."*"]\nargs = ["--neither"]\n'
    assert main(["config", "check", str(write(head + routers + bad))]) == ExitCode.BAD_CONFIG
    lines = capsys.readouterr().err.splitlines()
    path = tmp_path / "llamavisor.toml"
    assert [line.split(" is not")[0] for line in lines if "warning" not in line] == [
        f'{path}:13: router a: [model."*"]: --neither in args',
        f'{path}:10: router b: [model."x"]: --nope in args',
        f'{path}:13: router b: [model."*"]: --neither in args',
    ]
    good = '[model."*"]\nctx_size = 1\n'
    assert main(["config", "check", str(write(head + routers + good))]) == ExitCode.OK


def test_an_alias_that_is_refused_is_not_told_as_a_list(write: Write) -> None:
    """What is wrong is one of its words, not that they are several."""
    (line,) = refusal(write(HEAD + '[model.a]\naliases = ["b,c"]\n'))
    assert line.endswith("which separates aliases")
    (line,) = refusal(write(HEAD + "[model.a]\nctx_size = [1]\n"))
    assert line.endswith("found a list")


def test_config_check_doubts_tables_of_what_is_not_there(
    write: Write, folder: Path, fake_llama_server: Callable[..., FakeLlamaServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that tables name, and models: they may come, so these are warnings with their lines, and no failure."""
    head = f'models_dir = "{folder}"\nllama_server = "{fake_llama_server()}"\n'
    tables = """
[model.alpha]
ctx_size = 1
grammar_file = "no.gbnf"
lora = ["no.gguf:0.5"]
[model.alhpa]
threads = 1
[model."qwen*"]
threads = 2
[model."al*"]
threads = 3
"""
    path = write(head + tables)
    assert main(["config", "check", str(path)]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert "ok, routers: main" in out
    here = path.parent
    assert err.splitlines() == [
        f'llamavisor: warning: {path}:6: [model."alpha"]: grammar_file {here}/no.gbnf is not there',
        f'llamavisor: warning: {path}:7: [model."alpha"]: lora {here}/no.gguf is not there',
        f'llamavisor: warning: {path}:9: [model."alhpa"] matches no model in {folder}, did you mean alpha?',
        f'llamavisor: warning: {path}:11: [model."qwen*"] matches no model in {folder}',
    ]


def test_config_check_says_nothing_of_models_in_a_folder_that_cannot_be_read(
    write: Write, tmp_path: Path, fake_llama_server: Callable[..., FakeLlamaServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is not known; that is told once."""
    head = f'models_dir = "{tmp_path}/none"\nllama_server = "{fake_llama_server()}"\n'
    assert main(["config", "check", str(write(head + "[model.a]\nthreads = 1\n"))]) == ExitCode.OK
    assert "matches no model" not in capsys.readouterr().err
