"""The part of the control API that is about the Hugging Face Hub: what a repository holds, and pulls."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pydantic
from aiohttp import web

from llamavisor.hub import Choice, HubError, Listing, Progress, Pull, Record, RemoteFile, Spec, parse
from llamavisor.prospect import foresee
from llamavisor.router import Router
from llamavisord.daemon import Daemon
from llamavisord.query import BadRequestError, flag

PULLS = "/pulls"
"""Where pulls are; a POST there is the only command that takes a body."""
LEFT = "left"
"""The state of a pull that an earlier daemon has begun and nobody wants now."""


class _Order(pydantic.BaseModel):
    """What a person asks for."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    spec: str
    file: str = ""
    revision: str = ""
    mmproj: bool = True
    draft: bool = True
    name: str = ""
    router: str | None = None


def pulling_routes(daemon: Daemon, base: str) -> list[web.RouteDef]:
    """What can be asked for; the docstring of a handler says to people what it does."""
    api = _Pulling(daemon)
    return [
        web.get(f"{base}/hub", api.look),
        web.get(f"{base}{PULLS}", api.pulls),
        web.post(f"{base}{PULLS}", api.start),
        web.delete(base + PULLS + r"/{id:[^/]+}", api.cancel),
    ]


class _Pulling:
    """The handlers."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._fleet = daemon.fleet

    async def look(self, request: web.Request) -> web.Response:
        """What a repository of the Hub holds, without a download: `?repo=USER/REPO`, or `USER/REPO:QUANT`.

        `?file=`, `?revision=`, `?mmproj=` and `?draft=` as for a pull. For each model its files, quantization, trained
        context, which one is `chosen` (without a quantization: the usual one), and how it would do on a router, the
        first or `?router=`: `needed_bytes` by device with the `n_ctx` that a request could have, reckoned from its
        header, its name and the options that it would get, and whether that `fits` what models may take there. Where
        that cannot be told, `reason` says why: as before the router has started, or where tables
        keep the model from it.
        """
        query = request.query
        spec = parse(
            query.get("repo", ""),
            file=query.get("file", ""),
            revision=query.get("revision", ""),
            with_projector=flag(request, "mmproj", default=True),
            with_draft=flag(request, "draft", default=True),
        )
        router = self._router(query.get("router"))
        listing = await self._daemon.downloads.hub.look(spec, reads_headers=True)
        chosen = _chosen(listing, spec)
        models: list[dict[str, Any]] = []
        for choice in listing.choices:
            told = {**_choice_view(choice, spec), **self._foresee(choice, spec, router), "chosen": choice is chosen}
            models.append(told)
            await anyio.lowlevel.checkpoint()  # a hostile header takes some ms to be reckoned
        return web.json_response(
            {
                "repository": listing.repository,
                "revision": listing.revision,
                "commit": listing.commit,
                "models": models,
                "others": [_file_view(file) for file in listing.others],
                **self._room_view(router),
            }
        )

    async def start(self, request: web.Request) -> web.Response:
        """Bring a model into the models folder of the first router, or of `router`; the same one twice is one pull.

        The body is JSON: `spec` (`USER/REPO` or `USER/REPO:QUANT`) and if need be `file` (a pattern), `revision`,
        `mmproj` and `draft` (false: not these), `name` (what the model is to be called), `router`. Answered as soon as
        it is known what is to be brought; it is pulled in the background, and a later daemon goes on with it. Of a
        model that `was_there` already, only the content is looked at. `fits` is false if the files alone are more than
        what models may take; `/hub` says more.
        """
        try:
            order = _Order.model_validate_json(await request.read())
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            text = f"POST {request.path}: the body is no pull: {where and where + ': '}{first['msg']}"
            raise BadRequestError(text) from None
        spec = parse(
            order.spec,
            file=order.file,
            revision=order.revision,
            with_projector=order.mmproj,
            with_draft=order.draft,
        )
        event_id, folder = self._daemon.bus.last_id, self._folder(order.router)
        pull = await (await self._daemon.downloads.into(folder)).start(spec, name=order.name)
        router, choice = self._router(order.router), _choice_of(pull.record)
        body = {
            "pull": _pull_view(pull, folder),
            "usual": not spec.quantization and not spec.file,
            **self._room_view(router),
            "fits": self._foresee(choice, spec, router)["fits"],
            "event_id": event_id,
        }
        return web.json_response(body, status=HTTPStatus.ACCEPTED)

    async def pulls(self, request: web.Request) -> web.Response:
        """The pulls that are under way, those that have ended lately, and those that can be gone on with.

        `?id=`: only that one. `problems`: why there may be more, such as a folder that does not answer.
        """
        key = request.query.get("id")
        pulls, refusals = await self._known(key)
        if key is not None and not pulls and refusals:
            raise refusals[0]
        return web.json_response({"pulls": pulls, "problems": [str(each) for each in refusals]})

    async def cancel(self, request: web.Request) -> web.Response:
        """End a pull. What came is kept, and the same pull goes on with it; `?drop=true` removes it.

        `dropped` says whether it was removed: not if another daemon brings the same into that folder. Instead of the
        id the model's name will do, if there is one such pull.
        """
        event_id, drop = self._daemon.bus.last_id, flag(request, "drop")
        key = await self._key(request.match_info["id"])
        is_dropped = await self._daemon.downloads.cancel(key, self._daemon.models_dirs, drop=drop)
        pull = next(iter((await self._known(key))[0]), None)
        return web.json_response({"pull": pull, "dropped": is_dropped, "event_id": event_id})

    def _router(self, name: str | None) -> Router | None:
        """The router that is meant, else the first; None if the fleet has none yet."""
        return next(iter(self._fleet), None) if name is None else self._fleet[name]

    def _folder(self, router: str | None) -> Path:
        found = self._router(router)
        return self._daemon.models_dirs[0] if found is None else found.settings.models_dir

    async def _known(self, key: str | None) -> tuple[list[dict[str, Any]], list[HubError]]:
        """The pulls of all folders, or those of that id; and why there may be more."""
        known, refusals = await self._daemon.downloads.known(self._daemon.models_dirs, key)
        views = [
            _pull_view(each, folder) if isinstance(each, Pull) else _record_view(each, folder) for folder, each in known
        ]
        return views, refusals

    async def _key(self, word: str) -> str:
        """The id of a pull that is called so, by its id or its model's name."""
        if (await self._known(word))[0]:
            return word
        pulls, _ = await self._known(None)
        states = {view["id"]: view["state"] for view in pulls if view["model"] == word}
        named = [key for key, state in states.items() if state != "done"] or list(states)
        return named[0] if len(named) == 1 else word

    def _foresee(self, choice: Choice, spec: Spec, router: Router | None) -> dict[str, Any]:
        """How a model would do on a router."""
        if router is None:
            return {"needed_bytes": {}, "n_ctx": None, "fits": None, "reason": "there is no router yet"}
        capacity, rules = self._fleet.memory.capacity, self._daemon.config.rules
        prospect = foresee(choice, spec, router, capacity=capacity, rules=rules)
        return {
            "needed_bytes": dict(prospect.bytes),
            "n_ctx": prospect.n_ctx,
            "fits": prospect.is_fitting,
            "reason": prospect.reason or None,
        }

    def _room_view(self, router: Router | None) -> dict[str, Any]:
        """What models may take on a router, by device."""
        if router is None:
            return {"router": None, "budget_bytes": {}}
        limits = self._fleet.memory.capacity.limits(router.settings)
        return {"router": router.name, "budget_bytes": {device: limit.bytes for device, limit in limits.items()}}


