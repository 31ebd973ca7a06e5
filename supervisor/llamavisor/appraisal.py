"""What one model is expected to take on one router: from its files, its options, the build, and what it took before."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import anyio

from llamavisor import gguf, preset, sections
from llamavisor.binary import Binary
from llamavisor.catalog import FileId
from llamavisor.footprint import (
    Device,
    Fit,
    FitParams,
    Footprint,
    Plan,
    Weights,
    context_size,
    estimate,
    find_tool,
    read_options,
    slot_context,
)
from llamavisor.gguf import GgufError, Header
from llamavisor.ledger import FootprintKey, Footprints
from llamavisor.sections import ModelSpec
from llamavisor.shelf import Offered
from llamavisor.threads import run_in_thread

KEPT_S = 300.0
"""How long it is believed that files which only options name, and what the build says, are as they were."""
DOUBTFUL_KEPT_S = 30.0
"""The same when something could not be read."""
FILES_TIMEOUT_S = 5.0
"""How long files beside a model may take to be read: they may lie on a dead mount."""
QUIET_S = 20.0
"""How long the end of loads is waited for before GPUs are woken."""
QUIET_POLL_S = 0.1
STUCK_MAX = 4
"""So many models' files may be stuck in the kernel; then no others are read any more."""
MAX_KNOWN = 1_000
"""Models, and headers, that are remembered, the latest asked for."""
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What a model is expected to take.

    Attributes:
        footprint: bytes by device, and where they are known from.
        key: under which what it really takes is to be recorded.
        n_ctx: tokens of context that one request is to have, as llama-server tells it.
        is_ctx_ours: whether that is our choice, because nobody has made one.
        warnings: what a person should know of how far this can be trusted.
    """

    footprint: Footprint
    key: FootprintKey
    n_ctx: int
    is_ctx_ours: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Look:
    """What a look at one file found.

    Attributes:
        path: the file.
        id: which content, None when it cannot even be found.
        header: None when it was not wanted, or is none.
        problem: why it is not reckoned with, "" if it is.
    """

    path: str
    id: FileId | None = None
    header: Header | None = None
    problem: str = ""


@dataclass(slots=True)
class _Basis:
    """All that an appraisal rests on but what was measured; and the appraisal, until something more is."""

    weights: Weights
    plan: Plan
    fits: tuple[Fit | None, Fit | None]
    key: FootprintKey
    n_ctx: int
    is_ctx_ours: bool
    warnings: tuple[str, ...]
    until: float
    measured: tuple[Mapping[str, int], ...] | None = None
    appraisal: Appraisal | None = None


class Appraiser:
    """Appraises models for all routers of a process, and remembers what that rests on.

    Args:
        fit: asks the build's own tool. That wakes the driver of every GPU: one question at a time.
        footprints: what models took before.
        clock: monotonic seconds.

    Attributes:
        is_loading: whether a model is being loaded: the tool takes some of each GPU's memory for a moment, which a load
            at the same time would not find.
    """

    def __init__(
        self,
        fit: FitParams | None = None,
        footprints: Footprints | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fit = fit or FitParams()
        self._footprints = Footprints() if footprints is None else footprints
        self._clock = clock
        self.is_loading: Callable[[], bool] = lambda: False
        self._known: OrderedDict[object, _Basis] = OrderedDict()
        self._headers: OrderedDict[FileId, Header] = OrderedDict()
        self._stuck: set[str] = set()  # models whose files a thread reads, which may never come back
        self._reading = anyio.Lock()
        self._asking = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Appraiser of {len(self._known)}>"

    async def appraise(
        self, found: Binary, env: Mapping[str, str], offered: Offered, devices: Sequence[Device]
    ) -> Appraisal | None:
        """What a model is expected to take; None when nobody can say.

        Called with every demand for a model: what was found out is remembered for some minutes. Then it is found out
        again, without a process if nothing has changed.

        Args:
            found: the router's llama-server.
            env: the router's environment.
            offered: the model, as the router was told of it.
            devices: the GPUs that the router sees, in its order.
        """
        spec = offered.spec
        ours = sections.for_memory(spec, found.flags)
        is_ctx_ours = ours is not None and ours.options.ctx_size is not None
        told, places = tuple(offered.section.items()), tuple((device.name, device.id) for device in devices)
        key = told, spec.files, is_ctx_ours, places, found.fingerprint, tuple(sorted(env.items()))
        basis = self._known.get(key)
        if basis is None or self._clock() >= basis.until:
            basis = await self._find_out(found, env, offered, tuple(devices), is_ctx_ours=is_ctx_ours)
            if basis is None:
                return None
            self._known[key] = basis
        _touch(self._known, key)
        measured = self._footprints.recall(basis.key)
        if basis.measured != measured:
            basis.measured, basis.appraisal = measured, _appraise(basis, measured)
        return basis.appraisal

    async def _find_out(
        self,
        found: Binary,
        env: Mapping[str, str],
        offered: Offered,
        devices: tuple[Device, ...],
        *,
        is_ctx_ours: bool,
    ) -> _Basis | None:
        spec, options = offered.spec, read_options(preset.ALWAYS, offered.section)
        looks = await self._read(spec, options.mmproj, options.draft, options.adapters)
        header = spec.header or looks["model"].header
        if header is None:
            return None
        weights = _weigh(header, spec.own_bytes, looks)
        plan = Plan(options=options, n_ctx=context_size(header, options), devices=devices)
        ids = dict.fromkeys((*spec.files, *(look.id for look in looks.values() if look.id is not None)))
        key = FootprintKey.of(tuple(ids), plan.digest, found.fingerprint.files)
        fits: tuple[Fit | None, Fit | None] = None, None
        if not self._footprints.recall(key):
            fits = await self._ask(found, env, spec, plan, looks.get("draft"))
        problems = tuple(look.problem for look in looks.values() if look.problem)
        return _Basis(
            weights=weights,
            plan=plan,
            fits=fits,
            key=key,
            n_ctx=slot_context(header, options, plan.n_ctx),
            is_ctx_ours=is_ctx_ours,
            warnings=(*problems, *map(_unreckoned, options.unknown)),
            until=self._clock() + (DOUBTFUL_KEPT_S if problems else KEPT_S),
        )

    async def _read(
        self, spec: ModelSpec, projector: str | None, draft: str | None, adapters: Sequence[str]
    ) -> dict[str, _Look]:
        """What there is to be read of a model, by what it is for."""
        wanted = {"model": spec.path} if spec.header is None else {}
        wanted |= {what: path for what, path in (("projector", projector), ("draft", draft)) if path is not None}
        wanted |= {f"adapter {number}": path for number, path in enumerate(adapters)}
        if not wanted:
            return {}
        async with self._reading:  # one at a time: whoever is still there before the next is stuck
            if spec.path not in self._stuck and len(self._stuck) < STUCK_MAX:
                with anyio.move_on_after(FILES_TIMEOUT_S):
                    looks = await run_in_thread(self._look, spec.path, wanted, abandon_on_cancel=True)
                    for look in looks.values():
                        if look.id is not None and look.header is not None:
                            self._headers[look.id] = look.header
                            _touch(self._headers, look.id)
                    return looks
        return {what: _Look(path, problem=_unread(path, "it does not answer")) for what, path in wanted.items()}

    def _look(self, model: str, wanted: Mapping[str, str]) -> dict[str, _Look]:
        """Look at these files; blocking, for ever if one lies on a dead mount."""
        self._stuck.add(model)
        try:
            return {
                what: _look(path, self._headers, has_header=not what.startswith("adapter"))
                for what, path in wanted.items()
            }
        finally:
            self._stuck.discard(model)

    async def _ask(
        self, found: Binary, env: Mapping[str, str], spec: ModelSpec, plan: Plan, draft: _Look | None
    ) -> tuple[Fit | None, Fit | None]:
        """What the build itself says of the model and of its draft."""

        def work() -> tuple[Fit | None, Fit | None]:
            tool = find_tool(found.path)
            if tool is None:
                return None, None
            fit = self._fit.ask(tool, spec.path, spec.own_files, plan, env=env)
            if fit is None or draft is None or draft.id is None or draft.header is None:
                return fit, None
            return fit, self._fit.ask(tool, draft.path, (draft.id,), plan.for_draft(), env=env)

        async with self._asking:
            with anyio.move_on_after(QUIET_S):
                while plan.devices and self.is_loading():
                    await anyio.sleep(QUIET_POLL_S)
            return await run_in_thread(work, abandon_on_cancel=True)


def _appraise(basis: _Basis, measured: Sequence[Mapping[str, int]]) -> Appraisal | None:
    fit, draft_fit = basis.fits
    expected = estimate(basis.weights, basis.plan, fit=fit, draft_fit=draft_fit, measured=measured)
    if expected is None:
        return None
    return Appraisal(expected, basis.key, basis.n_ctx, basis.is_ctx_ours, basis.warnings)


def _weigh(header: Header, size_bytes: int, looks: Mapping[str, _Look]) -> Weights:
    """The files of a model; what lies beside it and has no header that can be read counts by its size, as adapters."""
    headers = {what: look.header for what, look in looks.items() if look.header is not None}
    sizes = {what: look.id.size for what, look in looks.items() if look.id is not None and what != "model"}
    return Weights(
        header=header,
        size_bytes=size_bytes,
        projector=headers.get("projector"),
        draft=headers.get("draft"),
        draft_bytes=sizes["draft"] if "draft" in headers else 0,
        adapter_bytes=sum(size for what, size in sizes.items() if what not in headers),
    )


def _look(path: str, known: Mapping[FileId, Header], *, has_header: bool) -> _Look:
    try:
        status = os.stat(path)  # noqa: PTH116 (a str with a NUL raises ValueError, as Path's does)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return _Look(path, problem=_unread(path, why))
    file = FileId(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    header = known.get(file) if has_header else None
    if has_header and header is None:
        with suppress(GgufError, OSError):
            header = gguf.read(path)
    return _Look(path, file, header)


def _touch(known: OrderedDict[_K, _V], key: _K) -> None:
    """Makes `key` the latest, and the oldest go."""
    known.move_to_end(key)
    while len(known) > MAX_KNOWN:
        known.popitem(last=False)


def _unread(path: str, why: object) -> str:
    return f"{path} is not reckoned with: {why}"


def _unreckoned(name: str) -> str:
    return f"--{name.replace('_', '-')} moves weights in ways that are not reckoned with"
