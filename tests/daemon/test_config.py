"""What is written in files, variables and flags, and the configuration that comes of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamavisor.settings import MemoryBudget
from llamavisord.config import Config
from llamavisord.document import DefaultsTable, Document, GatewayTable, MetricsTable, ModelTable, RouterTable
from llamavisord.loading import load
from llamavisord.places import Places
from llamavisord.problems import ConfigError
from llamavisord.sources import Overrides

NOTHING: Mapping[str, str] = {}
EXAMPLE = """\
serve = "router"
host = "127.0.0.1"
port = 8080
models_dir = "/srv/models"
models_max = 4
llama_server = "llama-server"
[metrics]
host = "127.0.0.1"
port = 9155
[defaults]
gpu_layers = "auto"
ctx_size = 8192
flash_attn = "auto"
args = ["--threads", "8"]
[[router]]
name = "gpu0"
port = 8081
devices = ["CUDA0"]
env = { CUDA_VISIBLE_DEVICES = "0" }
split_mode = "none"
models_max = 2
"""

AT_THE_TOP = "{}: unknown key here: it belongs at the top of the file, above the first [table]"
BUDGET = 'expected "auto", a size such as "22GiB", or sizes by device such as { CUDA0 = "22GiB", RAM = "48GiB" }'
DEVICE_BUDGET = 'expected a size, such as "22GiB"; leave out a device without a budget of its own'
NO_BUDGET = (
    'with a budget of 0 nothing could be loaded: write "auto" for all that is there;'
    " to keep models off a GPU, name only the others in `devices`"
)
DURATION = 'expected a duration: a number of seconds, or text such as "30s", "10m" or "1h30m"'

ROUTER = 'serve = "router"\nmodels_dir = "/m"\n'
"""What a file begins with where llama-server itself faces the clients; `test_config_gateway.py` has the other way."""

Write = Callable[[str], Path]


def refusal(path: Path | None, environ: Mapping[str, str] = NOTHING, overrides: Overrides | None = None) -> list[str]:
    """The lines that a person sees, with the file's own path left out."""
    with pytest.raises(ConfigError) as caught:
        load(path, environ, overrides)
    assert caught.value.code == "config_invalid"
    return [line.replace(f"{path}:", "") for line in str(caught.value).splitlines()]


# What comes out


def test_the_example_of_the_readme_means_what_it_says(write: Write) -> None:
    """Each key ends up where the daemon looks for it."""
    config = load(write(EXAMPLE), NOTHING)
    (router,) = config.routers
    assert config.serve == "router"
    assert (config.metrics.enabled, config.metrics.host, config.metrics.port) == (True, "127.0.0.1", 9155)
    assert (router.name, router.host, router.port) == ("gpu0", "127.0.0.1", 8081)
    assert (router.models_dir, router.models_max) == (Path("/srv/models"), 2)
    assert router.llama_server == "llama-server"
    assert router.env == (("CUDA_VISIBLE_DEVICES", "0"),)
    defaults, own = router.layers
    assert defaults.source == "[defaults]"
    assert defaults.options.model_dump(exclude_unset=True) == {
        "gpu_layers": "auto",
        "ctx_size": 8192,
        "flash_attn": "auto",
        "args": ("--threads", "8"),
    }
    assert own.source == "[[router]] gpu0"
    assert own.options.model_dump(exclude_unset=True) == {"devices": ("CUDA0",), "split_mode": "none"}


def test_no_file_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A models folder on the command line makes one router called main with the defaults of everything."""
    monkeypatch.setattr("llamavisord.places._SYSTEM_CONFIG", tmp_path / "none")
    config = load(None, NOTHING, Overrides(models_dir="/m"), places=Places(NOTHING, is_root=True))
    (router,) = config.routers
    assert config.path is None
    assert (router.name, router.models_max, router.layers) == ("main", 4, ())
    assert config.gateway is not None
    assert (config.serve, config.gateway.host, config.gateway.port) == ("gateway", "127.0.0.1", 8080)
    assert config.socket == Path("/run/llamavisor/control.sock")
    assert config.state_dir == Path("/var/lib/llamavisor")
    assert config.log_dir == Path("/var/lib/llamavisor/logs")


def test_flags_win_over_variables_over_the_file_over_the_defaults(write: Write) -> None:
    """Each of four keys is decided by a different one of the four."""
    path = write('models_dir = "/file"\nport = 1\nmodels_max = 1\n')
    environ = {"LLAMAVISOR_PORT": "2", "LLAMAVISOR_MODELS_MAX": "2"}
    config = load(path, environ, Overrides(models_max=3))
    (router,) = config.routers
    assert config.gateway is not None
    found = (config.gateway.host, router.models_dir, config.gateway.port, router.models_max)
    assert found == ("127.0.0.1", Path("/file"), 2, 3)


def test_a_flag_speaks_for_every_router(write: Write) -> None:
    """What a router's own table says gives way to a flag too."""
    path = write('[[router]]\nname = "a"\nmodels_dir = "/a"\n[[router]]\nname = "b"\n')
    routers = load(path, NOTHING, Overrides(models_dir="/flag", models_max=9)).routers
    assert [(router.models_dir, router.models_max) for router in routers] == [(Path("/flag"), 9)] * 2


