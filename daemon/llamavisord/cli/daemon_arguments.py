"""The arguments of the commands that run a daemon, and see to what it runs on."""

from __future__ import annotations

import argparse
from pathlib import Path

from llamavisord.cli.vocabulary import Commands, add_socket


def add_serve(commands: Commands) -> None:
    """`serve`; what follows its `--` is taken away before."""
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


def add_config(commands: Commands) -> None:
    """`config` and its two verbs."""
    config = commands.add("config", "check or show the configuration")
    verbs = Commands(config, "commands", "verb")
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


def add_doctor(commands: Commands) -> None:
    """`doctor`."""
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


def add_install(commands: Commands) -> None:
    """`install-service`."""
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
