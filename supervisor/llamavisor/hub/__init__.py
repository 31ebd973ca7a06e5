"""Models from the Hugging Face Hub: what there is, and how it comes into the models folder, whole and once."""

from __future__ import annotations

from llamavisor.hub.failure import HubError, Why
from llamavisor.hub.listing import Choice, Listing, RemoteFile
from llamavisor.hub.patience import Patience
from llamavisor.hub.progress import Progress, Stage
from llamavisor.hub.remote import Hub
from llamavisor.hub.spec import Spec, parse

__all__ = [
    "Choice",
    "Hub",
    "HubError",
    "Listing",
    "Patience",
    "Progress",
    "RemoteFile",
    "Spec",
    "Stage",
    "Why",
    "parse",
]
