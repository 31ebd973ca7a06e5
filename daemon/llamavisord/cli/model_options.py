"""`llamavisor config show --model`: what a model gets from each router that may hold it, and where that is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamavisor.catalog import Entry, EntryState, FileId, ModelFile
from llamavisor.flags import OptionLayer
from llamavisor.options import OURS
from llamavisor.rules import matching
from llamavisor.sections import ModelSpec, layers_in_force, specify
from llamavisor.settings import RouterSettings
from llamavisor.spellings import typed_name
from llamavisord.cli.errors import CommandError
from llamavisord.config import Config, Setting
from llamavisord.exit_codes import ExitCode
from llamavisord.plain import plain
from llamavisord.problems import Origin
from llamavisord.redaction import without_secrets

_NOWHERE = ModelFile("", FileId(0, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class _Value:
    """What one option is: a typed value, or words of args."""

    layer: OptionLayer
    value: object
    words: tuple[str, ...] = ()


def settings_of(config: Config, model: str, router: str | None) -> list[tuple[str, Setting]]:
    """The values that are in force for a model, with the router that each is for. Overridden ones are left out.

    Reads the models folder. What is unusual is told on standard error.

    Args:
        config: the configuration.
        model: name of a model, or an alias that the configuration gives one. It need not exist.
        router: only this router, None for all.

    Raises:
        CommandError: there is no such router, or none that may hold the model.
    """
    routers = [each for each in config.routers if router in (None, each.name)]
    if not routers:
        raise CommandError(f"no router is called {router}", exit_code=ExitCode.NOT_FOUND)
    name = next((rule.name for rule in config.rules if rule.name and model in rule.settings.aliases), model)
    if name != model:
        _say(f"{model} is an alias of {name}")
    found: list[tuple[str, Setting]] = []
    may_hold = False
    for each in routers:
        entry = _find(config, each, name)
        spec = specify(entry, config.rules, router=each.name, base=each.layers)
        if spec is None:
            _say(f"router {each.name}: may not hold {name}: `router` in its [model] table names others")
            continue
        may_hold = True
        found += [(each.name, setting) for setting in _settings(config, each, spec, entry)]
    if not may_hold:
        raise CommandError(f"no router may hold {name}", exit_code=ExitCode.NOT_FOUND)
    return found


def _find(config: Config, router: RouterSettings, name: str) -> Entry:
    """The model in the router's folder; one that is nothing but a name if there is none."""
    from llamavisor.catalog.scanner import Scanner  # noqa: PLC0415 (a command that reads no folder does not pay for it)

    scanner = Scanner(str(router.models_dir), link_dirs=tuple(map(str, config.link_dirs)))
    scan = scanner.scan()
    names = {entry.name: entry for entry in scanner.entries}
    aliases = {alias: entry for entry in scanner.entries for alias in entry.aliases}
    found = names.get(name) or aliases.get(name)
    if found is not None:
        return found
    why = scan.problem or f"{router.models_dir} has no such model"
    _say(f"router {router.name}: {why}; this is what one called {name} would get")
    return Entry(name=name, state=EntryState.GONE, files=(_NOWHERE,))


def _settings(config: Config, router: RouterSettings, spec: ModelSpec, entry: Entry) -> Iterator[Setting]:
    origins = _Origins(config, router)
    if spec.path:
        folder = origins.of_router("models_dir")
        yield Setting("model", spec.path, folder)
        yield Setting("kind", spec.kind.value, Origin(spec.path))
    effective = _effective(layers_in_force(spec))
    # What the spec makes of these stands in none of its tables.
    said = _effective((*router.layers, *(rule.layer for rule in matching(config.rules, spec.name))))
    effective |= {key: said[key] for key in OURS & said.keys()}
    if entry.aliases:
        written = effective.pop("aliases", None)
        place = Origin("its place in the folder")
        yield Setting("aliases", spec.aliases, origins.of(written.layer, "aliases") if written else place)
    args: dict[str, tuple[OptionLayer, list[str]]] = {}
    for key, chosen in sorted(effective.items()):
        if chosen.words:
            args.setdefault(chosen.layer.source, (chosen.layer, []))[1].extend(chosen.words)
        else:
            yield Setting(key, chosen.value, origins.of(chosen.layer, key))
    for layer, words in args.values():
        yield Setting("args", without_secrets(words), origins.of(layer, "args"))


def _effective(layers: Sequence[OptionLayer]) -> dict[str, _Value]:
    """The last word on each option, by the typed option's name or the spelling that was used."""
    effective: dict[str, _Value] = {}
    for layer in layers:
        table: dict[str, _Value] = {}
        for key in layer.options.model_fields_set - {"args"}:
            if (value := getattr(layer.options, key)) is not None:
                table[key] = _Value(layer, value)
        for name, words in _groups(layer.options.args):
            earlier = table[name].words if name in table else ()
            table[name] = _Value(layer, None, (*earlier, *words))
        effective |= table
    return effective


def _groups(args: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The words of each option. What looks like an option begins one, as far as that is known without the build."""
    group: list[str] = []
    for word in (*args, "--"):
        if word.startswith("-") and not word.lstrip("-")[:1].isdigit():
            if group:
                yield typed_name(group[0]) or group[0].replace("--no-", "--", 1), tuple(group)
            group = []
        group.append(word)


class _Origins:
    """Where the values of one router's models are written."""

    def __init__(self, config: Config, router: RouterSettings) -> None:
        self._origins = {setting.key: setting.origin for setting in config.settings}
        self._prefix = f"router.{router.name}."
        args = [setting.origin for setting in config.settings if setting.key == f"{self._prefix}args"]
        with_args = [layer.source for layer in router.layers if "args" in layer.options.model_fields_set]
        self._args = dict(zip(with_args, args, strict=False))
        self._rules = {rule.source: rule for rule in config.rules}

    def of(self, layer: OptionLayer, key: str) -> Origin:
        """The table and the line; the table alone for what nobody has written."""
        if rule := self._rules.get(layer.source):
            origin = self._origins.get(f"{rule.source[1:-1]}.{key}")
        elif key == "args":
            origin = self._args.get(layer.source)
        else:
            origin = self._origins.get(self._prefix + key)
        is_written = origin is not None and not layer.source.startswith("automatic")
        return Origin(f"{layer.source}, {origin}") if is_written else Origin(layer.source)

    def of_router(self, key: str) -> Origin:
        """Where a key of the router itself is written."""
        return self._origins[self._prefix + key]


def _say(text: str) -> None:
    print(f"llamavisor: {plain(text)}", file=sys.stderr)
