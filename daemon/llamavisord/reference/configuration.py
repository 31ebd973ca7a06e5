"""The keys of a configuration file: what may be written, what holds if nothing is, and when a change takes effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from llamavisor.options import ModelOptions, OptionLayer, hang_after_s
from llamavisor.rules import ModelSettings
from llamavisor.settings import MemoryBudget, RouterSettings
from llamavisor.spellings import MODEL_SPELLINGS, SPELLINGS
from llamavisord.daemon import FIXED, FIXED_DOOR
from llamavisord.document import Document, RouterKeys
from llamavisord.problems import DEFAULT
from llamavisord.reference import specimen
from llamavisord.reference.docstrings import told
from llamavisord.reference.markdown import code, prose, table
from llamavisord.reference.quantities import duration, size
from llamavisord.reference.types import words
from llamavisord.sources import FLAGS
from llamavisord.variables import FALLBACKS, KEYS

_HEADINGS = ("key", "type", "default", "also said by", "a change", "meaning")
_RESTART, _ROUTERS, _MODELS, _AT_ONCE = "restart", "reload, routers", "reload, models", "reload"
_TOP = "The top of the file"
_ABOUT = f"""\
Flags of `serve` win over the environment, the environment over the file, the file over the default. A relative path
counts from the folder of the file it is written in. A size is a number of bytes, or text such as `"22GiB"` (1024³),
`"22G"` (the same) or `"22GB"` (1000³); a duration is a number of seconds, or text such as `"90s"` or `"1h30m"`.

A change of a key takes effect with

- *{_AT_ONCE}*: `llamavisor reload`;
- *{_MODELS}*: the same, which loads the models anew that it is about, each when it is idle;
- *{_ROUTERS}*: the same, which restarts the routers that it is about, as soon as nobody is being answered;
- *{_RESTART}*: a restart of the daemon; a reload that changes it is refused."""
_OPTIONS = """\
They may stand in `[defaults]`, in a `[[router]]` and in a `[model."NAME"]`; of these the later wins. What nobody has
said is left to llama-server, unless the meaning says otherwise. What the one at hand does not know is refused."""
_Defaults = dict[tuple[str, ...], tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a file.

    Attributes:
        heading: as it is written, or what it is.
        keys: the model that reads it.
        at: the key that it stands at, empty for the top.
    """

    heading: str
    keys: type[BaseModel]
    at: str = ""


def configuration() -> Iterator[str]:
    """Every table with its keys."""
    yield _ABOUT
    yield ""
    defaults = _defaults()
    for each in tables():
        yield f"### {code(each.heading) if each.at else each.heading}"
        yield ""
        yield from _about(each)
        yield from table(_HEADINGS, [_row(each, key, defaults) for key in own_keys(each)])
    yield "### Options of models"
    yield ""
    yield _OPTIONS
    yield ""
    yield from _options(ModelOptions, SPELLINGS)
    yield 'These may stand in a `[model."NAME"]` alone:'
    yield ""
    yield from _options(ModelSettings, MODEL_SPELLINGS)


def tables() -> list[Table]:
    """The tables of a file, its top first."""
    found = [Table(_TOP, Document)]
    for key, hint in get_type_hints(Document, include_extras=True).items():
        if (model := _model_in(hint)) is not None:
            inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            heading = {list: f"[[{key}]]", dict: f'[{key}."NAME"]'}.get(get_origin(inner), f"[{key}]")
            found.append(Table(heading, model, key))
    return found


def own_keys(of: Table) -> list[str]:
    """The keys of a table that are neither tables themselves nor among those of another section."""
    hints = get_type_hints(of.keys, include_extras=True)
    keys = [key for key in of.keys.model_fields if _model_in(hints[key]) is None]
    models: list[type[BaseModel]] = [ModelOptions, ModelSettings, *([RouterKeys] if of.at else [])]
    shared = [model for model in models if issubclass(of.keys, model)]
    return [key for key in keys if not any(key in model.model_fields for model in shared)]


def _about(of: Table) -> Iterator[str]:
    """What a table is, and what else may stand in it."""
    if not of.at:
        return
    text = told(of.keys).partition(": ")[2]  # before it stands the heading
    about = [prose(f"{text[0].upper()}{text[1:]}")]
    if issubclass(of.keys, RouterKeys):
        keys = ", ".join(map(code, RouterKeys.model_fields))
        about.append(
            f"It may say {keys} for itself, as at the top of the file; `host`, `port` and `api_key_file` only with"
            ' `serve = "router"`.'
        )
    if issubclass(of.keys, ModelOptions):
        about.append("All [options of models](#options-of-models) may stand in it.")
    yield " ".join(about)
    yield ""


