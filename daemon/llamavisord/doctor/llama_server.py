"""Which llama-server is used, and what of ours it can do."""

from __future__ import annotations

from llamavisor.binary import Binary
from llamavisor.errors import BinaryError
from llamavisor.footprint import find_tool
from llamavisor.settings import RouterSettings
from llamavisor.spellings import SPELLINGS, find_typed
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning

_ASKED_FOR = {
    "--cache-ram": "prompt caches are not kept within the memory budget",
    "--fit-target": "llama.cpp is not told how much of a GPU to leave free",
    "--cors-origins": "web pages of other sites may use a router that clients reach by itself",
}
"""What we say unasked where a build knows it, and what comes of it where it does not."""
_NEWER = "a newer build of llama.cpp has it"
_SYSTEM_CONFIG = "etc/llama.cpp/config.ini"


def look(case: Case) -> Findings:
    """Every llama-server that a router is to run, each once."""
    assert case.config is not None  # noqa: S101 (the check needs one)
    known: set[object] = set()
    for router in case.config.routers:
        try:
            found = case.binary_of(router)
        except BinaryError as error:
            yield problem(f"router {router.name}: {error}", error.hint)
            continue
        if found.fingerprint not in known:
            known.add(found.fingerprint)
            yield from _judge(found)
        yield from _running(case, router, found)
    if (case.root / _SYSTEM_CONFIG).exists():
        yield warning(f"/{_SYSTEM_CONFIG} is read by llama-server too, and may change what it does", "remove it")


def _judge(found: Binary) -> Findings:
    yield ok(f"{found.path}, version {found.version}, {len(found.flags)} options, router mode")
    if missing := [key for key in SPELLINGS if find_typed(key, found.flags) is None]:
        yield note(f"this build does not know {', '.join(missing)}: a configuration that says so is refused", _NEWER)
    for spelling, effect in _ASKED_FOR.items():
        if found.flags.find(spelling) is None:
            yield note(f"this build has no {spelling}: {effect}", _NEWER)
    if find_tool(found.path) is None:
        text = "llama-fit-params is not beside it: what models take is worked out from their headers, less exactly"
        yield note(text, "install all programs of that build of llama.cpp")


def _running(case: Case, router: RouterSettings, found: Binary) -> Findings:
    """What the daemon says of the router that runs it."""
    told = case.router_status(router.name)
    if told is None:
        return
    if told["build"] not in (None, found.version):
        text = f"router {router.name} runs version {told['build']}, and {found.version} is on the disk now"
        yield note(text, "it is restarted when nobody is being answered; `llamavisor restart` does it at once")
    if told["reason"]:
        yield problem(f"router {router.name} is {told['state']}: {told['reason']}", told["hint"] or "")
