"""The command line as people write it: every command, its flags, and what `--help` says of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llamavisor.quantities import parse_duration
from llamavisord import __version__
from llamavisord.exit_codes import ExitCode

LOAD_TIMEOUT_S = 600.0
ROUTER_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 600.0
WAIT_MAX_S = 3600.0
"""The daemon lets nobody wait longer; whoever wants to asks again."""
LOG_LINES = 100
_SOCKET_HELP = "the daemon's control socket (else LLAMAVISOR_SOCKET)"
_WITHOUT_SOCKET = frozenset({"config", "demo", "install-service", "version"})


class _Commands:
    """Adds commands to a parser, each with what all commands have."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, dest: str) -> None:
        self._actions = parser.add_subparsers(title=title, metavar="COMMAND", dest=dest, required=True)

    def add(
        self, name: str, does: str, *, details: str = "", talks: bool = False, json: bool = False
    ) -> argparse.ArgumentParser:
        """A command that does what `does` says.

        Args:
            name: the command.
            does: one line for the list of commands.
            details: what its own help adds.
            talks: whether it talks to the daemon.
            json: whether it can answer in JSON.
        """
        description = f"{does[0].upper()}{does[1:]}.{details and ' '}{details}"
        parser = self._actions.add_parser(name, help=does, description=description, allow_abbrev=False)
        add_debug(parser)
        if talks:
            add_socket(parser, _SOCKET_HELP, default=argparse.SUPPRESS)
        if json:
            parser.add_argument("--json", action="store_true", help="answer in JSON")
        return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What is asked for: `command` names it, `server_args` are the words after the `--` of `serve`.

    Raises:
        SystemExit: it makes no sense (2), or help was asked for (0); both have been printed.
    """
    words, server_args = list(words), []
    # argparse would let the words after `--` wander off to other arguments.
    if _command(words) == "serve" and "--" in words:
        at = words.index("--")
        words, server_args = words[:at], words[at + 1 :]
    parser = make_parser()
    arguments, late = parser.parse_known_args(words)
    if arguments.command == "run":
        late = _take_prompt(arguments, late)
    if late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    arguments.server_args = tuple(server_args)
    if arguments.socket is not None and arguments.command in _WITHOUT_SOCKET:
        parser.error(f"--socket means nothing to {arguments.command}")
    return arguments


def _take_prompt(arguments: argparse.Namespace, late: list[str]) -> list[str]:
    """Take in the words of a prompt that stand behind flags, for which argparse has no place; what is left is wrong."""
    at = late.index("--") if "--" in late else len(late)
    arguments.prompt += [*(word for word in late[:at] if not word.startswith("-")), *late[at + 1 :]]
    return [word for word in late[:at] if word.startswith("-")]


def _command(words: Sequence[str]) -> str:
    """The first word that is neither a flag nor the value of one."""
    at = 0
    while at < len(words) and words[at].startswith("-"):
        at += 2 if words[at] == "--socket" else 1
    return words[at] if at < len(words) else ""


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug` may stand before the command and behind it."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def add_socket(parser: argparse.ArgumentParser, told: str, *, default: str | None = None) -> None:
    """`--socket` likewise; behind the command it does not take back what stands before it."""
    parser.add_argument("--socket", metavar="PATH", default=default, help=told)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its actions are what the reference page tells of."""
    exit_codes = ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in ExitCode)
    parser = argparse.ArgumentParser(
        prog="llamavisor",
        description="Keeps llama.cpp's llama-server alive, so that a folder of GGUF files is an OpenAI endpoint.",
        epilog=f"exit codes: {exit_codes}",
        allow_abbrev=False,
    )
    add_debug(parser)
    add_socket(parser, _SOCKET_HELP)
    parser.add_argument(
        "--version", action="version", version=f"llamavisor {__version__}", help="say which version this is"
    )
    commands = _Commands(parser, "commands", "command")
    _add_serve(commands)
    _add_reading(commands)
    _add_run(commands)
    _add_quantize(commands)
    _add_acting(commands)
    _add_pulling(commands)
    _add_tidying(commands)
    _add_config(commands)
    _add_doctor(commands)
    _add_install(commands)
    demo = commands.add("demo", "show it working, with tiny models made on the spot")
    demo.add_argument("--llama-server", metavar="PATH", help="the llama-server to use")
    commands.add("version", "say which version this is", json=True)
    return parser


