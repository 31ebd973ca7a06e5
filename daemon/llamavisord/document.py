"""What may be written in a configuration file: every table and key, with its type and its meaning.

The environment and the flags of `serve` are read into the same tables: a value is checked alike wherever it
stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import ErrorDetails, core_schema

from llamavisor.likeness import near
from llamavisor.options import ModelOptions
from llamavisor.quantities import parse_duration, parse_size
from llamavisor.rules import ModelSettings
from llamavisor.settings import MemoryBudget, OnOverwrite, Oversize, Serve
from llamavisord.toml_lines import Location

_ROUTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,255}")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHOWN = 60
"""Characters of a wrong value that a message repeats."""
_MODELS_MAX = 1_000_000
_DEVICE = re.compile(r"[A-Za-z][A-Za-z0-9_.:\[\]-]{0,255}")
"""How llama-server names devices: CUDA0, Vulkan1, RPC0, RPC[10.0.0.2:50052]."""
_BUDGET_BYTES_MIN = 1024 * 1024
"""A smaller budget is a number whose unit was forgotten."""
_BODY_BYTES_MIN = 1024
_RETRIES_MAX = 10
_MANY = 1_000_000
_NAME_MAX = 255
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}
"""Ports that a browser leaves out of an origin."""
_HOST_AND_PORT = re.compile(r"[^:]*:[0-9]+")


def _whole(value: object, low: int, high: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(expected)
    return value


def _port(value: object) -> int:
    return _whole(value, 1, 65535, "expected a port, a whole number from 1 to 65535")


def _metrics_port(value: object) -> int:
    return _whole(
        value, 1, 65535, "expected a port, a whole number from 1 to 65535 (enabled = false turns metrics off)"
    )


def _count(value: object) -> int:
    return _whole(value, 0, _MODELS_MAX, "expected a whole number from 0 (no cap) up")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("expected text in quotes, not empty and without control characters")
    return value


def _is_label(label: str) -> bool:
    """Whether the name service takes it as one part of a name (RFC 1035, 2.3.4); of an address it is harmless."""
    return 0 < len(label) < 64


def _host(value: object) -> str:
    if not isinstance(value, str) or not _HOST.fullmatch(value) or not all(map(_is_label, value.split("."))):
        raise ValueError('expected one address or host name in quotes, such as "127.0.0.1" or "::1"')
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not _ROUTER_NAME.fullmatch(value):
        raise ValueError("expected a name of 1 to 64 letters, digits, - and _ in quotes")
    return value


def _device(value: object) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise ValueError("expected a device as llama-server names it, such as CUDA0, or RAM")
    if value.upper() in {"CPU", "RAM"} and value != "RAM":
        raise ValueError("the memory of the machine itself is called RAM here")
    return value


def _budget_of_device(value: object) -> int:
    return _budget(value, 'a size, such as "22GiB"; leave out a device without a budget of its own')


def _budget(value: object, expected: str) -> int:
    """There are four cases: no size, nothing, a size that cannot be meant, a size."""
    try:
        size_bytes = parse_size(value)
    except ValueError:
        raise ValueError(f"expected {expected}") from None
    if size_bytes == 0:
        raise ValueError(
            'with a budget of 0 nothing could be loaded: write "auto" for all that is there;'
            " to keep models off a GPU, name only the others in `devices`"
        )
    if size_bytes < _BUDGET_BYTES_MIN:
        raise ValueError('less than any model takes: write the unit too, as in "22GiB"')
    return size_bytes


def _memory(value: object, read_table: ValidatorFunctionWrapHandler) -> MemoryBudget:
    """There are four cases: "auto", a table of nothing, a table, which is read key by key, or a size."""
    if value == "auto":
        return MemoryBudget()
    if value == {}:
        raise ValueError('names no device: write "auto" for all that is there')
    if isinstance(value, dict):
        return MemoryBudget(devices=tuple(sorted(read_table(value).items())))
    either = '"auto", a size such as "22GiB", or sizes by device such as { CUDA0 = "22GiB", RAM = "48GiB" }'
    return MemoryBudget(_budget(value, either))


def _many(value: object) -> int:
    return _whole(value, 1, _MANY, f"expected a whole number from 1 to {_MANY}")


def _retries(value: object) -> int:
    return _whole(value, 0, _RETRIES_MAX, f"expected a whole number from 0 to {_RETRIES_MAX}")


def _body(value: object) -> int:
    size_bytes = parse_size(value)
    if size_bytes < _BODY_BYTES_MIN:
        raise ValueError('no request fits into that: write the unit too, as in "256MiB"')
    return size_bytes


def _held(value: object) -> int | Literal["auto"]:
    return "auto" if value == "auto" else _body(value)


def _patience(value: object) -> float:
    seconds = parse_duration(value)
    if seconds < 1:
        raise ValueError('expected a duration of at least 1 s, such as "10m": no model loads at once')
    return seconds


def _origins(value: object) -> tuple[str, ...]:
    return _any_or_each(value, _origin, 'origins such as "https://chat.example.org"')


def _origin(text: str) -> str:
    """An origin as browsers write it: in lower case, without the port that goes without saying."""
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise ValueError(f'"{text}" is no origin: it is written like "https://chat.example.org", without a path')
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" if port in (None, _PORTS.get(scheme)) else f"{scheme}://{host}:{port}"


def _host_names(value: object) -> tuple[str, ...]:
    return _any_or_each(value, _host_name, 'host names such as "llm.example.org"')


def _host_name(text: str) -> str:
    name = text.lower().removesuffix(".")
    if not _HOST.fullmatch(name) or not all(map(_is_label, name.split("."))) or _HOST_AND_PORT.fullmatch(name):
        raise ValueError(f'"{text}" is no host name: it is written like "llm.example.org", without a port')
    return name


def _any_or_each(value: object, read: Callable[[str], str], what: str) -> tuple[str, ...]:
    """There are three cases: "*" for all, a list of proper things, anything else."""
    if value in ("*", ["*"]):
        return ("*",)
    if not isinstance(value, list) or not all(isinstance(each, str) and each.isprintable() for each in value):
        raise ValueError(f'expected a list of {what}, or "*" for all')
    if "*" in value:
        raise ValueError('"*" stands for all: nothing else may stand beside it')
    if long := next((each for each in value if len(each) > _NAME_MAX), None):
        raise ValueError(f"a name of {len(long)} characters: at most {_NAME_MAX} are one")
    return tuple(dict.fromkeys(map(read, value)))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")  # noqa: TRY004
    return value


def _tables(value: object) -> object:
    if isinstance(value, dict):
        raise ValueError("write [[router]] with two brackets: there may be several")  # noqa: TRY004
    return value


# The title of a type says to people what may be written; the reference page has them.
Port = Annotated[int, BeforeValidator(_port), Field(title="port, 1 to 65535")]
Text = Annotated[str, BeforeValidator(_text), Field(title="text")]
PathText = Annotated[Text, Field(title="path")]
Host = Annotated[str, BeforeValidator(_host), Field(title="address or host name")]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(title="duration")]
Retries = Annotated[int, BeforeValidator(_retries), Field(title=f"whole number from 0 to {_RETRIES_MAX}")]
Many = Annotated[int, BeforeValidator(_many), Field(title=f"whole number from 1 to {_MANY}")]
Env = dict[str, Annotated[str, Field(strict=True)]]
_SizesByDevice = dict[Annotated[str, BeforeValidator(_device)], Annotated[int, BeforeValidator(_budget_of_device)]]
Memory = Annotated[
    MemoryBudget,
    GetPydanticSchema(
        lambda _, schema_of: core_schema.no_info_wrap_validator_function(_memory, schema_of(_SizesByDevice))
    ),
    Field(title='"auto", size, or table of sizes by device'),
]
LogLevel = Literal["debug", "info", "warning", "error"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RouterKeys(_Table):
    """What the top of a file says for every router, and a `[[router]]` table for itself."""

    host: Host | None = None
    """Address to listen on: the gateway's; with serve = "router" a router's."""
    port: Port | None = None
    """TCP port to listen on: the gateway's; with serve = "router" a router's, and several routers need one each."""
    models_dir: PathText | None = None
    """Folder with the GGUF files. `~` is a home; a relative path starts at the folder of the file."""
    models_max: Annotated[int, BeforeValidator(_count), Field(title="whole number from 0 up")] | None = None
    """How many models a router keeps loaded, 0 = no cap."""
    memory: Memory | None = None
    """Memory that a router's models may take: "auto", what there is less a reserve; a size, of each GPU that the router
    sees, or of RAM if it sees none; or sizes of single devices by the names that `llama-server --list-devices` prints,
    `{ CUDA0 = "22GiB", RAM = "48GiB" }`, while the others are "auto"."""
    llama_server: Annotated[Text, Field(title="path or command")] | None = None
    """The llama-server to run; else that of LLAMAVISOR_LLAMA_SERVER, of PATH, or of the llama extra."""
    api_key_file: PathText | None = None
    """File with the API keys that clients must send, one on each line; with serve = "router" exactly one. A key itself
    is never written here."""


class MetricsTable(_Table):
    """`[metrics]`: the Prometheus endpoint."""

    enabled: Annotated[bool, BeforeValidator(_flag)] | None = None
    """Whether Prometheus can read metrics here."""
    host: Host | None = None
    """Address that the metrics are read on."""
    port: Annotated[int, BeforeValidator(_metrics_port), Field(title="port, 1 to 65535")] | None = None
    """TCP port that the metrics are read on."""


Flag = Annotated[bool, BeforeValidator(_flag)]


class GatewayTable(_Table):
    """`[gateway]`: how the one address behaves that clients know."""

    default_model: Text | None = None
    """The model that serves requests which name none; without it they are refused."""
    allow_origins: (
        Annotated[tuple[str, ...], BeforeValidator(_origins), Field(title='list of origins, or "*"')] | None
    ) = None
    """Web pages that may use it besides those of this machine, such as "https://chat.example.org"; "*" for all."""
    allow_hosts: (
        Annotated[tuple[str, ...], BeforeValidator(_host_names), Field(title='list of host names, or "*"')] | None
    ) = None
    """Names that clients without a key may call it by besides those of its address; "*" for all."""
    max_body: Annotated[int, BeforeValidator(_body), Field(title="size")] | None = None
    """What the body of one request may take, such as "256MiB"."""
    max_held: Annotated[int | Literal["auto"], BeforeValidator(_held), Field(title='"auto" or size')] | None = None
    """What the bodies of all requests may take together. "auto" is 1 GiB, or a quarter of RAM if that is less, but
    never less than `max_body`."""
    max_connections: Many | None = None
    """How many clients may be connected at once."""
    max_waiting: Many | None = None
    """How many requests may wait for models at once; the next is refused."""
    max_waiting_per_model: Many | None = None
    """How many requests may wait for one model; the next is refused."""
    max_wait: Annotated[float, BeforeValidator(_patience), Field(title="duration of at least 1s")] | None = None
    """How long one request waits for its model at most, such as "10m"."""
    drain: Duration | None = None
    """How long answers may go on when the daemon is told to end, such as "30s"; then streams end with an error."""
    retries: Retries | None = None
    """How often a request is sent again after its model has died before it said anything."""
    public_without_key: Flag | None = None
    """Whether everybody who reaches its address may use it although no key is set. Without a key, and unless this is
    true, it refuses to listen where other machines reach it."""
    log_requests: Flag | None = None
    """Whether each request has a line in the log."""
    log_bodies: Flag | None = None
    """Whether that line holds what was asked, its first 64 KiB."""


class DefaultsTable(ModelOptions):
    """`[defaults]`: options of every model of every router."""

    env: Env = Field(default_factory=dict)
    """Extra environment of every router and its models."""


class RouterTable(RouterKeys, ModelOptions):
    """`[[router]]`: one router, and the options of its models."""

    name: Annotated[str, BeforeValidator(_name), Field(title="1 to 64 letters, digits, - and _")] | None = None
    """What the router is called. Only a lone one may do without."""
    env: Env = Field(default_factory=dict)
    """Extra environment of this router and its models, on top of that of `[defaults]`."""


class ModelTable(ModelSettings):
    """`[model."NAME"]`: the models of that name, or of all names that a glob matches."""

    load_on_start: Annotated[bool, BeforeValidator(_flag)] | None = None
    """Whether the model is loaded as soon as its router is ready."""
    pin: Annotated[bool, BeforeValidator(_flag)] | None = None
    """Whether the model, once it is loaded, is unloaded neither to make room nor for being idle."""


class Document(RouterKeys):
    """A whole file; every key may be left out."""

    serve: Serve | None = None
    """Who listens on the public address: "gateway", llamavisor for all routers; or "router", each of them itself."""
    socket: PathText | None = None
    """Unix socket of the control API."""
    state_dir: PathText | None = None
    """Folder for generated files, logs, and what survives a restart of the daemon."""
    log_level: LogLevel | None = None
    """Which of the daemon's own messages are logged: those of this level, and all that are graver."""
    log_size: (
        Annotated[int, BeforeValidator(parse_size), Field(ge=64 * 1024, title="size of at least 64KiB")] | None
    ) = None
    """Size at which a router's log file is rotated, such as "64MiB"; two older ones are kept."""
    link_dirs: Annotated[list[Text], Field(title="list of paths")] | None = None
    """Folders outside of `models_dir` that symlinks in it may lead to."""
    on_overwrite: OnOverwrite | None = None
    """What becomes of a loaded model whose file is overwritten in place, once it is idle: it is loaded anew, unloaded,
    or left as it is."""
    min_residency: Duration | None = None
    """How long a model that was just loaded is the last to be unloaded to make room, such as "2m"."""
    oversize: Oversize | None = None
    """What becomes of a demand for a model that is larger than its budget: once all else has left
    it is loaded as llama.cpp can fit it in, or it is refused."""
    metrics: MetricsTable = Field(default_factory=MetricsTable)
    """Where Prometheus reads."""
    gateway: GatewayTable = Field(default_factory=GatewayTable)
    """The one address that clients know."""
    defaults: DefaultsTable = Field(default_factory=DefaultsTable)
    """Options of every model."""
    router: Annotated[list[RouterTable], BeforeValidator(_tables)] = Field(default_factory=list)
    """The routers; none written = one called "main"."""
    model: dict[str, ModelTable] = Field(default_factory=dict)
    """Options of single models, by name or glob."""


