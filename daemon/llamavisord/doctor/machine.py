"""What the models of a router have to live in: its devices, what they have, and what of it models may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anyio import from_thread

from llamavisor import budgets, footprint
from llamavisor.binary import Binary
from llamavisor.errors import BinaryError
from llamavisor.gauge import RAM_ID, Reading, open_gauge
from llamavisor.gauge.listed import SUFFIX, ask_llama_server, parse_devices
from llamavisor.settings import RouterSettings
from llamavisor.sight import NO_GPUS, place
from llamavisord.doctor.case import Case


@dataclass(frozen=True, slots=True)
class Memory:
    """One memory; a number that is not known is None, and `reason` says why.

    Attributes:
        id: which it physically is, "RAM" for the machine's.
        name: for people.
        total_bytes: what there is.
        free_bytes: what can be had now.
        budget_bytes: what the models of the router may take together; if it does not see it, those of others that do.
        reason: why a number is missing.
    """

    id: str
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    budget_bytes: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one router has.

    Attributes:
        memories: RAM and every GPU, seen by the router or not.
        gpus: those that the router sees, in its order; None if neither its llama-server nor a daemon says.
    """

    memories: tuple[Memory, ...]
    gpus: tuple[footprint.Device, ...] | None

    def memory(self, device_id: str) -> Memory | None:
        """The memory with this id."""
        return next((each for each in self.memories if each.id == device_id), None)


def machine_of(case: Case, router: RouterSettings, found: Binary | None) -> Machine:
    """As the daemon tells of it, so that no GPU is woken beside it; else the drivers and llama-server are asked.

    Blocking; to be called in a worker thread of anyio.

    Args:
        case: what is examined.
        router: whose.
        found: its llama-server, None if there is none.
    """
    if case.status is not None and case.status["memory"]["devices"]:
        own = case.router_status(router.name) or {}
        return told(case.status["memory"]["devices"], own.get("devices"))  # an older daemon does not say
    readings = from_thread.run(_read, case, found)
    gpus = _seen(case, router, found, readings)
    limits = budgets.limits(router.memory, gpus or (), readings)
    machine = Machine(tuple(map(_memory, readings)), gpus)
    known = {each.id for each in machine.memories}
    beyond = [Memory(each.id, each.name, free_bytes=each.free_bytes) for each in gpus or () if each.id not in known]
    memories = (*machine.memories, *beyond)
    return replace(machine, memories=tuple(_with_budget(each, limits) for each in memories))


def told(devices: Sequence[Mapping[str, object]], own: Sequence[Mapping[str, object]] | None) -> Machine:
    """What a daemon says, as in the answer to `status`. Pure.

    Args:
        devices: those of all routers; the budget is the smallest.
        own: RAM and what this router sees, with its own budgets; None while that is not known.
    """

    def number(device: Mapping[str, object], key: str) -> int | None:
        value = device[key]
        return value if isinstance(value, int) else None

    budget = {each["id"]: number(each, "budget_bytes") for each in (*devices, *(own or ()))}
    free = {each["id"]: number(each, "free_bytes") for each in devices}
    memories = tuple(
        Memory(
            id=str(device["id"]),
            name=str(device["name"]),
            total_bytes=number(device, "total_bytes"),
            free_bytes=number(device, "free_bytes"),
            budget_bytes=budget[device["id"]],
            reason=str(device["reason"] or ""),
        )
        for device in devices
    )
    if own is None:
        return Machine(memories, None)
    seen = (footprint.Device(str(each["name"]), str(each["id"]), free.get(each["id"])) for each in own)
    return Machine(memories, tuple(each for each in seen if each.name != RAM_ID))


async def _read(case: Case, found: Binary | None) -> tuple[Reading, ...]:
    gauge = open_gauge(case.environ, root=case.root, llama_server=found.path if found is not None else None)
    try:
        return tuple(await gauge.read())
    finally:
        await gauge.aclose()


def _seen(
    case: Case, router: RouterSettings, found: Binary | None, readings: Sequence[Reading]
) -> tuple[footprint.Device, ...] | None:
    if found is None:
        return None
    env = {**case.env_of(router), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    try:
        listed = parse_devices(ask_llama_server(found.path, env), 0.0)
    except (BinaryError, OSError):
        return None
    gpus = [each for each in listed if each.device.id.removesuffix(SUFFIX) not in NO_GPUS]
    return place(gpus, env, [each.device for each in readings], router=router.name)


def _memory(reading: Reading) -> Memory:
    device = reading.device
    return Memory(
        id=device.id,
        name=device.name,
        total_bytes=reading.total_bytes,
        free_bytes=reading.free_bytes,
        reason=reading.reason,
    )


def _with_budget(memory: Memory, limits: Mapping[str, budgets.Limit]) -> Memory:
    limit = limits.get(memory.id)
    return replace(memory, budget_bytes=limit.bytes) if limit is not None else memory
