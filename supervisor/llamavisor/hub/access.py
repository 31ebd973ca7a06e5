"""How the Hub is reached: its address, whether it is to be asked at all, and the token that opens private doors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from llamavisor.hub.failure import HubError, Why

ENDPOINT = "https://huggingface.co"
CREDENTIAL = "huggingface.token"
"""What the token is called among the credentials of systemd: LoadCredential=huggingface.token:/path."""

_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
_TOKEN_BYTES = 4096
_TOKEN = re.compile(r"[!-~]+")
_USER_INFO = re.compile(r"(?<=://).*@", re.DOTALL)
"""Whatever is before an @: a password that should have been escaped is one, too."""


class Token:
    """A secret. It is shown by nothing; only `reveal` says it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "<Token>"

    def reveal(self) -> str:
        """The secret itself."""
        return self._text


@dataclass(frozen=True, slots=True)
class Access:
    """How the Hub is reached.

    Attributes:
        endpoint: its address, without a slash at the end; a password may be in it, so that it is told as `shown`.
        is_offline: whether it is not to be asked.
        token: None for what everybody may have.
    """

    endpoint: str = field(default=ENDPOINT, repr=False)
    is_offline: bool = False
    token: Token | None = None

    @property
    def shown(self) -> str:
        """Its address as everybody may see it, without a user and a password."""
        return _USER_INFO.sub("", self.endpoint)


def find_access(environ: Mapping[str, str]) -> Access:
    """What the environment says. Blocking: it reads files, and an expired login of `hf auth login` is renewed.

    The token is from the first `Origin` that there is.

    Raises:
        HubError: the address is none, or the token is no token.
    """
    endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise HubError("HF_ENDPOINT is no address of HTTP", why=Why.SPEC, hint=f"Write it as in {ENDPOINT}.")
    is_offline = environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    return Access(endpoint, is_offline, None if is_offline else _find_token(environ))


class Origin(StrEnum):
    """Where a token is from, the first of these that there is."""

    ENVIRONMENT = "environment"
    """HF_TOKEN."""
    CREDENTIAL = "credential"
    """The credential `huggingface.token` of systemd."""
    LOGIN = "login"
    """What `hf auth login` has left in the home of this user."""


def find_origin(environ: Mapping[str, str]) -> Origin | None:
    """Where `find_access` takes the token from, None without one. Blocking: it sees whether files are there."""
    if environ.get("HF_TOKEN", "").strip():
        return Origin.ENVIRONMENT
    path = _credential_file(environ)
    if path is not None and _has_content(path):
        return Origin.CREDENTIAL
    return Origin.LOGIN if _has_content(login_file(environ)) else None


def login_file(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps a token: HF_TOKEN_PATH, else `token` in HF_HOME, else that below the cache folder."""
    if named := environ.get("HF_TOKEN_PATH"):
        return Path(named)
    if home := environ.get("HF_HOME"):
        return Path(home, "token")
    own = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 (Path's raises without a home)
    return Path(environ.get("XDG_CACHE_HOME") or f"{own}/.cache", "huggingface", "token")


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError:
        return True  # something is there, and a pull says what is wrong with it


def _credential_file(environ: Mapping[str, str]) -> Path | None:
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    return Path(folder, CREDENTIAL) if folder.startswith("/") else None


def _find_token(environ: Mapping[str, str]) -> Token | None:
    if text := environ.get("HF_TOKEN", "").strip():
        return _token(text, "HF_TOKEN")
    if (path := _credential_file(environ)) is not None:
        try:
            with path.open("rb") as file:
                text = file.read(_TOKEN_BYTES).decode("ascii", errors="replace").strip()
        except FileNotFoundError:
            text = ""
        except OSError as exc:
            raise HubError(f"{path} cannot be read: {exc.strerror}", why=Why.UNAUTHORIZED) from exc
        if text:
            return _token(text, str(path))
    from huggingface_hub import get_token  # noqa: PLC0415 (half a second, for who pulls nothing)

    try:
        text = (get_token() or "").strip()
    except Exception as exc:  # noqa: BLE001 (its file may be anything, its renewal fail in any way, and name the token)
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else type(exc).__name__
        text = f"the token of `hf auth login` cannot be read: {reason}"
        hint = "Let the user of the daemon read it, or set HF_TOKEN."
        raise HubError(text, why=Why.UNAUTHORIZED, hint=hint) from None
    return _token(text, "the token of `hf auth login`") if text else None


def _token(text: str, origin: str) -> Token:
    """What is no token would end as an error of the HTTP library, which says all of it."""
    if not _TOKEN.fullmatch(text):
        raise HubError(f"{origin} holds something that is no token", why=Why.UNAUTHORIZED, hint="Write it anew.")
    return Token(text)
