"""Headers of GGUF files: what a model is, without loading it, and whether its file is whole."""

from __future__ import annotations

from llamavisor.gguf.beginning import ShortError, parse_beginning
from llamavisor.gguf.container import Places, TypeShare
from llamavisor.gguf.cursor import GgufError, ReadAt
from llamavisor.gguf.file import parse, read, read_fd
from llamavisor.gguf.header import Header, Projector, Split
from llamavisor.gguf.kind import Kind
from llamavisor.gguf.layout import Layout, Recurrence
from llamavisor.gguf.values import PerLayer

__all__ = [
    "GgufError",
    "Header",
    "Kind",
    "Layout",
    "PerLayer",
    "Places",
    "Projector",
    "ReadAt",
    "Recurrence",
    "ShortError",
    "Split",
    "TypeShare",
    "parse",
    "parse_beginning",
    "read",
    "read_fd",
]
