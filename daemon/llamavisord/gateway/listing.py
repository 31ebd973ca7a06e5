"""The fleet's models as one llama-server router would list them: each once, whichever routers have it.

It is made from the fleet's own record, so there is a list while a router is down. `status.args` and `status.preset` are
there and empty: the true ones tell the paths of this machine, the ports of processes that ask nobody's leave, and every
secret among a model's options. A person finds them with `llamavisor show`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import anyio.lowlevel

from llamavisor.fleet import Fleet
from llamavisor.models import Model
from llamavisor.router import Router
from llamavisor.sections import ModelSpec
from llamavisor.states import HAS_CHILD, RESIDENT, ModelState
from llamavisord.gateway.capabilities import architecture_of, meta_of

STEP = 100
"""Models that are shown without giving others a turn: half a millisecond."""
FAILED_EXIT_CODE = 1
"""What llama-server says of almost every process that failed; of one that a signal ended, always."""

_WORDS = {
    ModelState.LOADING: "loading",
    ModelState.LOADED: "loaded",
    ModelState.SLEEPING: "sleeping",
    ModelState.DOWNLOADING: "downloading",
}
_RANKS = {ModelState.LOADED: 0, ModelState.SLEEPING: 1, ModelState.LOADING: 2, ModelState.UNLOADING: 3}
_FAILED, _UNLOADED, _NOT_SERVED = 4, 5, 6  # who waits for a load must see that it has failed somewhere


@dataclass(frozen=True, slots=True)
class Place:
    """One model where it is best to be had.

    Attributes:
        name: its name.
        router: whose word counts.
        model: what that router says of it, None while it has said nothing.
    """

    name: str
    router: Router
    model: Model | None

    @property
    def rank(self) -> int:
        """Whose word counts more if several routers have the model: the least goes first."""
        state = self.model.state if self.model is not None else ModelState.UNLOADED
        if not self.router.is_serving:
            return _NOT_SERVED
        return _RANKS.get(state, _FAILED if state is ModelState.FAILED else _UNLOADED)

    @property
    def is_running(self) -> bool:
        """Whether it has a process, as far as is known."""
        return self.model is not None and self.model.state in HAS_CHILD

    @property
    def spec(self) -> ModelSpec | None:
        """What it is: as its router was told if that serves, for it may run by that, else as it will be told."""
        shelf = self.router.shelf
        offered = shelf.offer.models.get(self.name)
        return offered.spec if offered is not None and self.router.is_serving else shelf.wanted.get(self.name)


@dataclass(frozen=True, slots=True)
class _Text:
    """The parts of an item that stay as long as the model is the same, as JSON.

    Attributes:
        spec: what it was made from.
        section: likewise.
        head: all before the time.
        tail: all behind the status of a model that does not run.
    """

    spec: ModelSpec | None
    section: Mapping[str, str] | None
    head: str
    tail: str


class Listing:
    """The models of a fleet as clients see them.

    Args:
        fleet: the routers.
        is_asked_for: whether a client has just had the model of that name loaded, and that has not begun yet.
        clock: Unix seconds.
    """

    def __init__(
        self, fleet: Fleet, *, is_asked_for: Callable[[str], bool], clock: Callable[[], float] = time.time
    ) -> None:
        self._fleet = fleet
        self._is_asked_for = is_asked_for
        self._clock = clock
        self._texts: dict[tuple[str, str], _Text] = {}  # by router and model

    def __repr__(self) -> str:
        return f"<Listing of {self._fleet!r}>"

    def find(self, word: str) -> Place | None:
        """The model that a client calls `word`, where it is best to be had; None if there is none."""
        name = self._fleet.memory.scheduler.where.name_of(word)
        places = [place for router in self._fleet if (place := _place(router, name)) is not None]
        return min(places, key=lambda place: place.rank, default=None)

    def place(self, router: str, name: str) -> Place | None:
        """What one router says of a model; None if there is no such router, or it does not know the model."""
        return next((_place(each, name) for each in self._fleet if each.name == router), None)

    def places(self) -> list[Place]:
        """Every model once, by name."""
        found: dict[str, Place] = {}
        for router in self._fleet:
            for place in _places(router):
                known = found.get(place.name)
                if known is None or place.rank < known.rank:
                    found[place.name] = place
        return [found[name] for name in sorted(found)]

    def status(self, place: Place) -> str:
        """Its state in llama-server's words, which has none for a model on its way out: it is still loaded."""
        model = place.model
        if model is None or not place.is_running:
            word = "unloaded" if model is None else _WORDS.get(model.state, "unloaded")
            return "loading" if self._is_asked_for(place.name) else word
        if model.state is ModelState.UNLOADING:
            return _WORDS.get(model.router_says, "loaded")
        return _WORDS[model.state]

    async def to_json(self, may_use: Callable[[str], bool], coming: Iterable[str] = ()) -> bytes:
        """The body of GET /models, made in steps between which others run.

        Args:
            may_use: which models are in it, by name.
            coming: what clients have had downloaded that is not there yet; likewise.
        """
        places = self.places()
        if len(self._texts) > 2 * len(places) + STEP:
            self._texts.clear()  # of models that have gone
        created, items = str(int(self._clock())), []
        for number, place in enumerate(places, 1):
            if may_use(place.name):
                items.append(self._item(place, created))
            if number % STEP == 0:
                await anyio.lowlevel.checkpoint()
        items += [_coming_item(word, created) for word in coming if may_use(word)]
        return f'{{"data":[{",".join(items)}],"object":"list"}}'.encode("utf-8", "replace")

    def info(self, place: Place) -> dict[str, object]:
        """What the process of a loaded model says of it when it is ready."""
        spec = place.spec
        model = {
            "id": place.name,
            "aliases": [place.name],
            "tags": _words(place, "tags", spec.tags if spec is not None else ()),
            "object": "model",
            "architecture": {},
            "created": int(self._clock()),
            "owned_by": "llamacpp",
            "meta": {},
        }
        return {**model, **_told(place)}

    def _item(self, place: Place, created: str) -> str:
        text = self._text(place)
        status = self.status(place)
        failed = ""
        if place.model is not None and place.model.state is ModelState.FAILED and status == "unloaded":
            failed = f',"exit_code":{FAILED_EXIT_CODE},"failed":true'
        tail = _tail(_told(place)) if place.is_running else text.tail
        return f'{text.head}{created},"status":{{"value":"{status}","args":[],"preset":""{failed}}},{tail}'

    def _text(self, place: Place) -> _Text:
        """What stays of an item; made anew when the model is another."""
        key, spec = (place.router.name, place.name), place.spec
        offered = place.router.shelf.offer.models.get(place.name)
        section = offered.section if offered is not None else None
        known = self._texts.get(key)
        if known is not None and known.spec is spec and known.section is section:
            return known
        aliases = _words(place, "alias", spec.aliases if spec is not None else ())
        tags = _words(place, "tags", spec.tags if spec is not None else ())
        tail = _tail({"architecture": architecture_of(spec), "meta": meta_of(spec)} if spec is not None else {})
        text = _Text(spec, section, _head(place.name, aliases, tags), tail)
        self._texts[key] = text
        return text


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _head(name: str, aliases: Sequence[str] = (), tags: Sequence[str] = ()) -> str:
    """The beginning of an item, up to the time."""
    identity = {"id": name, "aliases": aliases, "tags": tags, "object": "model", "owned_by": "llamacpp"}
    return f'{_dump(identity)[:-1]},"created":'


