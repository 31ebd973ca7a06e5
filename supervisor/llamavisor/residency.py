"""Which models of one router are loaded, and what has been asked about them: the model half of a router's owner.

`Residency` is used by the router's owner alone, in its task. It knows no process and no restart; it hears what the
router says of its models, takes wishes in, has one call made at a time, and loads again what was resident before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import anyio

from llamavisor import events as ev
from llamavisor import generation as gen
from llamavisor.announcer import Announcer
from llamavisor.api import ListedModel, StatusEvent
from llamavisor.arbiter import Arbiter
from llamavisor.errors import (
    ApiError,
    LlamavisorError,
    ModelLoadError,
    ModelNotFoundError,
    ModelsMaxError,
    OptionError,
    RouterNotReadyError,
)
from llamavisor.explanations import Explanations
from llamavisor.healing import Healing
from llamavisor.host import Api, Host
from llamavisor.launch import Launch
from llamavisor.messages import CallEnded, Recalled, Suspected, Wanted
from llamavisor.models import Model, ModelTable
from llamavisor.news import AllIdle, ChildEnded, ChildFound, Listed, ModelNews, News, Told, Tried, Unsound, Used
from llamavisor.operations import Kind, Operation, Operations, Ticket
from llamavisor.output import OutputFile
from llamavisor.refresh import Refresh
from llamavisor.restart import STABLE_AFTER_S
from llamavisor.restoration import Restoration
from llamavisor.settings import RouterSettings
from llamavisor.shelf import Offer, Offered, Shelf
from llamavisor.states import HAS_CHILD, ModelState

LOOK_AGAIN_S = 30.0
"""How often what did not work is tried again: a reload that was refused, a model that is withheld."""
WARN_EVERY_S = 3600.0
_COMES_BACK = frozenset({ev.UnloadReason.CRASHED, ev.UnloadReason.UNRESPONSIVE, ev.UnloadReason.RECYCLED})


@dataclass(frozen=True, slots=True)
class Line:
    """The connection to a router that serves."""

    api: Api
    generation: gen.Generation
    host: Host
    launch: Launch


class Residency:
    """The models of one router.

    Args:
        settings: what the router is told to be.
        log: what it prints.
        publish: where events go.
        post: where the news of a finished call, and what it brought, go: back to the owner.
        arbiter: who sees all routers, None without one.
        refusal: why no model may be loaded now, None if one may.
    """

    def __init__(
        self,
        settings: RouterSettings,
        log: OutputFile,
        *,
        refusal: Callable[[], LlamavisorError | None],
        publish: Callable[[ev.Event], None],
        post: Callable[[gen.Generation, News | CallEnded], None],
        arbiter: Arbiter | None = None,
    ) -> None:
        self.settings = settings
        self.table = ModelTable(settings.name)
        self.shelf = Shelf()
        self._refuses = refusal
        self._explanations = Explanations(log, self.table, self.shelf, arbiter)
        self._publish_one = publish
        self._post = post
        self._arbiter = arbiter
        self._operations = Operations()
        self._line: Line | None = None  # Invariant: set if and only if the router serves
        self._restoration = Restoration(
            settings.name, publish=publish, want=self._want, is_full=self._is_full, is_pinned=self._is_pinned
        )
        self._refresh = Refresh(
            settings.name,
            self.table,
            self.shelf,
            self._operations,
            publish=publish,
            retire=self._retire,
            want=self._want,
            is_full=self._is_full,
        )
        self._healing = Healing(
            settings.name,
            self.table,
            self.shelf,
            self._operations,
            publish=publish,
            renew=self._renew,
            arbiter=arbiter,
        )
        self._announcer = Announcer(settings.name)
        self._is_first = False  # what is restored is of an earlier daemon
        self._look_again_at = 0.0
        self._refused = "", -math.inf  # the last reload that was refused: why, and when that was told

    def __repr__(self) -> str:
        return f"<Residency {self.table!r} {self._operations!r}>"

    @property
    def closed(self) -> LlamavisorError | None:
        """Why no model may be loaded now, None if one may."""
        return self._refuses()

    def try_all(self) -> None:
        """Something speaks against all models: see which of them work."""
        for model in self.table.running():
            self._healing.suspect(model.name, self._line, anyio.current_time())

    # --- the router's life ----------------------------------------------------------------------------------------

    def came_up(self, line: Line, models: Iterable[ListedModel]) -> None:
        """The router serves, and has these models."""
        self._line = line
        self._restoration.came_up()
        now = anyio.current_time()
        self._publish(self.table.apply_list(models, asked_at=self.table.revision, now=now))
        if self._is_first or not self._restoration.is_under_way:
            self._load_first()
        self._is_first = False

    def take(self, message: Wanted | Recalled | Suspected) -> None:
        """Take note of what others say of the models."""
        match message:
            case Wanted():
                self.want(message)
            case Recalled(models):  # what is to be loaded on start is loaded beside
                self._restoration.recall(models)
                self._is_first = True
            case Suspected(model, deaf_port):
                self._healing.suspect(model, self._line, anyio.current_time(), deaf_port=deaf_port)

    def _load_first(self) -> None:
        """Load what is to be loaded on start, as much as there is room for."""
        names, most = self.shelf.to_load_on_start(), self.settings.models_max
        if 0 < most < len(names):
            late = ", ".join(names[most:])
            text = f"load_on_start names {len(names)} models and models_max is {most}: {late} left out"
            self._publish([ev.Warned(subject=f"router {self.settings.name}", text=text)])
            names = names[:most]
        for name in names:
            self._want(Ticket(Operation(Kind.LOAD, name)))

    def _want(self, ticket: Ticket) -> None:
        """Have a model loaded that nobody has asked for just now."""
        if self._arbiter is not None and self._is_governed:
            self._arbiter.demand(self.settings.name, ticket)
        else:
            self.accept(ticket)

    def _retire(self, name: str) -> None:
        """Have a model unloaded that is not what it should be, once it is idle."""
        if self._arbiter is not None and self._is_governed:
            self._arbiter.dismiss(self.settings.name, name)
        else:
            self.accept(Ticket(Operation(Kind.UNLOAD, name, if_idle=True, reason=ev.UnloadReason.REFRESHED)))

    def settle_on(self, host: Host) -> None:
        """The router has other settings; one that goes on serving writes with them from now on."""
        self.settings = host.settings
        if self._line is not None:
            self._line = replace(self._line, host=host)

    def pause(self) -> None:
        """The router is asked to end: nothing more is begun on it, what is asked for waits for the next."""
        self._line = None

    def went_down(self, *, keeps: bool, is_requested: bool) -> None:
        """The router's process has ended.

        Args:
            keeps: whether what was resident is wanted again.
            is_requested: whether the process was asked to end. If not, what was still loading is not loaded again: it
                may be what ended the process.
        """
        self._line = None
        now = anyio.current_time()
        loading = [model.name for model in self.table if model.state is ModelState.LOADING] if is_requested else []
        self._restoration.went_down([*self.table.residents(), *loading], keeps=keeps)
        self._refresh.forget()  # the next start tells it everything
        self._operations.end(None)
        self._operations.drop_reloads()
        if self._is_governed:  # what was decided for the process that has ended is decided anew for the next
            self._operations.refuse_loads(self._not_up())
        self._publish(self.table.router_ended(now=now))

    @property
    def _is_governed(self) -> bool:
        """Whether every load here is somebody else's decision."""
        return self._arbiter is not None and self._arbiter.decides

    def _not_up(self) -> RouterNotReadyError:
        return RouterNotReadyError(f"router {self.settings.name} is not up", hint="ask again when it is")

    def _is_pinned(self, name: str) -> bool:
        return self._arbiter is not None and self._arbiter.is_pinned(name)

    def given_up(self, error: LlamavisorError, *, forget: bool) -> None:
        """The router is stopped or failed: nobody waits any longer; `forget` also what was resident."""
        if forget:
            self._restoration.forget()
        self._operations.refuse_all(error)

    # --- what is to be served -------------------------------------------------------------------------------------

    def want(self, wanted: Wanted) -> None:
        """The router is to serve other models from now on."""
        self._refresh.on_overwrite = wanted.on_overwrite
        self.shelf.want(wanted.specs, wanted.leaving)
        self._refresh.tell()

    def told(self, offer: Offer) -> None:
        """The router has read this offer: say what it can serve now and what it cannot."""
        before = self.shelf.offer
        self.shelf.told(offer)
        self._publish(self._announcer.compare(before, offer))
        self._refresh.tell()

    async def confirm_all_idle(self) -> None:
        """Ask every loaded model once more, now, and say so if none is answering anybody. A worker's task."""
        line = self._line
        if line is not None:
            loaded = [model for model in self.table.running() if _can_answer(model)]
            if all([await self._answers_nobody(line, model.name) for model in loaded]):
                self._post(line.generation, AllIdle())

    async def _answers_nobody(self, line: Line, name: str) -> bool:
        """Whether a model answers nobody, and has not since it was last asked, which may be a second ago."""
        model = self.table.get(name)
        if model is None or model.state is ModelState.SLEEPING:
            return True
        before = model.work
        usage = await line.generation.usage_now(name)
        return usage is not None and usage.in_flight == 0 and usage.work == before

    # --- what is heard --------------------------------------------------------------------------------------------

    def hear(self, news: ModelNews) -> None:
        """The router or the kernel says something of the models."""
        now = anyio.current_time()
        match news:
            case StatusEvent():
                self._load_again(self._publish(self.table.apply_event(news, now=now)), now)
            case Listed(models, asked_at, is_first):
                happened = self.table.apply_list(models, asked_at=asked_at, now=now, is_first=is_first)
                self._load_again(self._publish(happened), now)
            case Told(offer):
                self._refused = "", -math.inf
                self.told(offer)
            case Used(model, usage, vitals, has_refused):
                self.table.used(model, usage, vitals=vitals, has_refused=has_refused, now=now)
            case Tried():
                self._healing.tried(news, now)
            case ChildFound(model, child):
                self.table.child_found(model, child.pid, child.port)
            case ChildEnded(model, pid, status):
                self._publish(self.table.child_ended(model, pid, status=status, now=now))

    def _load_again(self, happened: Iterable[ev.Event], now: float) -> None:
        """A model that had served for a while and was lost is loaded again at once, before most people notice.

        One that was lost soon after its load stays away until somebody asks for it: it would only happen again.
        """
        for event in happened:
            if isinstance(event, ev.ModelUnloaded) and event.reason in _COMES_BACK:
                model = self.table.get(event.model)
                if model is not None and model.loaded_at is not None and now - model.loaded_at >= STABLE_AFTER_S:
                    self._want(Ticket(Operation(Kind.LOAD, event.model)))

    def accept(self, ticket: Ticket) -> None:
        """Take a wish in. A router that is starting is waited for, but not by what an arbiter has decided."""
        operation = ticket.operation
        if self._line is not None and operation.model and self.table.get(operation.model) is None:
            ticket.finish(self._unknown(operation.model))
        elif operation.kind is Kind.LOAD and self.closed is not None:
            ticket.finish(self.closed)
        elif operation.kind is Kind.LOAD and self._line is None and self._is_governed:
            ticket.finish(self._not_up())
        else:
            if operation.kind is Kind.UNLOAD and self._restoration.leave_out(operation.model):
                ticket.changed = True
            self.shelf.is_forced |= operation.kind is Kind.RELOAD
            self._operations.ask(ticket, self.table)

    def advance(self) -> None:
        """Do what can be done now: called by the owner after every message."""
        self._operations.settle(self.table)
        self._refresh.advance(now=anyio.current_time(), is_closed=self.closed is not None)
        if self._line is not None and self.closed is None:
            self._restoration.advance()
        reload = Operation(Kind.RELOAD)
        if (
            self._line is not None
            and self.shelf.is_due(self.table)
            and not self._operations.is_pending(reload)
            and self.table.corpse(now=anyio.current_time()) is None
        ):
            self._operations.ask(Ticket(reload), self.table)
        self._start_operation()

    def check_deadlines(self) -> None:
        """End what hangs, try again what did not work; called every second."""
        now = anyio.current_time()
        if now >= self._look_again_at:
            self._look_again_at = now + LOOK_AGAIN_S
            self.shelf.look_again()
        self._healing.advance(self._line, now)

    def _renew(self, reason: str) -> None:
        if self._line is not None:
            self._post(self._line.generation, Unsound(reason))

    # --- one call at a time ---------------------------------------------------------------------------------------

    def _start_operation(self) -> None:
        """Begin the next operation that can be begun, if the router serves and none is under way."""
        line = self._line
        while line is not None and (operation := self._operations.take(self.table)) is not None:
            refusal = self._refusal(operation)
            if refusal is not None:
                self._operations.end(refusal)
                continue
            now = anyio.current_time()
            if operation.kind is Kind.LOAD:
                is_again = self._restoration.is_of(operation.model)
                self._publish(self.table.begin_load(operation.model, now=now, is_again=is_again))
            elif operation.kind is Kind.UNLOAD:
                self.table.unloading(operation.model, now=now, reason=operation.reason)
            # What runs now is kept as it is; nothing of ours can begin to run before the call has returned.
            kept = self.shelf.kept(self.table) if operation.kind is Kind.RELOAD else {}
            line.generation.start_soon(self._call, operation, line, kept)

    def _refusal(self, operation: Operation) -> LlamavisorError | None:
        """Why an operation that was taken in must not be begun after all; None if it can."""
        if operation.kind is not Kind.LOAD and self.table.corpse(now=anyio.current_time()) is not None:
            return self.closed  # it might need a stop, for which the router would wait for ever
        if operation.kind is Kind.RELOAD:
            return None
        if self.table.get(operation.model) is None:  # asked for before the list was known
            return self._unknown(operation.model)
        return self.closed if operation.kind is Kind.LOAD else None

    async def _reload(self, line: Line, kept: Mapping[str, Offered]) -> None:
        """Write down what the router is to serve, and have it read that.

        A reload that is refused half-way blocks every later load; one of the last good state releases them.

        Raises:
            ApiError: it was refused; the router goes on with what it knew.
        """
        asked_at, before = self.table.revision, self.shelf.offer
        is_forced, self.shelf.is_forced = self.shelf.is_forced, False
        offer = await self._write(line, kept, before)
        if not is_forced and offer.models == before.models:  # what is withheld still is
            self._post(line.generation, Told(offer))
            return
        try:
            models = await line.api.models(reload=True)
        except ApiError as refusal:
            await self._put_back(line, before, refusal)
            raise
        self._post(line.generation, Listed(models, asked_at))
        self._post(line.generation, Told(offer))
        listed = {model.name for model in models}
        if unheard := [name for name in offer.models if name not in listed]:
            count = f"{unheard[0]} and {len(unheard) - 1} more" if len(unheard) > 1 else unheard[0]
            self._post(line.generation, Unsound(f"a reload did not make it list {count}"))

    async def _unload(self, operation: Operation, line: Line) -> None:
        """Have a model unloaded; one that is only to be refreshed if it is idle at this moment, and can come back."""
        wanted = self.shelf.wanted.get(operation.model)
        if operation.reason is ev.UnloadReason.REFRESHED:
            objection = await line.host.objection(line.launch, wanted) if wanted is not None else None
            if objection is not None:
                raise ApiError(f"model {operation.model} is not loaded anew: {objection}")
        if operation.if_idle and not await self._answers_nobody(line, operation.model):
            raise ApiError(f"model {operation.model} is answering somebody")
        await line.api.unload(operation.model)

    async def _write(self, line: Line, kept: Mapping[str, Offered], before: Offer) -> Offer:
        """Write an offer down that leaves alone whatever runs, also what a client has had loaded meanwhile.

        Where something that the router knows would change, the router is asked at the last moment what runs: its events
        may be late.
        """
        while True:
            try:
                offer = await line.host.write_offer(line.launch, self.shelf.wanted, kept=kept, before=before)
            except (OSError, OptionError) as error:
                raise ApiError(f"not reloaded: {error}") from error
            changed = {name: each for name, each in before.models.items() if offer.models.get(name) != each}
            if not changed:
                return offer
            running = {model.name for model in await line.api.models() if model.state in HAS_CHILD}
            running |= self.shelf.kept(self.table).keys()
            if not (held := {name: each for name, each in changed.items() if name in running}):
                return offer
            kept = {**kept, **held}

    async def _put_back(self, line: Line, before: Offer, refusal: ApiError) -> None:
        try:
            await line.host.put_back(line.launch, before)
            await line.api.models(reload=True)
        except (OSError, ApiError) as error:
            reason = f"it refused a reload ({refusal}), and then its own last state ({error})"
            self._post(line.generation, Unsound(reason))

    async def _call(self, operation: Operation, line: Line, kept: Mapping[str, Offered]) -> None:
        """The worker of one operation: the HTTP call and nothing else."""
        error: ApiError | None = None
        try:
            match operation.kind:
                case Kind.LOAD:
                    await line.api.load(operation.model)
                case Kind.UNLOAD:
                    await self._unload(operation, line)
                case Kind.RELOAD:
                    await self._reload(line, kept)
        except ApiError as failure:
            error = failure
            if failure.status is None:  # it said nothing
                line.generation.suspect()
        self._post(line.generation, CallEnded(line.generation, operation, error))

    def call_ended(self, operation: Operation, error: ApiError | None) -> None:
        """The call of an operation has returned."""
        now = anyio.current_time()
        name = operation.model
        refusal: LlamavisorError | None = error
        if operation.kind is Kind.LOAD:
            if error is not None and error.status == 400:  # "already running": a client's request was faster
                refusal = error = None
            if error is not None:
                refusal = self._load_refusal(name, error)
            failed = self.table.end_load_call(name, refusal=str(refusal) if refusal else None, now=now)
            self._publish(failed)
            if not failed:  # it loads, or the router's word on its end was faster than the answer
                refusal = None
        elif operation.kind is Kind.UNLOAD and error is not None:
            if error.status == 400:  # "not running": it has gone meanwhile, and the news of it is under way
                refusal = None
            else:
                self.table.still_there(name, now=now)
                self._refresh.put_off(name, now=now)
        elif error is not None:
            self.shelf.is_blocked = True  # tried again when something changes, or after a while
            text, told_at = self._refused
            if str(error) != text or now - told_at >= WARN_EVERY_S:
                self._refused = str(error), now
                self._publish([ev.Warned(subject=f"router {self.settings.name}", text=str(error))])
        self._operations.end(refusal)

    def _load_refusal(self, name: str, error: ApiError) -> LlamavisorError:
        if "model limit reached" in str(error):
            text = f"model {name}: {self.settings.models_max} models are loaded and none of them can leave now"
            return ModelsMaxError(text, hint="unload one, or raise models_max")
        return ModelLoadError(f"model {name}: {error}", hint="see `llamavisor logs`")

    def _is_full(self) -> bool:
        """Whether one more model would push another one out. An arbiter sees to that itself."""
        if self._is_governed:
            return False
        held = {model.name for model in self.table if model.state in HAS_CHILD} | self._operations.queued_loads()
        return 0 < self.settings.models_max <= len(held)

    def _unknown(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"no model {name!r} on router {self.settings.name}", hint="see `llamavisor models`")

    def _publish(self, events: Iterable[ev.Event]) -> list[ev.Event]:
        explained = [self._explanations.add_to(event) for event in events]
        for event in explained:
            self._publish_one(event)
        return explained


def _can_answer(model: Model) -> bool:
    return model.state is ModelState.LOADED and model.dead_since is None and model.hung_at is None
