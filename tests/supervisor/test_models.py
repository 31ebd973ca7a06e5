"""What is known of the models of one router, from the words of the router, the kernel, and our own intents."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamavisor.api import ListedModel, StatusEvent
from llamavisor.cause import Cause
from llamavisor.events import (
    Event,
    ModelChildExited,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelProgress,
    ModelSleeping,
    ModelUnloaded,
    UnloadReason,
)
from llamavisor.models import DEAD_S, Model, ModelTable
from llamavisor.states import HAS_CHILD, RESIDENT, ModelState
from llamavisor.usage import Usage

S = ModelState


def _listed(name: str, state: ModelState = S.UNLOADED, *, failed: bool = False, **more: int) -> ListedModel:
    return ListedModel(name=name, state=state, failed=failed, path=Path(f"/m/{name}.gguf"), n_ctx=more.get("n_ctx"))


class Table:
    """A table under test: every word at a later second, the events in one list."""

    def __init__(self, *names: str) -> None:
        self.table = ModelTable("main")
        self.now = 0.0
        self.heard: list[Event] = []
        self.lists(*(_listed(name) for name in names))

    def __getitem__(self, name: str) -> Model:
        model = self.table.get(name)
        assert model is not None, f"{name} is not in {self.table}"
        return model

    def _later(self) -> float:
        self.now += 1.0
        return self.now

    def lists(self, *models: ListedModel, asked_at: int | None = None) -> list[Event]:
        """The router's whole list, asked for now or when the table had the revision `asked_at`."""
        asked = self.table.revision if asked_at is None else asked_at
        return self._hear(self.table.apply_list(models, asked_at=asked, now=self._later()))

    def says(self, name: str, state: ModelState, **more: object) -> list[Event]:
        """One event of the router."""
        return self._hear(self.table.apply_event(StatusEvent(name, state, **more), now=self._later()))

    def asks(self, name: str, *, is_again: bool = False) -> list[Event]:
        """We ask for a load; the call has not returned."""
        return self._hear(self.table.begin_load(name, now=self._later(), is_again=is_again))

    def answers(self, name: str, refusal: str | None = None) -> list[Event]:
        """The call to load has returned."""
        return self._hear(self.table.end_load_call(name, refusal=refusal, now=self._later()))

    def unloads(self, name: str) -> None:
        """We ask for an unload."""
        self.table.unloading(name, now=self._later())

    def loads(self, name: str, *, is_again: bool = False) -> None:
        """A whole load, as it goes well."""
        self.asks(name, is_again=is_again)
        self.says(name, S.LOADING)
        self.answers(name)
        self.says(name, S.LOADED, n_ctx=4096)

    def dies(self) -> list[Event]:
        """The router's process has ended."""
        return self._hear(self.table.router_ended(now=self._later()))

    def _hear(self, events: list[Event]) -> list[Event]:
        self.heard += events
        return events


@pytest.fixture
def it() -> Table:
    """A table with the models a and b."""
    return Table("a", "b")


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_load_from_beginning_to_end(it: Table) -> None:
    """A load that we asked for is told once, with its progress and the time that it took."""
    it.asks("a")
    it.says("a", S.LOADING)
    it.says("a", S.LOADING, stage="text_model", progress=0.5)
    assert (it["a"].stage, it["a"].progress) == ("text_model", 0.5)
    it.answers("a")
    it.says("a", S.LOADED, n_ctx=512)
    assert it.heard == [
        ModelLoading(router="main", model="a", is_requested=True),
        ModelProgress(router="main", model="a", stage="text_model", progress=0.5),
        ModelLoaded(router="main", model="a", load_s=4.0),
    ]
    assert (it["a"].n_ctx, it["a"].progress, it["a"].error) == (512, None, None)


def test_a_load_by_a_client(it: Table) -> None:
    """A load that we did not ask for is told as such, even of a model that we asked for before."""
    it.loads("b")
    it.says("b", S.UNLOADED, exit_code=0)
    assert it.says("b", S.LOADING) == [ModelLoading(router="main", model="b", is_requested=False)]


