"""`llamavisor install-service`: have systemd look after llamavisor."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
import subprocess
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import llamavisor
import llamavisord
from llamavisor import binary
from llamavisor.errors import BinaryError
from llamavisord.cli.errors import CommandError
from llamavisord.cli.render import Screen
from llamavisord.config import Config
from llamavisord.exit_codes import ExitCode
from llamavisord.installation import (
    INSTANCE,
    MODELS_DIR,
    Folder,
    Machine,
    Remove,
    Run,
    Step,
    Wish,
    Write,
    can_listen,
    plan,
    removal,
)
from llamavisord.loading import load
from llamavisord.problems import ConfigError

_BOOTED = Path("/run/systemd/system")
"""Is there if systemd is process 1; see sd_booted(3)."""
_SERVICE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
"""Where a service looks for commands."""
_GPUS = ("/dev/nvidiactl", "/dev/dri", "/dev/kfd", "/dev/accel")
_NOT_FOR_MODELS = ("/", "/etc", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/var")  # noqa: S108
_COMMAND_TIMEOUT_S = 120.0


def install(arguments: Namespace) -> int:
    """Put units, folders and a first configuration in place; what is there and the same is left as it is."""
    wish = _wish(arguments)
    if shutil.which("systemctl") is None:
        raise CommandError("this machine has no systemd", hint="have what starts services here run `llamavisor serve`")
    if wish.home is None and os.geteuid() != 0 and not arguments.dry_run:
        hint = "use sudo, or --user for a service of yours alone; --dry-run shows what would be done"
        raise CommandError("a service of the machine takes root", hint=hint, exit_code=ExitCode.NOT_PERMITTED)
    if arguments.remove:
        _carry_out(removal(wish), is_dry=arguments.dry_run)
        return ExitCode.OK
    config = _config(wish)
    models_dir = _models_dir(arguments, wish, config)
    machine = _machine(arguments, config)
    if config is not None and config.gateway is not None and wish.has_socket and not can_listen(config):
        text = f"host = {config.gateway.host!r} is a name, and systemd listens on addresses only"
        raise CommandError(text, hint="write an address, or use --no-socket")
    _carry_out(plan(wish, machine, config, models_dir), is_dry=arguments.dry_run)
    if not arguments.dry_run:
        _say_what_next(wish, models_dir)
    return ExitCode.OK


def _wish(arguments: Namespace) -> Wish:
    if arguments.instance is not None and not INSTANCE.fullmatch(arguments.instance):
        text = f"--instance {arguments.instance!r}: a name is made of letters, digits, _ and ."
        raise CommandError(text, exit_code=ExitCode.USAGE)
    if arguments.user and arguments.instance:
        raise CommandError("--instance is for services of the machine", exit_code=ExitCode.USAGE)
    return Wish(
        home=Path(pwd.getpwuid(os.getuid()).pw_dir) if arguments.user else None,
        instance=arguments.instance,
        has_socket=not arguments.no_socket,
        is_started=arguments.now,
    )


def _config(wish: Wish) -> Config | None:
    """The configuration that is there; it has to make sense, since folders and ports are taken from it."""
    if not wish.config_file.exists():
        return None
    try:
        return load(wish.config_file, {})
    except ConfigError as error:
        raise CommandError(str(error), hint="mend that first", exit_code=ExitCode.BAD_CONFIG) from error


def _models_dir(arguments: Namespace, wish: Wish, config: Config | None) -> Path:
    """The models folder; that of a configuration is written there."""
    given: Path | None = arguments.models_dir.absolute() if arguments.models_dir else None
    if config is not None:
        known = config.routers[0].models_dir
        if given not in {None, known}:
            text = f"{wish.config_file} has its models in {known}"
            raise CommandError(
                text, hint="change models_dir there, and leave out --models-dir", exit_code=ExitCode.USAGE
            )
        return known
    folder = given or (MODELS_DIR if wish.home is None else wish.home / "models")
    homes = {entry.pw_dir for entry in pwd.getpwall()}
    if str(folder.resolve()) in {*_NOT_FOR_MODELS, *homes}:
        text = f"{folder} is not for models alone, and its group and mode would be changed"
        raise CommandError(text, hint=f"take a folder in it, such as {folder / 'models'}", exit_code=ExitCode.USAGE)
    return folder


def _machine(arguments: Namespace, config: Config | None) -> Machine:
    found = _llama_server(config)
    has_gpu = any(map(os.path.lexists, _GPUS)) if arguments.gpu is None else arguments.gpu
    packages = [Path(str(module.__file__)).resolve().parents[1] for module in (llamavisor, llamavisord)]
    needs = [Path(sys.prefix), Path(sys.base_prefix), *packages]
    if found is not None:
        needs.append(found.parent.parent if found.parent.name == "bin" else found.parent)
    path = shutil.which(binary.NAME, path=_SERVICE_PATH)
    is_odd = found is not None and path is None and not found.is_relative_to(sys.prefix)
    return Machine(
        program=_program(),
        needs=tuple(_outermost(needs)),
        systemd=_systemd_version(),
        has_gpu=has_gpu,
        llama_server=found if is_odd else None,
    )


def _llama_server(config: Config | None) -> Path | None:
    try:
        return binary.find(config.routers[0].llama_server if config else None)
    except BinaryError as error:
        print(f"llamavisor: no llama-server yet: {error}. {error.hint}", file=sys.stderr)
        return None


def _program() -> Path:
    """The command as it was installed here, whatever the name is by which it was called."""
    program = Path(sysconfig.get_path("scripts"), "llamavisor")
    if not program.exists():
        text = f"the command {program} is not there"
        raise CommandError(text, hint="install llamavisor with pip, into a folder such as /opt/llamavisor")
    return program


def _outermost(paths: list[Path]) -> Iterator[Path]:
    """Each folder once, and none that is in another; what every service sees is left out."""
    system = (Path("/usr"), Path("/opt"))
    wanted = sorted({path for path in paths if path not in system})
    for path in wanted:
        if not any(path != other and path.is_relative_to(other) for other in wanted):
            yield path


def _systemd_version() -> int:
    said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False, timeout=10)  # noqa: S607
    words = said.stdout.split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0


def _carry_out(steps: Iterator[Step], *, is_dry: bool) -> None:
    """Do one after the other, or only tell; the first that fails ends it, and another try takes up from there."""
    screen = Screen()
    for step in steps:
        try:
            text = _carry_out_one(step, is_dry=is_dry)
        except (OSError, LookupError) as error:
            raise CommandError(f"{_object_of(step)}: {_reason(error)}", hint="mend that and call it again") from error
        if text:
            screen.line(f"would {text}" if is_dry else text)
            if is_dry and isinstance(step, Write):
                for line in step.text.splitlines():
                    screen.line(f"  | {line}")


def _carry_out_one(step: Step, *, is_dry: bool) -> str | None:
    """What was, or would be, done; None if nothing."""
    match step:
        case Write():
            return _write(step, is_dry=is_dry)
        case Remove(path=path):
            if not os.path.lexists(path):
                return None
            if not is_dry:
                path.unlink()
                with suppress(OSError):  # a folder of drop-ins goes with its last
                    path.parent.rmdir()
            return f"remove {path}"
        case Folder():
            return _make_folder(step, is_dry=is_dry)
        case Run():
            return _run(step, is_dry=is_dry)


def _write(step: Write, *, is_dry: bool) -> str | None:
    with suppress(FileNotFoundError):
        if step.is_theirs or step.path.read_text(encoding="utf-8", errors="replace") == step.text:
            step.path.stat()
            return None
    if not is_dry:
        step.path.parent.mkdir(parents=True, exist_ok=True)
        draft = step.path.with_name(f".{step.path.name}.new")
        draft.unlink(missing_ok=True)
        draft.touch(0o600, exist_ok=False)
        with draft.open("w", encoding="utf-8") as file:
            file.write(step.text)
            if step.group is not None:
                os.fchown(file.fileno(), -1, grp.getgrnam(step.group).gr_gid)
            os.fchmod(file.fileno(), step.mode)
        draft.replace(step.path)
    return f"write {step.path}"


def _make_folder(step: Folder, *, is_dry: bool) -> str | None:
    """Make it, or give one that is there what it lacks.

    By a descriptor and not by its path: who may write where it is could put a link in its place, and have root open
    another folder to a group.
    """
    is_new = not os.path.lexists(step.path)
    if is_new:
        if is_dry:
            return f"make the folder {step.path} ({_rights(step.mode, step.group)})"
        step.path.mkdir(mode=0o700, parents=True)
    folder = os.open(step.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        before = os.fstat(folder)
        mode = step.mode if is_new else stat.S_IMODE(before.st_mode) | step.added
        has_group = step.group is None or _group_name(before.st_gid) == step.group
        if mode == stat.S_IMODE(before.st_mode) and has_group:
            return f"make the folder {step.path}" if is_new else None
        if not is_dry:
            if step.group is not None:
                os.fchown(folder, -1, grp.getgrnam(step.group).gr_gid)
            os.fchmod(folder, mode)  # last: a change of the group takes the bits away that pass it on
        return f"{'make' if is_new else 'change'} the folder {step.path} ({_rights(mode, step.group)})"
    finally:
        os.close(folder)


def _rights(mode: int, group: str | None) -> str:
    return f"mode {mode:o}" + (f", group {group}" if group else "")


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _run(step: Run, *, is_dry: bool) -> str:
    told = " ".join(step.argv)
    if step.needs_systemd and not _BOOTED.exists():
        return f"leave out, as systemd does not run here: {told}"
    if not is_dry:
        try:
            done = subprocess.run(step.argv, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done after {_COMMAND_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0 and not step.may_fail:
            raise OSError(done.stderr.strip() or f"exit code {done.returncode}")
    return f"run {told}"


def _object_of(step: Step) -> str:
    return " ".join(step.argv) if isinstance(step, Run) else str(step.path)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _say_what_next(wish: Wish, models_dir: Path) -> None:
    screen = Screen()
    systemctl = "systemctl --user" if wish.home is not None else "systemctl"
    if not wish.is_started:
        screen.line("have it start, now and at each boot, or take over what has changed: the same with --now")
    screen.line(f"put models into {models_dir}")
    if wish.home is None:
        screen.line("who is to do that, and to command it, joins the group: usermod -aG llamavisor NAME")
    else:
        screen.line(
            f"have it run while nobody is logged in: loginctl enable-linger {pwd.getpwuid(os.getuid()).pw_name}"
        )
    config = wish.config_file
    screen.line(f"change {config}, then: {systemctl} reload {wish.unit}")