def _add_serve(commands: _Commands) -> None:
    serve = commands.add(
        "serve",
        "run the daemon",
        details="Flags win over the environment (LLAMAVISOR_...), the environment over the configuration file. "
        "What follows -- goes to llama-server: llamavisor serve --models-dir DIR -- --threads 8",
    )
    add = serve.add_argument
    add("--config", type=Path, metavar="FILE", help="the configuration file (else LLAMAVISOR_CONFIG)")
    add("--models-dir", metavar="DIR", help="folder with the GGUF files")
    add("--models-max", type=int, metavar="N", help="how many models are kept loaded, 0 = no cap")
    add("--memory", metavar="SIZE", help='memory for models on each GPU (in RAM if there is none): "22GiB" or "auto"')
    add("--host", help="address to listen on")
    add("--port", type=int, help="port to listen on")
    add("--gpu-layers", metavar="N", help='layers in GPU memory: a number, "auto" or "all"')
    add("--llama-server", metavar="PATH", help="the llama-server to run, a path or a command")
    add_socket(serve, "where the control socket is to be", default=argparse.SUPPRESS)
    add("--state-dir", metavar="DIR", help="folder for generated files and logs")
    add("--metrics-port", type=int, metavar="PORT", help="port that Prometheus reads")
    add("--no-metrics", action="store_true", help="no Prometheus endpoint")
    add("--log-level", metavar="LEVEL", help="debug, info, warning or error")


def _add_reading(commands: _Commands) -> None:
    commands.add("status", "show how the daemon, its routers and its models are", talks=True, json=True)
    models = commands.add("models", "list the models", talks=True, json=True)
    models.add_argument("names", nargs="*", metavar="NAME", help='only models with such a name or alias: "qwen*"')
    show = commands.add("show", "show everything that is known of a model", talks=True, json=True)
    show.add_argument("model", help="name of the model, or an alias")
    show.add_argument("--router", metavar="NAME", help="only what this router makes of it")
    show.add_argument("--template", action="store_true", help="only the chat template, as it stands in the file")
    commands.add(
        "ps",
        "list the models in memory",
        details="Bytes are those of all devices of a model together; a > stands before what is not all of it, a dash "
        "where nothing is known.",
        talks=True,
        json=True,
    )
    events = commands.add(
        "events", "show what happened", details="With --json, one object on each line.", talks=True, json=True
    )
    events.add_argument("-f", "--follow", action="store_true", help="go on with what happens")
    events.add_argument("--all", action="store_true", help="with -f: also probes and progress, which are not kept")
    events.add_argument("-n", "--lines", type=_count, metavar="N", help="only the last N of the past")
    events.add_argument("--since", type=_count, default=0, metavar="ID", help="only events after this number")
    logs = commands.add(
        "logs",
        "show what llama-server printed",
        details="The past goes back 64 KiB; the whole of it is in the file that `status --json` names. "
        "With --json, one object on each line.",
        talks=True,
        json=True,
    )
    logs.add_argument("router", nargs="?", help="only this router's")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is printed")
    logs.add_argument(
        "-n", "--lines", type=_count, default=LOG_LINES, metavar="N", help=f"the last N lines (default: {LOG_LINES})"
    )


def _add_run(commands: _Commands) -> None:
    run = commands.add(
        "run",
        "ask a model, or chat with it",
        details="The answer is streamed to standard output; what is piped in follows the prompt. Without a prompt, on "
        "a terminal: a chat, line by line, with /clear and /bye. Ctrl-C ends an answer, and Ctrl-D the chat.",
        talks=True,
    )
    add = run.add_argument
    add("model", help="name of the model, or an alias")
    add("prompt", nargs="*", default=[], metavar="PROMPT", help="what to ask")
    add("--system", metavar="TEXT", help="how the model is to behave: a system prompt")
    add(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="an image to ask about; may be repeated"
    )
    form = run.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="a JSON schema that the answer is to follow")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="a grammar (GBNF) that the answer is to follow")
    add("--temperature", type=_amount, metavar="N", help="how freely to choose among tokens; 0 takes the likeliest")
    add("--top-p", type=_share, metavar="N", help="choose among the likeliest tokens that have this share together")
    add("--top-k", type=_count, metavar="N", help="choose among the N likeliest tokens; 0 for all")
    add("--min-p", type=_share, metavar="N", help="leave out tokens below this share of the likeliest")
    add("--repeat-penalty", type=_amount, metavar="N", help="how much to hold back what was said; 1 for not at all")
    add("--max-tokens", type=_count, metavar="N", help="the longest answer, in tokens")
    add("--seed", type=_count, metavar="N", help="begin chance here: the same question then has the same answer")
    add("--stats", action="store_true", help="say afterwards how fast it was")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="a file with the API key on its only line (else LLAMAVISOR_API_KEY)",
    )