_EXPECTED = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "string_type": "expected text in quotes",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "list_type": "expected a list, in [ ]",
    "tuple_type": "expected a list, in [ ]",
    "dict_type": "expected a table of names and values, in { }",
    "model_type": "expected a table of keys and values",
    "model_attributes_type": "expected a table of keys and values",
}
_CONFIDENTIAL = frozenset({"env", "args", "api_key", "api_key_file"})
"""Keys whose values a message does not repeat: they may hold a secret."""

_LISTS = frozenset(
    {
        *("aliases", "allow_hosts", "allow_origins", "args", "devices", "draft_devices", "lora", "router", "tags"),
        "tensor_split",
    }
)
"""Keys that may be lists: of one that is refused the message says which part of it is wrong."""


def validate(raw: Mapping[str, object]) -> Document | list[tuple[Location, str]]:
    """The document that `raw` is, or all that is wrong with it: where, and what."""
    try:
        return Document.model_validate(raw)
    except ValidationError as exc:
        wrong: dict[Location, str] = {}
        for error in exc.errors(include_url=False):
            location = _within(raw, error["loc"])
            wrong.setdefault(location, _explain(location, error))
        return list(wrong.items())


def spell(location: Location) -> str:
    """A location as a person writes it: `router[1].port`, `model."qwen*".ctx_size`."""
    text = ""
    for piece in location:
        if isinstance(piece, int):
            text += f"[{piece}]"
        else:
            key = piece if _BARE_KEY.fullmatch(piece) else json.dumps(piece, ensure_ascii=False)
            text += f".{key}" if text else key
    return text


