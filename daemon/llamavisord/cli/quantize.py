"""`llamavisor quantize`: makes a smaller model of a large one, beside it."""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

from llamavisor import binary, gguf
from llamavisor.catalog.disk import disk_of
from llamavisor.errors import BinaryError, LlamavisorError
from llamavisor.likeness import near
from llamavisor.quantizer import Order, Quantizer, UnknownTypeError, parts_of, target_beside
from llamavisor.units import format_size
from llamavisord.cli.client import Client, model_path
from llamavisord.cli.errors import CommandError, UnreachableError
from llamavisord.cli.look import client_of
from llamavisord.cli.render import NAME_WIDTH, Progress, Screen, shortened
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.places import Places
from llamavisord.plain import plain
from llamavisord.problems import ConfigError


def quantize(arguments: Namespace) -> int:
    """Quantize a model, and say what came of it."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal leaves as little behind as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        return _quantize(arguments)
    except LlamavisorError as exc:
        exit_code = ExitCode.USAGE if isinstance(exc, UnknownTypeError) else ExitCode.FAILED
        raise CommandError(str(exc), hint=exc.hint, exit_code=exit_code, log_tail=exc.log_tail) from exc


def _quantize(arguments: Namespace) -> int:
    client = client_of(arguments)
    quantizer = Quantizer(_llama_server(client), os.environ)
    type_ = quantizer.type_named(arguments.type)
    source = _source(client, arguments.source)
    _check_readable(source)
    target = _target(arguments, source, target_beside(source, type_, list(quantizer.types)))
    order = Order(
        source=source,
        target=target,
        type=type_,
        threads=arguments.threads,
        imatrix=arguments.imatrix,
        may_requantize=arguments.allow_requantize,
        may_replace=arguments.force,
    )
    _check_room(quantizer.expected_bytes(order), target.parent)
    progress = Progress(f"quantizing {shortened(source.name, NAME_WIDTH)} to {type_}", Screen(sys.stderr))
    try:
        header = quantizer.make(order, progress.show)
    finally:
        progress.close()
    _tell(header, source, target)
    return ExitCode.OK


def _tell(header: gguf.Header, source: Path, target: Path) -> None:
    before, after = sum(part.stat().st_size for part in parts_of(source)), target.stat().st_size
    Screen().line(f"{plain(target)}: {header.quantization}, {format_size(after)} of {format_size(before)}")


def _llama_server(client: Client) -> Path:
    """The llama-server that the tool stands beside: the daemon's; without one the configured one, else any.

    Raises:
        BinaryError: there is none.
    """
    configured = None
    try:
        routers = client.get("/control/v1/routers")["routers"]
        configured = next((router["llama_server"] for router in routers if router["llama_server"]), None)
    except CommandError:  # no daemon: files can be quantized all the same
        try:
            configured = load(Places(os.environ).config_file, os.environ).routers[0].llama_server
        except ConfigError:
            configured = None
    try:
        return binary.find(configured)
    except BinaryError:
        if configured is None:
            raise
        return binary.find(None)  # the daemon's own is not for everybody to see


def _source(client: Client, named: str) -> Path:
    """The file that is meant: one at that path, else that of the model that is called so."""
    path = Path(named)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except PermissionError as exc:
        raise _unreadable(path, exc) from exc
    if is_file:
        return path
    if is_folder:
        raise CommandError(f"{named} is a folder", hint="name the file in it", exit_code=ExitCode.USAGE)
    try:
        files = client.get(model_path(named))["files"]
    except CommandError as exc:
        if _is_like_a_path(named) and exc.exit_code in {ExitCode.UNREACHABLE, ExitCode.NOT_FOUND}:
            raise _no_file(path) from exc
        if not isinstance(exc, UnreachableError):
            raise
        raise CommandError(
            f"there is no file {named}, and no daemon to ask for a model of that name",
            hint=exc.hint,
            exit_code=ExitCode.NOT_FOUND,
        ) from exc
    if not files:
        raise CommandError(f"model {named} has no file any more", exit_code=ExitCode.NOT_FOUND)
    return Path(files[0]["path"])


def _is_like_a_path(named: str) -> bool:
    """Whether a file was meant; models of the hub's cache have a slash in their names, too."""
    return "/" in named or named.endswith(".gguf")


def _no_file(path: Path) -> CommandError:
    try:
        like = near(path.name, (each.name for each in path.parent.iterdir()))
    except OSError:
        like = []
    if not path.parent.is_dir():
        hint = f"there is no folder {path.parent}"
    else:
        hint = f"did you mean {path.with_name(like[0])}?" if like else "name a GGUF file, or a model by its name"
    return CommandError(f"there is no such file {path}", hint=hint, exit_code=ExitCode.NOT_FOUND)


def _check_readable(source: Path) -> None:
    for part in parts_of(source):
        try:
            part.open("rb").close()
        except FileNotFoundError:  # the quantizer says which parts it lacks
            continue
        except PermissionError as exc:
            raise _unreadable(part, exc) from exc


def _unreadable(path: Path, error: PermissionError) -> CommandError:
    """What was pulled is often the daemon's own: its models folder may be closed to others."""
    try:
        whose = f"it is {path.owner()}'s"
    except (OSError, KeyError):
        whose = "it is not for everybody"
    return CommandError(
        f"{path} cannot be read: {error.strerror}; {whose}",
        hint="let your user read it and its folder, or run this as its owner; the result goes where DST says",
        exit_code=ExitCode.NOT_PERMITTED,
    )


def _target(arguments: Namespace, source: Path, beside: Path) -> Path:
    """Where the result goes; never onto the source, and onto another file only by --force."""
    target: Path = arguments.destination or beside
    if target.is_dir():
        target /= beside.name
    if target.name.startswith(".") or target.suffix != ".gguf":
        raise CommandError(
            f"{target} would be no model: its name must end in .gguf and begin with no dot", exit_code=ExitCode.USAGE
        )
    if not target.parent.is_dir():
        raise CommandError(f"there is no folder {target.parent}", exit_code=ExitCode.NOT_FOUND)
    if not os.access(target.parent, os.W_OK):
        raise CommandError(
            f"{target.parent} may not be written", hint="name another place", exit_code=ExitCode.NOT_PERMITTED
        )
    if any(part.exists() and target.exists() and part.samefile(target) for part in parts_of(source)):
        raise CommandError(f"{target} is the source itself", hint="name another file", exit_code=ExitCode.USAGE)
    if target.exists() and not arguments.force:
        raise CommandError(f"{target} exists already", hint="--force replaces it", exit_code=ExitCode.USAGE)
    return target


def _check_room(needed: int, folder: Path) -> None:
    disk = disk_of(str(folder))
    if disk is not None and needed > disk.free_bytes:
        raise CommandError(
            f"{folder} has {format_size(disk.free_bytes)} free, and the result takes {format_size(needed)}",
            hint="name another place, or make room",
        )