def test_a_load_whose_beginning_was_missed(it: Table) -> None:
    """A model that is found loaded has no known load time."""
    assert it.lists(_listed("a", S.LOADED, n_ctx=512), _listed("b")) == [
        ModelLoaded(router="main", model="a", load_s=None)
    ]
    assert it["a"].n_ctx == 512


def test_a_refused_load(it: Table) -> None:
    """A call that is refused means a failed load with the reason of the refusal."""
    it.asks("a")
    assert it.answers("a", "no room") == [
        ModelLoadFailed(router="main", model="a", reason="no room", cause=Cause.UNSOUND)
    ]
    assert (it["a"].state, it["a"].error) == (S.FAILED, "no room")
    assert it.says("a", S.UNLOADED) == []
    assert it["a"].state is S.FAILED


def test_a_refusal_that_comes_too_late(it: Table) -> None:
    """A call that breaks after the model was loaded, or has failed for a better reason, changes nothing."""
    it.asks("a")
    it.says("a", S.LOADED)
    assert it.answers("a", "the connection broke") == []
    assert it["a"].state is S.LOADED
    it.asks("b")
    it.says("b", S.LOADING)
    it.says("b", S.UNLOADED, exit_code=1)
    it.table.explain("b", "bad magic")
    assert it.answers("b", "the connection broke") == []
    assert it["b"].error == "bad magic"


def test_a_load_that_ends_without_the_model(it: Table) -> None:
    """A model that goes from loading to unloaded has failed, whatever the exit code says."""
    it.asks("a")
    it.says("a", S.LOADING)
    [failed] = it.says("a", S.UNLOADED, exit_code=0)
    assert isinstance(failed, ModelLoadFailed)
    assert it["a"].state is S.FAILED
    assert it.says("a", S.LOADING) == [ModelLoading(router="main", model="a", is_requested=False)]
    assert it["a"].error is None


def test_the_end_of_a_former_life_is_told_late(it: Table) -> None:
    """A list may overtake an event: an end that the router tells of before our load is that of the process before."""
    it.loads("a")
    it.lists(_listed("a", failed=True), _listed("b"))
    it.asks("a")
    it.answers("a")
    assert it.says("a", S.UNLOADED, exit_code=1) == []
    assert it["a"].state is S.LOADING
    it.says("a", S.LOADING)
    [failed] = it.says("a", S.UNLOADED, exit_code=1)
    assert isinstance(failed, ModelLoadFailed)


def test_a_process_that_ends_while_its_model_loads(it: Table) -> None:
    """A router that calls the model loaded all the same has lost sight of it; another process is a sign of life."""
    it.says("a", S.LOADING)
    it.table.child_found("a", 7, 40_000)
    it.table.child_ended("a", 7, now=it.now)
    it.says("a", S.LOADED)
    it.now += DEAD_S
    assert it.table.corpse(now=it.now) == "a"
    it.table.child_found("a", 8, 40_001)
    assert it.table.corpse(now=it.now) is None


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_requested_unload(it: Table) -> None:
    """An unload that we asked for is a requested one, though the router calls it failed."""
    it.loads("a")
    it.unloads("a")
    assert it["a"].state is S.UNLOADING
    assert it.says("a", S.UNLOADED, exit_code=1) == [
        ModelUnloaded(router="main", model="a", reason=UnloadReason.REQUESTED)
    ]
    assert (it["a"].state, it["a"].error) == (S.UNLOADED, None)


@pytest.mark.parametrize("word", [S.LOADED, S.LOADING, S.SLEEPING])
def test_the_router_has_no_word_for_leaving(it: Table, word: ModelState) -> None:
    """While a model leaves, the router goes on calling it what it was: that is no news."""
    it.loads("a")
    it.unloads("a")
    assert it.says("a", word, progress=0.3) == []
    assert it.lists(_listed("a", word), _listed("b")) == []
    assert (it["a"].state, it["a"].progress) == (S.UNLOADING, None)


