"""The ports that clients and Prometheus connect to: free, ours, or somebody else's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from llamavisor.cause import Verdict
from llamavisor.ports import find_port, holder_of, listener_of
from llamavisord.addresses import LOOPBACK, is_loopback
from llamavisord.config import Config
from llamavisord.doctor.case import Case
from llamavisord.doctor.finding import Findings, note, ok, problem


@dataclass(frozen=True, slots=True)
class Address:
    """Where something of ours listens, or is to."""

    what: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.what} at {f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def look(case: Case) -> Findings:
    """What the daemon holds is told by the daemon; of all else it is tried whether it can be bound."""
    assert case.config is not None  # noqa: S101 (the check needs one)
    held = set(_held(case))
    for address in _wanted(case.config):
        if address.port in held:
            yield ok(f"{address}: the daemon listens")
        else:
            yield from _try(address, case)


def _wanted(config: Config) -> Iterator[Address]:
    if config.gateway is not None:
        yield from _at("the gateway", config.gateway.host, config.gateway.port)
    else:
        for router in config.routers:
            yield from _at(f"router {router.name}", router.host, router.port)
    if config.metrics.enabled:
        yield Address("metrics", config.metrics.host, config.metrics.port)


def _at(what: str, host: str, port: int) -> Iterator[Address]:
    for each in LOOPBACK if is_loopback(host) or host == "localhost" else (host,):
        yield Address(what, each, port)


def _held(case: Case) -> Iterator[int]:
    """The ports that a daemon says it listens on."""
    if case.status is None:
        return
    gateway = case.status["gateway"]
    urls = [case.status["metrics_url"], *(gateway["urls"] if gateway else ())]
    urls += [router["url"] for router in case.status["routers"] if gateway is None and router["pid"]]
    for url in filter(None, urls):
        if port := urlsplit(url).port:
            yield port


def _try(address: Address, case: Case) -> Findings:
    found = find_port(address.host, address.port)
    if not isinstance(found, Verdict):
        if case.status is not None:
            yield problem(f"{address}: the daemon does not listen", "`llamavisor status` says why")
        else:
            yield ok(f"{address}: free")
        return
    if ":" in address.host and "taken" not in found.reason:
        yield note(f"{address}: this machine has no such address, and does without")
        return
    if case.pid is not None and case.status is None and _is_of(case.pid, listener_of(address.port)):
        how = "does not answer" if case.is_hung else "runs with another configuration"
        yield note(f"{address}: taken by the daemon (pid {case.pid}), which {how}")
        return
    holder = holder_of(address.port)
    if holder is not None and holder.startswith("systemd "):
        yield ok(f"{address}: systemd listens for the daemon")
    elif holder is None and case.is_barred:
        yield note(f"{address}: taken, most likely by the daemon, which may not be asked", "ask as root")
    elif holder is None and os.geteuid() != 0:
        yield problem(f"{address}: {found.reason}", "ask as root who holds it; end that, or choose another port")
    else:
        yield problem(f"{address}: {found.reason}", found.hint)


def _is_of(daemon: int, pid: int | None) -> bool:
    """Whether a process is the daemon, or one that it has started, such as a router."""
    if pid is None:
        return False
    try:
        return daemon in {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
    except psutil.Error:
        return False