def test_a_router_inherits_what_it_does_not_say_itself(write: Write) -> None:
    """The top of the file, [defaults] and the command line reach every router, in that order of its layers."""
    path = write(
        'serve = "router"\nhost = "::1"\nmodels_dir = "/top"\n[defaults]\nctx_size = 1\nenv = { A = "1", B = "1" }\n'
        '[[router]]\nname = "a"\nport = 1\nctx_size = 2\nenv = { B = "2" }\n[[router]]\nname = "b"\nport = 2\n'
    )
    a, b = load(path, NOTHING, Overrides(gpu_layers="7", args=("--top-k", "1"))).routers
    assert (a.host, a.models_dir, b.host, b.models_dir) == ("::1", Path("/top"), "::1", Path("/top"))
    assert [layer.source for layer in a.layers] == ["[defaults]", "[[router]] a", "command line"]
    assert [layer.source for layer in b.layers] == ["[defaults]", "command line"]
    assert (a.layers[-1].options.gpu_layers, a.layers[-1].options.args) == (7, ("--top-k", "1"))
    assert (a.env, b.env) == ((("A", "1"), ("B", "2")), (("A", "1"), ("B", "1")))


def test_the_variable_for_llama_server_fills_a_gap_and_overrides_nothing(write: Write) -> None:
    """LLAMAVISOR_LLAMA_SERVER describes the machine: a file that names a llama-server means that one."""
    environ = {"LLAMAVISOR_LLAMA_SERVER": "/machine/llama-server"}
    silent, outspoken = 'models_dir = "/m"\n', 'models_dir = "/m"\nllama_server = "/mine"\n'
    assert load(write(silent), environ).routers[0].llama_server == "/machine/llama-server"
    assert load(write(outspoken), environ).routers[0].llama_server == "/mine"
    assert (
        load(write(outspoken), environ, Overrides(llama_server="llama-server")).routers[0].llama_server
        == "llama-server"
    )


def test_relative_paths_start_where_they_were_written(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file they start at its folder, in a flag or a variable at the working folder; `~` is the home."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", "/home/me")
    path = write('models_dir = "models"\nstate_dir = "~/state"\nllama_server = "bin/llama-server"\n')
    config = load(path, NOTHING)
    assert config.routers[0].models_dir == tmp_path / "models"
    assert config.routers[0].llama_server == str(tmp_path / "bin/llama-server")
    assert config.state_dir == Path("/home/me/state")
    assert load(path, {"LLAMAVISOR_MODELS_DIR": "m"}).routers[0].models_dir == tmp_path / "cwd/m"
    assert load(Path("../llamavisor.toml"), NOTHING, Overrides(socket="s")).socket == tmp_path / "cwd/s"


def test_two_readings_of_one_file_are_equal(write: Write) -> None:
    """Equal settings are how a reload knows that nothing has to be restarted."""
    assert load(write(EXAMPLE), NOTHING) == load(write(EXAMPLE), NOTHING)
    assert load(write(EXAMPLE), NOTHING) != load(write(EXAMPLE.replace("8192", "4096")), NOTHING)


def test_a_missing_folder_or_binary_is_no_error_of_the_configuration(write: Write) -> None:
    """The daemon comes up and its router says what is missing."""
    path = write('models_dir = "/does/not/exist"\nllama_server = "/does/not/exist/either"\n')
    assert load(path, NOTHING).routers[0].models_dir == Path("/does/not/exist")


def test_metrics_are_turned_off_by_a_key_or_a_flag(write: Write) -> None:
    """A port of nought is not how: the message of its refusal names the key."""
    text = 'models_dir = "/m"\n[metrics]\n'
    assert not load(write(f"{text}enabled = false\n"), NOTHING).metrics.enabled
    assert not load(write(text), NOTHING, Overrides(metrics=False)).metrics.enabled
    assert "enabled = false turns metrics off" in refusal(write(f"{text}port = 0\n"))[0]


def test_sizes_are_written_with_units(write: Write) -> None:
    """The size at which logs are rotated may be text, and must not be silly."""
    assert load(write('models_dir = "/m"\nlog_size = "2MiB"\n'), NOTHING).log_size_bytes == 2 * 1024**2
    assert refusal(write('models_dir = "/m"\nlog_size = 12\n'))[0].startswith("2: log_size: expected greater than")


