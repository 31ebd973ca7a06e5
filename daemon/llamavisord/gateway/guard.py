"""Who may do what from where: keys, and what keeps web pages out where there are none.

With keys, a key is all that counts: no web page has one that it was not given, so neither the name that a client calls
us by nor the page that it is from matters. What pages of other sites may read stays bounded (CORS).

Without keys everybody who reaches us may do everything, and any web page reaches what its reader's machine reaches. So
what a browser says of where a request is from decides:

1. Host: a page that has its own name turned to our address ("DNS rebinding") asks by that name. Refused are names that
   anybody in the world could own. Addresses are fine, and so are names that no public name server has: those without a
   dot, `.localhost`, `.local`, `.internal`, `.home.arpa`.
2. Origin: a page of another site says so, also with a POST that no preflight goes before. Allowed are pages of this
   machine, our own, and those that the configuration names.
3. Sec-Fetch-Site: what a page of another site embeds (`<img src=…>`) has no Origin. Refused, because a GET may load a
   model; but people may come to the web UI from anywhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11

from llamavisord.config import ANY, GatewaySettings
from llamavisord.gateway.keys import Key, glob
from llamavisord.gateway.replies import Trouble, TroubleError
from llamavisord.plain import plain

OPEN_PATHS = frozenset({"/health", "/v1/health"})
"""What everybody may ask from anywhere: whether there is somebody."""
PREFLIGHT_METHODS = "GET, POST, DELETE, OPTIONS"

_VERDICTS = 256
"""So many hosts and origins are remembered; what clients send is not bounded by itself."""
_NAME_MAX = 255
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_LOCAL_ORIGIN = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?")
"""As llama-server has it: any port of this machine."""
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")
"""What no public name server has: RFC 6761, RFC 6762, ICANN's name for private use, RFC 8375."""
_BAD_ESCAPE = re.compile(
    r"%(?![0-9A-F]{2})|%2[DEF]|%3[0-9]|%4[1-9A-F]|%5[0-9AF]|%6[1-9A-F]|%7[0-9AE]",
    re.IGNORECASE,
)
"""None at all, or one of a character that needs none (RFC 3986, 2.3) or of a slash. llama-server undoes them, and also
%u006c: a path that is spelled otherwise would be another to us than to it, and get by what is checked here."""
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_REQUESTED_MAX = 2048

Headers = Mapping[str, str]
"""Of a request, upper and lower case alike: aiohttp's."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may do; without arguments somebody where no keys are needed, who may do everything.

    Attributes:
        name: of the key; None without one.
        is_admin: whether they may load, unload and reload models, download and delete them.
        models: matches the names of the models that they may use; None for all.
    """

    name: str | None = None
    is_admin: bool = True
    models: re.Pattern[str] | None = None

    @classmethod
    def of(cls, key: Key) -> Caller:
        """Whoever has sent that key."""
        return cls(key.name, key.is_admin, None if key.models is None else glob(key.models))

    def may_use(self, model: str) -> bool:
        """Whether they may use, and are shown, the model of that canonical name."""
        return self.models is None or self.models.fullmatch(model) is not None

    def check_model(self, model: str) -> None:
        """Likewise.

        Raises:
            TroubleError: they may not.
        """
        if not self.may_use(model):
            raise TroubleError(Trouble(403, f"the API key {self.name} may not use the model {plain(model)}"))

    def check_admin(self) -> None:
        """Whether they may load, unload and reload models, download and delete them.

        Raises:
            TroubleError: they may not.
        """
        if not self.is_admin:
            who = "no API key" if self.name is None else f"the API key {self.name}"
            text = f"{who} may load, unload, reload, download or delete models only if its line in the file of keys"
            raise TroubleError(Trouble(403, f"{text} says admin"))


NOBODY = Caller(is_admin=False, models=glob(()))
"""Who has shown no key where one is needed: may have what is open to all."""
_ANYBODY = Caller()

_INVALID_KEY = Trouble(401, "Invalid API Key", is_native=True)
_NO_HOST = Trouble(400, "a request of HTTP/1.1 needs a Host header that names this server", closes=True)
_VERSIONS = frozenset({HttpVersion10, HttpVersion11})
_BAD_VERSION = Trouble(400, "the only versions of HTTP that are spoken here are 1.0 and 1.1", closes=True)
_BAD_TARGET = Trouble(
    400, "this is no proxy: the target of a request is a path on this server, such as /v1/models", closes=True
)
_ODD_PATH = Trouble(
    400, "the path of the request has a % where none belongs: letters, digits and / stand for themselves"
)


