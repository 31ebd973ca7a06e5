"""The running daemon as its faces see it: the fleet, the configuration in force, and how to change it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread

from llamavisor.errors import LlamavisorError
from llamavisor.events import Bus, ConfigRejected, ConfigReloaded
from llamavisor.fleet import Fleet
from llamavisor.settings import base_url
from llamavisor.states import RouterState
from llamavisord import __version__
from llamavisord.config import Config
from llamavisord.problems import ConfigError, Problem


class Daemon:
    """What is supervised, and by which configuration.

    Args:
        config: the configuration that is in force.
        load_config: reads the configuration again; raises ConfigError.
        fleet: the routers.
        bus: where the events go.
    """

    def __init__(self, config: Config, *, load_config: Callable[[], Config], fleet: Fleet, bus: Bus) -> None:
        self.config = config
        self.config_error: str | None = None
        self.config_loaded_at = time.time()
        self.fleet = fleet
        self.bus = bus
        self.metrics_error: str | None = None
        self.loop_lag_s = 0.0
        self.started_at = time.time()
        self._started_mono = anyio.current_time()
        self._load_config = load_config
        self._reloading = anyio.Lock()  # two reloads at once would apply half of each

    def __repr__(self) -> str:
        return f"<Daemon {self.fleet!r}>"

    async def reload(self) -> tuple[str, ...]:
        """Read the configuration again and go over to it, all or nothing.

        Returns:
            The names of the routers that changed.

        Raises:
            ConfigError: it is not valid, or changes what a running daemon cannot change; the old one stays in force.
        """
        async with self._reloading:
            try:
                config = await anyio.to_thread.run_sync(self._load_config)
                self._refuse_fixed(config)
                if problems := await self.fleet.check(config.router_settings()):
                    raise ConfigError(problems)  # noqa: TRY301 (refused like any other)
            except ConfigError as error:
                self.config_error = str(error)
                self.bus.publish(ConfigRejected(error="; ".join(map(str, error.problems))))
                raise
            self.config, self.config_error, self.config_loaded_at = config, None, time.time()
            changed = await self.fleet.apply(config.router_settings())
            self.bus.publish(ConfigReloaded(changed=changed))
            return changed

    def _refuse_fixed(self, config: Config) -> None:
        """Sockets and folders are taken when the daemon starts; a new value needs a new daemon."""
        fixed = ("socket", "state_dir", "log_dir", "log_size_bytes", "log_level", "metrics")
        changed = [key for key in fixed if getattr(config, key) != getattr(self.config, key)]
        if changed:
            text = "cannot be changed by a reload: restart llamavisor"
            raise ConfigError([Problem(text, key=key) for key in changed])

    async def try_reload(self) -> None:
        """Reload for SIGHUP: the error is in the log, in `status` and in the metrics, and work goes on."""
        with suppress(LlamavisorError):
            await self.reload()

    def warnings(self) -> list[str]:
        """What a person should know although it works."""
        found = list(self.config.warnings)
        if self.metrics_error:
            found.append(self.metrics_error)
        for router in self.fleet:
            if router.state is RouterState.READY and not len(router.table):
                found.append(f"no models: put GGUF files into {router.settings.models_dir}, then `llamavisor reload`")
            if router.launch is not None:
                found += router.launch.warnings
        return list(dict.fromkeys(found))

    def view(self) -> dict[str, Any]:
        """The daemon itself as `status` shows it."""
        metrics = self.config.metrics
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime_s": anyio.current_time() - self._started_mono,
            "started_unix": self.started_at,
            "serve": self.config.serve,
            "config_path": str(self.config.path) if self.config.path else None,
            "config_error": self.config_error,
            "config_loaded_unix": self.config_loaded_at,
            "socket": str(self.config.socket),
            "metrics_url": f"{base_url(metrics.host, metrics.port)}/metrics" if metrics.enabled else None,
            "warnings": self.warnings(),
        }