GIB = 1024**3


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ("", MemoryBudget()),
        ('memory = "auto"\n', MemoryBudget()),
        ('memory = "22GiB"\n', MemoryBudget(22 * GIB)),
        ("memory = 1073741824\n", MemoryBudget(GIB)),
        ('memory = { RAM = "48GiB", CUDA0 = "22G" }\n', MemoryBudget(None, (("CUDA0", 22 * GIB), ("RAM", 48 * GIB)))),
        ('[memory]\n"RPC[10.0.0.2:50052]" = "1GB"\n', MemoryBudget(None, (("RPC[10.0.0.2:50052]", 10**9),))),
    ],
)
def test_a_budget_is_auto_or_a_size_or_sizes_by_device(write: Write, written: str, budget: MemoryBudget) -> None:
    """The order in which devices are written means nothing."""
    (router,) = load(write(f'models_dir = "/m"\n{written}'), NOTHING).routers
    assert router.memory == budget


def test_the_nearest_word_on_memory_counts_alone(write: Write) -> None:
    """A router's own table takes nothing over from that at the top of the file; a variable or a flag replaces both."""
    path = write(
        'models_dir = "/m"\nmemory = { CUDA0 = "1GiB", RAM = "4GiB" }\n[[router]]\nname = "a"\n'
        '[[router]]\nname = "b"\n[router.memory]\nCUDA1 = "2GiB"\n'
    )
    top, own = MemoryBudget(None, (("CUDA0", GIB), ("RAM", 4 * GIB))), MemoryBudget(None, (("CUDA1", 2 * GIB),))
    assert [router.memory for router in load(path, NOTHING).routers] == [top, own]
    environ = {"LLAMAVISOR_MEMORY": "3GiB"}
    config = load(path, environ)
    assert [router.memory for router in config.routers] == [MemoryBudget(3 * GIB)] * 2
    origins = {each.key: (each.value, str(each.origin)) for each in config.settings}
    assert origins["router.b.memory"] == (3 * GIB, "LLAMAVISOR_MEMORY")
    config = load(path, environ, Overrides(memory="auto"))
    assert [router.memory for router in config.routers] == [MemoryBudget()] * 2
    origins = {each.key: (each.value, str(each.origin)) for each in config.settings}
    assert origins["router.a.memory"] == ("auto", "--memory")


def test_budgets_are_shown_by_device_with_their_lines(write: Write) -> None:
    """Each device is a row of its own, in an inline table and in one with a line for each."""
    path = write('models_dir = "/m"\n[memory]\nRAM = "4GiB"\n\nCUDA0 = "1GiB"\n')
    shown = {each.key: (each.value, str(each.origin)) for each in load(path, NOTHING).settings}
    assert shown["router.main.memory.RAM"] == (4 * GIB, f"{path}:3")
    assert shown["router.main.memory.CUDA0"] == (GIB, f"{path}:5")
    assert "router.main.memory" not in shown
    path = write('models_dir = "/m"\n')
    shown = {each.key: (each.value, str(each.origin)) for each in load(path, NOTHING).settings}
    assert shown["router.main.memory"] == ("auto", "default")


def test_how_room_is_made_reaches_the_fleet(write: Write) -> None:
    """Both keys have a default, and stand with their lines in what is shown."""
    config = load(write('models_dir = "/m"\n'), NOTHING)
    fleet = config.fleet_settings(router_key="k3y")
    assert (fleet.serve, fleet.min_residency_s, fleet.oversize) == ("gateway", 60.0, "fit")
    path = write('models_dir = "/m"\nmin_residency = "1h30m"\noversize = "refuse"\n')
    config = load(path, NOTHING)
    fleet = config.fleet_settings(router_key="k3y")
    assert (fleet.min_residency_s, fleet.oversize) == (5400.0, "refuse")
    shown = {each.key: (each.value, str(each.origin)) for each in config.settings}
    assert shown["min_residency"] == (5400.0, f"{path}:2")
    assert shown["oversize"] == ("refuse", f"{path}:3")
    assert load(write('models_dir = "/m"\nmin_residency = 0\n'), NOTHING).min_residency_s == 0.0


def test_a_time_to_live_is_written_like_an_option(write: Write) -> None:
    """In [defaults] and in a router's table, with the line of each."""
    path = write('models_dir = "/m"\n[defaults]\nttl = "1h30m"\n[[router]]\nname = "a"\nttl = 0\n')
    config = load(path, NOTHING)
    assert [layer.options.ttl for layer in config.routers[0].layers] == [5400.0, 0.0]
    shown = {each.key: (each.value, str(each.origin)) for each in config.settings}
    assert shown["router.a.ttl"] == (0.0, f"{path}:6")


# Where things are


