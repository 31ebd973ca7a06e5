"""Fake router processes on virtual time, what they are scripted to do, and the machine that they run on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.abc
from anyio.streams.memory import MemoryObjectSendStream

from llamavisor.api import ListedModel, StatusEvent
from llamavisor.catalog import FileId
from llamavisor.errors import ApiError, SpawnError
from llamavisor.gauge import RAM_ID
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.process import KILL_GRACE_S, ExitStatus, Leftovers
from llamavisor.sections import ModelSpec
from llamavisor.shelf import Offer
from llamavisor.states import HAS_CHILD, ModelState
from llamavisor.vitals import Vitals

if TYPE_CHECKING:
    from fakes.host import FakeHost

ANSWER_S = 0.001
"""How long the fake takes for whatever takes no time worth scripting."""
KILLED = ExitStatus(signal=9)


@dataclass(slots=True, kw_only=True)
class FakeStart:
    """How one start of a router goes. Times in seconds since the start.

    Attributes:
        ready_at: when it answers, `math.inf` for never.
        ends_at: when it ends unasked.
        status: how it then ends.
        prints: what it prints at once.
        is_router: whether it is one, and not a single-model server.
        term_s: how long it takes to obey SIGTERM, `math.inf` for one that ignores it.
        clear_s: how long it takes until nothing of it is left after its end.
        leftovers: what had to be killed then.
        is_unkillable: whether the kernel holds it, even against SIGKILL.
        error: why the process cannot even be started.
    """

    ready_at: float = 0.05
    ends_at: float = math.inf
    status: ExitStatus = field(default_factory=lambda: ExitStatus(code=1))
    prints: tuple[str, ...] = ()
    is_router: bool = True
    term_s: float = 0.02
    clear_s: float = 0.01
    leftovers: Leftovers = field(default_factory=Leftovers)
    is_unkillable: bool = False
    error: SpawnError | None = None


@dataclass(slots=True, kw_only=True)
class FakeModel:
    """What a model does when it is loaded, and when it is unloaded.

    Attributes:
        load_s: how long it loads, `math.inf` for ever.
        progress: what it reports on the way, evenly spread.
        exit_code: what its child ends with instead of becoming loaded; 0 for a model that loads.
        prints: the errors that its child prints before that.
        refusal: HTTP status and message with which the router refuses to load it.
        answer_s: how long the router takes to answer a request to load it.
        unload_s: how long its child takes to go.
        unload_refusal: HTTP status and message with which the router refuses to unload it.
        path: file that it is loaded from.
        inode: which file that is.
        content: which content it has.
        options: its tables in the configuration.
        load_on_start: whether it is to be loaded when the router starts.
        takes: bytes that it is expected to take, by device id; nothing when nobody can say.
        n_ctx: tokens of context that it gets.
        n_ctx_asked: tokens that it was to get, None for as many.
    """

    load_s: float = 1.0
    progress: tuple[float, ...] = (0.0, 1.0)
    exit_code: int = 0
    prints: tuple[str, ...] = ()
    refusal: tuple[int, str] | None = None
    answer_s: float = ANSWER_S
    unload_s: float = 0.1
    unload_refusal: tuple[int, str] | None = None
    path: Path | None = None
    inode: int = 1
    content: int = 1
    options: tuple[str, ...] = ()
    load_on_start: bool = False
    takes: Mapping[str, int] = field(default_factory=lambda: {RAM_ID: 1024**3})
    n_ctx: int = 4096
    n_ctx_asked: int | None = None

    def spec(self, name: str) -> ModelSpec:
        """What the catalog and the configuration say of it."""
        path = self.path or Path(f"/models/{name}.gguf")
        size = path.stat().st_size if path.exists() else 1000
        return ModelSpec(
            name=name,
            path=str(path),
            files=(FileId(1, self.inode, size, self.content),),
            layers=tuple(OptionLayer(source, ModelOptions()) for source in self.options),
            load_on_start=self.load_on_start,
        )


class FakeMachine:
    """All processes that the fake hosts of one test ever started."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.written: dict[str, Offer] = {}  # what the files of each router say, by name
        self.pids = iter(range(1000, 1_000_000))

    def __repr__(self) -> str:
        return f"<FakeMachine {self.processes}>"

    @property
    def alive(self) -> list[FakeProcess]:
        """The routers that run."""
        return [process for process in self.processes if process.status is None]

    @property
    def left(self) -> list[object]:
        """What is not gone: routers that run or were not cleared away, and children that run."""
        children = [child for process in self.processes for child in process.children.values()]
        return [
            *(process for process in self.processes if not process.is_cleared),
            *(child for child in children if not child.ended.is_set()),
        ]

    def at(self, port: int) -> FakeProcess | None:
        """The router that runs on that port."""
        return next((process for process in self.alive if process.host.settings.port == port), None)

    def holder_of(self, port: int) -> FakeProcess | None:
        """The router that holds that port, or whose remains do."""
        held = (process for process in self.processes if not process.is_cleared)
        return next((process for process in held if process.host.settings.port == port), None)

    @property
    def spawned_at(self) -> list[float]:
        """When each of the processes was started."""
        return [process.spawned_at for process in self.processes]