class Guard:
    """Decides for every request whether it is answered; knows nothing of connections.

    Args:
        settings: the keys, and what is allowed besides what is by itself.
        own_names: names of this machine.
    """

    def __init__(self, settings: GatewaySettings, *, own_names: Iterable[str] = ()) -> None:
        self._keys = settings.keys
        self._callers = {key: Caller.of(key) for key in settings.keys.keys}
        self._any_host = ANY in settings.allow_hosts
        self._hosts = {name.lower() for name in (*settings.allow_hosts, settings.host, *own_names)}
        self._any_origin = ANY in settings.allow_origins
        self._origins = frozenset(settings.allow_origins)
        self._is_our_host = lru_cache(_VERDICTS)(self._judge_host)
        self._is_allowed_origin = lru_cache(_VERDICTS)(self._judge_origin)

    def __repr__(self) -> str:
        return f"<Guard {len(self._callers)} keys>"

    def admit(
        self,
        method: str,
        target: str,
        headers: Headers,
        *,
        version: HttpVersion = HttpVersion11,
    ) -> Caller:
        """Who asks, if they may ask at all. What needs more is checked with the caller where it is done.

        Args:
            method: HTTP's.
            target: what follows it, as it was sent.
            headers: of the request.
            version: of HTTP.

        Raises:
            TroubleError: 400 if it is no request to this server, 401 without a key, 403 from the wrong place.
        """
        if version not in _VERSIONS:
            raise TroubleError(_BAD_VERSION)
        path = target.partition("?")[0]
        if not path.startswith("/") or method == "CONNECT" or "#" in target:  # no client sends what follows a #
            raise TroubleError(_BAD_TARGET)
        if "%" in path and _BAD_ESCAPE.search(path):
            raise TroubleError(_ODD_PATH)
        host = headers.get("Host", "")
        if not host and version >= HttpVersion11:
            raise TroubleError(_NO_HOST)
        if path in OPEN_PATHS and method != "OPTIONS":
            return NOBODY if self._callers else _ANYBODY
        if not self._callers:
            self._check_place(path, host, headers)
            return _ANYBODY
        if method == "OPTIONS":  # browsers send no key with it
            self._check_origin(host, headers)
            return NOBODY
        return self._who(headers)

    def cors_headers(self, headers: Headers) -> tuple[tuple[str, str], ...]:
        """What an answer to a request with these headers says of who may read it; empty if no web page asks."""
        origin = headers.get("Origin")
        if origin is None:
            return ()
        if not self._is_allowed_origin(origin, headers.get("Host", "")):
            return (("Vary", "Origin"),)
        return (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"))

    def preflight(self, headers: Headers) -> tuple[tuple[str, str], ...]:
        """What the answer to an OPTIONS says: 200 and an empty page of text/html, as llama-server has it.

        The headers that the page wants to send are allowed by their names: "*" would not stand for Authorization.
        """
        wanted = headers.get("Access-Control-Request-Headers", "")
        is_proper = len(wanted) <= _REQUESTED_MAX and _HEADER_NAMES.fullmatch(wanted)
        return (
            *self.cors_headers(headers),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Allow-Methods", PREFLIGHT_METHODS),
            ("Access-Control-Allow-Headers", wanted if is_proper else "*"),
        )

    def _who(self, headers: Headers) -> Caller:
        """As llama-server does it: x-api-key counts without Authorization, and "Bearer " may stand before both."""
        sent = headers.get("Authorization") or headers.get("X-Api-Key", "")
        key = self._keys.find(sent.removeprefix("Bearer "))
        if key is not None:
            return self._callers[key]
        raise TroubleError(_INVALID_KEY)

    # Where from: without keys

    def _check_place(self, path: str, host: str, headers: Headers) -> None:
        if host and not self._is_our_host(host):
            name = _shown(_without_port(host))
            text = (
                f"the Host header names {name}, which this server does not answer to without API keys:"
                " add the name to allow_hosts in [gateway]"
            )
            raise TroubleError(Trouble(403, text))
        if headers.get("Origin") is not None:
            self._check_origin(host, headers)
            return
        if headers.get("Sec-Fetch-Site") != "cross-site" or self._any_origin:
            return
        if path == "/" and headers.get("Sec-Fetch-Dest") == "document":
            return
        raise TroubleError(Trouble(403, "web pages of other sites may not ask this server for anything"))

    def _check_origin(self, host: str, headers: Headers) -> None:
        origin = headers.get("Origin")
        if origin is None or self._is_allowed_origin(origin, host):
            return
        text = f"web pages of {_shown(origin)} may not use this server: add it to allow_origins in [gateway]"
        raise TroubleError(Trouble(403, text))

    def _judge_host(self, host: str) -> bool:
        if self._any_host:
            return True
        found = _HOST.fullmatch(host.lower()) if len(host) <= _NAME_MAX else None
        if found is None:
            return False
        name = found[1].strip("[]").removesuffix(".")
        if "." not in name or name in self._hosts or name.endswith(_PRIVATE_SUFFIXES):
            return bool(name)
        return _is_address(name)

    def _judge_origin(self, origin: str, host: str) -> bool:
        """Browsers write origins in lower case; `null` is the origin of whatever does not want to say its own."""
        if not (origin.isascii() and origin.isprintable()):  # it would be repeated in a header
            return False
        if self._any_origin or origin in self._origins:
            return True
        scheme, separator, place = origin.partition("://")
        is_own = bool(separator and place) and scheme in {"http", "https"} and place == host.lower()
        return is_own or _LOCAL_ORIGIN.fullmatch(origin) is not None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _shown(text: str) -> str:
    return plain(text if len(text) <= _NAME_MAX else f"{text[:_NAME_MAX]}…")
