"""The log as systemd's journal takes it: one entry for each event, with fields that can be searched.

`journalctl MODEL=qwen3-8b EVENT=ModelUnloaded` finds what a line of text would have to be taken apart for. The protocol
is a datagram of fields; see https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

from llamavisor.events import Event
from llamavisord.variables import Variable

ADDRESS = "/run/systemd/journal/socket"
IDENTIFIER = "llamavisor"
FIELD_BYTES = 96 * 1024
"""More of one field is cut off: a datagram has to fit into the buffer of the socket, which is 208 KiB as a rule."""
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
_NAMED = {"router": "ROUTER", "model": "MODEL"}
"""Fields of events by which people search."""


def is_behind(descriptor: int, environ: Mapping[str, str], address: str = ADDRESS) -> bool:
    """Whether what is written there goes to the journal, as systemd says in JOURNAL_STREAM; see systemd.exec(5)."""
    try:
        stream = os.fstat(descriptor)
    except OSError:
        return False
    if not os.path.exists(address):  # noqa: PTH110 (Path's raises where it may not look)
        return False
    return environ.get(Variable.JOURNAL_STREAM) == f"{stream.st_dev}:{stream.st_ino}"


class JournalHandler(logging.Handler):
    """Hands records over, with the event that they tell of.

    Nobody waits for the journal: what it does not take at once is lost, and how many were is told with the next that it
    takes.

    Args:
        address: where it listens.
    """

    def __init__(self, address: str = ADDRESS) -> None:
        super().__init__()
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._lost = 0

    def __repr__(self) -> str:
        return f"<JournalHandler {self._address}>"

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one over."""
        try:
            if self._lost:
                self._send(
                    {"MESSAGE": f"{self._lost} lines before this were lost: the journal took none", "PRIORITY": "4"}
                )
                self._lost = 0
            priority = str(_priority(record.levelno))
            self._send(
                {"MESSAGE": self.format(record), "PRIORITY": priority} | _fields_of(getattr(record, "event", None))
            )
        except OSError:
            self._lost += 1
        except Exception:  # noqa: BLE001 (as every handler: a line that cannot be written ends nothing)
            self.handleError(record)

    def _send(self, fields: Mapping[str, str]) -> None:
        fields = {**fields, "SYSLOG_IDENTIFIER": IDENTIFIER}
        self._socket.sendto(b"".join(_field(name, value) for name, value in fields.items()), self._address)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
        super().close()


def _priority(level: int) -> int:
    """The level of syslog(3)."""
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG)


def _fields_of(event: Event | None) -> dict[str, str]:
    if event is None:
        return {}
    named = {field: getattr(event, name, None) for name, field in _NAMED.items()}
    return {"EVENT": type(event).__name__} | {field: str(value) for field, value in named.items() if value is not None}


def _field(name: str, value: str) -> bytes:
    """With its length before it, so that nothing in it can end it and begin another."""
    raw = value.encode("utf-8", "backslashreplace")[:FIELD_BYTES]
    return name.encode("ascii") + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"