def test_a_file_is_found_where_it_is_expected(tmp_path: Path) -> None:
    """The named one, else LLAMAVISOR_CONFIG, else the user's own; a named one that is missing is an error."""
    own = tmp_path / "config/llamavisor/llamavisor.toml"
    own.parent.mkdir(parents=True)
    own.write_text('models_dir = "/own"\n', encoding="utf-8")
    other = tmp_path / "other.toml"
    other.write_text('models_dir = "/other"\n', encoding="utf-8")
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "HOME": "/none"}

    def models_dir(path: Path | None, environ: Mapping[str, str]) -> Path:
        return load(path, environ, places=Places(environ, is_root=False)).routers[0].models_dir

    assert models_dir(None, environ) == Path("/own")
    assert models_dir(None, environ | {"LLAMAVISOR_CONFIG": str(other)}) == Path("/other")
    assert models_dir(other, environ) == Path("/other")
    missing = tmp_path / "missing.toml"
    assert refusal(missing) == [" cannot be read: No such file or directory"]


def test_a_user_and_root_have_their_own_places() -> None:
    """The folders of a user are those of the XDG specification; without a runtime folder the socket is private."""
    user = Places({"HOME": "/home/me", "XDG_RUNTIME_DIR": "/run/user/7"}, is_root=False)
    assert user.socket == Path("/run/user/7/llamavisor/control.sock")
    assert user.sockets == (user.socket, Path("/run/llamavisor/control.sock"))
    assert user.state_dir == Path("/home/me/.local/state/llamavisor")
    assert user.config_files[0] == Path("/home/me/.config/llamavisor/llamavisor.toml")
    bare = Places({"HOME": "/home/me", "XDG_RUNTIME_DIR": "relative"}, is_root=False)
    assert bare.socket == Path("/home/me/.local/state/llamavisor/run/control.sock")
    root = Places({"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0"}, is_root=True)
    assert root.sockets == (Path("/run/llamavisor/control.sock"),)
    assert root.config_files == (Path("/etc/llamavisor/llamavisor.toml"),)


@pytest.mark.parametrize("is_root", [True, False])
def test_the_folders_of_systemd_win_over_the_defaults_and_not_over_the_file(write: Write, is_root: bool) -> None:
    """Of several folders in one variable the first counts."""
    environ = {"RUNTIME_DIRECTORY": "/run/a:/run/b", "STATE_DIRECTORY": "/state", "LOGS_DIRECTORY": "/logs"}
    places = Places(environ, is_root=is_root)
    config = load(write('models_dir = "/m"\n'), environ, places=places)
    assert (config.runtime_dir, config.state_dir) == (Path("/run/a"), Path("/state"))
    assert config.log_dir == Path("/logs")
    config = load(write('models_dir = "/m"\nstate_dir = "/mine"\nsocket = "/my/socket"\n'), environ, places=places)
    assert (config.socket, config.runtime_dir, config.state_dir) == (Path("/my/socket"), Path("/my"), Path("/mine"))


def test_a_user_without_a_home_still_has_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown user id in a container is no reason to fail."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert Places({}, is_root=False).state_dir == Path("/.local/state/llamavisor")