def test_an_unload_of_a_model_that_is_loading(it: Table) -> None:
    """A load that was cancelled did not fail."""
    it.asks("a")
    it.answers("a")
    it.says("a", S.LOADING)
    it.unloads("a")
    assert it.says("a", S.UNLOADED, exit_code=1) == [
        ModelUnloaded(router="main", model="a", reason=UnloadReason.REQUESTED)
    ]
    assert it["a"].state is S.UNLOADED


@pytest.mark.parametrize("state", [S.LOADED, S.LOADING, S.SLEEPING])
def test_an_unload_that_was_refused(it: Table, state: ModelState) -> None:
    """A model whose unload was refused is what it was."""
    it.says("a", state)
    it.unloads("a")
    it.table.still_there("a", now=100.0)
    assert it["a"].state is state


def test_a_load_that_ended_while_its_unload_was_refused(it: Table) -> None:
    """A model that became loaded while an unload was tried in vain is loaded."""
    it.asks("a")
    it.unloads("a")
    it.says("a", S.LOADED)
    it.table.still_there("a", now=100.0)
    assert (it["a"].state, it["a"].loaded_at) == (S.LOADED, 100.0)


def test_the_router_s_own_choice(it: Table) -> None:
    """A loaded model that leaves with exit code 0 was evicted."""
    it.loads("a")
    assert it.says("a", S.UNLOADED, exit_code=0) == [
        ModelUnloaded(router="main", model="a", reason=UnloadReason.EVICTED)
    ]
    assert it["a"].state is S.UNLOADED


@pytest.mark.parametrize("state", [S.LOADED, S.SLEEPING])
@pytest.mark.parametrize("by_list", [True, False])
def test_a_crash(it: Table, state: ModelState, by_list: bool) -> None:
    """A model in memory that leaves with another exit code crashed; the router's later word does not wipe that out."""
    it.says("a", state)
    it.table.child_found("a", 77, 40000)
    crashed = [ModelUnloaded(router="main", model="a", reason=UnloadReason.CRASHED)]
    if by_list:
        assert it.lists(_listed("a", failed=True), _listed("b")) == crashed
    else:
        assert it.says("a", S.UNLOADED, exit_code=1) == crashed
    assert it.lists(_listed("a", failed=True), _listed("b")) == []
    assert (it["a"].state, it["a"].pid, it["a"].error) == (S.FAILED, None, "its process ended unasked")


def test_sleep(it: Table) -> None:
    """A model that sleeps is still resident, and its waking is a load of unknown length."""
    it.loads("a")
    assert it.says("a", S.SLEEPING) == [ModelSleeping(router="main", model="a")]
    assert it.table.residents() == ["a"]
    assert it.says("a", S.LOADED) == [ModelLoaded(router="main", model="a", load_s=None)]


def test_a_word_of_a_future_build(it: Table) -> None:
    """A state that this version does not know is shown as unknown, and the next word is believed."""
    assert it.says("a", S.UNKNOWN) == []
    assert it["a"].state is S.UNKNOWN
    it.says("a", S.LOADED)
    assert it["a"].state is S.LOADED


# --- lists and events out of order ------------------------------------------------------------------------------------


def test_a_list_is_older_than_what_happened_since(it: Table) -> None:
    """A list that was asked for before a change does not undo it."""
    asked_at = it.table.revision
    it.says("a", S.LOADED)
    assert it.lists(_listed("a"), _listed("b"), asked_at=asked_at) == []
    assert it["a"].state is S.LOADED
    it.lists(_listed("a"), _listed("b"))
    assert it["a"].state is S.UNLOADED


def test_no_list_knows_of_a_call_under_way(it: Table) -> None:
    """While a call to load is under way, a list may not know of it yet, whenever it was asked for."""
    it.asks("a")
    assert it.lists(_listed("a"), _listed("b")) == []
    it.answers("a")
    asked_at = it.table.revision
    [failed] = it.lists(_listed("a", failed=True), _listed("b"), asked_at=asked_at)
    assert isinstance(failed, ModelLoadFailed)


