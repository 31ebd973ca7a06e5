"""Which GPUs a router sees, and which physical devices they are: `llama-server --list-devices` in its environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio

from llamavisor import footprint, gauge
from llamavisor.binary import Binary
from llamavisor.errors import BinaryError
from llamavisor.gauge.listed import HIDING, SUFFIX, Ask, ask_llama_server, parse_devices
from llamavisor.threads import run_in_thread

KEPT_S = 600.0
"""How long a list is believed: asking wakes every GPU, and takes some hundred MiB of each for a moment."""
EMPTY_KEPT_S = 60.0
"""How long one without devices is, and how long after a failure nobody asks again: a driver may load late."""
MAX_KNOWN = 64
NO_GPUS = frozenset({"BLAS", "ZenDNN"})
"""Libraries of the CPU, which some builds list beside the GPUs."""

_Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Listed:
    """What one llama-server said in one environment; None when it said nothing."""

    seen: tuple[gauge.Reading, ...] | None
    until: float


class Sights:
    """Asks llama-servers for their devices, seldom. One for all routers: they are asked one after the other.

    Args:
        ask: gets the list; blocking, and bounded in time by itself.
        clock: monotonic seconds.
    """

    def __init__(self, ask: Ask = ask_llama_server, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._known: dict[_Key, _Listed] = {}
        self._lock = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Sights of {len(self._known)}>"

    async def look(
        self, found: Binary, env: Mapping[str, str], devices: Sequence[gauge.Device], *, router: str
    ) -> tuple[footprint.Device, ...] | None:
        """The GPUs that a router sees, in its order; None when its llama-server cannot be asked.

        Each has the id under which the gauge knows it, "RAM" if its memory is the machine's. One that the gauge does
        not know for certain has an id of its own.

        Args:
            found: the router's llama-server.
            env: the router's environment, which decides what is seen and in which order.
            devices: all that the gauge has found.
            router: its name.
        """
        key = _key(found, env)
        async with self._lock:
            known = self._known.get(key)
            if known is None or self._clock() >= known.until:
                known = await self._list(found, env, known)
                self._known.pop(key, None)
                self._known[key] = known
                while len(self._known) > MAX_KNOWN:
                    del self._known[next(iter(self._known))]
        return None if known.seen is None else place(known.seen, env, devices, router=router)

    def forget(self, found: Binary, env: Mapping[str, str]) -> None:
        """A device that should be there is not, or has come: the next look asks again."""
        self._known.pop(_key(found, env), None)

    async def _list(self, found: Binary, env: Mapping[str, str], before: _Listed | None) -> _Listed:
        try:
            text = await run_in_thread(self._ask, found.path, env, abandon_on_cancel=True)
        except (BinaryError, OSError):
            # A driver that is too busy to answer has not lost its devices.
            return _Listed(before.seen if before is not None else None, self._clock() + EMPTY_KEPT_S)
        seen = tuple(each for each in parse_devices(text, self._clock()) if _name(each) not in NO_GPUS)
        return _Listed(seen, self._clock() + (KEPT_S if seen else EMPTY_KEPT_S))


def place(
    seen: Sequence[gauge.Reading], env: Mapping[str, str], devices: Sequence[gauge.Device], *, router: str
) -> tuple[footprint.Device, ...]:
    """Which physical devices those are that a router sees. Pure; arguments as for `Sights.look`."""
    known = {device.id: device for device in devices}

    def memory_id(reading: gauge.Reading) -> str:
        listed, name = reading.device, _name(reading)
        found = gauge.physical_id(name, env, devices, description=listed.name)
        if found is not None:
            return known[found].memory_id if found in known else found
        if listed.is_ram_shared:
            return gauge.RAM_ID
        # Two routers mean the same card by the same name only if none of them is hidden from either.
        is_hidden = any(variable in env for variable in HIDING)
        return f"{name}@{router}" if is_hidden or listed.id in known else listed.id

    return tuple(footprint.Device(_name(each), memory_id(each), each.free_bytes) for each in seen)


def _key(found: Binary, env: Mapping[str, str]) -> _Key:
    return found.fingerprint, tuple(sorted(env.items()))


def _name(reading: gauge.Reading) -> str:
    return reading.device.id.removesuffix(SUFFIX)