def _add_quantize(commands: _Commands) -> None:
    quantize = commands.add(
        "quantize",
        "make a smaller model of a large one",
        details="With the llama-quantize beside llama-server. The result appears whole or not at all.",
        talks=True,
    )
    add = quantize.add_argument
    add("source", metavar="SRC", help="a GGUF file, or the name of a model")
    add("type", metavar="TYPE", help="what to make of it, such as Q4_K_M")
    add(
        "destination",
        nargs="?",
        type=Path,
        metavar="DST",
        help="file or folder for the result (default: beside the source, with the type in the name)",
    )
    add("--threads", type=_positive, metavar="N", help="CPU threads (default: all)")
    add("--imatrix", type=Path, metavar="FILE", help="importance of weights, which the smallest types need")
    add("--allow-requantize", action="store_true", help="take a source that is quantized already, at a loss")
    add("--force", action="store_true", help="replace a file that is there")


def _add_acting(commands: _Commands) -> None:
    load = commands.add("load", "load a model and wait until it answers", talks=True, json=True)
    _add_model(load, LOAD_TIMEOUT_S)
    unload = commands.add("unload", "unload a model and wait until it is gone", talks=True, json=True)
    _add_model(unload, ROUTER_TIMEOUT_S)
    pin = commands.add(
        "pin",
        "keep models in memory once they are there",
        details="They are neither evicted nor unloaded when idle; with serve = router llama-server itself may still "
        "evict them at models_max.",
        talks=True,
        json=True,
    )
    unpin = commands.add("unpin", "let models that were pinned leave memory again", talks=True, json=True)
    for kept in (pin, unpin):
        kept.add_argument("models", nargs="+", metavar="NAME", help="name of a model, or an alias")
    evict = commands.add(
        "evict",
        "show which models would make room for another",
        details="Models are evicted by themselves; `unload` takes one away.",
        talks=True,
        json=True,
    )
    evict.add_argument("model", help="name of the model that there is to be room for, or an alias")
    evict.add_argument("--dry-run", action="store_true", help="only show it: there is no other way")
    evict.add_argument("--router", metavar="NAME", help="only on this router")
    for name, does in (
        ("restart", "end a router and start it again"),
        ("stop", "end a router, until it or the daemon is started"),
        ("start", "start a router that was stopped or has failed"),
    ):
        moved = commands.add(
            name, does, details="Without a name: the router, if there is only one.", talks=True, json=True
        )
        moved.add_argument("router", nargs="*", help="name of a router")
        moved.add_argument("--all", action="store_true", help="every router")
        _add_wait(moved, ROUTER_TIMEOUT_S)
    drain = commands.add(
        "drain",
        "have the gateway take no new requests, and wait until the last one has ended",
        details="Models stay loaded, and what runs has as long as it needs; `resume` takes it back.",
        talks=True,
        json=True,
    )
    _add_wait(drain, DRAIN_TIMEOUT_S)
    commands.add("resume", "have the gateway take requests again", talks=True, json=True)
    commands.add(
        "reload",
        "read the configuration and the models folder again",
        details="On any error the old configuration stays in force.",
        talks=True,
        json=True,
    )


def _add_pulling(commands: _Commands) -> None:
    pull = commands.add(
        "pull",
        "bring a model from the Hugging Face Hub into the models folder",
        details="The daemon brings it: it goes on when the terminal is closed, and after a restart. Without a "
        "quantization the usual one is taken, as by llama-server -hf: Q4_K_M, else Q8_0, else the first.",
        talks=True,
        json=True,
    )
    add = pull.add_argument
    add("spec", nargs="?", metavar="SPEC", help="USER/REPO or USER/REPO:QUANT")
    add("--file", default="", metavar="GLOB", help="the model whose file is called so, instead of a quantization")
    add("--revision", default="", metavar="REV", help="a branch, a tag or a commit (default: main)")
    add(
        "--mmproj",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether its projector comes too (default: yes)",
    )
    add(
        "--draft",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether its draft comes too (default: yes)",
    )
    add("--name", default="", help="what the model is to be called (default: as its file is)")
    add("--router", metavar="NAME", help="into the models folder of this router (default: of the first)")
    add("--list", action="store_true", help="only show what the repository holds, and what of it fits this machine")
    add("--detach", action="store_true", help="do not wait until it is there")
    add("--cancel", metavar="ID", help="end a pull; what came is kept, and the same pull goes on with it")
    add("--drop", action="store_true", help="with --cancel: remove what came")
    commands.add("pulls", "show the models that come from the Hub, and how far they are", talks=True, json=True)


