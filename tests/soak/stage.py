"""What is tried: a daemon with two routers, their models, and what somebody wants of them."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from findings import Findings
from journal import Journal

from fakes.bare_router import free_port
from llamavisord.tiny_model import write_tiny_model
from running import RunningDaemon

ROUTERS = ("one", "two")
LETTERS = "abcd"
PINNED = "a"
"""This model of each router is loaded on start and pinned."""
ALIASED = "b"
"""This one has an alias that configuration changes."""
EMBEDS = "two-e"
"""This one is pinned by a command."""
REMEMBERED_S = 31.0
"""What is said by a command is on the disk by then."""
CHAT_MODELS = tuple(f"{router}-{letter}" for router in ROUTERS for letter in LETTERS)
MODELS_MAX = 2
"""On the first router; the second has no such limit."""
MEMORY = "400MiB"
"""For the models of both: about five have room in it."""
LAYERS = 20

_CONFIG = """
serve = "gateway"
port = {port}
memory = "{memory}"
log_size = "1MiB"
[metrics]
port = {metrics_port}
[defaults]
threads = 1
ctx_size = 2048
[[router]]
name = "one"
models_dir = "{models}/one"
models_max = {models_max}
[[router]]
name = "two"
models_dir = "{models}/two"
models_max = 0
[model."*-a"]
load_on_start = true
pin = true
[model."two-e"]
embeddings = true
"""


class Stage:
    """It, with all that parts of the program tell each other.

    Args:
        folder: for everything.
        llama_server: the real one.

    Attributes:
        findings: what is broken.
        journal: what the daemon has told.
        down: when there was no daemon, in Unix seconds; the last one may be open.
        is_paused: whether the daemon has been stopped by a signal.
        pins: the models that should be pinned and loaded.
        pinned_at: when one was pinned by a command, in Unix seconds.
        aliases: by model, what it should be called too.
        quiet: models that clients leave alone for a while.
    """

    def __init__(self, folder: Path, llama_server: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        for router in ROUTERS:
            (self.models / router).mkdir(parents=True)
        for name in CHAT_MODELS:
            self.write(name)
        write_tiny_model(self.file(EMBEDS), ["vectors"], pooling=1, n_ctx=2048)
        self.port, self.metrics_port = free_port(), free_port()
        self.aliases = {f"{router}-{ALIASED}": f"{router}-{ALIASED}-v0" for router in ROUTERS}
        self.daemon = RunningDaemon(folder, self.models, llama_server, config=self.config())
        self.findings = Findings()
        self.journal = Journal(self.daemon.socket)
        self.down: list[tuple[float, float]] = []
        self.is_paused = False
        self.quiet: set[str] = set()
        self.pins = {f"{router}-{PINNED}" for router in ROUTERS}
        self.pinned_at = math.inf
        self.ready_since: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Stage {self.folder}>"

    def file(self, model: str) -> Path:
        """Where a model's file is."""
        return self.models / router_of(model) / f"{model}.gguf"

    def write(self, model: str) -> None:
        """Put a model's file in its place, whole, by a rename."""
        write_tiny_model(self.file(model), ["I", "am", model], loop=True, n_layer=LAYERS, n_ctx=2048)

    def config(self) -> str:
        """The configuration that is wanted."""
        text = _CONFIG.format(
            port=self.port,
            metrics_port=self.metrics_port,
            models=self.models,
            models_max=MODELS_MAX,
            memory=MEMORY,
        )
        return text + "".join(f'[model."{model}"]\naliases = ["{alias}"]\n' for model, alias in self.aliases.items())

    @property
    def is_up(self) -> bool:
        """Whether there is a daemon that can answer."""
        return not self.is_paused and not (self.down and self.down[-1][1] == math.inf)

    def went_down(self) -> None:
        """There is no daemon from now on."""
        self.down.append((time.time(), math.inf))

    def came_up(self) -> None:
        """The daemon answers again."""
        self.down[-1] = (self.down[-1][0], time.time())

    def was_down(self, since: float, until: float) -> bool:
        """Whether there was no daemon at some time between these two."""
        return any(began < until and ended > since for began, ended in self.down)

    async def call(self, method: str, path: str) -> tuple[int, Any]:
        """An answer of the control socket."""
        return await anyio.to_thread.run_sync(self.daemon.call, method, f"/control/v1/{path}")

    async def get(self, path: str) -> Mapping[str, Any]:
        """What it says to a GET.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
            AssertionError: it refuses.
        """
        status, told = await self.call("GET", path)
        assert status == 200, told
        return dict(told)

    async def routers(self) -> dict[str, dict[str, Any]]:
        """The routers by name."""
        return {router["name"]: router for router in (await self.get("status"))["routers"]}

    async def pin(self) -> bool:
        """Have a model pinned by a command; whether it was not yet."""
        status, told = await self.call("POST", f"models/{EMBEDS}/pin")
        assert status == 200, told
        return bool(told["changed"])

    async def all_models(self) -> dict[str, dict[str, Any]]:
        """The models by name."""
        return {model["name"]: model for model in (await self.get("models"))["models"]}

    async def loaded(self) -> set[str]:
        """The names of the models that are loaded."""
        return {name for name, model in (await self.all_models()).items() if model["state"] == "loaded"}

    async def has_loaded(self, model: str, *, tries: int = 5) -> int | None:
        """Have a model loaded, as somebody asks for it; its process, or None if that was refused or did not last."""
        for _ in range(tries):
            status, told = await self.call("POST", f"models/{model}/load?wait=14")
            if status == 200 and (pid := (told["model"] or {}).get("pid")):
                return int(pid)
            await anyio.sleep(0.5)
        return None

    async def wait_live(self) -> None:
        """Wait for a daemon that answers."""
        with anyio.fail_after(30):
            while not await anyio.to_thread.run_sync(self.daemon.is_live):
                await anyio.sleep(0.02)

    async def until(
        self, is_true: Callable[[], Awaitable[bool]], within_s: float, every_s: float = 0.1
    ) -> float | None:
        """Unix seconds of when something asynchronous became true; None if it did not within so long."""
        with anyio.move_on_after(within_s):
            while True:
                with suppress(OSError, HTTPException, AssertionError, KeyError):
                    if await is_true():
                        return time.time()
                await anyio.sleep(every_s)
        return None


def router_of(model: str) -> str:
    """The router of a model, which has its name before the dash."""
    return model.partition("-")[0]
