"""What one run of a router's process tells the router's owner."""

from __future__ import annotations

from dataclasses import dataclass

from llamavisor.api import ListedModel, Props, StatusEvent
from llamavisor.cause import Verdict
from llamavisor.host import Api, ModelProcess, RouterProcess
from llamavisor.launch import Launch
from llamavisor.process import ExitStatus, Leftovers
from llamavisor.shelf import Offer
from llamavisor.usage import Usage
from llamavisor.vitals import Vitals


@dataclass(frozen=True, slots=True)
class Waiting:
    """The start waits for something, or no longer (None); `is_news` when a person should hear of it at once."""

    reason: str | None
    is_news: bool = False


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process runs."""

    process: RouterProcess
    launch: Launch
    offer: Offer


@dataclass(frozen=True, slots=True)
class CameUp:
    """The router answers, is a router, and has these models; devices that it should have may still be missing."""

    api: Api
    models: list[ListedModel]
    start_s: float
    missing_devices: tuple[str, ...]
    props: Props


@dataclass(frozen=True, slots=True)
class Overdue:
    """The router did not come up within its deadline."""

    reason: str


@dataclass(frozen=True, slots=True)
class Listed:
    """The router's whole list, as it was when the table had the revision `asked_at`.

    `is_first` tells that it is the first after the event stream was opened: no event of before is on its way any more.
    """

    models: list[ListedModel]
    asked_at: int
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """The router has read another offer; what it lists now is told besides."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Unsound:
    """The router cannot be brought up to date while it runs: a fresh process is wanted once nobody is answered."""

    reason: str


@dataclass(frozen=True, slots=True)
class AllIdle:
    """A moment ago no model was answering anybody."""


@dataclass(frozen=True, slots=True)
class Used:
    """How busy a model is; None when it did not say.

    `vitals` are what its process has done so far, None if that was not looked at or cannot be told; `has_refused` tells
    that it has answered, and not what it was asked.
    """

    model: str
    usage: Usage | None
    vitals: Vitals | None = None
    has_refused: bool = False


@dataclass(frozen=True, slots=True)
class Tried:
    """A model that is under suspicion was asked to do something; `error` is what went wrong, None if it works."""

    model: str
    pid: int
    error: str | None


@dataclass(frozen=True, slots=True)
class ChildFound:
    """The process that serves a model is known."""

    model: str
    child: ModelProcess


@dataclass(frozen=True, slots=True)
class ChildEnded:
    """The process that served a model has ended; how, None if nobody can say."""

    model: str
    pid: int
    status: ExitStatus | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """The router was asked whether it answers; None means that it did.

    If it did not, `vitals` are what its process has done so far, as far as that can be told.
    """

    duration_s: float
    error: str | None
    vitals: Vitals | None = None


@dataclass(frozen=True, slots=True)
class DevicesMissing:
    """Devices that the options name and that llama-server does not see; empty once they are there."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Polling:
    """The router has no event stream for us: its list is read again and again instead."""

    reason: str


@dataclass(frozen=True, slots=True)
class Replaced:
    """The llama-server that runs is no longer the one on disk."""


@dataclass(frozen=True, slots=True)
class Ended:
    """There will be no (more) process in this generation; `pid` is None when there never was one."""

    verdict: Verdict
    status: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing of this generation is left."""

    leftovers: Leftovers


ModelNews = StatusEvent | Listed | Told | Used | Tried | ChildFound | ChildEnded
"""What is told of models."""

News = (
    ModelNews
    | Waiting
    | Spawned
    | CameUp
    | Overdue
    | Unsound
    | AllIdle
    | Probed
    | DevicesMissing
    | Polling
    | Replaced
    | Ended
    | Gone
)
