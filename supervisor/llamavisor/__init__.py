"""Supervision of llama.cpp's llama-server routers: their processes, their models, and what happens to them."""

from llamavisor.cause import Cause
from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, Event
from llamavisor.fleet import Fleet, open_fleet
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.router import Router
from llamavisor.settings import RouterSettings
from llamavisor.states import ModelState, RouterState

__all__ = [
    "Bus",
    "Cause",
    "Event",
    "Fleet",
    "LlamavisorError",
    "ModelOptions",
    "ModelState",
    "OptionLayer",
    "Router",
    "RouterSettings",
    "RouterState",
    "open_fleet",
]