def _model_in(hint: Any) -> type[BaseModel] | None:
    """The model of a table, of several, or of tables by name."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    return next((found for each in get_args(hint) if (found := _model_in(each)) is not None), None)


def _row(of: Table, key: str, defaults: _Defaults) -> tuple[str, ...]:
    kind = words(get_type_hints(of.keys, include_extras=True)[key])
    at = (of.at, key) if of.at else (key,)
    meaning = of.keys.model_fields[key].description or ""
    return code(key), prose(kind), _default(defaults.get(at, ()), kind), _also(at), _change(at), prose(meaning)


def _options(keys: type[ModelOptions], spellings: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    hints = get_type_hints(keys, include_extras=True)
    base = ModelOptions.model_fields if keys is not ModelOptions else {}
    rows = []
    for key in (key for key in keys.model_fields if key not in base):
        default = code(f'"{duration(hang_after_s(()) or 0)}"') if key == "hang_after" else ""
        change = _MODELS if key in {*spellings, "args"} else _AT_ONCE
        meaning = keys.model_fields[key].description or ""
        told_as = code(spellings[key][0]) if key in spellings else ""
        also = ", ".join(filter(None, (_also(("defaults", key)),)))
        rows.append((code(key), prose(words(hints[key])), default, also, told_as, change, prose(meaning)))
    headings = ("key", "type", "default", "also said by", "of llama-server", "a change", "meaning")
    yield from table(headings, rows)


def _default(values: tuple[object, ...], kind: str) -> str:
    """What holds if nothing is said, for a user and, where that differs, for root."""
    shown = [_written(value, kind) for value in dict.fromkeys(values)]
    return f"{shown[0]} (root: {shown[1]})" if len(shown) > 1 else "".join(shown)


def _defaults() -> _Defaults:
    """The defaults of each key, by where it would be written: those of a lone router, at the top of the file."""
    found: _Defaults = {}
    for places in (specimen.USER, specimen.ROOT):
        for setting in specimen.defaults(places).settings:
            *table_, key = setting.key.split(".")
            at = (*(each for each in table_[:1] if each != "router" or key == "name"), key)
            if setting.origin == DEFAULT:
                found[at] = (*found.get(at, ()), setting.value)
    return found


def _written(value: object, kind: str) -> str:
    """A value as it would be written in a file."""
    match value:
        case bool():
            return code(str(value).lower())
        case int() if "size" in kind:
            return code(f'"{size(value)}"')
        case float() if "duration" in kind:
            return code(f'"{duration(value)}"')
        case Path():
            text = str(value)
            return code(text[1:] if text.startswith(("/~", "/$")) else text)
        case tuple():
            return "none" if not value else code(list(value))
        case str():
            return code(f'"{value}"')
    return code(value)


def _also(at: tuple[str, ...]) -> str:
    """The variable and the flag that say the same."""
    variables = [name for name, key in {**KEYS, **FALLBACKS}.items() if key == at]
    flags = [flag for flag, key in FLAGS.values() if key == at]
    return ", ".join(code(each) if each[0] in "-L" else each for each in [*flags, *variables])


def _change(at: tuple[str, ...]) -> str:
    """What a change of a key takes."""
    if at[0] in FIXED or at in {(key,) for key in FIXED_DOOR}:
        return _RESTART
    key = at[-1]
    if key == "memory":
        return _MODELS  # what they are told follows from it
    of_router = at[0] not in ("gateway", "metrics", "model") and key != "api_key_file"  # the gateway reads keys anew
    return _ROUTERS if of_router and key in _of_processes() else _AT_ONCE


def _of_processes() -> set[str]:
    """What the process of a router is started with: all that `without_models` leaves as it is."""
    options = OptionLayer("", ModelOptions(ctx_size=1))
    full = RouterSettings(
        name="", models_dir=Path(), models_max=1, layers=(options,), memory=MemoryBudget(1), autoload=False
    )
    told = full.without_models()
    return {each.name for each in fields(full) if getattr(full, each.name) == getattr(told, each.name)}
