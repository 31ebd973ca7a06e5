"""What a router has been asked to do: one operation at a time, and who waits for what."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamavisor.api import ListedModel, StatusEvent
from llamavisor.errors import ModelLoadError, RouterNotReadyError
from llamavisor.models import ModelTable
from llamavisor.operations import Kind, Operation, Operations, Ticket
from llamavisor.states import HAS_CHILD, ModelState

S = ModelState
LOAD_A, LOAD_B = Operation(Kind.LOAD, "a"), Operation(Kind.LOAD, "b")
UNLOAD_A = Operation(Kind.UNLOAD, "a")
RELOAD = Operation(Kind.RELOAD)


class Desk:
    """Operations and the table that they are read against."""

    def __init__(self) -> None:
        self.table = ModelTable("main")
        self.operations = Operations()
        entries = [ListedModel(name, S.UNLOADED, failed=False, path=None, n_ctx=None) for name in "ab"]
        self.table.apply_list(entries, asked_at=0, now=0.0)

    def ask(self, operation: Operation) -> Ticket:
        """Somebody wants this."""
        ticket = Ticket(operation)
        self.operations.ask(ticket, self.table)
        return ticket

    def take(self) -> Operation | None:
        """As the owner does after every message."""
        self.operations.settle(self.table)
        return self.operations.take(self.table)

    def is_now(self, name: str, state: ModelState, exit_code: int | None = None) -> None:
        """The router says what the model is."""
        self.table.apply_event(StatusEvent(name, state, exit_code=exit_code), now=1.0)
        self.operations.settle(self.table)

    def state(self, name: str) -> ModelState:
        """What the table says."""
        model = self.table.get(name)
        assert model is not None
        return model.state


@pytest.fixture
def desk() -> Desk:
    """Two unloaded models, nothing asked."""
    return Desk()


def test_one_operation_at_a_time(desk: Desk) -> None:
    """Operations begin in the order in which they were asked for, each when the one before has returned."""
    for operation in (LOAD_A, RELOAD, LOAD_B):
        desk.ask(operation)
    assert desk.take() == LOAD_A
    assert desk.take() is None
    desk.operations.end(None)
    assert desk.take() == RELOAD
    desk.operations.end(None)
    assert desk.take() == LOAD_B


def test_a_load_is_fulfilled_by_the_table(desk: Desk) -> None:
    """A ticket for a load is done when the model is loaded, not when the call returns."""
    ticket = desk.ask(LOAD_A)
    desk.take()
    desk.is_now("a", S.LOADING)
    desk.operations.end(None)
    assert not ticket.is_done
    desk.is_now("a", S.LOADED)
    assert (ticket.is_done, ticket.changed, ticket.error) == (True, True, None)


def test_what_is_so_already_needs_nothing(desk: Desk) -> None:
    """A load of a loaded model and an unload of an unloaded one are done at once, unchanged."""
    desk.is_now("a", S.LOADED)
    load, unload = desk.ask(LOAD_A), desk.ask(Operation(Kind.UNLOAD, "b"))
    assert desk.take() is None
    assert [(ticket.is_done, ticket.changed) for ticket in (load, unload)] == [(True, False)] * 2


def test_the_same_wish_twice_is_one_operation(desk: Desk) -> None:
    """Those who want the same share one operation, whether it waits or is under way."""
    tickets = [desk.ask(LOAD_A), desk.ask(LOAD_A)]
    desk.take()
    tickets.append(desk.ask(LOAD_A))
    desk.is_now("a", S.LOADED)
    desk.operations.end(None)
    assert desk.take() is None
    assert all(ticket.is_done and ticket.changed for ticket in tickets)


def test_what_has_become_needless_is_not_begun(desk: Desk) -> None:
    """A load that a client's request was faster with is dropped, and its ticket waits for the client's load."""
    desk.ask(LOAD_B)
    desk.take()
    load = desk.ask(LOAD_A)
    desk.is_now("a", S.LOADING)
    desk.operations.end(None)
    assert desk.take() is None
    assert not load.is_done
    desk.is_now("a", S.LOADED)
    assert load.is_done


def test_an_unload_withdraws_loads_that_wait(desk: Desk) -> None:
    """An unload of a model whose load has not begun is done at once, and the load is refused."""
    desk.ask(LOAD_B)
    desk.take()
    load, unload = desk.ask(LOAD_A), desk.ask(UNLOAD_A)
    desk.operations.settle(desk.table)
    assert isinstance(load.error, ModelLoadError)
    assert (unload.is_done, unload.error) == (True, None)


def test_a_load_waits_for_a_model_that_is_leaving(desk: Desk) -> None:
    """A load of a leaving model waits; what comes after it in the queue does not."""
    desk.is_now("a", S.LOADED)
    desk.ask(UNLOAD_A)
    assert desk.take() == UNLOAD_A
    desk.table.unloading("a", now=2.0)
    desk.operations.end(None)
    load = desk.ask(LOAD_A)
    desk.ask(LOAD_B)
    assert desk.take() == LOAD_B
    desk.operations.end(None)
    assert desk.take() is None
    assert not load.is_done
    desk.is_now("a", S.UNLOADED)
    assert desk.take() == LOAD_A


def test_an_unloaded_model_may_come_back_at_once(desk: Desk) -> None:
    """An unload is done when the model has gone, though a client loads it again before our call returns."""
    desk.is_now("a", S.LOADED)
    ticket = desk.ask(UNLOAD_A)
    desk.take()
    desk.table.unloading("a", now=2.0)
    desk.is_now("a", S.UNLOADED)
    desk.is_now("a", S.LOADING)
    desk.operations.end(None)
    desk.operations.settle(desk.table)
    assert (ticket.is_done, ticket.error) == (True, None)


def test_an_unload_of_a_model_that_came_back_is_asked_again(desk: Desk) -> None:
    """Who asks for an unload during the call for an earlier one gets a call of their own, if one is still needed."""
    desk.is_now("a", S.LOADED)
    desk.ask(UNLOAD_A)
    desk.take()
    desk.table.unloading("a", now=2.0)
    desk.is_now("a", S.UNLOADED)
    desk.is_now("a", S.LOADING)
    ticket = desk.ask(UNLOAD_A)
    desk.operations.end(None)
    assert desk.take() == UNLOAD_A
    desk.table.unloading("a", now=3.0)
    desk.operations.end(None)
    desk.is_now("a", S.UNLOADED)
    assert (ticket.is_done, ticket.error) == (True, None)


def test_a_load_that_failed_has_a_reason(desk: Desk) -> None:
    """The error of a load is what the table knows of its end."""
    ticket = desk.ask(LOAD_A)
    desk.take()
    desk.is_now("a", S.LOADING)
    desk.operations.end(None)
    desk.is_now("a", S.UNLOADED, exit_code=1)
    assert isinstance(ticket.error, ModelLoadError)
    assert "its process ended while it was loading" in str(ticket.error)


def test_a_refused_call_ends_its_tickets_alone(desk: Desk) -> None:
    """An error of one call reaches those who asked for it, and nobody else."""
    desk.is_now("a", S.LOADED)
    first, second = desk.ask(UNLOAD_A), desk.ask(LOAD_B)
    desk.take()
    desk.operations.end(ModelLoadError("no"))
    assert isinstance(first.error, ModelLoadError)
    assert not second.is_done
    assert desk.take() == LOAD_B
    desk.operations.end(None)
    assert desk.take() is None


def test_a_reload_is_done_when_its_call_returns(desk: Desk) -> None:
    """A reload has no goal in the table; its ticket ends with the call."""
    ticket = desk.ask(RELOAD)
    desk.take()
    desk.operations.settle(desk.table)
    assert not ticket.is_done
    desk.operations.end(None)
    assert ticket.is_done


def test_everybody_is_told_when_the_router_is_given_up(desk: Desk) -> None:
    """When the router will not serve, the queue is forgotten and every ticket refused."""
    tickets = [desk.ask(operation) for operation in (LOAD_A, RELOAD, LOAD_B)]
    desk.take()
    desk.operations.refuse_all(RouterNotReadyError("stopped"))
    assert all(isinstance(ticket.error, RouterNotReadyError) for ticket in tickets)
    assert desk.take() is None
    assert desk.operations.current is None


@pytest.mark.anyio
async def test_a_ticket_answers_once() -> None:
    """The first end of a ticket counts, and it can be waited for any number of times."""
    ticket = Ticket(LOAD_A)
    ticket.finish(ModelLoadError("first"))
    ticket.finish()
    for _ in range(2):
        with anyio.fail_after(1.0), pytest.raises(ModelLoadError, match="first"):
            await ticket.wait()


DEEDS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from([LOAD_A, LOAD_B, UNLOAD_A, Operation(Kind.UNLOAD, "b"), RELOAD])),
    st.tuples(st.just("event"), st.sampled_from("ab"), st.sampled_from([S.UNLOADED, S.LOADING, S.LOADED])),
    st.tuples(st.sampled_from(["end", "refuse"])),
)


@settings(max_examples=300)
@given(st.lists(DEEDS, max_size=40))
def test_nobody_waits_for_ever(deeds: list[tuple[object, ...]]) -> None:
    """Whatever is asked and whatever happens, at most one operation runs, and at rest no ticket is open."""
    desk = Desk()
    tickets = []

    def begin() -> None:
        operation = desk.take()
        if operation is None:
            return
        state = desk.state(operation.model) if operation.model else None
        if operation.kind is Kind.LOAD:
            assert state not in HAS_CHILD
            desk.table.begin_load(operation.model, now=1.0)
        elif operation.kind is Kind.UNLOAD:
            assert state in HAS_CHILD
            desk.table.unloading(operation.model, now=1.0)

    def end(error: ModelLoadError | None) -> None:
        operation = desk.operations.current
        if operation is not None and operation.kind is Kind.LOAD:
            desk.table.end_load_call(operation.model, refusal=str(error) if error else None, now=1.0)
        elif operation is not None and operation.kind is Kind.UNLOAD and error is not None:
            desk.table.still_there(operation.model, now=1.0)
        desk.operations.end(error)

    for deed in deeds:
        match deed:
            case ("ask", Operation() as operation):
                tickets.append(desk.ask(operation))
            case ("event", str(name), ModelState() as state):
                desk.is_now(name, state)
            case ("end",):
                end(None)
            case ("refuse",):
                end(ModelLoadError("no"))
        begin()
    for _ in range(len(deeds) + 2):  # let everything end well
        for name in "ab":
            if desk.state(name) is S.LOADING:
                desk.is_now(name, S.LOADED)
            if desk.state(name) is S.UNLOADING:
                desk.is_now(name, S.LOADING)  # it says so of every load, before it says that it has ended
                desk.is_now(name, S.UNLOADED)
        end(None)
        begin()
    desk.operations.settle(desk.table)
    assert [ticket for ticket in tickets if not ticket.is_done] == []
    assert repr(desk.operations) == "<Operations current=None queued=0 tickets=0>"
