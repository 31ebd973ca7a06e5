"""What one router is told to be: the library's side of a configuration file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llamavisor import flags
from llamavisor.demands import MAX_WAITING, MAX_WAITING_PER_MODEL
from llamavisor.eviction import MIN_RESIDENCY_S
from llamavisor.flags import OptionLayer
from llamavisor.rules import ModelRule

LOOPBACK = "127.0.0.1"
"""Where routers listen that nobody but us talks to."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """How much memory the models of one router may take; what is not said is "auto", what there is less a reserve.

    Attributes:
        size: bytes of every GPU that the router sees, each, or of RAM when it sees none; None = auto.
        devices: bytes of single devices, which `size` is not about, as (name, bytes) pairs. A name is the router's own
            name of a GPU, such as "CUDA0", or "RAM".
    """

    size: int | None = None
    devices: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """The whole configuration of one router; two equal settings mean that nothing has to be restarted.

    Attributes:
        name: unique among the routers of a fleet; used in file names, so `[A-Za-z0-9_-]+`.
        host: address that the router listens on.
        port: TCP port, 1 to 65535; 0 for any that is free when it is started.
        models_dir: absolute path of the folder with the GGUF files.
        models_max: how many models may be loaded at once, 0 = no cap.
        llama_server: path or command name as configured, None = search for one.
        layers: option tables, lowest precedence first.
        env: extra environment of this router and its models, as (name, value) pairs.
        api_key: the key that clients must send, None = no key. Never shown.
        memory: what its models may take.
        autoload: whether the router itself loads what clients ask for; if not, it loads only what it is told to, as
            with `serve = "gateway"`.
    """

    name: str = "main"
    host: str = "127.0.0.1"
    port: int = 8080
    models_dir: Path
    models_max: int = 4
    llama_server: str | None = None
    layers: tuple[OptionLayer, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    api_key: str | None = field(default=None, repr=False)
    memory: MemoryBudget = MemoryBudget()
    autoload: bool = True

    def without_models(self) -> RouterSettings:
        """The same, without what is only about its models: a router need not be restarted for that."""
        # One that does not load by itself is told of no cap either: who decides about loads counts.
        models_max = self.models_max if self.autoload else 0
        return replace(self, layers=flags.only_for_routers(self.layers), memory=MemoryBudget(), models_max=models_max)


OnOverwrite = Literal["reload", "unload", "keep"]
"""What happens to a loaded model whose file was overwritten in place, once it is idle."""
Serve = Literal["router", "gateway"]
"""Who listens on the public address, and so who decides what is loaded: each router itself, or one gateway for all."""
Oversize = Literal["fit", "refuse"]
"""What happens to a demand for a model that is larger than its budget: llama.cpp fits it in, or it is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """All that a fleet is told to be.

    Attributes:
        routers: each with a name of its own.
        rules: option tables of single models, in the order of the configuration.
        link_dirs: folders outside of models_dir to which symlinks in it may lead.
        on_overwrite: what happens to a loaded model whose file was overwritten in place.
        serve: who listens on the public address.
        min_residency_s: seconds after its load during which a model is the last to be unloaded to make room. It puts
            victims into an order, and never delays a demand.
        oversize: what happens to a demand for a model that is larger than its budget; "fit" unloads all else before it.
        max_waiting: how many demands may wait at once; the next is refused.
        max_waiting_per_model: how many of them for one model.
    """

    routers: tuple[RouterSettings, ...]
    rules: tuple[ModelRule, ...] = ()
    link_dirs: tuple[Path, ...] = ()
    on_overwrite: OnOverwrite = "reload"
    serve: Serve = "router"
    min_residency_s: float = MIN_RESIDENCY_S
    oversize: Oversize = "fit"
    max_waiting: int = MAX_WAITING
    max_waiting_per_model: int = MAX_WAITING_PER_MODEL

    def for_leases(self, api_key: str) -> FleetSettings:
        """The same where leases say what is loaded: only who holds the key talks to routers, which load nothing.

        Args:
            api_key: what routers and their models ask for.
        """
        routers = (replace(each, host=LOOPBACK, port=0, api_key=api_key, autoload=False) for each in self.routers)
        return replace(self, routers=tuple(routers), serve="gateway")


def base_url(host: str, port: int) -> str:
    """The address of a server for clients on this machine: a wildcard address becomes the loopback one."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
