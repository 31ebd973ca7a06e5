"""When the models folder changes: a worker process looks again and again, at once when the kernel hints at it."""

from __future__ import annotations

from llamavisor.watch.news import Afresh, Found, Looked, ModeChanged, News, Silent, WorkerDied
from llamavisor.watch.watcher import FolderWatch

__all__ = ["Afresh", "FolderWatch", "Found", "Looked", "ModeChanged", "News", "Silent", "WorkerDied"]