def _add_tidying(commands: _Commands) -> None:
    rm = commands.add(
        "rm",
        "remove models from the disk",
        details="All files of a model go, and nothing else; what other models use stays. One that is loaded, in use or "
        "pinned is refused.",
        talks=True,
        json=True,
    )
    rm.add_argument("models", nargs="+", metavar="MODEL", help="name of a model, or an alias")
    rm.add_argument("--force", action="store_true", help="unload it first, when its answers have ended; pinned or not")
    rm.add_argument("--folder", metavar="DIR", help="the models folder, if several have a model of that name")
    rm.add_argument(
        "--timeout",
        type=_duration,
        default=ROUTER_TIMEOUT_S,
        metavar="TIME",
        help=f"how long the unload may take (default: {ROUTER_TIMEOUT_S / 60:.0f}m)",
    )
    du = commands.add(
        "du",
        "show who takes the disk, and what is no model",
        details="What is shared is counted once; a link takes nothing.",
        talks=True,
        json=True,
    )
    du.add_argument(
        "--clean", action="store_true", help="remove what nobody wants any more, and pulls left more than a day ago"
    )
    du.add_argument(
        "--revisions", action="store_true", help="with --clean: also revisions in a cache of the hub that are not used"
    )
    for command in (rm, du):
        command.add_argument("--yes", action="store_true", help="do not ask")
        command.add_argument("--dry-run", action="store_true", help="only show what would be removed")


def _add_config(commands: _Commands) -> None:
    config = commands.add("config", "check or show the configuration")
    verbs = _Commands(config, "commands", "verb")
    check = verbs.add(
        "check", "tell everything that is wrong with the configuration", details="Exit code 78 if anything is."
    )
    show = verbs.add("show", "show what is in force, and where each value is written", json=True)
    show.add_argument("--model", metavar="NAME", help="what a model of this name gets, and from which table")
    show.add_argument("--router", metavar="NAME", help="with --model: only from this router")
    for verb in (check, show):
        verb.add_argument(
            "file", nargs="?", type=Path, help="the file (else LLAMAVISOR_CONFIG, else the default place)"
        )
        verb.add_argument("--config", type=Path, metavar="FILE", help="the same")


def _add_doctor(commands: _Commands) -> None:
    doctor = commands.add(
        "doctor",
        "look for what is wrong, and say what to do about it",
        details="Works with a daemon and without, needs no root, changes nothing. Exit code 1 if there is a problem.",
        talks=True,
        json=True,
    )
    doctor.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration file (else that of the daemon, LLAMAVISOR_CONFIG, the default place)",
    )


def _add_install(commands: _Commands) -> None:
    install = commands.add(
        "install-service",
        "have systemd look after llamavisor",
        details="Puts units, a user, a models folder and a first configuration in place. What is there and yours stays "
        "as it is; calling it again after a change of the configuration is safe.",
    )
    add = install.add_argument
    add("--user", action="store_true", help="as a service of this user, without root")
    add("--dry-run", action="store_true", help="only print what would be done, files included")
    add(
        "--models-dir", type=Path, metavar="DIR", help="the models folder (default: /srv/models; with --user: ~/models)"
    )
    add("--now", action="store_true", help="also enable and start it")
    add("--instance", metavar="NAME", help="one more daemon beside the first, llamavisor@NAME.service")
    add(
        "--gpu",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether it may use GPUs; if it is not said, whether there is one now",
    )
    add(
        "--socket-unit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether systemd listens for it, so that nobody is refused while it restarts; if it is not said, as "
        "before, and at first it does",
    )
    add("--remove", action="store_true", help="take the units away again; configuration, models and state stay")


def _add_model(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    parser.add_argument("model", help="name of the model")
    parser.add_argument("--router", metavar="NAME", help="the router, if several have the model")
    _add_wait(parser, timeout_s)


def _add_wait(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to wait until it is done (default: yes)",
    )
    parser.add_argument(
        "--timeout",
        type=_duration,
        default=timeout_s,
        metavar="TIME",
        help=f'how long to wait, such as "90s" or "10m", at most 1h (default: {timeout_s / 60:.0f}m)',
    )


def _duration(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    if not 0 < seconds <= WAIT_MAX_S:
        raise argparse.ArgumentTypeError("expected more than nothing and at most 1h")
    return seconds


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("expected a number from 0 up")
    return number


def _share(text: str) -> float:
    number = _amount(text)
    if number > 1:
        raise argparse.ArgumentTypeError("expected a number from 0 to 1")
    return number


def _positive(text: str) -> int:
    number = _count(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a whole number from 1 up")
    return number


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise argparse.ArgumentTypeError("expected a whole number from 0 up")
    return int(text)
