"""A daemon of which nothing runs, for what only a daemon can be asked: its metrics and its addresses."""

from __future__ import annotations

import os
from pathlib import Path

from llamavisor.events import Bus
from llamavisor.opening import open_fleet
from llamavisor.process import Spawner
from llamavisord.config import Config
from llamavisord.daemon import Daemon
from llamavisord.exposition import Exposition
from llamavisord.gateway.service import Service
from llamavisord.loading import load
from llamavisord.places import Places
from llamavisord.sources import Overrides

USER = Places({"HOME": "/~", "XDG_RUNTIME_DIR": "/$XDG_RUNTIME_DIR"}, is_root=False)
"""The places of a user as people write them; they have to be absolute, hence the slash."""
ROOT = Places({}, is_root=True)
_NOWHERE = Path(os.devnull)


def defaults(places: Places) -> Config:
    """The configuration of somebody who has said nothing but where the models are."""
    return load(_NOWHERE, {}, Overrides(models_dir="/"), places=places)


def exposition() -> tuple[Exposition, Daemon]:
    """A daemon with a gateway, and its metrics. To be called in an event loop; nothing is started, read or written."""
    config, bus = defaults(USER), Bus()
    spawner = Spawner("reference")
    fleet = open_fleet(spawner=spawner, state_dir=_NOWHERE, log_dir=_NOWHERE, environ={}, bus=bus)
    daemon = Daemon(config, load_config=lambda: config, fleet=fleet, bus=bus)
    shown = Exposition(daemon)
    if config.gateway is not None:
        Service(daemon, config.gateway)  # the daemon knows its traffic from then on
    return shown, daemon
