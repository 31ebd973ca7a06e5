"""Commands about models: the list of all, and everything about one."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

from llamavisor.units import format_duration, format_size
from llamavisord.cli.errors import CommandError
from llamavisord.cli.look import client_of
from llamavisord.cli.render import NAME_WIDTH, Screen, shortened
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain

_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Model": (
        *("name", "architecture", "kind", "size_label", "parameter_count", "quantization", "file_type", "type_mix"),
        *("context_length", "embedding_length", "layer_count", "nextn_layer_count"),
    ),
    "Attention": (
        *("head_count", "head_count_kv", "key_length", "value_length", "sliding_window", "sliding_window_pattern"),
        *("is_causal", "pooling"),
    ),
    "Experts": ("expert_count", "expert_used_count"),
    "Positions": ("rope_dimension_count", "rope_freq_base", "rope_scaling", "rope_scaling_factor"),
    "Text": ("tokenizer", "tokenizer_pre", "vocabulary_size", "chat_family", "chat_template"),
    "Projector": ("projector",),
    "File": ("version", "split", "tensor_count", "data_offset", "data_bytes", "last_tensor_bytes", "file_bytes"),
}
"""What a header says, in the order in which it is shown; whatever a later daemon says besides comes last."""
_NOT_SHOWN = frozenset({"layout"})
"""What a header says for estimates of memory alone; `--json` has it."""
_ALL_NAMES = _NOT_SHOWN.union(*_GROUPS.values())
_INDENT = "  "
_ALIASES_WIDTH = 12
"""So many columns aliases have on a terminal behind whatever name."""


def models(arguments: Namespace) -> int:
    """List the models: all, or those that are named."""
    client = client_of(arguments)
    answer = client.get("/control/v1/models")
    found = answer["models"] = _named(answer["models"], arguments.names)
    screen = Screen()
    if arguments.json:
        screen.json(answer)
    else:
        _show_table(screen, found)
        for folder in answer.get("folders", ()):
            if folder["stale"]:
                _say(f"folder {folder['path']}: {folder['stale']}; what was known of it stays")
    if found:
        return ExitCode.OK
    if arguments.names:
        raise CommandError(
            f"no model is called {' or '.join(arguments.names)}",
            hint="see `llamavisor models`",
            exit_code=ExitCode.NOT_FOUND,
        )
    if not arguments.json:
        folders = sorted({router["models_dir"] for router in client.get("/control/v1/routers")["routers"]})
        _say(f"no models; put GGUF files into {' or '.join(folders)}, or `llamavisor pull USER/REPO`")
    return ExitCode.OK


def _named(found: list[dict[str, Any]], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """The models of which a name or an alias is one of `wanted`, or fits one that is a glob; all if none is wanted."""
    if not wanted:
        return found

    def is_wanted(name: str) -> bool:  # a name may hold the brackets of a glob
        return any(name == word or fnmatchcase(name, word) for word in wanted)

    return [model for model in found if any(map(is_wanted, (model["name"], *model["aliases"])))]


def _show_table(screen: Screen, found: Sequence[dict[str, Any]]) -> None:
    shows_router = len({model["router"] for model in found} - {None}) > 1
    headers = ["NAME", "STATE", "SIZE", "QUANT", "CONTEXT", "ARCH", "KIND", "LAST USE", "NOTE/PROBLEM"]
    rows = [_row(model, is_short=screen.is_terminal) for model in found]
    if shows_router:
        headers.insert(2, "ROUTER")
        for model, row in zip(found, rows, strict=True):
            row.insert(2, model["router"])
    screen.table(headers, rows, cuts_last=True)


def _row(model: dict[str, Any], *, is_short: bool) -> list[object]:
    return [
        _names(model, is_short=is_short),
        model["state"],
        _size(model["size_bytes"]),
        model["quantization"],
        model["n_ctx"] or model["n_ctx_train"],
        model["architecture"],
        model["kind"],
        _last_use(model),
        model["problem"] or "; ".join(model["notes"]),
    ]


def _names(model: dict[str, Any], *, is_short: bool) -> str:
    """The name, and the aliases in parentheses. What is piped on is whole."""
    name, aliases = plain(model["name"]), plain(", ".join(model["aliases"]))
    if is_short:
        name = shortened(name, NAME_WIDTH)
        aliases = shortened(aliases, max(_ALIASES_WIDTH, NAME_WIDTH - len(f"{name} ()")))
    return f"{name} ({aliases})" if aliases else name


def _last_use(model: dict[str, Any]) -> str | None:
    if model["in_flight"]:
        return "now"
    return None if model["used_unix"] is None else format_duration(time.time() - model["used_unix"])


def show(arguments: Namespace) -> int:
    """Show everything about a model, or its chat template alone."""
    path = f"/control/v1/models/{quote(arguments.model, safe='')}"
    answer = client_of(arguments).get(path, router=arguments.router)
    screen = Screen()
    if arguments.template:
        template = _template(answer)
        if arguments.json:
            screen.json(template)
        else:
            screen.raw(template)
        return ExitCode.OK
    if arguments.json:
        screen.json(answer)
        return ExitCode.OK
    _show_model(screen, answer["model"])
    _show_header(screen, answer["header"] or {})
    _show_files(screen, answer)
    for router, command in answer["command"].items():
        _show_options(screen, answer, router)
        screen.line()
        screen.line(screen.paint(f"Command line on router {plain(router)}", "bold"))
        told = plain(shlex.join(command)) if command else "the router does not tell it now"
        screen.line(f"{_INDENT}{told}")
    return ExitCode.OK


def _template(answer: dict[str, Any]) -> str:
    """The chat template of a model's file.

    Raises:
        CommandError: it has none.
    """
    name, header = answer["model"]["name"], answer["header"]
    if header is None:
        raise CommandError(
            f"model {name}: the header of its file cannot be read", hint=answer["model"]["problem"] or ""
        )
    template = header["chat_template"]
    if not template:
        raise CommandError(f"model {name} has no chat template, or one of more than 256 KiB")
    return str(template)


def _show_model(screen: Screen, model: dict[str, Any]) -> None:
    """What it is called, how it is, and what is wrong with it."""
    screen.line(screen.paint(plain(model["name"]), "bold"))
    lines: list[tuple[str, object]] = [
        ("aliases", ", ".join(model["aliases"])),
        ("tags", ", ".join(model["tags"])),
        ("problem", model["problem"]),
        *(("note", note) for note in model["notes"]),
        *((f"on {router['router']}", _on_router(router)) for router in model["routers"]),
    ]
    if not model["routers"]:
        lines.append(("state", f"{model['state']}, served by no router"))
    _show_lines(screen, lines)


def _on_router(model: dict[str, Any]) -> str:
    parts = [model["state"]]
    if model["pid"]:
        parts.append(f"pid {model['pid']}" + (f", port {model['port']}" if model["port"] else ""))
    if model["n_ctx"]:
        parts.append(f"{model['n_ctx']} tokens of context")
    if model["in_flight"]:
        parts.append(f"{model['in_flight']} request{'s' if model['in_flight'] > 1 else ''}")
    elif model["used_unix"] is not None:
        parts.append(f"last used {format_duration(time.time() - model['used_unix'])} ago")
    return ", ".join(parts)


def _show_header(screen: Screen, header: dict[str, Any]) -> None:
    """Everything that it says, without what it does not say."""
    groups = {**_GROUPS, "Other": tuple(name for name in header if name not in _ALL_NAMES)}
    for title, names in groups.items():
        lines = [(_label(name), _told(name, header[name])) for name in names if header.get(name) not in (None, "")]
        if lines:
            screen.line()
            screen.line(screen.paint(title, "bold"))
            _show_lines(screen, lines)


def _label(name: str) -> str:
    return name.removeprefix("is_").replace("_", " ")


def _told(name: str, value: Any) -> str:
    """A value of a header for a person."""
    if name == "type_mix":
        parts = ((part["type"], _size(part["size_bytes"]), part["tensors"]) for part in value)
        return ", ".join(f"{type_} {size} in {tensors} tensors" for type_, size, tensors in parts)
    if name == "chat_template":
        return f"{len(value)} characters, see --template"
    if name == "split":
        return f"part {value['number'] + 1} of {value['count']}"
    if name == "parameter_count":
        return f"{value:,}"
    if name.endswith("_bytes"):
        return f"{_size(value)} ({value:,} bytes)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{_label(key)} {_told(key, each)}" for key, each in value.items() if each not in (None, ""))
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _show_files(screen: Screen, answer: dict[str, Any]) -> None:
    rows = [(file, "") for file in answer["files"]]
    rows += [(answer[role], role) for role in ("projector", "draft") if answer[role]]
    if rows:
        screen.line()
        screen.table(
            ("FILE", "SIZE", "CHANGED", "ROLE"),
            [(file["path"], _size(file["size_bytes"]), _when(file["mtime_unix"]), role) for file, role in rows],
        )


def _show_options(screen: Screen, answer: dict[str, Any], router: str) -> None:
    """What the router is told of the model, and by which table."""
    effective, origins = answer["effective"].get(router), answer["origins"].get(router, {})
    if effective:
        screen.line()
        screen.line(screen.paint(f"Options on router {plain(router)}", "bold"))
        screen.table(("OPTION", "VALUE", "FROM"), [(key, value, origins.get(key)) for key, value in effective.items()])


def _show_lines(screen: Screen, lines: Sequence[tuple[str, object]]) -> None:
    told = [(plain(label), plain(value)) for label, value in lines if value not in (None, "")]
    width = max((len(label) for label, _ in told), default=0)
    for label, value in told:
        screen.line(f"{_INDENT}{label.ljust(width)}  {value}")


def _say(text: str) -> None:
    print(f"llamavisor: {plain(text)}", file=sys.stderr)


def _size(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else format_size(size_bytes)


def _when(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix))
