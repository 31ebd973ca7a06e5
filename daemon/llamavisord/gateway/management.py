"""The management of models as llama-server's router offers it, answered for the whole fleet.

Routers are not asked: they would tell of themselves alone, load behind admission's back, and be silent while they are
down. `POST /models` and `DELETE /models` are answered here, too: the end of a router's own download has it read its
models again whenever it likes, which stops those that have changed, and none removes what is not in a cache of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from llamavisor.errors import LlamavisorError, ModelNotFoundError
from llamavisor.events import Bus, UnloadReason, Warned
from llamavisor.fleet import Fleet
from llamavisor.hub import HubError, Why, parse
from llamavisor.router import Router
from llamavisor.states import ModelState
from llamavisord.gateway.deliveries import Deliveries
from llamavisord.gateway.json_peek import JsonPeek
from llamavisord.gateway.listing import Listing, Place
from llamavisord.gateway.notices import Notices, Stream
from llamavisord.gateway.replies import GONE, RETRY_S, Reply, Trouble, ok
from llamavisord.gateway.routes import Api

LOOK_S = 10.0
"""How long a reload waits for the look at the models folders, and for the routers to hear of what is new there."""
REMOVE_S = 60.0
"""How long the answers of a model that is to be removed may take to end."""
_PROPS: Final[dict[str, object]] = {
    "role": "router",
    "max_instances": 0,
    "models_autoload": True,
    "model_alias": "llama-server",
    "model_path": "none",
    "default_generation_settings": {"params": None, "n_ctx": 0},
    "ui_settings": {},
    "build_info": "",
    "cors_proxy_enabled": False,
}
"""What a router of b11434 says of itself, for as long as none has spoken; the web UI relies on all of it."""


class Management:
    """What clients see and do of the fleet's models.

    Args:
        fleet: the routers.
        bus: where events come from and go to.
        tasks: where loads go on after they were asked for; cancelled at the end.
    """

    def __init__(self, fleet: Fleet, bus: Bus, tasks: anyio.abc.TaskGroup) -> None:
        self._fleet = fleet
        self._bus = bus
        self._tasks = tasks
        self._loads: dict[str, anyio.CancelScope] = {}  # Invariant: those that were asked for and have not ended
        self._listing = Listing(fleet, is_asked_for=self._loads.__contains__)
        self._notices = Notices(self._listing, bus)
        self._deliveries = Deliveries(fleet.downloads, self._folder, notices=self._notices, bus=bus, tasks=tasks)
        self._looking = anyio.Lock()
        self._begun = self._ended = 0  # numbers of the last look that began, and of the last that came to an end
        self._problems: tuple[str, ...] = ()  # of that

    def __repr__(self) -> str:
        return f"<Management loads={sorted(self._loads)} {self._notices!r}>"

    def close(self) -> None:
        """End the streams of events: the daemon ends, and they would not."""
        self._notices.close()

    async def models(self, may_use: Callable[[str], bool], *, reload: bool = False) -> Reply:
        """GET /models and GET /v1/models.

        Args:
            may_use: which models are shown, by name.
            reload: whether to look at the folders first, and have the routers told of what is new; the configuration
                is not read again. Nothing that runs is stopped before it is idle.
        """
        if reload:
            problems = await self._look()
            if problems:
                return _refusal(500, "; ".join(problems))
        return Reply(200, await self._listing.to_json(may_use, self._deliveries.words()))

    async def _look(self) -> tuple[str, ...]:
        """Look at the folders, or share in a look that began after this call; returns what went wrong."""
        before = self._begun
        async with self._looking:
            if self._ended <= before:  # one that was broken off, because its client left, is none
                self._begun += 1
                self._problems = await self._fleet.look(within_s=LOOK_S)
                self._ended = self._begun
            return self._problems

    def props(self) -> Reply:
        """GET /props without `model`: what a router says of itself, for the fleet."""
        routers = sorted(self._fleet, key=lambda router: not router.is_serving)
        said = next((router.props.document for router in routers if router.props is not None), {})
        caps = [router.settings.models_max for router in routers]
        fleet = {"max_instances": sum(caps) if all(caps) else 0, "models_autoload": True}
        return ok({**_PROPS, **said, **fleet})

    def events(self, may_use: Callable[[str], bool]) -> AbstractContextManager[Stream]:
        """GET /models/sse: what happens to the models that somebody may use, until the block ends.

        Enter it before the answer's head goes out, so that nothing after that is missed. The stream ends when the
        daemon does, or when its reader does not keep up.
        """
        return self._notices.subscribe(may_use)

    def load(self, word: str, may_use: Callable[[str], bool]) -> Reply:
        """POST /models/load: answered at once; the load goes on, and its end is told by `events` and `models`.

        Args:
            word: what the body calls the model, see `named_in`.
            may_use: which models there are for who asks.
        """
        place = self._listing.find(word)
        if place is None or not may_use(place.name):
            return GONE
        if place.is_running or place.name in self._loads:
            return _refusal(400, "model is already running")
        self._loads[place.name] = anyio.CancelScope()
        self._tasks.start_soon(self._load, place.name, self._loads[place.name])
        return _SUCCESS

    def unload(self, word: str, may_use: Callable[[str], bool]) -> Reply:
        """POST /models/unload: answered at once; it leaves when nobody is answered by it any more.

        A load is ended at once, also for those who wait for it: these have it loaded again. A download likewise.
        """
        if word in self._deliveries and may_use(word):
            self._deliveries.end(word)
            return _SUCCESS
        place = self._listing.find(word)
        if place is None or not may_use(place.name):
            return _refusal(400, "model is not found")
        name = place.name
        self._fleet.leases.withdraw(name)
        asked_for = self._loads.get(name)
        running = [router for router in self._fleet if _is_running(router, name)]
        if asked_for is None and not running:
            return _refusal(400, "model is not running")
        if asked_for is not None:
            asked_for.cancel()
        for router in running:
            self._unload(router, name)
        return _SUCCESS

    def download(self, word: str) -> Reply:
        """POST /models: answered at once; how it goes on is told by `events`, and its end by `models`.

        The next daemon goes on with it as with a person's pull, which no client ends.
        """
        if not word:
            return _refusal(400, "model must be a non-empty string")
        try:
            spec = parse(word)
        except HubError:
            return _refusal(400, "error: invalid HF repo format, expected <user>/<model>[:quant]\n")
        if word in self._deliveries or self._listing.find(word) is not None:
            return _refusal(400, f"model '{word}' already exists")
        if self._deliveries.is_full:
            return Trouble(503, "too many downloads", retry_after_s=RETRY_S, is_native=True).reply(Api.NATIVE)
        self._deliveries.begin(word, spec)
        return _SUCCESS

    def _folder(self) -> Path:
        """Where downloads go.

        Raises:
            HubError: nobody knows yet.
        """
        router = next(iter(self._fleet), None)
        if router is None:
            raise HubError("the fleet has no router yet", why=Why.NOT_NOW)
        return router.settings.models_dir

    async def remove(self, word: str, may_use: Callable[[str], bool]) -> Reply:
        """DELETE /models: answered when its files are gone; it is unloaded first, when its answers have ended.

        Nothing else is forced: a model stays that is pinned, or whose files another needs. Why one stays is told in the
        log, for that has paths of this machine.
        """
        if not word:
            return _refusal(400, "model must be a non-empty string")
        place = self._listing.find(word)
        if place is None or not may_use(place.name):
            return _refusal(500, f"model name={word} is not found")
        if self._fleet.memory.scheduler.is_pinned(place.name):
            return _refusal(500, f"model name={word} is not removable (pinned)")
        try:
            with anyio.fail_after(REMOVE_S):
                await self._fleet.storage.remove(place.name, unload=True)
        except TimeoutError:
            text = f"model name={word} is not removable yet: it is in use"
            return Trouble(503, text, retry_after_s=RETRY_S, is_native=True).reply(Api.NATIVE)
        except ModelNotFoundError:
            return _refusal(500, f"model name={word} is not found")
        except LlamavisorError as error:
            self._bus.publish(Warned(subject=f"model {place.name}", text=f"DELETE /models: {error}"))
            return _refusal(500, f"model name={word} is not removable (see the log of llamavisor)")
        return _SUCCESS

    def _unload(self, router: Router, name: str) -> None:
        model, scheduler = router.table.get(name), self._fleet.memory.scheduler
        is_loading = model is not None and model.state is ModelState.LOADING
        if is_loading or scheduler.admission.slot(router.name, name) is None:
            self._tasks.start_soon(self._unload_now, router, name)
        else:
            scheduler.dismiss(router.name, name, UnloadReason.REQUESTED)

    async def _load(self, name: str, scope: anyio.CancelScope) -> None:
        began = anyio.current_time()
        try:
            with scope:
                await self._fleet.leases.have(name, goes_on=False)  # admission refuses what nothing moves for
        except LlamavisorError as error:
            place = self._listing.find(name)
            model = place.model if place is not None else None
            if model is None or model.state is not ModelState.FAILED or model.since < began:
                self._bus.publish(Warned(subject=f"model {name}", text=f"not loaded: {error}"))
                self._notices.tell_unloaded(name)  # a load that had begun was told of when it failed
        finally:
            del self._loads[name]

    async def _unload_now(self, router: Router, name: str) -> None:
        try:
            await router.unload(name)
        except LlamavisorError as error:
            self._bus.publish(Warned(subject=f"model {name}", text=f"not unloaded: {error}"))


def named_in(body: bytes) -> str | None:
    """The model that the body of a load or unload names, "" if it names none.

    None stands for a body that is not JSON: llama-server is to say what is wrong with it, in words of its own parser.
    """
    text = body.partition(b"\0")[0].removeprefix(b"\xef\xbb\xbf")  # a NUL is the end for llama-server's parser
    try:
        document = json.loads(text.decode(), parse_constant=_refuse_constant, parse_float=_parse_float)
    except ValueError:
        return None
    except RecursionError:  # llama-server has no such limit
        peek = JsonPeek()
        peek.feed(text)
        peeked = peek.finish()
        return peeked.model or "" if peeked.is_object else None
    model = document.get("model", "") if isinstance(document, dict) else ""
    if not isinstance(model, str):
        return ""
    return model if model.isascii() or _is_text(model) else None


def _refusal(status: int, message: str) -> Reply:
    return Trouble(status, message, is_native=True).reply(Api.NATIVE)


_SUCCESS = ok({"success": True})


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number


def _is_text(word: str) -> bool:
    """Whether it has no half of a character, which JSON can spell and llama-server refuses."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_running(router: Router, name: str) -> bool:
    return Place(name, router, router.table.get(name)).is_running
