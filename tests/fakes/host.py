"""A router's outside world within the test itself, for virtual time: it keeps to `llamavisor.host`, nothing is real.

A `FakeHost` stands where a `Launcher` does. What a start and a load do is scripted with `FakeStart` and `FakeModel`;
what clients and bad luck do is a method of the running `FakeProcess`. The machine keeps the books: which processes
there were and which are left, and it refuses a second process on a port that is not free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
import anyio.abc

from fakes.machine import ANSWER_S, KILLED, FakeChild, FakeMachine, FakeModel, FakeProcess, FakeStart
from llamavisor import footprint, gauge
from llamavisor.api import TRIAL_TIMEOUT_S, ListedModel, Props, StatusEvent
from llamavisor.appraisal import Appraisal
from llamavisor.binary import Binary, Fingerprint
from llamavisor.cause import Cause, Verdict
from llamavisor.errors import ApiError, OptionError, SpawnError
from llamavisor.flags import LaunchOptions
from llamavisor.helptext import parse_help
from llamavisor.launch import Launch, ModelSource
from llamavisor.ledger import FootprintKey
from llamavisor.output import OutputFile
from llamavisor.rules import ModelRule
from llamavisor.sections import ModelSpec
from llamavisor.settings import RouterSettings
from llamavisor.shelf import Offer, Offered, Withheld
from llamavisor.usage import READ_TIMEOUT_S, Usage, UsageError

_PATH = Path("/opt/llama-server")


class FakeHost:
    """Where a fake router runs; `llamavisor.host.Host` for a test.

    Args:
        settings: what the router is told to be.
        folder: where its output file goes.
        machine: keeps the books; shared by all hosts of a test.

    Attributes:
        starts: how the next starts go, in order; after these every start is like `usual`.
        obstacle: what stands in the way of a start, None for nothing.
        build: changes when llama-server is replaced.
        prepare_s: how long the look at everything takes.
        appraise_s: how long it takes to find out what a model takes.
        invisible: devices that llama-server should see and does not.
        has_events: whether this build has an event stream.
        models: the files in its folder and what they do.
        reload_refusals: HTTP status and message with which the next reloads are refused, in order.
        offer_error: why the router's files cannot be written, None if they can.
        withholds: models that are withheld, and why.
        waits_for: models that run under names that others are to have.
        while_writing: what happens once while something new is being written down.
        source: knows the models, where they are not scripted with `models`.
        deliver: who is told of what is in the folder, before every start and by `look`.
        has_stranger: whether somebody else answers on the port, and as a router.
        devices: the GPUs that the router sees; None when its llama-server cannot be asked.
    """

    def __init__(
        self, settings: RouterSettings, *, folder: Path, machine: FakeMachine | None = None, has_events: bool = True
    ) -> None:
        self.settings = settings
        self.output = OutputFile(folder / f"{settings.name}.log")
        self.machine = machine or FakeMachine()
        self.has_events = has_events
        self.starts: deque[FakeStart] = deque()
        self.usual = FakeStart()
        self.obstacle: Verdict | None = None
        self.build = 1
        self.prepare_s = 0.01
        self.appraise_s = ANSWER_S
        self.invisible: tuple[str, ...] = ()
        self.models: dict[str, FakeModel] = {}
        self.reload_refusals: deque[tuple[int, str]] = deque()
        self.offer_error: OSError | OptionError | None = None
        self.withholds: dict[str, str] = {}
        self.deliver: Callable[[Mapping[str, ModelSpec]], None] = lambda _: None
        self.waits_for: frozenset[str] = frozenset()
        self.while_writing: Callable[[], None] | None = None
        self.source: ModelSource | None = None
        self.has_stranger = False
        self.devices: tuple[footprint.Device, ...] | None = ()
        self.prepared_at: list[float] = []
        self.appraisals = 0

    def __repr__(self) -> str:
        return f"<FakeHost {self.settings.name}>"

    @property
    def written(self) -> Offer:
        """What the router's files say; they are the same for every host of one router."""
        return self.machine.written.get(self.settings.name, Offer())

    @written.setter
    def written(self, offer: Offer) -> None:
        self.machine.written[self.settings.name] = offer

    @property
    def process(self) -> FakeProcess:
        """The router that runs."""
        found = self.machine.at(self.settings.port)
        assert found is not None, "no router runs"
        return found

    def specs(self) -> dict[str, ModelSpec]:
        """What is in the folder."""
        return {name: model.spec(name) for name, model in self.models.items()}

    def look(self) -> None:
        """Look into the folder, and tell what is there."""
        self.deliver(self.specs())

    async def prepare(self) -> Launch | Verdict:
        """What can be started, or what stands in the way."""
        self.prepared_at.append(anyio.current_time())
        await anyio.sleep(self.prepare_s)
        if self.obstacle is not None:
            return self.obstacle
        holder = self.machine.holder_of(self.settings.port)
        if holder is not None and (holder.host.settings.name != self.settings.name or holder.script.is_unkillable):
            reason = f"port {self.settings.port} is taken by {holder.host.settings.name}"
            return Verdict(Cause.PORT_TAKEN, reason, is_obstacle=True)
        binary = Binary(_PATH, "fake", None, parse_help(""), self._fingerprint())
        if self.source is not None:
            specs = await self.source.take()
            return (
                specs
                if isinstance(specs, Verdict)
                else Launch(binary, LaunchOptions({}), {}, self.settings.port, specs)
            )
        self.look()
        return Launch(binary, LaunchOptions({}), {}, self.settings.port, self.specs())

    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(_PATH, (("llama-server", self.build, 0, 0),))

    async def missing_devices(self, launch: Launch) -> tuple[str, ...]:
        """The devices that are not visible."""
        await anyio.sleep(ANSWER_S)
        return self.invisible

    async def is_replaced(self, launch: Launch) -> bool:
        """Whether llama-server was replaced since."""
        await anyio.sleep(ANSWER_S)
        return launch.found.fingerprint != self._fingerprint()

    async def write_offer(
        self, launch: Launch, specs: Mapping[str, ModelSpec], *, kept: Mapping[str, Offered], before: Offer
    ) -> Offer:
        """Take note of what the router will read."""
        await anyio.sleep(ANSWER_S)
        if before.models and self.while_writing is not None:
            happens, self.while_writing = self.while_writing, None
            happens()
            await anyio.sleep(10 * ANSWER_S)  # the news of it is under way
        if self.offer_error is not None:
            raise self.offer_error
        models = dict(kept)
        for name, spec in specs.items():
            if name not in kept and name not in self.withholds:
                options = ",".join(layer.source for layer in spec.layers)
                aliases = {"alias": ",".join(spec.aliases)} if spec.aliases else {}
                models[name] = Offered(spec, {"model": spec.path, **aliases, "options": options})
        withheld = {name: Withheld(specs[name], why) for name, why in self.withholds.items() if name in specs}
        self.written = Offer(models, withheld, waits_for=self.waits_for)
        return self.written

    async def objection(self, launch: Launch, spec: ModelSpec) -> str | None:
        """Why a model would be withheld."""
        await anyio.sleep(ANSWER_S)
        return self.withholds.get(spec.name)

    async def put_back(self, launch: Launch, offer: Offer) -> None:
        """Take note that the router will read an earlier offer again."""
        await anyio.sleep(ANSWER_S)
        self.written = offer

    async def refusals(self, rules: Sequence[ModelRule]) -> list[str]:
        """Nothing is refused."""
        return []

    async def look_again(self) -> None:
        """Look into the folder again."""
        await anyio.sleep(ANSWER_S)
        if self.source is not None:
            await self.source.look_again()
        else:
            self.look()

    async def sight(
        self, devices: Sequence[gauge.Device], *, is_fresh: bool = False
    ) -> tuple[footprint.Device, ...] | None:
        """The GPUs that the router sees, whatever the gauge has found."""
        await anyio.sleep(ANSWER_S)
        return self.devices

    async def appraise(
        self, launch: Launch, offered: Offered, devices: tuple[footprint.Device, ...]
    ) -> Appraisal | None:
        """What the model is scripted to take; it does not grow."""
        self.appraisals += 1
        await anyio.sleep(self.appraise_s)
        model = self.models.get(offered.spec.name) or FakeModel()
        if not model.takes:
            return None
        n_ctx = model.n_ctx if model.n_ctx_asked is None else model.n_ctx_asked
        expected = footprint.Footprint(
            bytes=dict(model.takes),
            source=footprint.Source.FIT_PARAMS,
            parts={},
            prompt_cache_bytes=0,
            checkpoint_bytes=0,
            n_ctx=n_ctx,
        )
        key = FootprintKey(offered.spec.name, ",".join(device.id for device in devices), str(self.build))
        return Appraisal(expected, key, n_ctx, is_ctx_ours=model.n_ctx_asked is None)

    async def try_model(self, port: int) -> str | None:
        """Have a model do something; what goes wrong."""
        process = self.machine.at(self.settings.port)
        child = next((each for each in process.children.values() if each.port == port), None) if process else None
        if child is None or child.ended.is_set():
            return "nobody answers"
        child.trials += 1
        await anyio.sleep(TRIAL_TIMEOUT_S if child.is_hung else ANSWER_S)
        return "no answer" if child.is_hung else child.error

    def usage_of(self, port: int) -> FakeUsage:
        """A gauge of the model behind a child's port."""
        return FakeUsage(self, port)

    async def spawn(self, launch: Launch, *, autoload: bool) -> FakeProcess:
        """Start the next process of the script."""
        script = self.starts.popleft() if self.starts else self.usual
        await anyio.sleep(ANSWER_S)
        if isinstance(script.error, SpawnError):
            raise script.error
        process = FakeProcess(self, script, autoload=autoload)
        try:
            await anyio.sleep(ANSWER_S)
        except BaseException:  # as the true one: what nobody will know is not left running
            process.end(KILLED)
            process.clear_now()
            raise
        return process

    async def is_listening(self, router_pid: int, launch: Launch, *, log_mark: int) -> bool:
        """Whether the router with that pid holds the port."""
        await anyio.sleep(ANSWER_S)
        process = self.machine.at(self.settings.port)
        return process is not None and process.pid == router_pid and process.is_listening

    async def find_child(self, router_pid: int, model: str) -> FakeChild | None:
        """The process that serves the model, None when there is none."""
        await anyio.sleep(ANSWER_S)
        process = self.machine.at(self.settings.port)
        child = process.children.get(model) if process is not None and process.pid == router_pid else None
        return child if child is not None and not child.ended.is_set() else None

    def connect(self, launch: Launch) -> FakeApi:
        """A client of whatever answers on the port."""
        return FakeApi(self)


