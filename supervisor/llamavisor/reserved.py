"""What belongs to the supervisor: options and variables that no configuration may set, each with its reason.

Options are known here by all their spellings up to build 11434, so that a configuration can be checked
without a binary; with one, an option counts as reserved as soon as any of its spellings stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llamavisor.errors import OptionError
from llamavisor.helptext import normal


@dataclass(frozen=True, slots=True)
class Reserved:
    """Options that are refused for one reason.

    Attributes:
        spellings: all of them, dashes included.
        reason: completes "--port is refused: …".
        instead: what to do, a whole sentence; empty where there is nothing to do.
    """

    spellings: tuple[str, ...]
    reason: str
    instead: str = ""

    @classmethod
    def of(cls, spellings: str, reason: str, instead: str = "") -> Reserved:
        """The same from spellings in one string, blanks between them."""
        return cls(tuple(spellings.split()), reason, instead)


_ONE_MODEL = "it turns the router into a server of that single model"
_USE_FOLDER = "Put the GGUF file into models_dir; every file there is served under its own name."

_OPTIONS = (
    Reserved.of("-m --model -mu --model-url -dr --docker-repo", _ONE_MODEL, _USE_FOLDER),
    Reserved.of("-hf -hfr --hf-repo -hff --hf-file", _ONE_MODEL, _USE_FOLDER),
    Reserved.of(
        "-hft --hf-token",
        "a router shows its models' command lines, and the token with them, to every client",
        'Set it in the environment: env = { HF_TOKEN = "…" }.',
    ),
    Reserved.of("--host", "the address stands in the configuration", "Set host = … at the top."),
    Reserved.of("--port", "the port stands in the configuration", "Set port = … at the top."),
    Reserved.of(
        "--reuse-port",
        "two processes could then answer on one port, and nobody would notice",
        "Give each [[router]] a port of its own.",
    ),
    Reserved.of("--models-dir", "the supervisor reads the folder too", "Set models_dir = … at the top."),
    Reserved.of(
        "--models-preset",
        "the preset is generated from this configuration",
        "Write its options as options of [defaults] or of a [[router]].",
    ),
    Reserved.of("--models-max", "the supervisor counts too", "Set models_max = … at the top or in a [[router]]."),
    Reserved.of(
        "--models-autoload --no-models-autoload",
        "who loads models follows from how they are served",
        'Set serve = … at the top: with "router" it is on.',
    ),
    Reserved.of(
        "--api-key --api-key-file",
        "a key on a command line is seen by every user of the machine, and models would not ask for it",
        'Set api_key_file = "…" to a file that holds the key.',
    ),
    Reserved.of(
        "--ssl-key-file --ssl-cert-file",
        "the supervisor talks to the router over plain HTTP",
        "Let a reverse proxy speak TLS.",
    ),
    Reserved.of(
        "--api-prefix",
        "the supervisor expects the API at the root",
        "Let a reverse proxy add the prefix.",
    ),
    Reserved.of(
        "-a --alias --tags",
        "every model would get the same, and the router refuses to start with two models of one name",
        "Name the file, or its folder, as the model is to be called.",
    ),
    Reserved.of(
        "--log-file --log-disable --log-jsonl --no-log-jsonl --log-colors",
        "the supervisor keeps the log, rotates it, and explains failures from it",
        "Read it with: llamavisor logs.",
    ),
    Reserved.of(
        "-to --timeout",
        "the supervisor sets it, so that it never depends on a build's default",
        "Leave it out.",
    ),
    Reserved.of(
        "--threads-http",
        "the supervisor sets it high: a router with few threads stops answering under load",
        "Leave it out.",
    ),
    Reserved.of("--metrics", "it is always on: the supervisor reads it", "Leave it out."),
    Reserved.of(
        "--tools --tools-runtime --mcp-servers-config --mcp-servers-json -ag --agent -no-ag --no-agent",
        "every model's process would start the tools once more",
        "Run tools in a process of their own beside the router.",
    ),
    Reserved.of(
        "-h --help --usage --version --license -cl --cache-list --completion-bash --list-devices",
        "llama-server prints something and ends at once",
        "Run llama-server by hand to see it.",
    ),
    Reserved.of(
        "--control-vector-layer-range --spec-replace",
        "it takes two values, which a router cannot hand on to its models",
    ),
    Reserved.of(
        "--load-on-startup",
        "the router would load in no order, and refuse to start when there are more than models_max",
        "Load models with: llamavisor load NAME.",
    ),
    Reserved.of(
        "--stop-timeout",
        "the supervisor sets it below its own patience, so that models are not killed with their router",
    ),
    Reserved.of("--dedup-cache-models", "it is about cached models, which are not served"),
)
_BY_SPELLING = {spelling: reserved for reserved in _OPTIONS for spelling in reserved.spellings}

VARIABLES = {
    "LLAMA_API_KEY": 'Set api_key_file = "…" instead.',
    "LLAMA_CACHE": "Models come from models_dir.",
    "LLAMA_APP_CMD": "",
    "XDG_CONFIG_HOME": "A stray llama.cpp/config.ini there could turn the router into something else.",
    "NOTIFY_SOCKET": "It belongs to the service manager.",
}
VARIABLE_PREFIXES = {
    "LLAMA_ARG_": "Write it as an option instead.",
    "LLAMA_SERVER_": "",
    "LLAMAVISOR_": "It would be taken for the supervisor's own.",
    "AIP_": "It makes llama-server ignore its port.",
    "LISTEN_": "It belongs to the service manager.",
    "WATCHDOG_": "It belongs to the service manager.",
}


def find_reserved(spellings: Iterable[str]) -> Reserved | None:
    """Why an option that is known by `spellings` (dashes included) may not be set, None if it may."""
    return next((found for spelling in spellings if (found := _BY_SPELLING.get(normal(spelling)))), None)


def find_reserved_key(key: str) -> Reserved | None:
    """The same for a preset's key, that is a spelling without its dashes."""
    return find_reserved((f"--{key}", f"-{key}"))


def check_env(env: Mapping[str, str], *, source: str = "env") -> None:
    """Refuses environment variables of a router that would fight the supervisor.

    Args:
        env: what a `[[router]]` table sets for its router and its models.
        source: where it was written, for the message: `[[router]] gpu0`.

    Raises:
        OptionError: a name is reserved, or a name or value cannot stand in an environment.
    """
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise OptionError(f"{source}: {name!r} cannot be the name of an environment variable")
        if "\0" in value:
            raise OptionError(f"{source}: the value of {name} holds a NUL, which an environment cannot carry")
        prefix = next((prefix for prefix in VARIABLE_PREFIXES if name.startswith(prefix)), None)
        if name in VARIABLES or prefix is not None:
            hint = VARIABLES[name] if name in VARIABLES else VARIABLE_PREFIXES[prefix or ""]
            raise OptionError(f"{source}: {name} is the supervisor's to set", hint=hint)
