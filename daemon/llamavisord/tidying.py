"""The part of the control API that is about the disk: removing models, and what takes room."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import anyio
from aiohttp import web

from llamavisor.storage import Account, Cleaned, Leftover, Removal, Share
from llamavisord.daemon import Daemon
from llamavisord.query import WaitTimeoutError, flag, wait_s


def tidying_routes(daemon: Daemon, base: str) -> list[web.RouteDef]:
    """What can be asked for; the docstring of a handler says to people what it does."""
    api = _Tidying(daemon)
    return [
        web.delete(base + r"/models/{name:[\s\S]+}", api.remove),
        web.get(f"{base}/disk", api.disk),
        web.post(f"{base}/disk/clean", api.clean),
    ]


class _Tidying:
    """The handlers."""

    def __init__(self, daemon: Daemon) -> None:
        self._storage = daemon.fleet.storage
        self._bus = daemon.bus

    async def remove(self, request: web.Request) -> web.Response:
        """Remove all files of a model from the disk, and nothing else.

        409 while it is in memory, in use or pinned; `?force=true` unloads it first, when its answers have ended, and
        `?wait=` says how long that may take: 504 after that, and nothing is removed. `?dry_run=true` only tells what
        would be removed, with a `token`; with `?token=` only that is. `?folder=` says which one, if models folders
        have a model of that name each.
        """
        event_id, within_s = self._bus.last_id, wait_s(request) or math.inf
        is_dry, name = flag(request, "dry_run"), request.match_info["name"]
        removal = None
        with anyio.move_on_after(within_s):
            removal = await self._storage.remove(
                name,
                folder=request.query.get("folder"),
                force=flag(request, "force"),
                is_dry=is_dry,
                token=request.query.get("token"),
            )
        if removal is None:
            text = f"model {name}: not unloaded within {within_s:g} s; nothing was removed"
            raise WaitTimeoutError(text, hint="it is still to be unloaded: try again later")
        return web.json_response({**_removal_view(removal), "removed": not is_dry, "event_id": event_id})

    async def disk(self, _: web.Request) -> web.Response:
        """Who takes the disk: the models with their files, what is no model, and what is free, folder by folder.

        A folder that cannot be looked at has a `problem`, which says why, and no figures.
        """
        return web.json_response({"folders": [_account_view(each) for each in await self._storage.accounts()]})

    async def clean(self, request: web.Request) -> web.Response:
        """Remove what nobody wants or writes: what is staged, pulls left more than a day ago, and old revisions.

        Those are in caches of the hub, and no model needs them; `?keep_revisions=true` leaves them.
        `?dry_run=true`: only tell of it.
        """
        event_id, is_dry = self._bus.last_id, flag(request, "dry_run")
        cleaned = await self._storage.clean(keep_revisions=flag(request, "keep_revisions"), is_dry=is_dry)
        view = {"folders": [_cleaned_view(each) for each in cleaned], "removed": not is_dry}
        return web.json_response({**view, "event_id": event_id})


def _removal_view(removal: Removal) -> dict[str, Any]:
    return {
        "model": removal.model,
        "folder": removal.folder,
        "files": [
            {"path": path, "size_bytes": file.size_bytes, "link": file.is_link}
            for path, file in zip(removal.paths(), removal.files, strict=True)
        ],
        "size_bytes": removal.size_bytes,
        "kept": list(removal.kept),
        "obstacles": list(removal.obstacles),
        "token": removal.token,
    }


def _account_view(account: Account) -> dict[str, Any]:
    return {
        "path": account.folder,
        "total_bytes": account.disk.total_bytes if account.disk else None,
        "free_bytes": account.disk.free_bytes if account.disk else None,
        "models_bytes": account.models_bytes,
        "leftover_bytes": account.leftover_bytes,
        "models": [_share_view(each) for each in account.models],
        "leftovers": [_leftover_view(account.folder, each) for each in account.leftovers],
        "problem": account.problem or None,
    }


def _share_view(share: Share) -> dict[str, Any]:
    files = [{**asdict(item), "shared_with": list(item.shared_with)} for item in share.files]
    return {"name": share.model, "state": share.state.value, "size_bytes": share.size_bytes, "files": files}


def _leftover_view(folder: str, leftover: Leftover) -> dict[str, Any]:
    return {
        "kind": leftover.kind.value,
        "path": f"{folder.rstrip('/')}/{leftover.rel}",
        "size_bytes": leftover.size_bytes,
        "changed_unix": leftover.changed_at,
        "reason": leftover.reason or None,
        "model": leftover.model or None,
        "pull": leftover.pull or None,
        "under_way": leftover.is_under_way,
    }


def _cleaned_view(cleaned: Cleaned) -> dict[str, Any]:
    return {
        "path": cleaned.folder,
        "size_bytes": cleaned.size_bytes,
        "gone": [_leftover_view(cleaned.folder, each) for each in cleaned.gone],
        "problems": list(cleaned.problems),
    }