def test_an_older_list_knows_no_newer_models(it: Table) -> None:
    """A list from before a reload takes no model away that the reload brought, and brings none back."""
    asked_at = it.table.revision
    it.lists(_listed("a"), _listed("c"))
    it.lists(_listed("a"), _listed("b"), asked_at=asked_at)
    assert [model.name for model in it.table] == ["a", "c"]
    it.lists(_listed("a"), _listed("b"))
    assert [model.name for model in it.table] == ["a", "b"]


def test_a_model_that_is_no_longer_listed(it: Table) -> None:
    """A loaded model that vanishes from the list has left."""
    it.loads("a")
    assert it.lists(_listed("b")) == [ModelUnloaded(router="main", model="a", reason=UnloadReason.EVICTED)]
    assert it.table.get("a") is None
    assert len(it.table) == 1


def test_an_event_of_a_model_that_no_list_had(it: Table) -> None:
    """An event may name a model before any list does."""
    asked_at = it.table.revision
    it.says("new", S.DOWNLOADING)
    it.lists(_listed("a"), _listed("b"), asked_at=asked_at)
    assert it["new"].state is S.DOWNLOADING


# --- the kernel's word ------------------------------------------------------------------------------------------------


def test_the_process_of_a_model(it: Table) -> None:
    """A model's process is known from when it is found until it ends, or is replaced."""
    it.loads("a")
    it.table.child_found("a", 77, 40000)
    assert (it["a"].pid, it["a"].port) == (77, 40000)
    assert it.table.child_ended("a", 66, now=1.0) == [ModelChildExited(router="main", model="a", pid=66)]
    assert it["a"].pid == 77
    it.table.child_ended("a", 77, now=1.0)
    assert (it["a"].pid, it["a"].port, it["a"].state) == (None, None, S.LOADED)
    it.table.child_found("gone", 1, 2)
    assert it.table.get("gone") is None


# --- the end of the router --------------------------------------------------------------------------------------------


def test_what_a_process_said_is_forgotten_with_it() -> None:
    """It is kept while the model sleeps or answers nothing, and never told of another process or of none."""
    it = Table("a")
    said = Usage(0, 1.0, b"llamacpp:x 1")

    def hears(usage: Usage | None = said) -> bytes:
        it.table.used("a", usage, now=it.now)
        return it["a"].metrics

    it.loads("a")
    assert hears() == b""  # whose word this is nobody knows yet
    it.table.child_found("a", 77, 40000)
    assert hears() == b"llamacpp:x 1"
    assert hears(None) == b"llamacpp:x 1"
    it.says("a", S.SLEEPING)
    assert hears(Usage(0, 1.0, b"llamacpp:x 2")) == b"llamacpp:x 2"
    it.table.child_found("a", 78, 40001)
    assert it["a"].metrics == b""
    hears()
    it.table.child_ended("a", 78, now=it.now)
    assert it["a"].metrics == b""
    assert hears() == b""
    it.table.child_found("a", 79, 40002)
    hears()
    it.says("a", S.UNLOADED)
    assert it["a"].metrics == b""


def test_the_end_of_the_router(it: Table) -> None:
    """With the router every model leaves; one that was loading has failed; one that had failed keeps its reason."""
    it.lists(*(_listed(name) for name in "abcd"))
    it.loads("a")
    it.asks("b")
    it.asks("c")
    it.answers("c", "bad magic")
    assert it.dies() == [
        ModelUnloaded(router="main", model="a", reason=UnloadReason.ROUTER),
        ModelLoadFailed(router="main", model="b", reason="its router ended while it was loading", cause=Cause.UNSOUND),
    ]
    assert [it[name].state for name in "abcd"] == [S.UNLOADED, S.FAILED, S.FAILED, S.UNLOADED]
    assert it["c"].error == "bad magic"
    assert it.dies() == []


