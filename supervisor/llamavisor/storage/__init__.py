"""What models folders hold on the disk: who takes it, and how a model, or what is left over, leaves it."""

from __future__ import annotations

from llamavisor.storage.account import Account, Item, Kind, Leftover, Share
from llamavisor.storage.cleaning import Cleaned
from llamavisor.storage.removal import Doomed, Removal
from llamavisor.storage.storage import Storage

__all__ = ["Account", "Cleaned", "Doomed", "Item", "Kind", "Leftover", "Removal", "Share", "Storage"]
