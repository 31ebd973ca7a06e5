"""How the Hub is reached: which token counts, and that none is ever shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from llamavisor.hub import HubError, Why
from llamavisor.hub.access import CREDENTIAL, ENDPOINT, Origin, Token, find_access, find_origin, login_file


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file where `hf auth login` leaves a token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


def sent(environ: dict[str, str]) -> str | None:
    """What would be sent."""
    token = find_access(environ).token
    return f"Bearer {token.reveal()}" if token is not None else None


def test_which_token_counts(login: Path, tmp_path: Path) -> None:
    """The environment goes before systemd's credential, and that before a login; without any nothing is sent."""
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert sent(credentials) is None
    login.write_text("hf_login\n")
    assert sent(credentials) == "Bearer hf_login"
    (tmp_path / CREDENTIAL).write_text("hf_credential\n")
    assert sent(credentials) == "Bearer hf_credential"
    assert sent({**credentials, "HF_TOKEN": " hf_environ "}) == "Bearer hf_environ"


def test_where_the_token_is_from(tmp_path: Path) -> None:
    """The same order, told by whether the files are there: neither is read, and one that may not be read is told."""
    environ = {"HOME": str(tmp_path), "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert find_origin(environ) is None
    login = tmp_path / ".cache/huggingface/token"
    login.parent.mkdir(parents=True)
    login.touch()
    assert find_origin(environ) is None
    login.write_text("hf_login\n")
    assert find_origin(environ) is Origin.LOGIN
    (tmp_path / CREDENTIAL).write_text("hf_credential\n")
    assert find_origin(environ) is Origin.CREDENTIAL
    assert find_origin({**environ, "HF_TOKEN": "hf_environ"}) is Origin.ENVIRONMENT
    assert find_origin({"HF_TOKEN": " ", "HF_TOKEN_PATH": f"{login}/none"}) is Origin.LOGIN


@pytest.mark.parametrize(
    "environ", [{}, {"HF_HOME": "/hub"}, {"XDG_CACHE_HOME": "/cache"}, {"HF_TOKEN_PATH": "/token", "HF_HOME": "/hub"}]
)
def test_where_a_login_is_left(environ: dict[str, str]) -> None:
    """It is looked for where huggingface_hub, started with this environment, reads it."""
    environ = {**environ, "HOME": "/home/me"}
    code = "from huggingface_hub import constants; print(constants.HF_TOKEN_PATH)"
    told = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert str(login_file(environ)) == told.stdout.strip()


def test_a_token_is_not_shown() -> None:
    """Neither the token nor what holds it says it."""
    access = find_access({"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in f"{access} {access!r} {access.token} {access.token!r} {vars(Token)}"


def test_what_is_no_token(login: Path, tmp_path: Path) -> None:
    """What could not be sent is refused by where it comes from, and not repeated."""
    (tmp_path / CREDENTIAL).write_bytes(b"\xffsecret words")
    with pytest.raises(HubError, match=CREDENTIAL) as raised:
        find_access({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert raised.value.why is Why.UNAUTHORIZED
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("said", "meant"), [("", ENDPOINT), ("http://mirror:8080/", "http://mirror:8080")])
def test_the_endpoint(login: Path, said: str, meant: str) -> None:
    """A mirror stands for the Hub, with or without a slash; an empty variable is not set."""
    assert find_access({"HF_ENDPOINT": said}).endpoint == meant


@pytest.mark.parametrize(("said", "meant"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline(login: Path, said: str, meant: bool) -> None:
    """HF_HUB_OFFLINE is read as huggingface_hub reads it."""
    assert find_access({"HF_HUB_OFFLINE": said}).is_offline is meant


@pytest.mark.parametrize(
    ("endpoint", "shown"),
    [
        ("http://bob:s3cret@mirror:8080/hub", "http://mirror:8080/hub"),
        ("https://s3cret@mirror", "https://mirror"),
        ("http://bob:s3/cr@e?t#@mirror", "http://mirror"),
        ("http://mirror/hub", "http://mirror/hub"),
    ],
)
def test_a_password_in_the_address_is_not_shown(login: Path, endpoint: str, shown: str) -> None:
    """The address of a mirror is told without its user and password; asked is the whole of it."""
    access = find_access({"HF_ENDPOINT": endpoint})
    assert (access.endpoint, access.shown) == (endpoint, shown)
    assert "s3" not in f"{access} {access!r}"
