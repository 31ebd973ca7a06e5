"""What the worker process and the daemon say to each other: lines of JSON.

The daemon asks with a line that holds a number and nothing else; the worker answers with one `Answer` of that number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from llamavisor.gauge.device import Device, Kind, Reading

MAX_LINE_BYTES = 1024 * 1024
"""64 devices with 100 processes each are 100 KB."""
_KINDS = frozenset(get_args(Kind))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the worker found.

    Attributes:
        number: of the question.
        readings: of every device.
        failure: why there are none, or which are missing; empty if all is well.
        is_absent: whether that is because this machine has no such devices.
    """

    number: int
    readings: tuple[Reading, ...] = ()
    failure: str = ""
    is_absent: bool = False


def encode_question(number: int) -> bytes:
    """One line."""
    return f"{number}\n".encode("ascii")


def decode_question(line: bytes) -> int | None:
    """The number of a question, None if this is none."""
    return int(line) if line.strip().isdigit() and len(line) < 20 else None


def encode_answer(answer: Answer) -> bytes:
    """One line."""
    message = {
        "number": answer.number,
        "failure": answer.failure,
        "is_absent": answer.is_absent,
        "readings": [_pack(reading) for reading in answer.readings],
    }
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def decode_answer(line: bytes, at: float) -> Answer | None:
    """What the line says, None if it is no answer.

    Args:
        line: as it came.
        at: when the question was asked, in the daemon's time.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    number, failure, readings = message.get("number"), message.get("failure"), message.get("readings")
    if type(number) is not int or not isinstance(failure, str) or not isinstance(readings, list):
        return None
    unpacked = [_unpack(reading, at) for reading in readings]
    if None in unpacked:
        return None
    return Answer(number, tuple(filter(None, unpacked)), failure, message.get("is_absent") is True)


def _pack(reading: Reading) -> dict[str, object]:
    device = reading.device
    processes = reading.processes
    return {
        "id": device.id,
        "kind": device.kind,
        "name": device.name,
        "is_ram_shared": device.is_ram_shared,
        "uuids": device.uuids,
        "rank": device.rank,
        "bytes": (reading.total_bytes, reading.used_bytes, reading.free_bytes),
        "reason": reading.reason,
        "processes": None if processes is None else list(processes.items()),
    }


def _unpack(message: object, at: float) -> Reading | None:
    if not isinstance(message, dict):
        return None
    device_id, kind, name, reason = (message.get(key) for key in ("id", "kind", "name", "reason"))
    uuids, rank = message.get("uuids"), message.get("rank")
    numbers, processes = message.get("bytes"), message.get("processes")
    if not (isinstance(device_id, str) and isinstance(name, str) and isinstance(reason, str)):
        return None
    if not (isinstance(kind, str) and kind in _KINDS and _is_size(rank)):
        return None
    if not (isinstance(uuids, list) and all(isinstance(uuid, str) for uuid in uuids)):
        return None
    if not (isinstance(numbers, list) and len(numbers) == 3 and all(map(_is_size, numbers))):
        return None
    if processes is not None and not (isinstance(processes, list) and all(map(_is_pair, processes))):
        return None
    shared = message.get("is_ram_shared") is True
    device = Device(device_id, cast("Kind", kind), name, shared, tuple(cast("Sequence[str]", uuids)), rank)
    total, used, free = cast("list[int | None]", numbers)
    return Reading(device, total, used, free, at, reason, None if processes is None else dict(processes))


def _is_size(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and _is_size(value[1])