# What is refused


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('models_dir = "/m"\nprot = 1\n', "2: prot: unknown key, did you mean port?"),
        ('[metrics]\n\nhots = "x"\n', "3: metrics.hots: unknown key, did you mean host?"),
        (
            '[[router]]\nname = "a"\n[[router]]\nctx_sise = 1\n',
            "4: router[1].ctx_sise: unknown key, did you mean ctx_size?",
        ),
        ("gpu_layers = 1\n", "1: gpu_layers: unknown key here: it belongs in [defaults] or a [[router]]"),
        (
            '[metrics]\nlog_level = "info"\n',
            "2: metrics.log_level: unknown key here: it belongs at the top of the file, above the first [table]",
        ),
        (
            'api_key = "sesame"\n',
            "1: api_key: a key is not written here: put it into a file of its own and name that with api_key_file",
        ),
        ("qwertz = 1\n", "1: qwertz: unknown key"),
        ('port = "8080"\n', '1: port: expected a port, a whole number from 1 to 65535, found "8080"'),
        ("port = 65536\n", "1: port: expected a port, a whole number from 1 to 65535, found 65536"),
        ("port = true\n", "1: port: expected a port, a whole number from 1 to 65535, found true"),
        (
            "models_dir = 1\n",
            "1: models_dir: expected text in quotes, not empty and without control characters, found 1",
        ),
        ("models_max = -1\n", "1: models_max: expected a whole number from 0 (no cap) up, found -1"),
        ('log_level = "loud"\n', "1: log_level: expected 'debug', 'info', 'warning' or 'error', found \"loud\""),
        ("metrics = 3\n", "1: metrics: expected a table of keys and values, found 3"),
        ("[metrics]\nenabled = 1\n", "2: metrics.enabled: expected true or false, found 1"),
        (
            '[router]\nname = "a"\n',
            "1: router: write [[router]] with two brackets: there may be several, found a table",
        ),
        ("[defaults]\nenv = { A = 1 }\n", "2: defaults.env.A: expected text in quotes, found 1"),
        ('[defaults]\nargs = "--threads 8"\n', None),
        (
            '[[router]]\nname = "a b"\n',
            '2: router[0].name: expected a name of 1 to 64 letters, digits, - and _ in quotes, found "a b"',
        ),
        (
            'host = "127.0.0.1,::1"\n',
            '1: host: expected one address or host name in quotes, such as "127.0.0.1" or "::1", found "127.0.0.1,::1"',
        ),
        (
            'serve = "proxy"\n',
            "1: serve: expected 'router' or 'gateway', found \"proxy\"",
        ),
        ('[defaults]\ntensor_split = [1, "x"]\n', '2: defaults.tensor_split[1]: expected a number, found "x"'),
        ("[metrics]\nmemory = 1\n", AT_THE_TOP.format("2: metrics.memory")),
        ('[defaults]\nmemory = "1GiB"\n', AT_THE_TOP.format("2: defaults.memory")),
        ('[[router]]\nmin_residency = "1m"\n', AT_THE_TOP.format("2: router[0].min_residency")),
        ('memory = "lots"\n', f'1: memory: {BUDGET}, found "lots"'),
        ('memory = "-1GiB"\n', f'1: memory: {BUDGET}, found "-1GiB"'),
        ("memory = -1\n", f"1: memory: {BUDGET}, found -1"),
        ("memory = true\n", f"1: memory: {BUDGET}, found true"),
        ('memory = ["22GiB"]\n', f"1: memory: {BUDGET}, found a list"),
        ("memory = nan\n", f"1: memory: {BUDGET}, found a number beyond all bounds"),
        ("memory = 22\n", '1: memory: less than any model takes: write the unit too, as in "22GiB", found 22'),
        ("memory = 0\n", f"1: memory: {NO_BUDGET}, found 0"),
        ('memory = "0GiB"\n', f'1: memory: {NO_BUDGET}, found "0GiB"'),
        ("memory = {}\n", '1: memory: names no device: write "auto" for all that is there, found a table'),
        ('[memory]\nRAM = "1GiB"\nCUDA0 = 0\n', f"3: memory.CUDA0: {NO_BUDGET}, found 0"),
        ('[memory]\nRAM = "1GiB"\nCUDA0 = "all"\n', f'3: memory.CUDA0: {DEVICE_BUDGET}, found "all"'),
        ("memory = { CUDA0 = { size = 1 } }\n", f"1: memory.CUDA0: {DEVICE_BUDGET}, found a table"),
        ("memory = { CUDA0 = false }\n", f"1: memory.CUDA0: {DEVICE_BUDGET}, found false"),
        (
            '[[router]]\nname = "a"\nmemory = { cpu = "1GiB" }\n',
            '3: router[0].memory.cpu: the memory of the machine itself is called RAM here, found "cpu"',
        ),
        (
            'memory = { "CUDA 0" = "1GiB" }\n',
            '1: memory."CUDA 0": expected a device as llama-server names it, such as CUDA0, or RAM, found "CUDA 0"',
        ),
        ('oversize = "swap"\n', "1: oversize: expected 'fit' or 'refuse', found \"swap\""),
        ('min_residency = "soon"\n', f'1: min_residency: {DURATION}, found "soon"'),
        ("min_residency = -1\n", f"1: min_residency: {DURATION}, found -1"),
        ("min_residency = true\n", f"1: min_residency: {DURATION}, found true"),
        ('[defaults]\nttl = "soon"\n', f'2: defaults.ttl: {DURATION}; 0 for never, found "soon"'),
        ("[defaults]\nttl = true\n", f"2: defaults.ttl: {DURATION}; 0 for never, found true"),
        ('[[router]]\nname = "a"\nttl = { a = 1 }\n', f"3: router[0].ttl: {DURATION}; 0 for never, found a table"),
        (
            "[defaults]\ntemperature = -0.1\n",
            "2: defaults.temperature: expected greater than or equal to 0, found -0.1",
        ),
        (
            "[defaults]\ntemperature = true\n",
            "2: defaults.temperature: must be a number, not true or false, found true",
        ),
        ("[defaults]\ntop_p = 1.01\n", "2: defaults.top_p: expected less than or equal to 1, found 1.01"),
        ("[defaults]\ntop_k = 1.5\n", "2: defaults.top_k: expected a whole number, found 1.5"),
        (
            "[defaults]\nmin_p = nan\n",
            "2: defaults.min_p: expected greater than or equal to 0, found a number beyond all bounds",
        ),
        ("[defaults]\nrepeat_penalty = 0\n", "2: defaults.repeat_penalty: expected greater than 0, found 0"),
        ("[defaults]\nmax_tokens = 0\n", "2: defaults.max_tokens: expected greater than or equal to 1, found 0"),
        ("ttl = 60\n", "1: ttl: unknown key here: it belongs in [defaults] or a [[router]]"),
        ("[defaults]\npin = true\n", '2: defaults.pin: unknown key here: it belongs in a [model."NAME"]'),
        ("pin = true\n", '1: pin: unknown key here: it belongs in a [model."NAME"]'),
    ],
)
def test_what_is_wrong_is_told_with_its_line_its_key_and_what_is_expected(
    write: Write, text: str, line: str | None
) -> None:
    """One line for a person; where a value may be a secret it is not repeated."""
    lines = refusal(write(text))
    assert len(lines) == 1
    if line is not None:
        assert lines == [line]


