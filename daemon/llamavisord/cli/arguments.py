"""The command line as people write it: every command, its flags, and what `--help` says of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llamavisord import __version__
from llamavisord.cli.daemon_arguments import add_config, add_doctor, add_install, add_serve
from llamavisord.cli.vocabulary import (
    SOCKET_HELP,
    Commands,
    add_debug,
    add_socket,
    add_wait,
    amount,
    count,
    duration,
    positive,
    share,
)
from llamavisord.exit_codes import ExitCode

LOAD_TIMEOUT_S = 600.0
ROUTER_TIMEOUT_S = 120.0
DRAIN_TIMEOUT_S = 600.0
LOG_LINES = 100
_ELSEWHERE = {"ls": "models", "list": "models", "chat": "run", "delete": "rm", "remove": "rm", "download": "pull"}
"""What other programs call some commands."""
_WITHOUT_SOCKET = frozenset({"config", "demo", "install-service", "version"})


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
    parser, commands = _make()
    name = _command(words)
    if name and name not in commands.names:
        parser.error(f"there is no command {name!r}{_meant(name, commands.names)}")
    arguments, late = parser.parse_known_args(words)
    if arguments.command == "run":
        late = _take_prompt(arguments, late)
    command: argparse.ArgumentParser = arguments.parser  # its own usage helps, and not that of all
    del arguments.parser
    if late:
        hint = "; a prompt that begins with a dash stands behind --" if arguments.command == "run" else ""
        command.error(f"unrecognized arguments: {' '.join(late)}{hint}")
    arguments.server_args = tuple(server_args)
    if arguments.socket is not None and arguments.command in _WITHOUT_SOCKET:
        command.error(f"--socket means nothing to {arguments.command}")
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


def _meant(name: str, known: Sequence[str]) -> str:
    from llamavisor.likeness import near  # noqa: PLC0415 (half of what a quick command takes)

    found = [_ELSEWHERE[name]] if name in _ELSEWHERE else near(name, known)
    return f"; did you mean {found[0]}?" if found else "; --help lists them"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its actions are what the reference page tells of."""
    return _make()[0]


def _make() -> tuple[argparse.ArgumentParser, Commands]:
    exit_codes = ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in ExitCode)
    parser = argparse.ArgumentParser(
        prog="llamavisor",
        description="Keeps llama.cpp's llama-server alive, so that a folder of GGUF files is an OpenAI endpoint.",
        epilog=f"exit codes: {exit_codes}",
        allow_abbrev=False,
    )
    add_debug(parser)
    add_socket(parser, SOCKET_HELP)
    parser.add_argument(
        "--version", action="version", version=f"llamavisor {__version__}", help="say which version this is"
    )
    commands = Commands(parser, "commands", "command")
    add_serve(commands)
    _add_reading(commands)
    _add_run(commands)
    _add_quantize(commands)
    _add_acting(commands)
    _add_pulling(commands)
    _add_tidying(commands)
    add_config(commands)
    add_doctor(commands)
    add_install(commands)
    demo = commands.add("demo", "show it working, with tiny models made on the spot")
    demo.add_argument("--llama-server", metavar="PATH", help="the llama-server to use")
    commands.add("version", "say which version this is", json=True)
    return parser, commands


def _add_reading(commands: Commands) -> None:
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
    events.add_argument("-n", "--lines", type=count, metavar="N", help="only the last N of the past")
    events.add_argument("--since", type=count, default=0, metavar="ID", help="only events after this number")
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
        "-n", "--lines", type=count, default=LOG_LINES, metavar="N", help=f"the last N lines (default: {LOG_LINES})"
    )


def _add_run(commands: Commands) -> None:
    run = commands.add(
        "run",
        "ask a model, or chat with it",
        details="The answer is streamed to standard output; what is piped in follows the prompt. Without a prompt, on "
        "a terminal: a chat, line by line, in which /help says what else can be typed. Ctrl-C ends an answer, and "
        "Ctrl-D the chat.",
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
    add("--temperature", type=amount, metavar="N", help="how freely to choose among tokens; 0 takes the likeliest")
    add("--top-p", type=share, metavar="N", help="choose among the likeliest tokens that have this share together")
    add("--top-k", type=count, metavar="N", help="choose among the N likeliest tokens; 0 for all")
    add("--min-p", type=share, metavar="N", help="leave out tokens below this share of the likeliest")
    add("--repeat-penalty", type=amount, metavar="N", help="how much to hold back what was said; 1 for not at all")
    add("--max-tokens", type=count, metavar="N", help="the longest answer, in tokens")
    add("--seed", type=count, metavar="N", help="begin chance here: the same question then has the same answer")
    add("--stats", action="store_true", help="say afterwards how fast it was")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="a file with the API key on its only line (else LLAMAVISOR_API_KEY)",
    )


def _add_quantize(commands: Commands) -> None:
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
    add("--threads", type=positive, metavar="N", help="CPU threads (default: all)")
    add("--imatrix", type=Path, metavar="FILE", help="importance of weights, which the smallest types need")
    add("--allow-requantize", action="store_true", help="take a source that is quantized already, at a loss")
    add("--force", action="store_true", help="replace a file that is there")


def _add_acting(commands: Commands) -> None:
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
        add_wait(moved, ROUTER_TIMEOUT_S)
    drain = commands.add(
        "drain",
        "have the gateway take no new requests, and wait until the last one has ended",
        details="Models stay loaded, and what runs has as long as it needs; `resume` takes it back.",
        talks=True,
        json=True,
    )
    add_wait(drain, DRAIN_TIMEOUT_S)
    commands.add("resume", "have the gateway take requests again", talks=True, json=True)
    commands.add(
        "reload",
        "read the configuration and the models folder again",
        details="On any error the old configuration stays in force.",
        talks=True,
        json=True,
    )


def _add_pulling(commands: Commands) -> None:
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
    add("--name", help="what the model is to be called (default: as its file is)")
    add("--router", metavar="NAME", help="into the models folder of this router (default: of the first)")
    add("--list", action="store_true", help="only show what the repository holds, and what of it fits this machine")
    add("--detach", action="store_true", help="do not wait until it is there")
    cancels = "end a pull, by its ID or its model; what came is kept, and the same pull goes on with it"
    add("--cancel", metavar="ID", help=cancels)
    add("--drop", action="store_true", help="with --cancel: remove what came")
    commands.add("pulls", "show the models that come from the Hub, and how far they are", talks=True, json=True)


def _add_tidying(commands: Commands) -> None:
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
        type=duration,
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
        "--clean",
        action="store_true",
        help="remove what nobody wants any more, such as old revisions, and pulls left more than a day ago",
    )
    du.add_argument(
        "--keep-revisions", action="store_true", help="with --clean: not the old revisions in a cache of the hub"
    )
    for command in (rm, du):
        command.add_argument("--yes", action="store_true", help="do not ask")
        command.add_argument("--dry-run", action="store_true", help="only show what would be removed")


def _add_model(parser: argparse.ArgumentParser, timeout_s: float) -> None:
    parser.add_argument("model", help="name of the model")
    parser.add_argument("--router", metavar="NAME", help="the router, if several have the model")
    add_wait(parser, timeout_s)
