"""Where a model answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamavisor.demands import Lease


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers, for as long as its lease lasts.

    Attributes:
        lease: the promise that it stays there.
        host: the address of its process.
        port: likewise.
        api_key: what its process asks for, None for nothing.
        waited_s: how long it was waited for, in seconds.
        load_s: how long the load took that was waited for, 0 if it was loaded already.
    """

    lease: Lease
    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)
    waited_s: float = 0.0
    load_s: float = 0.0

    @property
    def router(self) -> str:
        """The router that has it."""
        return self.lease.router

    @property
    def model(self) -> str:
        """Its name."""
        return self.lease.model

    @property
    def url(self) -> str:
        """The base of its OpenAI endpoint's address, without `/v1`."""
        return f"http://{self.host}:{self.port}"
