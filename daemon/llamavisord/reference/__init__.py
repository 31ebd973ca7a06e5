"""The reference page: everything that people can write, call, read or match on, from the code that it is true of."""

from llamavisord.reference.manual import manual
from llamavisord.reference.page import page

__all__ = ["manual", "page"]
