"""Stand-ins for what a test cannot wait for or rely on."""

from fakes.builder import OLD_BUILD, FakeLlamaServer

__all__ = ["OLD_BUILD", "FakeLlamaServer"]
