"""The service of systemd: installed, enabled, running, and listening where the configuration says."""

from __future__ import annotations

from collections.abc import Mapping

from llamavisord.addresses import LOOPBACK, is_loopback
from llamavisord.config import Config
from llamavisord.doctor.case import UNIT, Case
from llamavisord.doctor.finding import Findings, note, ok, problem, warning

SOCKET_UNIT = "llamavisor.socket"
_PROPERTIES = "LoadState,LoadError,ActiveState,SubState,UnitFileState,DropInPaths,MainPID,NeedDaemonReload,Result"
_OURS = ("10-install.conf", "20-no-gpu.conf", "30-systemd-254.conf")
"""The drop-ins that `install-service` writes."""
Unit = Mapping[str, str]


def look(case: Case) -> Findings:
    """The service of the machine; where that is not installed, the one of the user."""
    if not case.has_systemd:
        yield note("systemd does not run here", "have what starts services here run `llamavisor serve`")
        return
    try:
        yield from _look(case)
    except OSError as error:
        yield note(f"systemd cannot be asked: {error}", "ask as root")


def _look(case: Case) -> Findings:
    scope: tuple[str, ...] = ()
    service = _show(case, UNIT)
    if service.get("LoadState") == "not-found" and not case.is_service:
        try:
            own = _show(case, UNIT, "--user")
        except OSError:
            own = {}  # nobody of that user is logged in
        if own.get("LoadState", "not-found") != "not-found":
            scope, service = ("--user",), own
    socket = _show(case, SOCKET_UNIT, *scope)
    daemon_pid = case.status["pid"] if case.status is not None else None
    yield from judge(service, " ".join(("systemctl", *scope)), daemon_pid=daemon_pid)
    if service.get("LoadState") == "loaded":
        yield from judge_socket(socket, case.config)


def judge(service: Unit, systemctl: str, *, daemon_pid: int | None) -> Findings:
    """What is to be said of the service. Pure.

    Args:
        service: its properties.
        systemctl: how a person calls systemd about it.
        daemon_pid: the process of the daemon that answers, None if none does.
    """
    load = service.get("LoadState", "")
    if load == "not-found":
        yield note(f"{UNIT} is not installed", "`sudo llamavisor install-service --now` has systemd look after it")
        return
    if load != "loaded":
        text = f"{UNIT} cannot be used: {service.get('LoadError') or load}"
        yield problem(text, f"`{systemctl} cat {UNIT}` shows it; install-service writes it anew")
        return
    active, enabled = service.get("ActiveState", ""), service.get("UnitFileState", "")
    told = f"{UNIT} is {active} ({service.get('SubState', '')}), {enabled or 'not to be enabled'}"
    if active == "failed":
        yield problem(f"{told}: {service.get('Result')}", "`journalctl -u llamavisor -e` says why")
    elif active == "active":
        yield ok(told)
    else:
        yield note(told, f"`{systemctl} start llamavisor`")
    if enabled == "disabled":
        yield note(f"{UNIT} is not started at boot", f"`{systemctl} enable llamavisor`")
    if service.get("NeedDaemonReload") == "yes":
        yield warning(f"{UNIT} has been changed since systemd has read it", f"`{systemctl} daemon-reload`")
    names = [path.rpartition("/")[2] for path in service.get("DropInPaths", "").split()]
    if theirs := [name for name in names if name not in _OURS]:
        yield note(f"{UNIT} has drop-ins of yours: {', '.join(theirs)}", f"`{systemctl} cat {UNIT}` shows them")
    main = int(service.get("MainPID") or 0)
    if active == "active" and daemon_pid is not None and main not in (0, daemon_pid):
        text = f"the daemon that answers (pid {daemon_pid}) is not the one of {UNIT} (pid {main})"
        yield warning(text, "end one of them, or say --socket")


def judge_socket(socket: Unit, config: Config | None) -> Findings:
    """What is to be said of the socket unit: systemd listens where it says, whatever the configuration says. Pure."""
    if socket.get("LoadState") != "loaded":
        yield note(f"{SOCKET_UNIT} is not installed: clients are refused while the daemon restarts")
        return
    listens = {line.rpartition(" (")[0] for line in socket.get("Listen", "").splitlines()}
    addresses = {each for each in listens if not each.startswith("/")}
    if socket.get("ActiveState") != "active":
        yield note(f"{SOCKET_UNIT} is {socket.get('ActiveState')}: clients are refused while the daemon restarts")
    elif config is None or config.gateway is None:
        yield ok(f"{SOCKET_UNIT} listens on {', '.join(sorted(listens))}")
    elif addresses != (wanted := _addresses(config.gateway.host, config.gateway.port)):
        text = f"{SOCKET_UNIT} listens on {_listed(addresses)}, and the configuration says {_listed(wanted)}"
        yield problem(text, "`sudo llamavisor install-service --now` takes the address over")
    else:
        yield ok(f"{SOCKET_UNIT} listens on {_listed(addresses)}, as the configuration says")


def _addresses(host: str, port: int) -> set[str]:
    hosts = LOOPBACK if is_loopback(host) or host == "localhost" else (host,)
    return {f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts}


def _listed(addresses: set[str]) -> str:
    return ", ".join(sorted(addresses)) or "no address"


def _show(case: Case, unit: str, *scope: str) -> dict[str, str]:
    """The properties of a unit; one that stands several times has a line for each."""
    said = case.systemctl(*scope, "show", f"--property={_PROPERTIES},Listen", unit)
    found: dict[str, str] = {}
    for line in said.splitlines():
        key, _, value = line.partition("=")
        found[key] = f"{found[key]}\n{value}" if key in found else value
    return found
