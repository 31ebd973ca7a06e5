"""X2: a whole fleet, whatever clients, people and bad luck do in whatever order: what was promised is kept."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes.fleet import Client
from fakes.machine import KILLED, FakeModel, FakeProcess, FakeStart
from fakes.stepwise import Stepwise
from fakes.witness import Witness
from fakes.world import TAKES, World
from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.demands import STALL_S
from llamavisor.gauge import RAM_ID as RAM
from llamavisor.generation import BINARY_POLL_S
from llamavisor.orders import LOAD_STALL_S
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.settings import FleetSettings, RouterSettings
from llamavisor.slots import Stage
from llamavisor.states import ModelState

MODELS = sorted(TAKES)
ANSWERED_S = 3 * STALL_S
"""How long it takes at most until everybody has an answer when everything does what it should."""
HANGS_S = 2 * LOAD_STALL_S + len(MODELS) * STALL_S
"""How long it takes at most until everybody has an answer when nothing moves any more."""
RESTS_S = 300.0
"""How long it takes after that at most until nothing is on its way."""
NATURES: Mapping[str, FakeModel] = {
    "good": FakeModel(),
    "slow": FakeModel(load_s=40.0, progress=(0.0, 0.1, 0.2, 0.4, 0.8)),
    "stalls": FakeModel(load_s=1e8, progress=(0.0,)),
    "fails": FakeModel(exit_code=1, prints=("error loading model",)),
    "lacks memory": FakeModel(exit_code=1, prints=("failed to allocate buffer of size 7",)),
    "is refused": FakeModel(refusal=(500, "failed to spawn server instance")),
    "will not leave": FakeModel(unload_refusal=(500, "not now")),
    "lingers": FakeModel(unload_s=20.0),
    "answers late": FakeModel(answer_s=3.0),
}
"""How a model behaves on its way in and out."""
TRAITS = ("load_s", "progress", "exit_code", "prints", "refusal", "answer_s", "unload_s", "unload_refusal")
STARTS: Mapping[str, FakeStart] = {
    "good": FakeStart(),
    "slow": FakeStart(ready_at=5.0, clear_s=2.0),
    "stubborn": FakeStart(term_s=30.0, clear_s=5.0),
    "never ready": FakeStart(ready_at=1e9),
}
"""How a router comes up and goes."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the configuration says."""

    ram: int = 10
    card: int = 8
    cap: int = 0
    has_two: bool = True
    ttl_s: float = 0.0
    pinned: str = ""
    changed: str = ""
    oversize: str = "fit"