def test_a_value_that_may_be_a_secret_is_not_repeated(write: Write) -> None:
    """Neither a message nor the settings for `config show` hold one."""
    path = write('[defaults]\nargs = "--hf-token sesame"\nenv = { HF_TOKEN = ["sesame"] }\n')
    assert "sesame" not in "\n".join(refusal(path))
    path = write(
        'models_dir = "/m"\n[defaults]\nenv = { HF_TOKEN = "sesame", DEBUG = "1" }\n'
        'args = ["--some-token", "sesame", "--top-k", "1"]\n'
    )
    shown = {each.key: each.value for each in load(path, NOTHING).settings}
    assert "sesame" not in str(shown)
    assert shown["router.main.env.HF_TOKEN"] == "(set)"
    assert shown["router.main.env.DEBUG"] == "1"
    assert shown["router.main.args"] == ("--some-token", "(set)", "--top-k", "1")


@pytest.mark.parametrize(
    ("raw", "line", "says"),
    [
        (b"a = 1\nb = \n", 2, "not TOML: Invalid value"),
        (b"a = 1\na = 2\n", 2, "not TOML: Cannot overwrite a value"),
        (b"a = 1\n\n# \xff\n", 3, "not TOML: a byte that is not UTF-8"),
        (b'a = """\n\n', 3, "not TOML"),
        (b"a = " + b"[" * 5000, None, "not TOML"),
        (b"a = " + b"9" * 5000, None, "not TOML"),
        (b"#" * 1_100_000, None, "not TOML: longer than"),
    ],
)
def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path, raw: bytes, line: int | None, says: str) -> None:
    """Also what tomllib itself does not call a TOML error."""
    path = tmp_path / "llamavisor.toml"
    path.write_bytes(raw)
    (told,) = refusal(path)
    assert told.startswith(f"{line}: {says}" if line else f" {says}")


def test_everything_that_is_wrong_is_told_at_once(write: Write) -> None:
    """In the order of the file, then the environment, then the flags."""
    path = write("port = 0\nprot = 1\n[metrics]\nport = 0\n")
    lines = refusal(path, {"LLAMAVISOR_PORT": "x"}, Overrides(log_level="loud"))
    assert [line.split(":")[0] for line in lines] == ["1", "2", "4", "LLAMAVISOR_PORT", "--log-level"]


def test_contradictions_are_told_with_their_lines(write: Write, tmp_path: Path) -> None:
    """Names and ports that are taken twice, and what the library refuses in options and variables."""
    path = write(
        'models_dir = "/m"\nserve = "router"\napi_key_file = "nokey"\n[defaults]\nargs = ["--port", "1"]\n'
        '[[router]]\nname = "a"\nport = 1\n[[router]]\nname = "a"\nport = 1\n'
        '[[router]]\nname = "m"\nport = 9155\nenv = { LLAMA_ARG_PORT = "1" }\n'
    )
    lines = refusal(path)
    assert f"3: api_key_file: {tmp_path}/nokey cannot be read: No such file or directory" in lines
    assert any(line.startswith("5: [defaults]: --port in args is refused") for line in lines)
    assert "10: router[1].name: 2 routers are called a; each needs a name of its own" in lines
    assert "11: router[1].port: both router a and router a would listen on port 1; each needs its own" in lines
    assert "14: router[2].port: both the metrics and router m would listen on port 9155; each needs its own" in lines
    assert any(line.startswith("15: [[router]] m: LLAMA_ARG_PORT is the supervisor's to set") for line in lines)
    assert len(lines) == 6


def test_one_port_on_two_addresses_is_two_ports(write: Write) -> None:
    """A wildcard address and a name may be any address, two different addresses are none of each other's business."""
    text = f'{ROUTER}[[router]]\nname = "a"\nhost = "127.0.0.1"\n[[router]]\nname = "b"\nhost = "{{}}"\n'
    assert len(load(write(text.format("127.0.0.2")), NOTHING).routers) == 2
    for host in ("0.0.0.0", "localhost", "127.0.0.1"):
        assert len(refusal(write(text.format(host)))) == 1


def test_several_routers_need_names_and_take_no_port_from_a_flag(write: Write) -> None:
    """One port for all of them cannot be meant."""
    path = write(f'{ROUTER}[[router]]\nport = 1\n[[router]]\nname = "b"\nport = 2\n')
    assert refusal(path) == ["3: router[0]: has no name; several routers need one each"]
    path = write(f'{ROUTER}[[router]]\nname = "a"\nport = 1\n[[router]]\nname = "b"\nport = 2\n')
    text = "--port: means nothing to several routers: each [[router]] table has a port of its own"
    assert refusal(path, NOTHING, Overrides(port=3)) == [text]


