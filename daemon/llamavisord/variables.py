"""The variables of the environment that the program knows: what stands for a key, and everything else that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

KEYS: Mapping[str, tuple[str, ...]] = {
    "LLAMAVISOR_SERVE": ("serve",),
    "LLAMAVISOR_SOCKET": ("socket",),
    "LLAMAVISOR_STATE_DIR": ("state_dir",),
    "LLAMAVISOR_LOG_LEVEL": ("log_level",),
    "LLAMAVISOR_HOST": ("host",),
    "LLAMAVISOR_PORT": ("port",),
    "LLAMAVISOR_MODELS_DIR": ("models_dir",),
    "LLAMAVISOR_MODELS_MAX": ("models_max",),
    "LLAMAVISOR_MEMORY": ("memory",),
    "LLAMAVISOR_METRICS_HOST": ("metrics", "host"),
    "LLAMAVISOR_METRICS_PORT": ("metrics", "port"),
}
"""Variables that win over the same key in the file."""
FALLBACKS: Mapping[str, tuple[str, ...]] = {"LLAMAVISOR_LLAMA_SERVER": ("llama_server",)}
"""Variables that count only where nothing else is written: they describe the machine, not the wish."""


class Variable(StrEnum):
    """What else is read. An empty variable is not set, and a folder that is no absolute path is not heeded."""

    LLAMAVISOR_CONFIG = "LLAMAVISOR_CONFIG"
    """The configuration file, if `--config` names none."""
    LLAMAVISOR_API_KEY = "LLAMAVISOR_API_KEY"
    """Of `run`: the key that it sends to the gateway, if `--api-key-file` names none."""
    LLAMAVISOR_INSTANCE = "LLAMAVISOR_INSTANCE"
    """Set by the daemon in all that it starts: by that it knows its own left-overs."""
    LLAMAVISOR_SPAWN = "LLAMAVISOR_SPAWN"
    """Likewise: tells one process and its children from another."""
    LLAMAVISOR_CI = "LLAMAVISOR_CI"
    """Of the tests alone: with `1` a test that would be skipped fails."""
    RUNTIME_DIRECTORY = "RUNTIME_DIRECTORY"
    """Of systemd: the folder of the control socket; the first, if there are several with colons between them."""
    STATE_DIRECTORY = "STATE_DIRECTORY"
    """Of systemd: the folder for what survives a restart of the daemon, likewise."""
    LOGS_DIRECTORY = "LOGS_DIRECTORY"
    """Of systemd: the folder for the routers' output, likewise; else `logs` in the state folder."""
    CREDENTIALS_DIRECTORY = "CREDENTIALS_DIRECTORY"
    """Of systemd: the folder of `llamavisor.keys`, if there is no `api_key_file`, and of `huggingface.token`."""
    HF_TOKEN = "HF_TOKEN"  # noqa: S105 (the name of the variable)
    """Opens private and gated repositories of the Hub; else `huggingface.token`, or what `hf auth login` has left."""
    HF_ENDPOINT = "HF_ENDPOINT"
    """The address of the Hub, if it is not `https://huggingface.co`."""
    HF_HUB_OFFLINE = "HF_HUB_OFFLINE"
    """With `1`: the Hub is not asked."""
    NOTIFY_SOCKET = "NOTIFY_SOCKET"
    """Of systemd: the socket that hears how the daemon is (`Type=notify`)."""
    WATCHDOG_USEC = "WATCHDOG_USEC"
    """Of systemd: how often it wants to hear from the daemon, in microseconds (`WatchdogSec=`)."""
    WATCHDOG_PID = "WATCHDOG_PID"
    """Of systemd: the process that this is about; the daemon heeds it only if it is meant."""
    LISTEN_FDS = "LISTEN_FDS"
    """Of systemd: how many sockets it has handed over (`llamavisor.socket`)."""
    LISTEN_PID = "LISTEN_PID"
    """Of systemd: the process that they are for; others leave them alone."""
    LISTEN_FDNAMES = "LISTEN_FDNAMES"
    """Of systemd: names of these sockets, which are told apart by their kind; it is taken out and not read."""
    JOURNAL_STREAM = "JOURNAL_STREAM"
    """Of systemd: the output that goes to its journal, which then gets entries with fields instead of lines."""
    HOME = "HOME"
    """The user's home, where the folders of XDG are if their own variables do not say; else the user database."""
    XDG_CONFIG_HOME = "XDG_CONFIG_HOME"
    """The folder that holds `llamavisor/llamavisor.toml`; else `~/.config`. Not for root."""
    XDG_STATE_HOME = "XDG_STATE_HOME"
    """The folder that holds the state folder `llamavisor`; else `~/.local/state`. Not for root."""
    XDG_RUNTIME_DIR = "XDG_RUNTIME_DIR"
    """The folder that holds `llamavisor/control.sock`; else that is in the state folder. Not for root."""
    XDG_CACHE_HOME = "XDG_CACHE_HOME"
    """The folder that holds `huggingface/token`; else `~/.cache`."""
    HF_HOME = "HF_HOME"
    """Of the Hub: the folder that holds `token`, the token of whoever has logged in; else `huggingface` in that one."""
    HF_TOKEN_PATH = "HF_TOKEN_PATH"  # noqa: S105 (the name of a variable)
    """Of the Hub: the file with the token, wherever else it is."""
    COLUMNS = "COLUMNS"
    """Columns of the terminal, if it is not to be asked itself."""
    NO_COLOR = "NO_COLOR"
    """Anything in it: no colours."""
    TERM = "TERM"
    """With `dumb`: no colours."""
