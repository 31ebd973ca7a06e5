"""What is written of the gateway, and what it is told to be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llamavisord.cli import main
from llamavisord.config import Config, GatewaySettings
from llamavisord.exit_codes import ExitCode
from llamavisord.gateway.keys import Keys
from llamavisord.loading import load
from llamavisord.problems import ConfigError
from llamavisord.sources import Overrides

NOTHING: Mapping[str, str] = {}
HEAD = 'models_dir = "/m"\n'
MIB = 1024**2
DURATION = 'expected a duration: a number of seconds, or text such as "30s", "10m" or "1h30m"'
SIZE = 'expected a size: a number of bytes, or text such as "64MiB" or "24GB"'
BEHIND = (
    "clients talk to the gateway, whose address and keys stand at the top of the file; its routers listen where only"
    ' llamavisor reaches them: delete this, or write serve = "router" at the top'
)

Write = Callable[[str], Path]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A file with two keys that nobody else may read."""
    path = tmp_path / "keys"
    path.write_text("open-sesame\nalice sk-alice-1 models=qwen*\n", encoding="ascii")
    path.chmod(0o600)
    return path


def gateway_of(path: Path, environ: Mapping[str, str] = NOTHING, overrides: Overrides | None = None) -> GatewaySettings:
    """The settings of the gateway that a file makes."""
    gateway = load(path, environ, overrides).gateway
    assert gateway is not None
    return gateway


def refusal(path: Path, environ: Mapping[str, str] = NOTHING, overrides: Overrides | None = None) -> list[str]:
    """The lines that a person sees, with the file's own path left out."""
    with pytest.raises(ConfigError) as caught:
        load(path, environ, overrides)
    return [line.replace(f"{path}:", "") for line in str(caught.value).splitlines()]


def shown(config: Config) -> dict[str, tuple[object, str]]:
    """What `config show` shows."""
    return {each.key: (each.value, str(each.origin)) for each in config.settings}


# What comes out


def test_the_gateway_is_the_default_and_its_defaults_are_safe(write: Write) -> None:
    """Only this machine reaches it, only pages of this machine may use it, and everything is bounded."""
    config = load(write(HEAD), NOTHING)
    gateway = config.gateway
    assert gateway is not None
    assert config.serve == "gateway"
    assert (gateway.host, gateway.port, gateway.keys) == ("127.0.0.1", 8080, Keys())
    assert (gateway.allow_origins, gateway.allow_hosts, gateway.public_without_key) == ((), (), False)
    assert (gateway.max_body_bytes, gateway.max_connections) == (256 * MIB, 1024)
    assert 256 * MIB <= gateway.max_held_bytes <= 1024 * MIB
    assert (gateway.max_waiting, gateway.max_waiting_per_model, gateway.wait_s) == (512, 128, 600.0)
    assert (gateway.drain_s, gateway.retries, gateway.default_model) == (30.0, 2, None)
    assert (gateway.log_requests, gateway.log_bodies) == (False, False)
    assert config.warnings == ()


def test_routers_behind_the_gateway_load_only_what_they_are_told_on_ports_of_nobodys_choosing(write: Write) -> None:
    """The address at the top is the gateway's, however many routers there are; a router's key is made at run time."""
    text = HEAD + 'host = "::1"\nport = 9000\n[[router]]\nname = "a"\n[[router]]\nname = "b"\n'
    config = load(write(text), NOTHING)
    assert [(each.host, each.port, each.api_key, each.autoload) for each in config.routers] == [
        ("127.0.0.1", 0, None, False)
    ] * 2
    assert config.gateway is not None
    assert (config.gateway.host, config.gateway.port) == ("::1", 9000)


def test_with_serve_router_nothing_is_the_gateways(write: Write) -> None:
    """Routers inherit the address, load what is asked for, and there is no gateway."""
    config = load(write('serve = "router"\nport = 9000\n' + HEAD), NOTHING)
    assert config.gateway is None
    assert [(each.host, each.port, each.autoload) for each in config.routers] == [("127.0.0.1", 9000, True)]
    fleet = config.fleet_settings(router_key="k3y")
    assert (fleet.serve, fleet.routers) == ("router", config.routers)


def test_flags_and_variables_move_the_gateway(write: Write) -> None:
    """With several routers too: it is one address."""
    path = write(HEAD + 'port = 1\n[[router]]\nname = "a"\n[[router]]\nname = "b"\n')
    gateway = gateway_of(path, {"LLAMAVISOR_PORT": "2", "LLAMAVISOR_HOST": "127.0.0.2"}, Overrides(port=3))
    assert (gateway.host, gateway.port) == ("127.0.0.2", 3)