def nearest(word: str, known: Iterable[str]) -> str:
    """The name that was probably meant by `word`, as the end of a sentence; empty if none is near."""
    close = near(word, known)
    return f", did you mean {close[0]}?" if close else ""


def _within(raw: object, location: tuple[str | int, ...]) -> Location:
    """The part of `location` that leads to something in `raw`: pydantic adds names of types."""
    found: list[str | int] = []
    for piece in location:
        is_key = isinstance(raw, Mapping) and piece in raw
        is_index = isinstance(raw, Sequence) and isinstance(piece, int) and piece < len(raw)
        if not is_key and not is_index:
            break
        raw = raw[piece]  # type: ignore[index]
        found.append(piece)
    return tuple(found)


def _explain(location: Location, error: ErrorDetails) -> str:
    kind, key = error["type"], str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        return _explain_unknown(location, key)
    if kind in ("model_type", "model_attributes_type", "dict_type") and location[:1] == ("model",):
        return 'expected a table for each name: [model."NAME"], and its keys below' + _found(location, error["input"])
    if kind == "value_error":
        text = str(error["ctx"]["error"])
    else:
        text = _EXPECTED.get(kind) or error["msg"].replace("Input should be ", "expected ", 1)
    return text + _found(location, error["input"])


def _explain_unknown(location: Location, key: str) -> str:
    """There are five cases: a secret, what no model can have, a misspelt key, a key of another table, any other."""
    if key == "api_key":
        return "a key is not written here: put it into a file of its own and name that with api_key_file"
    if key == "env" and location[:1] == ("model",):
        return (
            "models have the environment of their router: write a [[router]] with that env, and name it here:"
            ' router = "that"'
        )
    here = _table_at(location[:-1]).model_fields
    if key in ModelSettings.model_fields and key not in ModelOptions.model_fields and location[:1] != ("model",):
        return 'unknown key here: it belongs in a [model."NAME"]'
    if close := nearest(key, here):
        return f"unknown key{close}"
    if key in ModelOptions.model_fields:
        return "unknown key here: it belongs in [defaults] or a [[router]]"
    if key in GatewayTable.model_fields:
        return "unknown key here: it belongs in [gateway]"
    if key in Document.model_fields:
        return "unknown key here: it belongs at the top of the file, above the first [table]"
    return "unknown key"


def _table_at(location: Location) -> type[BaseModel]:
    tables: dict[str, type[BaseModel]] = {
        "metrics": MetricsTable,
        "gateway": GatewayTable,
        "defaults": DefaultsTable,
        "router": RouterTable,
        "model": ModelTable,
    }
    return tables.get(str(location[0]), Document) if location else Document


def _found(location: Location, value: object) -> str:
    if isinstance(value, bool):
        return f", found {str(value).lower()}"
    if isinstance(value, int | float):
        return f", found {value}" if abs(value) < 10**_SHOWN else ", found a number beyond all bounds"
    if isinstance(value, str) and _CONFIDENTIAL.isdisjoint(location):
        return f', found "{value}"' if len(value) <= _SHOWN else ", found a long text"
    for kind, name in ((str, "text"), (dict, "a table"), (list, "a list")):
        if isinstance(value, kind) and not (kind is list and location and location[-1] in _LISTS):
            return f", found {name}"
    return ""
