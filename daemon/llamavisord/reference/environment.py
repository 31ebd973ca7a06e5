"""The variables of the environment: what is read, what is handed on to llama-server, and what may not be set for it."""

from __future__ import annotations

from collections.abc import Iterator

from llamavisor.gauge.listed import HIDING
from llamavisor.launch import PASSED_ON, PASSED_ON_PREFIXES
from llamavisor.reserved import VARIABLE_PREFIXES, VARIABLES
from llamavisor.workerprocess import INHERITED
from llamavisord.reference.docstrings import members, told
from llamavisord.reference.markdown import code, prose, table
from llamavisord.variables import FALLBACKS, KEYS, Variable


def environment() -> Iterator[str]:
    """Every variable."""
    yield "These stand for a key of the [configuration](#configuration):"
    yield ""
    wins = [(code(name), code(".".join(at)), "wins over the file") for name, at in KEYS.items()]
    wins += [(code(name), code(".".join(at)), "counts if nothing else is said") for name, at in FALLBACKS.items()]
    yield from table(("variable", "key", ""), wins)
    yield prose(told(Variable))
    yield ""
    yield from table(("variable", "meaning"), ((code(name), prose(text)) for name, text in members(Variable).items()))
    yield "### What llama-server gets"
    yield ""
    passed = [*PASSED_ON, *(f"{prefix}*" for prefix in PASSED_ON_PREFIXES)]
    yield f"Of the daemon's environment routers and their models get {_listed(passed)}; beyond that what `env` says."
    yield "`PATH` is also where llama-server is looked for."
    yield ""
    yield "What keeps devices from a router, or puts them into another order, is heeded when memory is reckoned:"
    yield f"{_listed(HIDING)}."
    yield ""
    yield f"Worker processes of the daemon itself get {_listed(INHERITED)}."
    yield ""
    yield "These are refused in `env`:"
    yield ""
    refused = {**VARIABLES, **{f"{prefix}*": why for prefix, why in VARIABLE_PREFIXES.items()}}
    yield from table(("variable", "why, and what to do"), ((code(name), prose(why)) for name, why in refused.items()))


def _listed(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(map(code, names))