class FleetMachine(RuleBasedStateMachine):
    """Two routers with budgets of their own share a machine."""

    def __init__(self) -> None:
        super().__init__()
        self.end = ExitStack()
        self.wishes = Wishes()
        self.version = 1

    @initialize()
    def begin(self) -> None:
        """Both routers are up."""
        self.world = World(Path(self.end.enter_context(tempfile.TemporaryDirectory())))
        self.witness = Witness(self.world)
        self.note_limits(0.0)
        self.loop = Stepwise(self.life, self.witness)
        self.end.callback(self.loop.end)

    @asynccontextmanager
    async def life(self) -> AsyncIterator[None]:
        """What the loop is there for."""
        async with self.world.running(*self.routers()):
            yield

    def routers(self) -> tuple[RouterSettings, ...]:
        """As the configuration says."""
        one = self.world.settings("one", ram=self.wishes.ram, card=self.wishes.card)
        two = self.world.settings("two", ram=10, card=6, models_max=self.wishes.cap)
        return (one, two) if self.wishes.has_two else (one,)

    def note_limits(self, now: float) -> None:
        """Tell the witness which budgets are in force from now on."""
        for each in self.routers():
            limits = self.witness.limits.setdefault(each.name, [])
            if limits:
                limits[-1] = (now, limits[-1][1])
            limits.append((float("inf"), each))

    async def nothing(self) -> None:
        """What was done takes no time; what follows from it at once has happened."""
        for _ in range(3):
            await anyio.sleep(0)

    def at_once(self, deed: Callable[[], object]) -> None:
        """Do what takes no time."""

        async def do() -> None:
            deed()
            await self.nothing()

        self.loop.do(do)

    # --- clients --------------------------------------------------------------------------------------------------

    @rule(model=st.sampled_from(MODELS), router=st.sampled_from([None, None, None, "one", "two"]))
    def ask(self, model: str, router: str | None) -> None:
        """Somebody wants a model."""
        if router == "two" and not self.wishes.has_two:
            router = None
        self.loop.do(lambda: self.world.ask(model, router))

    @rule(models=st.lists(st.sampled_from(MODELS), min_size=2, max_size=6), pause_s=st.sampled_from([0.0, 0.2, 3.0]))
    def crowd(self, models: list[str], pause_s: float) -> None:
        """Many come, and the machine is full."""
        for model in models:
            self.loop.do(lambda model=model: self.world.ask(model, None))
            self.loop.do(lambda: anyio.sleep(pause_s))

    @precondition(lambda self: self.world.holding)
    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        """A client has its answer."""
        self.at_once(self.pick(self.world.holding, which).leave)

    @rule()
    def all_leave(self) -> None:
        """All have their answers."""
        self.at_once(lambda: [client.leave() for client in self.world.holding])

    @precondition(lambda self: self.world.waiting + self.world.holding)
    @rule(which=st.integers(0, 9))
    def give_up(self, which: int) -> None:
        """A client goes away."""
        self.at_once(self.pick(self.world.waiting or self.world.holding, which).give_up)

    def pick(self, clients: list[Client], which: int) -> Client:
        """One of them."""
        return clients[which % len(clients)]

    @rule(seconds=st.sampled_from([0.001, 0.0125, 0.3, 1.2, 4.0, 12.0, 40.0, 130.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.loop.do(lambda: anyio.sleep(seconds))

    @rule(seconds=st.sampled_from([8.0, 400.0]))
    def freeze(self, seconds: float) -> None:
        """The daemon does not run for a while; nobody else does either."""
        self.loop.clock.jump(seconds)
        self.at_once(lambda: None)

    # --- bad luck -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.children())
    @rule(which=st.integers(0, 9), is_noticed=st.sampled_from([True, True, True, False]))
    def crash(self, which: int, is_noticed: bool) -> None:
        """The process of a model ends; at times its router does not notice that of a loaded one."""
        children = sorted(self.world.children().items())
        (_, model), (process, child) = children[which % len(children)]
        self.witness.fated.add(child)
        if process.status is None:
            known = self.world[process.host.settings.name].table.get(model)
            is_lost = (
                not is_noticed and known is not None and (known.state, known.pid) == (ModelState.LOADED, child.pid)
            )
            self.at_once(lambda: process.lose_sight_of(model) if is_lost else process.crash(model))

    def befall(self, name: str, fate: Callable[[FakeProcess], object]) -> None:
        """Something happens to a router, if it runs."""

        def do() -> None:
            if process := self.world.process(name):
                fate(process)

        self.at_once(do)

    @rule(name=st.sampled_from(["one", "two"]))
    def kill(self, name: str) -> None:
        """A router ends."""
        self.befall(name, lambda process: process.end(KILLED))

    @rule(name=st.sampled_from(["one", "two"]), is_silent=st.booleans())
    def hush(self, name: str, is_silent: bool) -> None:
        """A router does not answer any more, or again."""
        self.befall(name, lambda process: setattr(process, "is_silent", is_silent))

    @rule(name=st.sampled_from(["one", "two"]))
    def cut(self, name: str) -> None:
        """The event stream of a router breaks off."""
        self.befall(name, FakeProcess.cut_streams)

    @rule(name=st.sampled_from(["one", "two"]))
    def refuse_reload(self, name: str) -> None:
        """A router will not read its models again."""
        self.befall(name, lambda process: process.host.reload_refusals.append((500, "failed to parse")))

    @rule(model=st.sampled_from(MODELS), nature=st.sampled_from(sorted(NATURES)))
    def turn(self, model: str, nature: str) -> None:
        """A model behaves otherwise from now on."""
        given = NATURES[nature]
        mine = self.world.models[model]
        for trait in TRAITS:
            setattr(mine, trait, getattr(given, trait))

    @rule(name=st.sampled_from(["one", "two"]), kind=st.sampled_from(sorted(STARTS)))
    def spoil_router(self, name: str, kind: str) -> None:
        """A router comes up otherwise from now on, and the one that runs goes otherwise."""
        usual = self.world.hosts[name].usual = replace(STARTS[kind])
        for process in self.world.machine.alive:
            if process.host.settings.name == name:
                process.script = replace(usual, ready_at=process.script.ready_at)

    @rule(name=st.sampled_from(["one", "two"]))
    def upgrade(self, name: str) -> None:
        """The program of a router is replaced: it loads nothing more, and starts anew when nothing is loaded."""
        self.world.hosts[name].build += 1

    @rule(seconds=st.sampled_from([0.001, 0.001, 4.0]))
    def ponder(self, seconds: float) -> None:
        """It takes so long from now on to find out what a model takes."""
        self.world.appraise_s = seconds
        for host in self.world.hosts.values():
            host.appraise_s = seconds

    @rule(which=st.integers(0, 9))
    def use(self, which: int) -> None:
        """Somebody asks a model past everybody who waits; or has an answer."""
        children = sorted(self.world.children().items())
        if children:
            (_, model), (process, _) = children[which % len(children)]
            process.busy ^= {model}

    @rule(others=st.sampled_from([4.0, 4.0, 63.5]), lag_s=st.sampled_from([0.0, 2.0, 30.0]))
    def take_memory(self, others: float, lag_s: float) -> None:
        """Others take memory, or give it back; a driver is slow to."""
        self.world.memory.others[RAM] = int(others * 2**30)
        self.world.memory.lag_s = lag_s

    @rule(failure=st.sampled_from([None, OSError("it is broken")]), hangs=st.booleans())
    def spoil_gauge(self, failure: OSError | None, hangs: bool) -> None:
        """Nobody can say how much memory there is, or somebody can again."""
        self.world.memory.failure = failure
        self.world.memory.hangs = hangs and failure is None

    # --- people ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["one", "two"]), verb=st.sampled_from(["start", "start", "stop", "restart"]))
    def command(self, name: str, verb: str) -> None:
        """A person starts or ends a router."""
        if name in self.world.fleet._routers:
            self.at_once(getattr(self.world[name], verb))

    @rule(
        name=st.sampled_from(["one", "two"]),
        verb=st.sampled_from(["load", "unload", "rescan"]),
        model=st.sampled_from(MODELS),
    )
    def ask_router(self, name: str, verb: str, model: str) -> None:
        """A person asks a router for something, past everybody who waits."""
        if name in self.world.fleet._routers:
            self.loop.do(lambda: self.world.person(verb, self.world[name], model))
            self.at_once(lambda: None)

    @rule(model=st.sampled_from(MODELS), is_pinned=st.booleans())
    def pin(self, model: str, is_pinned: bool) -> None:
        """A person wants a model to stay, or does not care."""
        memory = self.world.fleet.memory
        if any(model in each.shelf.wanted for each in self.world.fleet):
            self.at_once(lambda: memory.pin(model) if is_pinned else memory.unpin(model))

    @rule(model=st.sampled_from(MODELS), how=st.sampled_from(["replaced", "overwritten", "removed"]))
    def touch(self, model: str, how: str) -> None:
        """The file of a model is another, or gone; one that was gone is back."""
        self.version += 1
        watch = self.world.watches[-1]
        if how == "removed":
            if model in watch.entries:
                self.at_once(lambda: watch.remove(model))
            return
        inode = MODELS.index(model) if how == "overwritten" else 100 + self.version
        file = ModelFile(f"/models/{model}.gguf", FileId(1, inode, 1000, self.version))
        entry = Entry(name=model, state=EntryState.READY, files=(file,))
        self.at_once(lambda: watch.put(entry))

    @rule(
        change=st.sampled_from(
            [
                {"ram": 10},
                {"ram": 5},
                {"card": 8},
                {"card": 4},
                {"cap": 0},
                {"cap": 1},
                {"has_two": False},
                {"has_two": True},
                {"ttl_s": 20.0},
                {"ttl_s": 0.0},
                {"pinned": "alpha"},
                {"pinned": ""},
                {"changed": "beta"},
                {"changed": ""},
                {"oversize": "refuse"},
                {"oversize": "fit"},
            ]
        )
    )
    def configure(self, change: dict[str, object]) -> None:
        """The configuration says something else."""
        self.apply(replace(self.wishes, **change))  # type: ignore[arg-type]

    def apply(self, wishes: Wishes) -> None:
        """Have it followed."""
        self.wishes = wishes
        self.note_limits(self.loop.clock.current_time())
        rules = [ModelRule.of("*", ModelSettings(ttl=wishes.ttl_s))]
        if wishes.pinned:
            rules.append(ModelRule.of(wishes.pinned, ModelSettings(pin=True)))
        if wishes.changed:
            rules.append(ModelRule.of(wishes.changed, ModelSettings(ctx_size=512)))
        now = FleetSettings(
            routers=self.routers(),
            rules=tuple(rules),
            serve="gateway",
            oversize=wishes.oversize,  # type: ignore[arg-type]
        )
        self.loop.do(lambda: self.world.fleet.apply(now))

    # --- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def nobody_complains(self) -> None:
        """What the witness has seen is all right, and so is what clients were told."""
        if hasattr(self, "world"):
            assert not self.witness.complaints, self.world.told(*self.witness.complaints)

    def teardown(self) -> None:
        """As soon as everything does what it should everybody has an answer, and what we know is what is."""
        try:
            if hasattr(self, "loop") and not self.loop._has_ended:
                if self.is_hung:
                    self.hang()
                    self.nobody_complains()
                self.mend()
                self.nobody_complains()
                self.all_are_answered()
                self.nobody_complains()
                self.everything_rests()
                self.nobody_complains()
                self.everything_works()
                self.nobody_complains()
        finally:
            self.end.close()

    @property
    def is_hung(self) -> bool:
        """Whether nothing goes on at the end: in every fourth run."""
        return len(self.world.waiting) % 4 == 1

    def hang(self) -> None:
        """Nothing is loaded, nothing is unloaded, and nobody leaves: who waits is refused for all that."""
        for model in MODELS:
            self.turn(model, "stalls")
            self.world.models[model].unload_refusal = (500, "not now")
        self.until(lambda: not self.world.waiting, HANGS_S, lambda: f"{self.world.waiting} wait")

    def mend(self) -> None:
        """Everything does what it should from now on, and whoever is served leaves."""
        world = self.world
        for model in MODELS:
            self.turn(model, "good")
            if model not in world.watches[-1].entries:
                self.touch(model, "replaced")
        for name in world.hosts:
            self.spoil_router(name, "good")
        for process in world.machine.alive:
            process.is_silent = False
            process.busy.clear()
            process.host.reload_refusals.clear()
        self.ponder(0.001)
        world.memory.others[RAM], world.memory.lag_s = 4 * 2**30, 0.0
        world.memory.failure, world.memory.hangs = None, False
        for model in MODELS:
            self.pin(model, is_pinned=False)
        self.apply(Wishes())
        self.wait(BINARY_POLL_S + 1.0)  # what was replaced is seen by then
        for router in world.fleet:
            self.at_once(router.restart if router.is_closed else router.start)
        self.at_once(lambda: [client.leave() for client in world.clients])

    def all_are_answered(self) -> None:
        """Nobody waits for ever."""
        self.until(lambda: not self.world.waiting, ANSWERED_S, lambda: f"{self.world.waiting} wait")

    def until(self, condition: Callable[[], bool], within_s: float, what: Callable[[], str]) -> None:
        """Let time pass until it holds."""
        began = self.loop.clock.current_time()
        while not condition():
            assert self.loop.clock.current_time() - began < within_s, self.world.told(what())
            self.loop.do(lambda: anyio.sleep(1.0))

    def everything_rests(self) -> None:
        """The table holds the processes that there are, and nothing is left of what was."""
        world = self.world
        self.until(lambda: not world.unrest, RESTS_S, lambda: world.unrest)
        scheduler = world.fleet.memory.scheduler
        children = {key: process.state(key[1]) for key, (process, _) in world.children().items()}
        known = {slot.key: slot.stage for slot in scheduler.admission.slots()}
        assert known == dict.fromkeys(children, Stage.LOADED), world.told(f"{known} and not {children}")
        assert set(children.values()) <= {ModelState.LOADED}
        assert [slot for slot in scheduler.admission.slots() if slot.leases] == []
        assert not len(scheduler._waiters), scheduler._waiters
        assert scheduler._moves._balances == {}

    def everything_works(self) -> None:
        """Every model can be had."""
        admission = self.world.fleet.memory.scheduler.admission
        for model in MODELS:
            self.at_once(lambda model=model: admission.forgive(model, anyio.current_time()))
            self.ask(model, None)
            client = self.world.clients[-1]
            self.until(lambda client=client: client.is_answered, STALL_S, lambda client=client: repr(client))
            assert client.has_it, self.world.told(repr(client))
            self.at_once(client.leave)


TestX2FleetMachine = FleetMachine.TestCase
TestX2FleetMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