def test_every_key_of_the_table_reaches_the_gateway(write: Write) -> None:
    """Sizes and times with their units; names as clients and browsers write them."""
    text = """[gateway]
default_model = "qwen3-8b"
allow_origins = ["https://Chat.example.org", "http://x.org:80", "https://x.org:8443", "app://obsidian.md"]
allow_hosts = ["LLM.example.org.", "10.0.0.7", "fe80::1"]
max_body = "1MiB"
max_held = "2MiB"
max_connections = 1
max_waiting = 2
max_waiting_per_model = 3
max_wait = "1m30s"
drain = 0
retries = 0
public_without_key = true
log_requests = true
log_bodies = true
"""
    config = load(write(HEAD + text), NOTHING)
    assert config.gateway == GatewaySettings(
        default_model="qwen3-8b",
        allow_origins=("https://chat.example.org", "http://x.org", "https://x.org:8443", "app://obsidian.md"),
        allow_hosts=("llm.example.org", "10.0.0.7", "fe80::1"),
        max_body_bytes=MIB,
        max_held_bytes=2 * MIB,
        max_connections=1,
        max_waiting=2,
        max_waiting_per_model=3,
        wait_s=90.0,
        drain_s=0.0,
        retries=0,
        public_without_key=True,
        log_requests=True,
        log_bodies=True,
    )
    fleet = config.fleet_settings(router_key="k3y")
    assert [router.api_key for router in fleet.routers] == ["k3y"]
    assert (fleet.serve, fleet.max_waiting, fleet.max_waiting_per_model) == ("gateway", 2, 3)


@pytest.mark.parametrize("written", ['"*"', '["*"]'])
def test_a_star_stands_for_all(write: Write, written: str) -> None:
    """For origins and for hosts, with and without brackets."""
    gateway = gateway_of(write(f"{HEAD}[gateway]\nallow_origins = {written}\nallow_hosts = {written}\n"))
    assert (gateway.allow_origins, gateway.allow_hosts) == (("*",), ("*",))


@pytest.mark.parametrize(
    ("total_bytes", "max_body", "held_bytes"),
    [
        (16 * 1024 * MIB, "1MiB", 1024 * MIB),
        (2 * 1024 * MIB, "1MiB", 512 * MIB),
        (2 * 1024 * MIB, "600MiB", 600 * MIB),
        (None, "1MiB", 1024 * MIB),
    ],
)
def test_what_bodies_take_together_follows_from_the_machine(
    write: Write, monkeypatch: pytest.MonkeyPatch, total_bytes: int | None, max_body: str, held_bytes: int
) -> None:
    """A GiB, or a quarter of a small machine; one body of the largest size always fits."""

    class _Ram:
        def __init__(self) -> None:
            self.total_bytes = total_bytes

    monkeypatch.setattr("llamavisord.gateway_table.read_ram", lambda root, at: _Ram())
    path = write(f'{HEAD}[gateway]\nmax_body = "{max_body}"\n')
    assert gateway_of(path).max_held_bytes == held_bytes
    assert shown(load(path, NOTHING))["gateway.max_held"] == ("auto", "default")


def test_two_readings_are_equal_and_a_changed_key_is_seen(write: Write, keys_file: Path) -> None:
    """Equal settings are how a reload knows that nothing has changed; the file of keys is read again."""
    path = write(f'{HEAD}api_key_file = "{keys_file}"\n[gateway]\nretries = 1\n')
    before = load(path, NOTHING)
    assert load(path, NOTHING) == before
    keys_file.write_text("another-key\n", encoding="ascii")
    assert load(path, NOTHING) != before
    assert load(path, NOTHING).routers == before.routers


