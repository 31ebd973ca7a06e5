"""The programs beside llamavisor that the bench of the gateway needs, and the load that its clients are.

They are one Go program (`yardsticks/`): a load generator in Python would measure itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("yardsticks")
_SLACK_S = 60.0
"""Far beyond what a load takes longer than it was told to."""
_PROMPT = "Why is the sky blue? " * 50
"""About 1 KiB."""

Order = Mapping[str, object]
"""What a request's body says beside the chat; the scripted child obeys some of its keys (`order` in `child.go`)."""


@dataclass(frozen=True, slots=True)
class Latency:
    """What whole answers took: how many there were, and the median time of one in seconds."""

    count: int
    median_s: float


@dataclass(frozen=True, slots=True)
class Flow:
    """How events arrived: how many, the median time to the first of a stream, and the jitter at the 99th percentile.

    Jitter is by how much the time between two events differs from what it was when they were sent; 0 from a true child,
    which does not tell.
    """

    count: int
    first_s: float
    jitter_s: float


class Yardsticks:
    """The program, built.

    Args:
        folder: where it goes. What the compiler keeps is kept in the virtual environment, as it takes 20 s to make.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "yardsticks"
        found = importlib.util.find_spec("go")
        if found is None or found.origin is None:
            sys.exit("no Go toolchain: run `make bench`, which installs one")
        root = Path(found.origin).parent
        offline = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GOENV": "off", "GOWORK": "off", "CGO_ENABLED": "0"}
        kept = {"GOROOT": str(root), "GOPATH": str(folder / "go"), "GOCACHE": str(Path(sys.prefix) / "go-build")}
        subprocess.run(
            [root / "bin" / "go", "build", "-trimpath", "-buildvcs=false", "-o", self.path, "."],
            cwd=_SOURCE,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **offline, **kept},
            check=True,
        )

    def __repr__(self) -> str:
        return f"<Yardsticks {self.path}>"

    def requests(self, port: int, *, clients: int, for_s: float, order: Order) -> Latency:
        """Ask for whole answers, each client for one after the other."""
        told = self._load("requests", port, clients, for_s, order)
        return Latency(told["count"], told["latency_s"]["p50"])

    def streams(self, port: int, *, clients: int, for_s: float, order: Order) -> Flow:
        """Ask for streams, each client for one after the other."""
        told = self._load("streams", port, clients, for_s, {"stream": True, **order})
        return Flow(told["count"], told["first_s"]["p50"], told["jitter_s"].get("p99", 0.0))

    @contextmanager
    def held(self, port: int, *, clients: int, order: Order) -> Iterator[None]:
        """So many requests that are under way: entered when all were sent and, of streams, have their first event.

        Raises:
            RuntimeError: one of them was answered, or its stream broke.
        """
        with subprocess.Popen(
            self._argv("hold", port, clients, 0.0, order), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if not process.stdout.readline():
                    raise RuntimeError(f"the load ended with {process.wait()}")
                yield
            finally:
                process.stdin.close()
        if process.returncode:
            raise RuntimeError(f"the load ended with {process.returncode}")

    def _load(self, mode: str, port: int, clients: int, for_s: float, order: Order) -> dict[str, Any]:
        argv = self._argv(mode, port, clients, for_s, order)
        told = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=for_s + _SLACK_S)
        return dict(json.loads(told.stdout))

    def _argv(self, mode: str, port: int, clients: int, for_s: float, order: Order) -> list[str]:
        body = {"model": "alpha", "messages": [{"role": "user", "content": _PROMPT}], **order}
        load = ["-to", f"127.0.0.1:{port}", "-clients", str(clients), "-for", f"{for_s}s"]
        return [str(self.path), mode, *load, "-order", json.dumps(body)]
