"""What happened: frozen, typed events, and the bus that keeps the last of them and tells whoever listens.

An event is the truth; the log line, the metric and the `events` stream are three renderings of it.
"""

from __future__ import annotations

from llamavisor.events.base import (
    Event,
)
from llamavisor.events.bus import (
    KEPT,
    Bus,
    Published,
)
from llamavisor.events.daemon import (
    ConfigRejected,
    ConfigReloaded,
    DaemonStarted,
    DaemonStopping,
    PeerRefused,
    Warned,
)
from llamavisor.events.folder import (
    EntryChanged,
    EntryNoted,
    FolderBack,
    FolderLooked,
    FolderStale,
    WatcherChanged,
    WatcherFailed,
)
from llamavisor.events.model import (
    ModelAdded,
    ModelChildExited,
    ModelLoaded,
    ModelLoadFailed,
    ModelLoading,
    ModelProgress,
    ModelRemoved,
    ModelsChanged,
    ModelSleeping,
    ModelStale,
    ModelUnloaded,
    ModelWithheld,
    UnloadReason,
)
from llamavisor.events.router import (
    LogRotated,
    RouterCrashLoop,
    RouterDegraded,
    RouterExited,
    RouterFailed,
    RouterProbed,
    RouterReady,
    RouterRecovered,
    RouterRestartScheduled,
    RouterSpawned,
    RouterStateChanged,
    StraysKilled,
)

__all__ = [
    "KEPT",
    "Bus",
    "ConfigRejected",
    "ConfigReloaded",
    "DaemonStarted",
    "DaemonStopping",
    "EntryChanged",
    "EntryNoted",
    "Event",
    "FolderBack",
    "FolderLooked",
    "FolderStale",
    "LogRotated",
    "ModelAdded",
    "ModelChildExited",
    "ModelLoadFailed",
    "ModelLoaded",
    "ModelLoading",
    "ModelProgress",
    "ModelRemoved",
    "ModelSleeping",
    "ModelStale",
    "ModelUnloaded",
    "ModelWithheld",
    "ModelsChanged",
    "PeerRefused",
    "Published",
    "RouterCrashLoop",
    "RouterDegraded",
    "RouterExited",
    "RouterFailed",
    "RouterProbed",
    "RouterReady",
    "RouterRecovered",
    "RouterRestartScheduled",
    "RouterSpawned",
    "RouterStateChanged",
    "StraysKilled",
    "UnloadReason",
    "Warned",
    "WatcherChanged",
    "WatcherFailed",
]
