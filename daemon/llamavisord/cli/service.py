"""`llamavisor install-service`: have systemd look after llamavisor."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
from argparse import Namespace
from pathlib import Path

from llamavisord.cli import machine
from llamavisord.cli.errors import CommandError
from llamavisord.cli.installer import Installer
from llamavisord.cli.render import Screen
from llamavisord.config import Config
from llamavisord.exit_codes import ExitCode
from llamavisord.gateway_table import CREDENTIAL
from llamavisord.installation import GROUP, INSTANCE, MODELS_DIR, Wish, can_listen, plan, removal, unit_folder
from llamavisord.loading import load
from llamavisord.problems import ConfigError
from llamavisord.variables import Variable

_CONFIGS = Path("/etc/llamavisor")
_UNITS = unit_folder(None)
_CREDENTIALS = Path("/etc/credstore")
"""Where systemd looks for credentials that a unit names without a path."""


def install(arguments: Namespace) -> int:
    """Put units, folders and a first configuration in place; what is there and the same is left as it is."""
    wish = _wish(arguments)
    if shutil.which("systemctl") is None:
        raise CommandError("this machine has no systemd", hint="have what starts services here run `llamavisor serve`")
    if wish.home is None and os.geteuid() != 0 and not arguments.dry_run:
        hint = "use sudo, or --user for a service of yours alone; --dry-run shows what would be done"
        raise CommandError("a service of the machine takes root", hint=hint, exit_code=ExitCode.NOT_PERMITTED)
    installer = Installer(is_dry=arguments.dry_run)
    if arguments.remove:
        installer.carry_out(removal(wish, is_last=not _has_others(wish)))
        return ExitCode.OK
    config = _config(wish)
    models_dir = _models_dir(arguments, wish, config)
    if config is not None and config.gateway is not None and wish.has_socket and not can_listen(config):
        text = f"host = {config.gateway.host!r} is a name, and systemd listens on addresses only"
        raise CommandError(text, hint="write an address, or use --no-socket-unit")
    installer.carry_out(plan(wish, machine.look(config, has_gpu=arguments.gpu), config, models_dir))
    if not arguments.dry_run:
        _say_what_next(wish, models_dir)
    return ExitCode.OK


def _wish(arguments: Namespace) -> Wish:
    name: str | None = arguments.instance
    if name is not None and (not INSTANCE.fullmatch(name) or name == "llamavisor"):
        text = f"--instance {name!r}: expected a name of letters, digits, _, - and . that is not llamavisor"
        raise CommandError(text, exit_code=ExitCode.USAGE)
    if arguments.user and name:
        raise CommandError("--instance is for services of the machine", exit_code=ExitCode.USAGE)
    home = Path(pwd.getpwuid(os.getuid()).pw_dir) if arguments.user else None
    units = unit_folder(home)
    # As before, if nothing is said; at first with it.
    had_socket = (units / "llamavisor.socket").exists() or not (units / "llamavisor.service").exists()
    return Wish(
        home=home,
        instance=name,
        number=len([path for path in _CONFIGS.glob("*.toml") if path.stem not in {"llamavisor", name}]),
        has_socket=had_socket if arguments.socket_unit is None else arguments.socket_unit,
        is_started=arguments.now,
    )


def _has_others(wish: Wish) -> bool:
    """Whether another daemon of the machine stays installed."""
    if wish.instance and (_UNITS / "llamavisor.service").exists():
        return True
    return any(path.name != f"{wish.unit}.d" for path in _UNITS.glob("llamavisor@?*.service.d"))


def _config(wish: Wish) -> Config | None:
    """The configuration that is there; it has to make sense, since folders and ports are taken from it."""
    if not wish.config_file.exists():
        return None
    has_keys = wish.home is None and not wish.instance and (_CREDENTIALS / CREDENTIAL).exists()
    try:
        return load(wish.config_file, {Variable.CREDENTIALS_DIRECTORY: str(_CREDENTIALS)} if has_keys else {})
    except ConfigError as error:
        raise CommandError(str(error), hint="mend that first", exit_code=ExitCode.BAD_CONFIG) from error


def _models_dir(arguments: Namespace, wish: Wish, config: Config | None) -> Path:
    """The models folder; that of a configuration is written there."""
    given: Path | None = arguments.models_dir.absolute() if arguments.models_dir else None
    if config is not None:
        known = config.routers[0].models_dir
        if given not in {None, known}:
            text = f"{wish.config_file} has its models in {known}"
            hint = "change models_dir there, and leave it out here"
            raise CommandError(text, hint=hint, exit_code=ExitCode.USAGE)
        folders = {router.models_dir for router in config.routers}
    else:
        known = given or (MODELS_DIR if wish.home is None else wish.home / "models")
        folders = {known}
    for folder in sorted(folders):
        if wish.home is None and machine.is_shared(folder):
            text = f"{folder} is not for models alone, and the service would see and change all in it"
            hint = f"take a folder in it, such as {folder / 'models'}"
            raise CommandError(text, hint=hint, exit_code=ExitCode.USAGE)
    return known


def _say_what_next(wish: Wish, models_dir: Path) -> None:
    screen = Screen()
    if not wish.is_started:
        screen.line("have it start, now and at each boot, or take over what has changed: the same with --now")
    screen.line(f"put models into {models_dir}")
    if wish.home is None:
        known = models_dir.stat()
        if known.st_gid != grp.getgrnam(GROUP).gr_gid or not known.st_mode & stat.S_ISGID:
            screen.line(f"it is yours, and stays as it is: see that the user {GROUP} can read what is in it, or have")
            screen.line(
                f"everybody of the group drop files there: chgrp {GROUP} {models_dir} && chmod 2775 {models_dir}"
            )
        screen.line(f"who is to drop models, and to command it, joins the group: usermod -aG {GROUP} NAME")
        if wish.instance:
            screen.line(f"command it by: llamavisor --socket /run/llamavisor-{wish.instance}/control.sock status")
        screen.line(f"change {wish.config_file}, then: systemctl reload {wish.unit}")
    else:
        name = pwd.getpwuid(os.getuid()).pw_name
        screen.line(f"have it run while nobody is logged in: loginctl enable-linger {name}")
        screen.line(f"change {wish.config_file}, then: systemctl --user reload {wish.unit}")
