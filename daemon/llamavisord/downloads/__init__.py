"""Where `llamavisor.downloads` was, for who still looks here."""

from __future__ import annotations

from llamavisor.downloads import Downloads

__all__ = ["Downloads"]