class FakeChild:
    """The process that serves a model.

    Attributes:
        status: how the kernel says that it has ended.
        is_hung: whether it lives and says nothing.
        is_working: whether it takes all of a processor.
        is_unkillable: whether the kernel holds it, even against SIGKILL.
        is_unseen: whether nobody can look what it does.
        error: what it answers to everything, None while it does well.
        trials: how often it was asked to show that it works.
    """

    def __init__(self, pid: int, port: int) -> None:
        self.pid = pid
        self.port: int | None = port
        self.ended = anyio.Event()
        self.status: ExitStatus | None = None
        self.is_hung = self.is_working = self.is_unkillable = self.is_unseen = False
        self.error: str | None = None
        self.trials = 0
        self.when_killed: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"<FakeChild {self.pid} {'ended' if self.ended.is_set() else 'runs'}>"

    async def wait(self) -> ExitStatus | None:
        """Wait until it has ended."""
        await self.ended.wait()
        return self.status

    def vitals(self) -> Vitals | None:
        """What it has done so far."""
        return None if self.ended.is_set() or self.is_unseen else working(self.is_working)

    def kill(self) -> None:
        """Be killed."""
        if not self.is_unkillable and not self.ended.is_set():
            self.status = KILLED
            self.ended.set()
            self.when_killed()


def working(is_working: bool) -> Vitals:
    """What a process has done that works all the time, or never."""
    return Vitals(cpu_s=anyio.current_time() if is_working else 1.0, major_faults=0, moved_bytes=0)


