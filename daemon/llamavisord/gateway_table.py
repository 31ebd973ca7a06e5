"""From what is written of the gateway, at the top of a file and in `[gateway]`, to what it is told to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from llamavisor.gauge.ram import ROOT, read_ram
from llamavisord.addresses import is_loopback
from llamavisord.config import GatewaySettings
from llamavisord.document import Document, GatewayTable
from llamavisord.gateway.keys import Keys, KeysError, read_keys
from llamavisord.picking import Picked, Picker, Scope
from llamavisord.problems import Origin, Problem
from llamavisord.sources import Source
from llamavisord.variables import Variable

CREDENTIAL = "llamavisor.keys"
"""What the file of keys is called among the credentials of systemd: LoadCredential=llamavisor.keys:/path."""
_HELD_BYTES = 1024**3
_T = TypeVar("_T")


def read(
    picker: Picker, top: Scope[Document], host: Picked[str], port: Picked[int], environ: Mapping[str, str]
) -> GatewaySettings:
    """What the gateway is told to be; what is wrong with it is added to the picker's problems.

    Reads the file of keys. Where none is written, the credential of systemd is taken if there is one.
    """
    default = GatewaySettings()

    def pick(key: str, get: Callable[[GatewayTable], _T | None], otherwise: _T) -> Picked[_T]:
        return picker.pick(top, f"gateway.{key}", lambda table: get(table.gateway), otherwise)

    max_body = pick("max_body", lambda table: table.max_body, default.max_body_bytes)
    max_held: Picked[int | str] = pick("max_held", lambda table: table.max_held, "auto")
    if isinstance(max_held.value, int) and max_held.value < max_body.value:
        picker.problems.append(
            max_held.problem("is less than max_body: no request of that size could ever be taken in")
        )
    default_model = top.find("gateway.default_model", lambda table: table.gateway.default_model)
    if default_model is not None:
        picker.show(top, "gateway.default_model", default_model.value, default_model.origin)
    keys = _keys(picker, top, environ)
    settings = GatewaySettings(
        host=host.value,
        port=port.value,
        keys=keys or default.keys,
        default_model=default_model.value if default_model else None,
        allow_origins=pick("allow_origins", lambda table: table.allow_origins, default.allow_origins).value,
        allow_hosts=pick("allow_hosts", lambda table: table.allow_hosts, default.allow_hosts).value,
        max_body_bytes=max_body.value,
        max_held_bytes=_held_bytes(max_held.value, max_body.value),
        max_connections=pick("max_connections", lambda table: table.max_connections, default.max_connections).value,
        max_waiting=pick("max_waiting", lambda table: table.max_waiting, default.max_waiting).value,
        max_waiting_per_model=pick(
            "max_waiting_per_model", lambda table: table.max_waiting_per_model, default.max_waiting_per_model
        ).value,
        wait_s=pick("max_wait", lambda table: table.max_wait, default.wait_s).value,
        drain_s=pick("drain", lambda table: table.drain, default.drain_s).value,
        retries=pick("retries", lambda table: table.retries, default.retries).value,
        public_without_key=pick("public_without_key", lambda table: table.public_without_key, otherwise=False).value,
        log_requests=pick("log_requests", lambda table: table.log_requests, otherwise=False).value,
        log_bodies=pick("log_bodies", lambda table: table.log_bodies, otherwise=False).value,
    )
    if keys is not None:
        _check_open(picker, settings, host)
    return settings


def unused(source: Source) -> Problem | None:
    """What is said of a `[gateway]` where there is none; it may stay, so that one key turns the gateway on and off."""
    written = source.document.gateway.model_fields_set
    if not written:
        return None
    text = f'has no effect with serve = "router": {", ".join(sorted(written))}'
    return source.problem(("gateway",), text)


def _keys(picker: Picker, top: Scope[Document], environ: Mapping[str, str]) -> Keys | None:
    """There are three cases: a file is written, systemd hands one over, there is none. None if it is no good."""
    written = top.find("api_key_file", lambda table: table.api_key_file)
    if written is not None:
        path, origin = picker.resolved(written), written.origin
    elif (folder := environ.get(Variable.CREDENTIALS_DIRECTORY, "")).startswith("/") and os.path.lexists(
        f"{folder}/{CREDENTIAL}"
    ):
        path, origin = Path(folder, CREDENTIAL), Origin(Variable.CREDENTIALS_DIRECTORY)
    else:
        return Keys()
    picker.show(top, "api_key_file", path, origin)
    try:
        keys, is_public = read_keys(path)
    except KeysError as exc:
        picker.problems.append(written.problem(str(exc)) if written else Problem(str(exc), origin))
        return None
    if is_public:
        picker.warnings.append(f"{path} holds API keys and every user can read or change it: chmod o-rw {path}")
    picker.show(top, "api_keys", tuple(map(str, keys.keys)), Origin(str(path)))
    return keys


def _check_open(picker: Picker, settings: GatewaySettings, host: Picked[str]) -> None:
    """Refuse to let everybody in whom the network brings, unless a person has said that this is meant."""
    if settings.keys or is_loopback(settings.host):
        return
    if not settings.public_without_key:
        text = (
            f"other machines reach {settings.host}, and without a key everybody there could use and delete models:"
            ' set api_key_file = "…" to a file with keys (or have systemd hand them over), or'
            " public_without_key = true in [gateway] if that is meant"
        )
        picker.problems.append(host.problem(text))
        return
    text = "without a key: everybody who reaches it can use, download and delete models"
    picker.warnings.append(f"the gateway listens on {settings.host} {text}")


def _held_bytes(written: int | str, max_body_bytes: int) -> int:
    """What all bodies may take together; the memory of this machine is looked at only if it is not written."""
    if isinstance(written, int):
        return written
    total_bytes = read_ram(ROOT, 0.0).total_bytes
    quarter = _HELD_BYTES if total_bytes is None else total_bytes // 4
    return max(min(_HELD_BYTES, quarter), max_body_bytes)
