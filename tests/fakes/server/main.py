"""What one start of the stand-in is: a question about the program, a router, or the process of a model."""

from __future__ import annotations

import json
import os
import sys
import time

from .behaviour import Behaviour, Record, end
from .child import Child
from .http import dumps
from .log import Log
from .options import OptionTable, PresetError, UsageError, is_on
from .registry import Registry
from .router import Router

_HELP_FOLDER = __file__.rsplit("/", 3)[0] + "/data/"
_BUILT_WITH = "built with GNU 12.2.0 for Linux x86_64"
_MODEL_OPTIONS = (
    *("LLAMA_ARG_MODEL", "LLAMA_ARG_ALIAS", "LLAMA_ARG_HOST", "LLAMA_ARG_PORT"),
    *("LLAMA_ARG_CTX_SIZE", "LLAMA_ARG_ENDPOINT_METRICS"),
)


def main(behaviour_path: str, program: str, arguments: list[str]) -> None:
    """Be llama-server."""
    behaviour_path = os.environ.get("FAKE_LLAMA", behaviour_path)
    with open(behaviour_path, encoding="utf-8") as file:
        script = Behaviour(**json.load(file))
    record = Record(f"{behaviour_path}.record")
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write("llama-server")
    with open(_HELP_FOLDER + script.help, encoding="utf-8") as file:
        table = OptionTable(file.read(), script.missing_options)

    if {"-h", "--help", "--usage"} & set(arguments):
        print(table.help_text, end="")
        return
    if "--version" in arguments:
        print(f"{script.version}\n{_BUILT_WITH}", file=sys.stderr)
        return
    if "--list-devices" in arguments:
        visible = script.devices if record.count("list-devices") > script.devices_after_calls else []
        print("Available devices:", *(f"  {line}" for line in visible or ["(none)"]), sep="\n")
        return
    try:
        given = table.parse(arguments)
    except UsageError as exc:
        print(exc, file=sys.stderr)
        sys.exit(1)

    options = {option.env: value for option, value in given.items()}
    given_keys = options.get("LLAMA_API_KEY", os.environ.get("LLAMA_API_KEY", ""))
    keys = [key for key in given_keys.split(",") if key]
    log = Log(2)
    log("llama_server", "initializing ...")
    log("common_params", "common_params_print_info: verbosity = 3 (adjust with the `-lv N` CLI arg)")
    folder = os.getcwd()
    note = dumps({"argv": [program, *arguments], "env": dict(os.environ), "cwd": folder, "pid": os.getpid()})
    if "LLAMA_ARG_MODEL" in options:
        record.note("models", note)
        own = {name: options[name] for name in _MODEL_OPTIONS if name in options}
        own |= {option.spellings[-1].lstrip("-"): value for option, value in given.items() if not option.env}
        child = Child(own, script, record, keys, is_alone="LLAMA_SERVER_ROUTER_PORT" not in os.environ)
        child.run()

    record.note("starts", note)
    time.sleep(script.start_s)
    if record.is_among_first(script.start_failures, "failures"):
        if script.start_line:
            log("llama_server", script.start_line, "E")
        end(script.start_exit)
    port = int(options.get("LLAMA_ARG_PORT", "8080"))
    env = {**os.environ, "LLAMA_SERVER_ROUTER_PORT": str(port)}
    try:
        registry = Registry(table, given, program=program, log=log, env=env)
    except PresetError as exc:
        log("llama_server", f"failed to initialize router models: {exc}", "E")
        end(1)
    if not keys:
        log("llama_server", "security: no API key is set and CORS allows all origins", "W")
    log("llama_server", "security: router mode enabled - do not expose to untrusted environments", "W")
    log("llama_server", "starting server in router mode. models will be automatically loaded on-demand")
    autoload = is_on(options.get("LLAMA_ARG_MODELS_AUTOLOAD", "1"))
    router = Router(registry, script, keys=keys, autoload=autoload, log=log)
    router.run(options.get("LLAMA_ARG_HOST", "127.0.0.1"), port)
