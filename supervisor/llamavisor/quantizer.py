"""Makes a smaller model of a large one, with the `llama-quantize` that stands beside llama-server.

Everything here blocks. What the tool can do is asked of the tool; checked against build b11434.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llamavisor import gguf
from llamavisor.capture import capture
from llamavisor.catalog.naming import PART
from llamavisor.errors import LlamavisorError
from llamavisor.files import put_new
from llamavisor.likeness import near

NAME = "llama-quantize"
STAGING = ".llamavisor-quantize-"
"""How the name of the folder begins, beside the target, in which it is made; what is killed leaves it there."""
HELP_TIMEOUT_S = 30.0
MEASURE_TIMEOUT_S = 120.0
"""Only headers are read to say how large the result will be, but those of a slow disk."""
REAP_S = 10.0
SLACK_BYTES = 1024 * 1024
"""What the tool rounds away when it says a size."""
TAIL_LINES = 5
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MIB = 1024 * 1024
_TYPES = re.compile(r"^ *(?:\d+ +or +)?([A-Z][A-Z0-9_]*) *: *(.*?) *$", re.MULTILINE)
_TYPES_BEGIN = "allowed quantization types"
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] *(\S+)")
_SIZE = re.compile(r"quant size += +([0-9.]+) MiB")
_WHY = re.compile(r"failed to quantize: (.+)")


class QuantizeError(LlamavisorError):
    """Raised when a model could not be quantized. Nothing of the attempt is left."""

    code = "quantize_failed"


class UnknownTypeError(QuantizeError):
    """Raised when the tool has no type of that name; the hint says which are near."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made of what.

    Attributes:
        source: the model's file, of a split model the first.
        target: the file to make.
        type: one that the tool knows.
        threads: CPU threads, None for all that the tool takes by itself.
        imatrix: file with the importance of weights, None for none.
        may_requantize: whether a source that is quantized already will do.
        may_replace: whether a file that is there, or comes meanwhile, makes way for the target.
    """

    source: Path
    target: Path
    type: str
    threads: int | None = None
    imatrix: Path | None = None
    may_requantize: bool = False
    may_replace: bool = False


Tell = Callable[[float, str], None]
"""Hears how far it has come, 0 to 1, and the name of the tensor that was done last."""


class Quantizer:
    """The tool that belongs to a llama-server.

    Args:
        llama_server: as `llamavisor.binary.find` returns it.
        environ: the environment of the tool.

    Raises:
        QuantizeError: the build comes without the tool, or it does not say what it can do.
    """

    def __init__(self, llama_server: Path, environ: Mapping[str, str]) -> None:
        self.tool = llama_server.with_name(NAME)
        self._environ = dict(environ)
        if not self.tool.is_file():
            raise QuantizeError(
                f"there is no {NAME} beside {llama_server}",
                hint=f"Set llama_server to a build of llama.cpp that has {NAME} in the same folder.",
            )
        try:
            self._help = capture((str(self.tool), "--help"), self._environ, timeout_s=HELP_TIMEOUT_S).stdout
        except OSError as exc:
            raise QuantizeError(f"{self.tool} cannot be started: {exc.strerror}") from exc
        self.types: Mapping[str, str] = dict(_TYPES.findall(self._help.partition(_TYPES_BEGIN)[2]))
        """The types that it makes, with what it says of each."""
        if not self.types:
            raise QuantizeError(f"{self.tool} --help lists no types", hint="Use a newer build of llama.cpp.")

    def __repr__(self) -> str:
        return f"<Quantizer {self.tool}, {len(self.types)} types>"

    def type_named(self, name: str) -> str:
        """The type that is meant, in the tool's own spelling.

        Raises:
            UnknownTypeError: there is none.
        """
        wanted = name.upper().replace("-", "_")
        if wanted in self.types:
            return wanted
        like = [each for each in self.types if wanted and each.startswith(wanted)] or near(wanted, self.types, most=4)
        hint = f"Did you mean {' or '.join(like)}?" if like else f"It knows {', '.join(self.types)}."
        raise UnknownTypeError(f"{name} is no type that {self.tool} knows", hint=hint)

    def expected_bytes(self, order: Order) -> int:
        """About how large the result will be, as the tool says; as large as the source, if it does not.

        Raises:
            QuantizeError: the source is not usable.
        """
        parts = parts_of(order.source)
        try:
            header_bytes = gguf.read(order.source).data_offset
            source_bytes = sum(part.stat().st_size for part in parts)
        except gguf.GgufError as exc:
            raise QuantizeError(str(exc), hint=exc.hint) from exc  # it names the file
        except OSError as exc:
            raise QuantizeError(f"{exc.filename or order.source} cannot be read: {exc.strerror}") from exc
        if "--dry-run" not in self._help:
            return source_bytes
        said = capture((str(self.tool), "--dry-run", *_words(order)), self._environ, timeout_s=MEASURE_TIMEOUT_S)
        size = _SIZE.search(said.stdout + said.stderr)
        return int(float(size[1]) * _MIB) + header_bytes + SLACK_BYTES if size else source_bytes

    def make(self, order: Order, tell: Tell) -> gguf.Header:
        """Make the target, whole or not at all, and return its header.

        It is made in a folder beside the target, checked, and put in its place. An exception of `tell` or an interrupt
        ends it, and leaves nothing.

        Raises:
            QuantizeError: it did not succeed.
        """
        # Nobody can guess the name, and nobody else may write in it, whatever the umask: the tool follows a link that
        # stands where it writes. No mkdtemp: what only its owner may enter `du` could not tell of.
        folder = order.target.with_name(f"{STAGING}{secrets.token_hex(8)}")
        staged = folder / order.target.name
        try:
            folder.mkdir(mode=0o755)
            self._run(order, staged, tell)
            header = _checked(staged, order)
            _put(staged, order)
        except OSError as exc:
            raise QuantizeError(f"{order.target} cannot be written: {exc.strerror}") from exc
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return header

    def _run(self, order: Order, staged: Path, tell: Tell) -> None:
        # An interrupt in the middle of a start would leave a process that nobody knows.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            process = subprocess.Popen(
                (str(self.tool), *_words(order, staged)),
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us: we end it
                text=True,
                errors="replace",
                preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, before),  # noqa: PLW1509 (one thread)
            )
        except BaseException:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            raise
        assert process.stderr is not None  # noqa: S101 (it is a pipe)
        tail: list[str] = []
        why = ""
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for line in process.stderr:
                if found := _WHY.search(line):
                    why = found[1].strip()
                if found := _TENSOR.match(line):
                    tell(int(found[1]) / max(int(found[2]), 1), found[3])
                elif line.strip():
                    tail = [*tail, line.rstrip()][-TAIL_LINES:]
            process.wait()
        finally:
            process.stderr.close()
            if process.poll() is None:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(REAP_S)
        if process.returncode != 0:
            raise _failure(order, process.returncode, why, tail)


def parts_of(source: Path) -> list[Path]:
    """All files of a model, of which `source` is the first or the only one."""
    part = PART.fullmatch(source.name)
    if part is None:
        return [source]
    return [source.with_name(f"{part[1]}-{at + 1:05}-of-{part[3]}{part[4]}") for at in range(int(part[3]))]


def target_beside(source: Path, new: str, types: Sequence[str]) -> Path:
    """Where the result goes if nobody says: beside the source, the new type in its name in place of an old one."""
    part = PART.fullmatch(source.name)
    stem = part[1] if part else source.stem
    for known in sorted(types, key=len, reverse=True):
        if match := re.fullmatch(rf"(.*[-._]){known}", stem, re.IGNORECASE):
            return source.with_name(f"{match[1]}{new}.gguf")
    return source.with_name(f"{stem}-{new}.gguf")


def _words(order: Order, staged: Path | None = None) -> tuple[str, ...]:
    words = ["--allow-requantize"] if order.may_requantize else []
    words += ["--imatrix", str(order.imatrix)] if order.imatrix is not None else []
    # A path that begins with a dash would be taken for an option.
    words += [os.path.abspath(order.source), *([os.path.abspath(staged)] if staged else [])]  # noqa: PTH100
    return *words, order.type, *([str(order.threads)] if order.threads else [])


def _checked(staged: Path, order: Order) -> gguf.Header:
    """The header of what was made, once all of it is on the disk.

    Raises:
        QuantizeError: it is not what was ordered.
    """
    try:
        header, source = gguf.read(staged), gguf.read(order.source)
    except gguf.GgufError as exc:
        raise QuantizeError(f"{NAME} has made no usable file of {order.source}: {exc}") from exc
    if not header.is_whole or header.architecture != source.architecture:
        raise QuantizeError(f"{NAME} has made no whole model of {order.source}")
    fd = os.open(staged, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return header


def _put(staged: Path, order: Order) -> None:
    """Gives what was made the name that was ordered, which nobody else has got meanwhile unless it may be replaced."""
    if order.may_replace:
        staged.replace(order.target)
        return
    try:
        put_new(staged, order.target)
    except FileExistsError as exc:
        raise QuantizeError(f"{order.target} has come meanwhile, and stays", hint="--force replaces it") from exc


def _failure(order: Order, returncode: int, why: str, tail: Sequence[str]) -> QuantizeError:
    """Why it did not succeed: in the tool's own words, if it has any."""
    if returncode < 0:
        with suppress(ValueError):
            why = why or f"{NAME} was killed by {signal.Signals(-returncode).name}"
    hint = ""
    if "requantizing" in why:
        hint = "Take an F32, F16 or BF16 file, or allow a loss with --allow-requantize."
    elif "imatrix" in why or "importance matrix" in why:
        hint = "This type needs --imatrix FILE; llama-imatrix makes one."
    error = QuantizeError(f"{order.source}: {why or f'{NAME} ended with status {returncode}'}", hint=hint)
    error.log_tail = () if why else tuple(tail)
    return error