def _chosen(listing: Listing, spec: Spec) -> Choice | None:
    """The model that is meant; None if it is not said and the usual one cannot be taken.

    Raises:
        HubError: what is asked for is not there.
    """
    try:
        return listing.choose(spec)
    except HubError:
        if spec.quantization or spec.file or not listing.choices:
            raise
        return None


def _choice_view(choice: Choice, spec: Spec) -> dict[str, Any]:
    header = choice.header
    return {
        "name": choice.name,
        "quantization": choice.quantization or None,
        "size_bytes": choice.size_bytes,
        "files": [_file_view(file) for file in choice.files],
        "projector": _file_view(choice.projector) if choice.projector and spec.with_projector else None,
        "draft": _file_view(choice.draft) if choice.draft and spec.with_draft else None,
        "problem": choice.problem or None,
        "architecture": header.architecture if header else None,
        "n_ctx_train": header.context_length if header else None,
    }


def _file_view(file: RemoteFile) -> dict[str, Any]:
    return {"path": file.path, "size_bytes": file.size}


def _pull_view(pull: Pull, folder: Path) -> dict[str, Any]:
    error = pull.error
    return {
        **_said(pull.record, folder),
        "state": pull.state.value,
        "done_bytes": pull.done_bytes,
        "speed_bytes_per_s": pull.speed,
        "left_s": pull.left_s,
        "silent_s": pull.silent_s,
        "files": [_progress_view(file) for file in pull.files],
        "path": str(pull.path) if pull.path else None,
        "was_there": pull.was_there,
        "error": None if error is None else {"why": error.why.value, "detail": str(error), "hint": error.hint or None},
    }


def _record_view(record: Record, folder: Path) -> dict[str, Any]:
    """A pull of which this daemon knows only what is written down."""
    return {
        **_said(record, folder),
        "state": LEFT,
        "done_bytes": None,
        "speed_bytes_per_s": 0.0,
        "left_s": None,
        "silent_s": 0.0,
        "files": [],
        "path": None,
        "was_there": False,
        "error": {"why": record.why, "detail": record.reason, "hint": None} if record.reason else None,
    }


def _said(record: Record, folder: Path) -> dict[str, Any]:
    return {
        "id": record.key,
        "model": record.name,
        "repository": record.repository,
        "revision": record.revision,
        "commit": record.commit,
        "quantization": _choice_of(record).quantization or None,
        "folder": str(folder),
        "size_bytes": record.size_bytes,
    }


def _choice_of(record: Record) -> Choice:
    return Choice(name=record.name, files=record.files)


def _progress_view(file: Progress) -> dict[str, Any]:
    return {
        "name": file.name,
        "stage": file.stage.value,
        "size_bytes": file.size,
        "done_bytes": file.done,
        "speed_bytes_per_s": file.speed,
        "left_s": file.left_s,
        "silent_s": file.silent_s,
        "trouble": file.trouble or None,
        "again": file.is_again,
    }