def test_without_a_models_folder_the_message_says_what_to_write(write: Write, tmp_path: Path) -> None:
    """It names the file, and the flag for those who want none."""
    path = write("")
    (told,) = refusal(path)
    assert told == f'models_dir: is not set: write models_dir = "/srv/models" into {path}, or use --models-dir DIR'


def test_a_socket_path_that_the_kernel_cannot_take_is_refused(write: Write) -> None:
    """107 bytes fit, one more does not, and bytes count, not letters."""
    fits = "/" + "x" * 106
    text = f'models_dir = "/m"\nsocket = "{fits}"\n'
    assert str(load(write(text), NOTHING).socket) == fits
    assert refusal(write(text.replace("/x", "/xx")))[0].startswith("2: socket: AF_UNIX path too long: /xx")
    assert refusal(write(text.replace("/x", "/é")))[0].startswith("2: socket: AF_UNIX path too long")


def test_a_command_line_is_checked_like_a_file() -> None:
    """The message names the command line, since it has no lines."""
    overrides = Overrides(models_dir="/m", gpu_layers="most")
    assert refusal(None, {"LLAMAVISOR_CONFIG": "/dev/null"}, overrides)[0].startswith("--gpu-layers: must be")
    overrides = Overrides(models_dir="/m", args=("--model", "x"))
    (told,) = refusal(None, {"LLAMAVISOR_CONFIG": "/dev/null"}, overrides)
    assert told.startswith("command line: --model in args is refused")


@pytest.mark.parametrize("flag", ["--host", "--port", "--models-dir", "--models_max"])
def test_what_serve_has_a_flag_for_is_not_sent_into_a_table(flag: str) -> None:
    """Behind `--` it is refused, and told where on the command line it belongs."""
    (told,) = refusal(None, overrides=Overrides(models_dir="/m", args=(flag, "3")))
    assert told.startswith(f"command line: {flag} after -- is refused: ")
    assert told.endswith(f"Write it before the --: serve {flag.replace('_', '-')} …")


def test_the_home_of_nobody_is_refused(write: Write) -> None:
    """A `~user` who does not exist must not become a folder of that name."""
    assert refusal(write('models_dir = "~no-such-user/m"\n')) == ["1: models_dir: no such user: ~no-such-user"]


def test_an_unknown_variable_is_a_warning_with_a_suggestion(write: Write) -> None:
    """A daemon must not refuse to start because of it, and ours are not unknown."""
    environ = {"LLAMAVISOR_PROT": "1", "LLAMAVISOR_INSTANCE": "x", "LLAMAVISOR_SPAWN": "x", "LLAMAVISOR_CI": "1"}
    config = load(write('models_dir = "/m"\n'), environ)
    assert config.warnings == ("LLAMAVISOR_PROT is set, and nothing reads it, did you mean LLAMAVISOR_PORT?",)


def test_an_empty_variable_is_not_set(write: Write) -> None:
    """That is how a unit file or a compose file unsets one."""
    config = load(write(ROUTER), {"LLAMAVISOR_PORT": "", "LLAMAVISOR_CONFIG": ""})
    assert config.routers[0].port == 8080


# Keys


def test_an_api_key_is_read_from_its_file_and_never_shown(write: Write, tmp_path: Path) -> None:
    """A router's own file comes before that of the top; a file that all may read is a warning."""
    top, own = tmp_path / "top", tmp_path / "own"
    top.write_text("sesame\n", encoding="ascii")
    own.write_text("open-up", encoding="ascii")
    top.chmod(0o600)
    own.chmod(0o644)
    path = write(
        f'{ROUTER}api_key_file = "top"\n[[router]]\nname = "a"\nport = 1\n'
        '[[router]]\nname = "b"\nport = 2\napi_key_file = "own"\n'
    )
    config = load(path, NOTHING)
    assert [router.api_key for router in config.routers] == ["sesame", "open-up"]
    assert config.warnings == (f"{own} holds an API key and every user can read it: chmod o-r {own}",)
    assert "sesame" not in repr(config)
    assert "sesame" not in str(config.settings)
    top.write_text("changed\n", encoding="ascii")
    assert load(path, NOTHING).routers[0] != config.routers[0]


@pytest.mark.parametrize("text", ["", "\n", "a\nb\n", "a b", "a,b", "é", "x" * 5000, "a\x00b"])
def test_a_file_without_a_proper_key_is_refused_and_not_repeated(write: Write, tmp_path: Path, text: str) -> None:
    """To serve without a key because the file is wrong would be worse than not to serve."""
    (tmp_path / "key").write_text(text, encoding="utf-8")
    (told,) = refusal(write(f'{ROUTER}api_key_file = "key"\n'))
    assert told.startswith(f"3: api_key_file: {tmp_path}/key")
    assert "xxxx" not in told


# Where values come from


