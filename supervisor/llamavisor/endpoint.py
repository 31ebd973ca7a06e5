"""Where a model answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers, for as long as its lease lasts.

    Attributes:
        router: the router that has it.
        model: its name.
        host: the address of its process.
        port: likewise.
        api_key: what its process asks for, None for nothing.
    """

    router: str
    model: str
    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The base of its OpenAI endpoint's address, without `/v1`."""
        return f"http://{self.host}:{self.port}"