def _coming_item(word: str, created: str) -> str:
    return f'{_head(word)}{created},"status":{{"value":"downloading","args":[],"preset":""}},{_tail({})}'


def _places(router: Router) -> Iterator[Place]:
    """The models of one router: what it lists, else what it will once it is up."""
    if router.is_serving:
        yield from (Place(model.name, router, model) for model in router.table)
        return
    yield from (Place(name, router, router.table.get(name)) for name in router.shelf.wanted if _is_fit(router, name))


def _place(router: Router, name: str) -> Place | None:
    model = router.table.get(name)
    is_there = model is not None if router.is_serving else name in router.shelf.wanted and _is_fit(router, name)
    return Place(name, router, model) if is_there else None


def _is_fit(router: Router, name: str) -> bool:
    """Whether a router that does not serve would take the model, as far as is known."""
    withheld = router.shelf.offer.withheld.get(name)
    return withheld is None or withheld.spec is not router.shelf.wanted[name]


def _told(place: Place) -> dict[str, object]:
    """`architecture` and `meta` of a model with a process: what that said if it has spoken, else what its file says."""
    spec, model = place.spec, place.model
    known: dict[str, object] = {}
    if spec is not None:
        known = {"architecture": architecture_of(spec), "meta": meta_of(spec)}
    if model is None:
        return known
    if model.info is not None:
        return {**known, **model.info}
    if model.state in RESIDENT and model.n_ctx is not None:
        known["meta"] = {**(meta_of(spec) if spec is not None else {}), "n_ctx": model.n_ctx}
    return known


def _tail(told: Mapping[str, object]) -> str:
    """The end of an item, from `architecture` on."""
    unknown = {"input_modalities": ["text"], "output_modalities": ["text"]}
    known = {"architecture": told.get("architecture", unknown), "source": "preset", "can_remove": False}
    if told.get("meta"):
        known["meta"] = told["meta"]
    return _dump(known)[1:]


def _words(place: Place, key: str, wanted: Iterable[str]) -> list[str]:
    """Its aliases or tags, as its router was told of them or will be."""
    offered = place.router.shelf.offer.models.get(place.name)
    if offered is None:
        return sorted(set(wanted))
    return sorted(set(offered.section[key].split(","))) if key in offered.section else []
