"""What is in the models folder: which files make which model, what it is called, and whether it can be used."""

from __future__ import annotations

from llamavisor.catalog.entry import Entry, EntryState, FileId, ModelFile, Scan
from llamavisor.catalog.scanner import Scanner

__all__ = ["Entry", "EntryState", "FileId", "ModelFile", "Scan", "Scanner"]