def test_a_call_that_dies_with_the_router(it: Table) -> None:
    """After the end of the router in the middle of a call, the next router's list is believed, and loads are news."""
    it.asks("a")
    it.dies()
    [loading] = it.lists(_listed("a", S.LOADING), _listed("b"))
    assert loading == ModelLoading(router="main", model="a", is_requested=False)


def test_the_order_of_residents(it: Table) -> None:
    """The most recently loaded model is the first, and one that is loaded again after a restart keeps its place."""
    it.lists(*(_listed(name) for name in "abcd"))
    for name in "abc":
        it.loads(name)
    it.asks("d")
    assert it.table.residents() == ["c", "b", "a"]
    it.dies()
    for name in "cba":
        it.loads(name, is_again=True)
    assert it.table.residents() == ["c", "b", "a"]
    it.unloads("a")
    it.says("a", S.UNLOADED)
    it.loads("a")
    assert it.table.residents() == ["a", "c", "b"]


# --- whatever comes ---------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b"])
STATES = st.sampled_from(list(ModelState))
WORDS = st.one_of(
    st.tuples(st.just("says"), NAMES, STATES, st.sampled_from([None, 0, 1])),
    st.tuples(st.just("lists"), STATES, st.booleans(), st.integers(0, 5)),
    st.tuples(st.sampled_from(["asks", "answers", "refuses", "unloads", "stays", "found", "ended"]), NAMES),
    st.tuples(st.just("dies")),
)


def _tell(it: Table, word: tuple[object, ...]) -> list[Event]:
    match word:
        case ("says", str(name), ModelState() as state, exit_code):
            return it.says(name, state, exit_code=exit_code, progress=0.5)
        case ("lists", ModelState() as state, bool(failed), int(age)):
            asked_at = max(0, it.table.revision - age)
            return it.lists(_listed("a", state, failed=failed), _listed("b", state), asked_at=asked_at)
        case ("asks", str(name)) if it.table.get(name) is not None:
            return it.asks(name)
        case ("answers", str(name)):
            return it.answers(name)
        case ("refuses", str(name)):
            return it.answers(name, "no")
        case ("unloads", str(name)):
            it.unloads(name)
        case ("stays", str(name)):
            it.table.still_there(name, now=it.now)
        case ("found", str(name)):
            it.table.child_found(name, 77, 40000)
        case ("ended", str(name)):
            return it.table.child_ended(name, 77, now=1.0)
        case ("dies",):
            return it.dies()
    return []


@settings(max_examples=300)
@given(st.lists(WORDS, max_size=30))
def test_whatever_comes_the_table_is_sound(words: list[tuple[object, ...]]) -> None:
    """After any words in any order, what is told agrees with the states, and nothing is told twice."""
    it = Table("a", "b")
    for word in words:
        revision, states = it.table.revision, {model.name: model.state for model in it.table}
        happened = _tell(it, word)
        for event in happened:
            match event:
                case ModelLoaded(model=name):
                    assert states.get(name) is not S.LOADED
                    assert it[name].state is S.LOADED
                case ModelLoading(model=name):
                    assert states[name] is not S.LOADING
                    assert it[name].state is S.LOADING
                case ModelUnloaded(model=name):
                    assert states[name] in HAS_CHILD
                    assert it[name].state not in HAS_CHILD
                case ModelLoadFailed(model=name, reason=reason):
                    assert states[name] is S.LOADING
                    assert (it[name].state, it[name].error) == (S.FAILED, reason)
        running = {model.name for model in it.table.running()}
        assert running == {model.name for model in it.table if model.state in HAS_CHILD}
        for model in it.table:
            assert model.state in HAS_CHILD or model.n_ctx is None
            assert model.progress is None or model.state is S.LOADING
            assert model.state in RESIDENT or model.name not in it.table.residents()
            changed = states.get(model.name) is not model.state
            assert not changed or (model.revision > revision and model.revision <= it.table.revision)
        if word[0] == "says":
            assert [event for event in _tell(it, word) if not isinstance(event, ModelProgress)] == []
