"""Models from the Hugging Face Hub: what there is, and how it comes into the models folder, whole and once."""

from __future__ import annotations

from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.listing import Choice, Listing, RemoteFile
from llamavisor.hub.patience import Patience
from llamavisor.hub.progress import Progress, Stage
from llamavisor.hub.pull import Pull, PullState
from llamavisor.hub.pulls import Pulls
from llamavisor.hub.record import Record
from llamavisor.hub.remote import Hub
from llamavisor.hub.spec import Spec, parse

__all__ = [
    "Choice",
    "Hub",
    "HubError",
    "Listing",
    "Patience",
    "Progress",
    "Pull",
    "PullState",
    "Pulls",
    "Record",
    "RemoteFile",
    "Spec",
    "Stage",
    "Why",
    "parse",
]