class FakeProcess:
    """A running router and the models in it; `llamavisor.host.RouterProcess` for a test.

    It lives as long as somebody waits for its end, which a generation does for the whole of its life.
    """

    def __init__(self, host: FakeHost, script: FakeStart, *, autoload: bool) -> None:
        holder = host.machine.holder_of(host.settings.port)
        assert holder is None, f"a second process on port {host.settings.port} beside {holder}"
        self.host = host
        self.script = script
        self.autoload = autoload
        self.pid = next(host.machine.pids)
        self.spawned_at = anyio.current_time()
        self.status: ExitStatus | None = None
        self.is_cleared = False
        self.is_silent = False  # accepts, and says nothing
        self.is_locked = False  # says that it is well, and answers nothing else
        self.is_working = False  # takes all of a processor
        self.is_unseen = False  # nobody can look what it does
        self.obeys_unloads = True
        self.terminated_at: float | None = None
        self.loads: list[str] = []  # every /models/load that reached it, in order
        self.unloads: list[str] = []
        self.reloads = 0
        self.calls_at_once = 0
        self.children: dict[str, FakeChild] = {}
        self.states: dict[str, ModelState] = {}
        self.failed: set[str] = set()
        self.busy: set[str] = set()  # models that are answering somebody
        self.work: dict[str, float] = {}
        self.metrics: dict[str, bytes] = {}  # what models say on their /metrics
        self.is_deaf = False  # it reads nothing again, as builds before reloads
        self._sections = self._written()
        self.listed = self._listed()
        self.listeners: set[MemoryObjectSendStream[StatusEvent | None]] = set()
        self._ended = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None
        host.machine.processes.append(self)
        self.print(*script.prints)

    def __repr__(self) -> str:
        return f"<FakeProcess {self.pid} {self.status or 'runs'}{'' if self.is_cleared else ', not cleared'}>"

    @property
    def is_listening(self) -> bool:
        """Whether it has come up and holds its port."""
        return self.status is None and anyio.current_time() - self.spawned_at >= self.script.ready_at

    def state(self, model: str) -> ModelState:
        """What it says of a model."""
        return self.states.get(model, ModelState.UNLOADED)

    # --- what a generation does with it ---------------------------------------------------------------------------

    async def wait(self) -> ExitStatus:
        """Live until the end."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._end_by_itself)
            await self._ended.wait()
            self._tasks.cancel_scope.cancel()
        assert self.status is not None
        return self.status

    def poll(self) -> ExitStatus | None:
        """How it ended, None while it lives."""
        return self.status

    def vitals(self) -> Vitals | None:
        """What it has done so far."""
        return working(self.is_working) if self.status is None and not self.is_unseen else None

    async def terminate(self, *, grace_s: float) -> bool:
        """Be asked to end, and be killed."""
        if self.terminated_at is None:
            self.terminated_at = anyio.current_time()
        if self.script.is_unkillable:
            await anyio.sleep(grace_s + KILL_GRACE_S)
            return False
        if self.status is None:
            await anyio.sleep(min(self.script.term_s, grace_s))
            obeys = self.script.term_s <= grace_s
            self.end(ExitStatus(code=0) if obeys else KILLED)
            return obeys
        return True

    async def clear(self) -> Leftovers:
        """Have everything cleared away."""
        if self.script.is_unkillable:
            return Leftovers(survivors=(self.pid,))
        assert self.status is not None, "cleared away alive"
        await anyio.sleep(self.script.clear_s)
        self.clear_now()
        return self.script.leftovers

    def clear_now(self) -> None:
        """Leave nothing."""
        for child in self.children.values():
            child.ended.set()
        self.is_cleared = True

    # --- what bad luck does with it -------------------------------------------------------------------------------

    def end(self, status: ExitStatus) -> None:
        """End, now; no effect on one that has ended."""
        if self.status is not None:
            return
        self.status = status
        self._ended.set()
        self.cut_streams()
        for name, child in self.children.items():
            if self.state(name) is not ModelState.LOADING:  # one that loads notices only later
                child.ended.set()

    def say_something_new(self) -> None:
        """Tell something on the event streams that this version does not understand."""
        for listener in self.listeners:
            listener.send_nowait(None)

    def cut_streams(self) -> None:
        """Break the event streams, and nothing else."""
        for listener in tuple(self.listeners):
            listener.close()
        self.listeners.clear()

    def crash(self, model: str, exit_code: int = 1, status: ExitStatus | None = None) -> None:
        """End the process of a loaded model; `status` is what the kernel tells of it."""
        self.children[model].status = status
        self.children[model].ended.set()
        self._has_ended(model, exit_code)

    def lose_sight_of(self, model: str) -> None:
        """End the process of a loaded model without the router's hearing of it."""
        self.children[model].ended.set()

    def evict(self, model: str) -> None:
        """Let a loaded model go, by the router's own choice."""
        self.crash(model, exit_code=0)

    def load_for_client(self, model: str) -> None:
        """Begin to load a model because a client's request needs it."""
        self._begin(model)

    def print(self, *lines: str) -> None:
        """Write lines to the output file."""
        with self.host.output.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    # --- what its API does ----------------------------------------------------------------------------------------

    async def load(self, name: str) -> None:
        """Answer POST /models/load."""
        model = self._known(name, 404, "File Not Found")
        self.loads.append(name)
        await self._one_call(model.answer_s)
        if model.refusal is not None:
            raise _refusal("POST /models/load", *model.refusal)
        if self.state(name) in HAS_CHILD:
            raise _refusal("POST /models/load", 400, "model is already running")
        self._begin(name)

    async def unload(self, name: str) -> None:
        """Answer POST /models/unload."""
        model = self._known(name, 400, "model is not found")
        self.unloads.append(name)
        await self._one_call(ANSWER_S)
        if model.unload_refusal is not None:
            raise _refusal("POST /models/unload", *model.unload_refusal)
        if self.state(name) not in HAS_CHILD:
            raise _refusal("POST /models/unload", 400, "model is not running")
        if self.obeys_unloads:
            self._start_soon(self._unload, name, model)

    async def reload(self) -> None:
        """Answer GET /models?reload=1, but for the list."""
        self.reloads += 1
        await self._one_call(ANSWER_S)
        if self.host.reload_refusals:
            raise _refusal("GET /models?reload=1", *self.host.reload_refusals.popleft())
        if self.is_deaf:
            return
        sections = self._written()
        for name, state in self.states.items():
            changed = sections.get(name) != self._sections.get(name)
            assert not (changed and state in HAS_CHILD), f"a reload would have stopped {name}"
        self._sections, self.listed = sections, self._listed()
        self.say_something_new()  # "models_reload"

    def _written(self) -> dict[str, object]:
        return {name: dict(offered.section) for name, offered in self.host.written.models.items()}

    def _listed(self) -> dict[str, FakeModel]:
        return {name: self.host.models.get(name) or FakeModel() for name in self.host.written.models}

    def models(self) -> list[ListedModel]:
        """The list."""
        return [
            ListedModel(
                name=name,
                state=self.state(name),
                failed=name in self.failed,
                path=model.path,
                n_ctx=model.n_ctx if self.state(name) is ModelState.LOADED else None,
            )
            for name, model in self.listed.items()
        ]

    async def _one_call(self, seconds: float) -> None:
        """Loads, unloads and reloads must never overlap: the true router breaks."""
        self.calls_at_once += 1
        try:
            assert self.calls_at_once == 1, "two operations at once"
            await anyio.sleep(seconds)
            if self.status is not None:
                raise ApiError("the router ended before it answered")
        finally:
            self.calls_at_once -= 1

    # --- its inner life -------------------------------------------------------------------------------------------

    async def _end_by_itself(self) -> None:
        await anyio.sleep_until(self.spawned_at + self.script.ends_at)
        self.end(self.script.status)

    def _begin(self, name: str) -> None:
        child = FakeChild(next(self.host.machine.pids), 40_000 + len(self.loads))
        child.when_killed = lambda: self._has_ended(name, 1)
        self.children[name] = child
        self.failed.discard(name)
        self.print(f"0.01.0 I srv          load: spawning server instance with name={name} on port {child.port}")
        self._tell(name, ModelState.LOADING)
        self._start_soon(self._load, name, self.listed[name], child)

    async def _load(self, name: str, model: FakeModel, child: FakeChild) -> None:
        with anyio.move_on_after(model.load_s):
            for value in model.progress:
                await anyio.sleep(min(model.load_s, 1e9) / (len(model.progress) + 1))
                if child.ended.is_set():
                    return
                self._tell(name, ModelState.LOADING, stage="text_model", progress=value)
            await child.wait()
        if child.ended.is_set():
            return
        self.print(*(f"[{child.port}] 0.00.006.7 E {line}" for line in model.prints))
        if model.exit_code:
            child.ended.set()
            self._has_ended(name, model.exit_code)
        else:
            self._tell(name, ModelState.LOADED, n_ctx=model.n_ctx)

    async def _unload(self, name: str, model: FakeModel) -> None:
        child = self.children[name]
        await anyio.sleep(model.unload_s)
        if not child.ended.is_set():
            child.ended.set()
            self._has_ended(name, 0)

    def _has_ended(self, name: str, exit_code: int) -> None:
        if exit_code:
            self.failed.add(name)
        self._tell(name, ModelState.UNLOADED, exit_code=exit_code)

    def _tell(
        self,
        name: str,
        state: ModelState,
        *,
        exit_code: int | None = None,
        stage: str | None = None,
        progress: float | None = None,
        n_ctx: int | None = None,
    ) -> None:
        self.states[name] = state
        event = StatusEvent(model=name, state=state, exit_code=exit_code, stage=stage, progress=progress, n_ctx=n_ctx)
        for listener in tuple(self.listeners):
            listener.send_nowait(event)

    def _known(self, name: str, status: int, message: str) -> FakeModel:
        if name not in self.listed:
            raise _refusal(f"model {name}", status, message)
        return self.listed[name]

    def _start_soon(self, *work: object) -> None:
        assert self._tasks is not None, "nobody waits for its end"
        self._tasks.start_soon(*work)


def fake_models(names: Iterable[str], **kind: object) -> dict[str, FakeModel]:
    """Models that are all alike."""
    return {name: FakeModel(**kind) for name in names}


def _refusal(call: str, status: int, message: str) -> ApiError:
    return ApiError(f"{call}: {message}", status=status)
