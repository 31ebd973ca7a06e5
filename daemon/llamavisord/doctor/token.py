"""The token of the Hub: whether there is one, and whether others can read it. It is never read, let alone told."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, warning
from llamavisord.places import Places
from llamavisord.variables import Variable


def look(case: Case) -> Findings:
    """As huggingface_hub looks for one: a variable, else a file."""
    if case.environ.get(Variable.HF_TOKEN):
        yield ok(f"in the environment ({Variable.HF_TOKEN})")
        return
    path = token_file(case.environ)
    try:
        status = path.stat()
    except FileNotFoundError:
        yield note(
            "none: private and gated models of the Hub cannot be had", f"`hf auth login`, or put one into {path}"
        )
        return
    except OSError as error:
        yield note(f"{path} cannot be seen: {error.strerror}")
        return
    if status.st_mode & 0o077:
        yield warning(f"{path} is {stat.filemode(status.st_mode)}: others can read it", f"chmod 600 {path}")
    elif case.account.barred(path, os.R_OK):
        yield note(f"{path} is readable for its owner alone, and the daemon runs as {case.account.name}")
    else:
        yield ok(f"{path}, readable for its owner alone")


def token_file(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps it: HF_TOKEN_PATH, else `token` in HF_HOME, else that below the cache folder."""
    if named := environ.get(Variable.HF_TOKEN_PATH):
        return Path(named)
    if home := environ.get(Variable.HF_HOME):
        return Path(home) / "token"
    cache = environ.get(Variable.XDG_CACHE_HOME) or str(Places(environ).home / ".cache")
    return Path(cache) / "huggingface" / "token"
