"""The token of the Hub: whether there is one, and whether others can read it. It is never read, let alone told."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from llamavisor.hub.access import CREDENTIAL
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Finding, Findings, note, ok, warning
from llamavisord.places import Places
from llamavisord.variables import Variable

STORES = ("etc/credstore", "run/credstore", "usr/lib/credstore")
"""Where systemd looks for what `LoadCredential=` names, the first that has it; systemd.exec(5)."""
ENCRYPTED = tuple(f"{store}.encrypted" for store in STORES)
"""Where it looks for what `LoadCredentialEncrypted=` names, which our unit does not say."""
_NONE = "none: private and gated models of the Hub cannot be had"


def look(case: Case) -> Findings:
    """As the daemon looks for one: a variable, else a credential of systemd, else what `hf auth login` has left."""
    if _is_unit(case):
        yield _of_service(case)
        return
    environ = _environ(case)
    if environ.get(Variable.HF_TOKEN):
        yield ok(f"in the environment ({Variable.HF_TOKEN})")
        return
    path = token_file(environ)
    places = [path]
    if (folder := environ.get(Variable.CREDENTIALS_DIRECTORY, "")).startswith("/"):
        places.insert(0, Path(folder, CREDENTIAL))
    yield _first(case, places) or note(_NONE, f"`hf auth login`, or put one into {path}")


def _is_unit(case: Case) -> bool:
    """Whether systemd starts it: a container has the same places, and whoever asks in it has its environment."""
    return case.is_service and case.has_systemd


def _of_service(case: Case) -> Finding:
    """What who asks has in the environment, or at home, is nothing to the service."""
    for store in STORES:
        path = case.root / store / CREDENTIAL
        try:
            mode, folder_mode = path.stat().st_mode, path.parent.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return note(f"{path} cannot be seen: {error.strerror}", "ask as root")
        if mode & 0o077 and folder_mode & 0o011:
            return _open_to_others(path, mode)
        return ok(f"{path}, a credential of the service")
    if (found := _first(case, [token_file(_environ(case))])) is not None:
        return found
    wanted = case.root / STORES[0] / CREDENTIAL
    hint = f"put one into {wanted}, readable for root alone, and `systemctl restart llamavisor`"
    for store in ENCRYPTED:
        path = case.root / store / CREDENTIAL
        if os.path.lexists(path):
            return note(
                f"{path} is there, which the unit as it comes does not load",
                f"`systemctl edit llamavisor`: [Service], LoadCredentialEncrypted={CREDENTIAL}",
            )
    return note(_NONE, hint)


def _environ(case: Case) -> Mapping[str, str]:
    """What is known of the environment of the daemon: that of who asks is another one, if that is another user."""
    if _is_unit(case) or case.account.uid != os.geteuid():
        return {Variable.HOME: str(case.account.home)}
    return case.environ


def _first(case: Case, places: list[Path]) -> Finding | None:
    """What is to be said of the first of these files that is there."""
    for path in places:
        try:
            mode = path.stat().st_mode
            is_barred = bool(case.account.barred(path, os.R_OK))
        except FileNotFoundError:
            continue
        except OSError as error:
            return note(f"{path} cannot be seen: {error.strerror}")
        if mode & 0o077:
            return _open_to_others(path, mode)
        if is_barred:
            return note(f"{path} is readable for its owner alone, and the daemon runs as {case.account.name}")
        return ok(f"{path}, readable for its owner alone")
    return None


def _open_to_others(path: Path, mode: int) -> Finding:
    return warning(f"{path} is {stat.filemode(mode)}: others can read it", f"chmod 600 {path}")


def token_file(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps it: HF_TOKEN_PATH, else `token` in HF_HOME, else that below the cache folder."""
    if named := environ.get(Variable.HF_TOKEN_PATH):
        return Path(named)
    if home := environ.get(Variable.HF_HOME):
        return Path(home) / "token"
    cache = environ.get(Variable.XDG_CACHE_HOME) or str(Places(environ).home / ".cache")
    return Path(cache) / "huggingface" / "token"