def test_every_value_is_shown_with_its_origin(
    write: Write, keys_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what nobody has written; of keys only what is no secret."""
    path = write(f'{HEAD}api_key_file = "keys"\n[gateway]\ndefault_model = "m"\nmax_wait = "5m"\n')
    assert main(["config", "show", str(path), "--json"]) == ExitCode.OK
    out = capsys.readouterr().out
    rows = {each["key"]: (each["value"], each["from"]) for each in json.loads(out)}
    assert rows["serve"] == ("gateway", "default")
    assert rows["host"] == ("127.0.0.1", "default")
    assert rows["port"] == (8080, "default")
    assert rows["api_key_file"] == (str(keys_file), f"{path}:2")
    assert rows["api_keys"] == (["key admin", "alice models=qwen*"], str(keys_file))
    assert rows["gateway.default_model"] == ("m", f"{path}:4")
    assert rows["gateway.max_wait"] == (300.0, f"{path}:5")
    expected = {"max_body", "max_held", "max_connections", "max_waiting", "max_waiting_per_model", "drain", "retries"}
    expected |= {"allow_origins", "allow_hosts", "public_without_key", "log_requests", "log_bodies"}
    assert {f"gateway.{key}" for key in expected} <= rows.keys()
    assert not {"router.main.host", "router.main.port", "router.main.api_key"} & rows.keys()
    assert "sesame" not in out
    assert "sk-alice" not in out


# What is refused


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max_body = 1023\n", '3: gateway.max_body: no request fits into that: write the unit too, as in "256MiB"'),
        ('max_body = "much"\n', f'3: gateway.max_body: {SIZE}, found "much"'),
        ("max_held = 64\n", '3: gateway.max_held: no request fits into that: write the unit too, as in "256MiB"'),
        ('max_held = "all"\n', f'3: gateway.max_held: {SIZE}, found "all"'),
        (
            'max_held = "1MiB"\n',
            "3: gateway.max_held: is less than max_body: no request of that size could ever be taken in",
        ),
        ("max_wait = 0\n", "3: gateway.max_wait: expected a duration of at least 1 s"),
        ('max_wait = "soon"\n', f'3: gateway.max_wait: {DURATION}, found "soon"'),
        ("drain = -1\n", f"3: gateway.drain: {DURATION}, found -1"),
        ("retries = 11\n", "3: gateway.retries: expected a whole number from 0 to 10, found 11"),
        ("retries = true\n", "3: gateway.retries: expected a whole number from 0 to 10, found true"),
        ("max_waiting = 0\n", "3: gateway.max_waiting: expected a whole number from 1 to 1000000, found 0"),
        ("max_connections = 1.5\n", "3: gateway.max_connections: expected a whole number from 1 to 1000000, found 1.5"),
        ("log_bodies = 1\n", "3: gateway.log_bodies: expected true or false, found 1"),
        ('default_model = ""\n', "3: gateway.default_model: expected text in quotes"),
        (
            'allow_origins = ["https://x.org/"]\n',
            '3: gateway.allow_origins: "https://x.org/" is no origin: it is written like "https://chat.example.org",',
        ),
        ('allow_origins = ["null"]\n', '3: gateway.allow_origins: "null" is no origin'),
        ('allow_origins = ["x.org"]\n', '3: gateway.allow_origins: "x.org" is no origin'),
        ('allow_origins = "https://x.org"\n', "3: gateway.allow_origins: expected a list of origins such as"),
        ('allow_origins = ["*", "https://x.org"]\n', '3: gateway.allow_origins: "*" stands for all: nothing else may'),
        ("allow_origins = [1]\n", "3: gateway.allow_origins: expected a list of origins such as"),
        (
            'allow_hosts = ["x.org:80"]\n',
            '3: gateway.allow_hosts: "x.org:80" is no host name: it is written like "llm.example.org", without a port',
        ),
        ('allow_hosts = ["a b"]\n', '3: gateway.allow_hosts: "a b" is no host name'),
        ('allow_hosts = [""]\n', '3: gateway.allow_hosts: "" is no host name'),
        ("allow_hosts = {}\n", "3: gateway.allow_hosts: expected a list of host names such as"),
        (f'allow_hosts = ["{"x" * 300}"]\n', "3: gateway.allow_hosts: a name of 300 characters: at most 255 are one"),
        ("max_bodies = 1\n", "3: gateway.max_bodies: unknown key, did you mean max_body?"),
        ('host = "::1"\n', "3: gateway.host: unknown key here: it belongs at the top of the file"),
    ],
)
def test_what_is_wrong_with_the_table_is_told_with_its_line(write: Write, text: str, line: str) -> None:
    """And with what is expected."""
    (told,) = refusal(write(f"{HEAD}[gateway]\n{text}"))
    assert told.startswith(line)


def test_a_key_of_the_table_that_stands_elsewhere_is_told_where_it_belongs(write: Write) -> None:
    """It would be without effect there."""
    assert refusal(write(f"{HEAD}max_body = 9999\n")) == ["2: max_body: unknown key here: it belongs in [gateway]"]


def test_an_address_of_a_router_behind_the_gateway_is_refused(write: Write) -> None:
    """Whoever writes one expects clients there: it says why nobody will find them, and the two ways out."""
    text = '[[router]]\nname = "a"\nhost = "::1"\nport = 1\napi_key_file = "k"\n'
    assert refusal(write(HEAD + text)) == [
        f"6: router[0].api_key_file: {BEHIND}",
        f"4: router[0].host: {BEHIND}",
        f"5: router[0].port: {BEHIND}",
    ]


def test_a_table_that_has_no_effect_is_a_warning(write: Write) -> None:
    """So that one key turns the gateway off and on again."""
    path = write('serve = "router"\n' + HEAD + "[gateway]\nretries = 1\nmax_wait = 5\n")
    config = load(path, NOTHING)
    assert config.warnings == (f'{path}:3: gateway: has no effect with serve = "router": max_wait, retries',)
    assert config.gateway is None
    assert not any(key.startswith("gateway.") for key in shown(config))


def test_leave_for_web_pages_in_the_options_of_a_router_is_a_warning(write: Write) -> None:
    """They do not talk to it any more; where llama-server itself faces them it is as it was."""
    text = '[[router]]\nname = "a"\nargs = ["--cors-origins", "*"]\n'
    (warning,) = load(write(HEAD + text), NOTHING).warnings
    assert warning == (
        "[[router]] a: --cors-origins has no effect: allow_origins in [gateway] says which web pages may use it"
    )
    assert load(write('serve = "router"\n' + HEAD + text), NOTHING).warnings == ()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_metrics_cannot_have_the_port_of_the_gateway(write: Write, host: str) -> None:
    """Also on the other loopback address: the gateway listens on both."""
    text = f'{HEAD}host = "{host}"\nport = 9155\n[metrics]\nhost = "{{}}"\n'
    for other in ("127.0.0.1", "::1"):
        told = refusal(write(text.format(other)))
        assert told == ["3: port: both the metrics and the gateway would listen on port 9155; each needs its own"]
    assert gateway_of(write(text.format("127.0.0.9"))).port == 9155


# Who may come in


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "llm.example.org"])
def test_an_address_for_everybody_needs_a_key_or_a_word_that_it_is_meant(
    write: Write, keys_file: Path, host: str
) -> None:
    """The message names both ways out."""
    text = f'{HEAD}host = "{host}"\n'
    (told,) = refusal(write(text))
    assert told == (
        f"2: host: other machines reach {host}, and without a key everybody there could use and delete models:"
        ' set api_key_file = "…" to a file with keys (or have systemd hand them over), or public_without_key = true'
        " in [gateway] if that is meant"
    )
    assert load(write(f'{text}api_key_file = "{keys_file}"\n'), NOTHING).warnings == ()
    (warning,) = load(write(f"{text}[gateway]\npublic_without_key = true\n"), NOTHING).warnings
    meant = "everybody who reaches it can use, download and delete models"
    assert warning == f"the gateway listens on {host} without a key: {meant}"


def test_an_open_address_is_refused_before_anything_starts(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 78, as for anything else that is wrong, whether it was written or said on the command line."""
    assert main(["serve", "--config", str(write(HEAD)), "--host", "0.0.0.0"]) == ExitCode.BAD_CONFIG
    assert capsys.readouterr().err.startswith("--host: other machines reach 0.0.0.0, and without a key")


def test_a_file_of_keys_that_is_wrong_is_told_once(write: Write, tmp_path: Path) -> None:
    """It is not also said that there is no key."""
    (tmp_path / "keys").write_text("# none\n", encoding="ascii")
    (told,) = refusal(write(f'{HEAD}host = "0.0.0.0"\napi_key_file = "keys"\n'))
    assert told.startswith(f"3: api_key_file: {tmp_path}/keys holds no key")


def test_a_file_of_keys_that_others_may_read_is_a_warning(write: Write, keys_file: Path) -> None:
    """With what to do about it."""
    keys_file.chmod(0o644)
    config = load(write(f'{HEAD}api_key_file = "{keys_file}"\n'), NOTHING)
    told = f"{keys_file} holds API keys and every user can read or change it: chmod o-rw {keys_file}"
    assert config.warnings == (told,)


def test_systemd_may_hand_over_the_keys(write: Write, keys_file: Path, tmp_path: Path) -> None:
    """Unless a file is written; `config show` says where they are from."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    environ = {"CREDENTIALS_DIRECTORY": str(folder)}
    assert not gateway_of(write(HEAD), environ).keys
    credential = folder / "llamavisor.keys"
    credential.write_text("from-systemd\n", encoding="ascii")
    credential.chmod(0o400)
    config = load(write(HEAD), environ)
    assert config.gateway is not None
    assert config.gateway.keys.find("from-systemd") is not None
    assert shown(config)["api_key_file"] == (credential, "CREDENTIALS_DIRECTORY")
    keys = gateway_of(write(f'{HEAD}api_key_file = "{keys_file}"\n'), environ).keys
    assert keys.find("from-systemd") is None
    assert keys.find("open-sesame") is not None


def test_a_credential_of_systemd_that_is_wrong_is_refused(write: Write, tmp_path: Path) -> None:
    """To serve without keys instead would be worse."""
    (tmp_path / "llamavisor.keys").write_text("", encoding="ascii")
    (told,) = refusal(write(HEAD), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert told.startswith(f"CREDENTIALS_DIRECTORY: {tmp_path}/llamavisor.keys holds no key")
