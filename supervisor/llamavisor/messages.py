"""What the owner of a router finds in its inbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamavisor import generation as gen
from llamavisor.errors import ApiError
from llamavisor.host import Host
from llamavisor.news import News
from llamavisor.operations import Operation, Ticket
from llamavisor.sections import ModelSpec
from llamavisor.settings import OnOverwrite
from llamavisor.states import Change, RouterInput


@dataclass(frozen=True, slots=True)
class Heard:
    """News of a generation; that of an earlier one is old by now."""

    generation: gen.Generation
    news: News


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call to the router has returned; `error` says why it did not do what it was asked."""

    generation: gen.Generation
    operation: Operation
    error: ApiError | None


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The backoff of the generation that ended is over, or what stood in its way has changed."""

    ended: gen.Generation | None


@dataclass(frozen=True, slots=True)
class Wish:
    """Somebody wants the router up, down, or fresh."""

    wish: RouterInput


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """The router has other settings from now on; `restart` tells whether its process must be another for that."""

    host: Host
    restart: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the router is to serve from now on.

    Attributes:
        specs: the models, by name.
        leaving: why models that it served are not among them, where they have not simply gone.
        on_overwrite: what happens to one whose file is overwritten.
    """

    specs: Mapping[str, ModelSpec]
    leaving: Mapping[str, Change]
    on_overwrite: OnOverwrite


@dataclass(frozen=True, slots=True)
class Recalled:
    """An earlier daemon had these models in memory."""

    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DevicesLost:
    """These devices have vanished; none when all are there again. `is_news`: the process that runs had one of them."""

    devices: tuple[str, ...]
    is_news: bool


@dataclass(frozen=True, slots=True)
class Suspected:
    """Somebody who uses a model has something against it.

    Attributes:
        model: its name.
        deaf_port: where its process takes no connections; None if it answers, but nothing but errors.
    """

    model: str
    deaf_port: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """A second has passed."""


Message = (
    Heard | CallEnded | RetryDue | Wish | Reconfigured | Wanted | Recalled | DevicesLost | Suspected | Tick | Ticket
)