class FakeUsage:
    """How busy a fake model is; `llamavisor.host.UsageGauge` for a test."""

    def __init__(self, host: FakeHost, port: int) -> None:
        self._host = host
        self._port = port

    async def read(self) -> Usage:
        """GET /metrics of the child."""
        await anyio.sleep(ANSWER_S)
        process = self._host.machine.at(self._host.settings.port)
        for name, child in process.children.items() if process is not None else ():
            if child.port == self._port and not child.ended.is_set():
                if child.is_hung:
                    await anyio.sleep(READ_TIMEOUT_S)
                    break
                text = process.metrics.get(name, b"")
                return Usage(int(name in process.busy), process.work.get(name, 0.0), text)
        raise UsageError(self._port, "nobody answers")

    async def aclose(self) -> None:
        """Nothing to close."""


class FakeApi:
    """The HTTP API of whatever answers on a port; `llamavisor.host.Api` for a test."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def check_health(self, *, timeout_s: float) -> None:
        """GET /health."""
        if not self._host.has_stranger:
            await self._reach(timeout_s=timeout_s)

    async def props(self) -> Props:
        """GET /props."""
        if self._host.has_stranger:
            return Props(is_router=True, build="b1")
        process = await self._reach()
        return Props(is_router=process.script.is_router, build="b11434")

    async def models(self, *, reload: bool = False) -> list[ListedModel]:
        """GET /models."""
        process = await self._reach()
        await self._wait_for_lock(process)
        if reload:
            await process.reload()
        listed = process.models()
        await anyio.sleep(ANSWER_S)  # an answer is as old as its way is long
        return listed

    async def load(self, name: str) -> None:
        """POST /models/load."""
        process = await self._reach()
        await self._wait_for_lock(process)
        await process.load(name)

    async def unload(self, name: str) -> None:
        """POST /models/unload."""
        process = await self._reach()
        await self._wait_for_lock(process)
        await process.unload(name)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[StatusEvent | None]]:
        """GET /models/sse."""
        process = await self._reach()
        if not self._host.has_events:
            raise ApiError("GET /models/sse was refused", status=404)
        send, receive = anyio.create_memory_object_stream[StatusEvent | None](math.inf)
        process.listeners.add(send)
        try:
            with receive:
                yield receive
        finally:
            process.listeners.discard(send)
            send.close()

    async def _wait_for_lock(self, process: FakeProcess) -> None:
        if process.is_locked:
            await anyio.sleep(10.0)
            raise ApiError("no answer within 10 s")

    async def _reach(self, *, timeout_s: float = 10.0) -> FakeProcess:
        await anyio.sleep(ANSWER_S)
        process = self._host.machine.at(self._host.settings.port)
        if process is None or not process.is_listening:
            raise ApiError("All connection attempts failed")
        if process.is_silent:
            await anyio.sleep(timeout_s)
            raise ApiError(f"no answer within {timeout_s:.0f} s")
        return process
