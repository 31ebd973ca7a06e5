"""`llamavisor serve`: from flags, environment and file to a running daemon."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from llamavisord import activation, app
from llamavisord.cli.errors import CommandError
from llamavisord.config import Config
from llamavisord.exit_codes import ExitCode
from llamavisord.loading import load
from llamavisord.problems import ConfigError
from llamavisord.sources import Overrides


def run(arguments: Namespace) -> int:
    """Run the daemon until a signal ends it."""
    overrides = Overrides(
        host=arguments.host,
        port=arguments.port,
        models_dir=arguments.models_dir,
        models_max=arguments.models_max,
        memory=arguments.memory,
        llama_server=arguments.llama_server,
        gpu_layers=arguments.gpu_layers,
        socket=arguments.socket,
        state_dir=arguments.state_dir,
        metrics_port=arguments.metrics_port,
        metrics=False if arguments.no_metrics else None,
        log_level=arguments.log_level,
        args=arguments.server_args,
    )
    try:
        handed = activation.take(os.environ)
        config = load(arguments.config, os.environ, overrides, activation=handed)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_CONFIG
    except activation.ActivationError as error:
        raise CommandError(str(error)) from error

    def reload() -> Config:
        # A file that was read once is read again: were it gone, a reload must fail, not go on without it.
        return load(config.path, os.environ, overrides, activation=handed)

    return app.run(config, reload, handed)