def test_every_effective_value_remembers_where_it_was_written(write: Write) -> None:
    """A file with its line, a variable, a flag, or the defaults."""
    path = write(EXAMPLE)
    config = load(path, {"LLAMAVISOR_HOST": "::1"}, Overrides(models_max=1, args=("--top-k", "1")))
    origins = {(each.key, each.value): str(each.origin) for each in config.settings}
    assert origins["serve", "router"] == f"{path}:1"
    assert origins["log_level", "info"] == "default"
    assert origins["router.gpu0.host", "::1"] == "LLAMAVISOR_HOST"
    assert origins["router.gpu0.models_max", 1] == "--models-max"
    assert origins["router.gpu0.port", 8081] == f"{path}:17"
    assert origins["router.gpu0.ctx_size", 8192] == f"{path}:12"
    assert origins["router.gpu0.args", ("--threads", "8")] == f"{path}:14"
    assert origins["router.gpu0.args", ("--top-k", "1")] == "the words after --"
    assert origins["router.gpu0.env.CUDA_VISIBLE_DEVICES", "0"] == f"{path}:19"


# Anything at all

_KEYS = st.sampled_from(
    sorted(
        {
            *Document.model_fields,
            *MetricsTable.model_fields,
            *GatewayTable.model_fields,
            *DefaultsTable.model_fields,
            *RouterTable.model_fields,
            *ModelTable.model_fields,
            "x",
        }
    )
)
_LEAVES = st.one_of(
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.integers(0, 70_000),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "auto",
            "main",
            "/m",
            "~",
            "~x",
            "127.0.0.1",
            "router",
            "gateway",
            "*",
            "64MiB",
            "5m",
            "--port",
            "\0",
            "x" * 120,
        ]
    ),
)
_TABLES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.text(max_size=3), inner, max_size=6),
    max_leaves=12,
)


def _toml(value: object) -> str:
    """Any of these values as TOML, tables inline."""
    match value:
        case bool():
            return str(value).lower()
        case float() if not math.isfinite(value):
            return str(value)
        case int() | float():
            return repr(value)
        case str():
            return _quoted(value)
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{_quoted(key)} = {_toml(inner)}' for key, inner in value.items())}}}"
    raise AssertionError(value)


def _quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(char):08x}" for char in text if not 0xD800 <= ord(char) < 0xE000) + '"'


def _outcome(
    path: Path, environ: Mapping[str, str], overrides: Overrides | None = None
) -> tuple[Config | None, list[str]]:
    try:
        return load(path, environ, overrides), []
    except ConfigError as error:
        return None, [str(problem) for problem in error.problems]


def _load_or_refuse(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "llamavisor.toml")
        path.write_bytes(raw)
        config, problems = _outcome(path, NOTHING)
    assert (config is None) == bool(problems)
    assert all(text.isprintable() for text in problems)


@settings(deadline=None)
@given(st.dictionaries(_KEYS, _TABLES, max_size=8))
def test_no_document_makes_more_than_a_config_error(document: dict[str, object]) -> None:
    """Whatever types stand behind whatever keys: a configuration, or lines that say what is wrong."""
    text = "".join(f"{key} = {_toml(value)}\n" for key, value in document.items())
    _load_or_refuse(text.encode("utf-8"))


@settings(deadline=None)
@given(st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_file_makes_more_than_a_config_error(raw: bytes) -> None:
    """Whatever bytes stand in a file."""
    _load_or_refuse(raw)


@settings(deadline=None)
@example({"LLAMAVISOR_HOST": "0"})
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("LLAMAVISOR_PORT", "LLAMAVISOR_HOST", "LLAMAVISOR_MODELS_MAX", "LLAMAVISOR_LOG_LEVEL"),
                *("LLAMAVISOR_MEMORY", "LLAMAVISOR_X"),
            ]
        ),
        st.text(max_size=20),
    )
)
def test_no_environment_makes_more_than_a_config_error(environ: dict[str, str]) -> None:
    """Whatever text stands in a variable."""
    config, problems = _outcome(Path("/dev/null"), environ, Overrides(models_dir="/m"))
    assert all(text.startswith("LLAMAVISOR_") for text in problems)
    # That a host without a key is open to everybody is another warning.
    told = [text for text in config.warnings if text.startswith("LLAMAVISOR_X ")] if config else []
    assert config is None or len(told) == len({"LLAMAVISOR_X"} & environ.keys())


@pytest.mark.parametrize(
    ("host", "is_open"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)]
)
def test_a_public_address_without_a_key_is_warned_about(write: Write, tmp_path: Path, host: str, is_open: bool) -> None:
    """Whoever opens a router to everybody is told so, and how to close it."""
    text = f'{ROUTER}host = "{host}"\n'
    assert any("without a key" in warning for warning in load(write(text), NOTHING).warnings) is is_open
    key = tmp_path / "key"
    key.write_text("sesame\n")
    key.chmod(0o600)
    assert load(write(f'{text}api_key_file = "{key}"\n'), NOTHING).warnings == ()
