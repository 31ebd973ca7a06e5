"""The Hub on the other side of the network: what a repository holds, and the bytes of its files.

What a repository holds is asked with huggingface_hub. Its downloads are not used: they can be neither cancelled nor
bounded, forget to which version of a file a part belongs, and do not look at the hash of what came.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple
from urllib.parse import quote

import anyio
import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from llamavisor.gguf import GgufError, Header, ShortError, parse_beginning
from llamavisor.hub.access import Access, find_access
from llamavisor.hub.failure import HubError, Why, refusal
from llamavisor.hub.listing import Choice, Commit, Listing, RemoteFile, arrange, is_gguf
from llamavisor.hub.patience import Patience
from llamavisor.hub.spec import Spec
from llamavisor.threads import Threads

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

PREFIX_BYTES = (64 * 1024, 2 * 1024 * 1024)
"""So much of a file is fetched to see what it is: the first is enough for what llama.cpp's tools write."""
MAX_HEADERS = 32
"""Of more models of one repository nothing is read: what the Hub allows in a minute is not endless."""
HEADERS_AT_ONCE = 4
MAX_REDIRECTS = 5
MAX_PORT = 65535
GIT_MAX_BYTES = 10_000_000
"""Git itself holds no larger files on the Hub."""
ASKED_AT_ONCE = 8
"""So many repositories are asked about at once."""

_R = TypeVar("_R")
_Ts = TypeVarTuple("_Ts")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_STRONG_ETAG = re.compile(r"(?!W/)[!-~]{1,1000}")
_TOO_MANY = f"only {MAX_HEADERS} models of a repository are looked at"
_TOO_LATE = "the Hub did not tell in time what its header says"
_NO_ANSWER = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What huggingface_hub makes of an answer that is none."""


class _Told(BaseModel):
    """What the Hub tells of a repository: it is held against what can be here, where it comes in, and nowhere later."""

    model_config = ConfigDict(frozen=True)

    commit: Commit
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Body:
    """What comes of a file.

    Attributes:
        begin: the place in the file of the first byte.
        is_whole: whether it is the file from its begin to its end, which comes where parts of it are not to be had.
        total: bytes of the whole file, None if that is not told.
        etag: names this very content, and is strong; empty without one.
        url: from where it comes in the end, None if that is the Hub itself.
        chunks: the bytes. They raise what `Connection.open` does.
    """

    begin: int
    is_whole: bool
    total: int | None
    etag: str
    url: httpx.URL | None
    chunks: AsyncIterator[bytes]


class Connection:
    """What is open to the Hub for a while.

    Args:
        client: open as long as this is used.
        access: how the Hub is reached.
    """

    def __init__(self, client: httpx.AsyncClient, access: Access) -> None:
        self._client = client
        self._access = access

    def __repr__(self) -> str:
        return f"<Connection {self._access.shown}>"

    @asynccontextmanager
    async def open(
        self,
        listing: Listing,
        file: RemoteFile,
        *,
        begin: int = 0,
        end: int | None = None,
        etag: str = "",
        url: httpx.URL | None = None,
    ) -> AsyncIterator[Body]:
        """Asks for a file from `begin` up to `end`, if it is still the one that `etag` names.

        Args:
            listing: the repository and its commit.
            file: one of its files.
            begin: the first byte.
            end: behind the last byte; None for the end of the file.
            etag: of what is here already; if it is another one now, all of the file comes.
            url: where an earlier part of it came from.

        Raises:
            HubError: it does not come, or no more of it.
        """
        what = f"{listing.repository}/{file.path}"
        path = f"{listing.repository}/resolve/{listing.commit}/{quote(file.path)}"
        headers = {"Accept-Encoding": "identity"}
        if url is None and self._access.token is not None:  # httpx keeps it from other hosts
            headers["Authorization"] = f"Bearer {self._access.token.reveal()}"
        if begin or end is not None:
            headers["Range"] = f"bytes={begin}-{'' if end is None else end - 1}"
            if etag:
                headers["If-Range"] = etag
        with _translated(what):
            async with self._client.stream(
                "GET", url or f"{self._access.endpoint}/{path}", headers=headers
            ) as response:
                yield self._body(response, what, begin)

    def _body(self, response: httpx.Response, what: str, begin: int) -> Body:
        status, headers = response.status_code, response.headers
        if status not in {200, 206}:
            told = {name.lower(): value for name, value in headers.items()}
            if status == 416:
                raise HubError(f"{what}: it is shorter than it was", why=Why.WRONG_CONTENT)
            raise refusal(status, told, what=what, has_token=self._access.token is not None)
        total: int | None
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
            if found is None or int(found[1]) != begin:
                raise HubError(f"{what}: another part came than the one that was asked for", why=Why.SERVER)
            total = int(found[3])
        else:
            length = headers.get("Content-Length", "")
            begin, total = 0, int(length) if length.isdigit() else None
        etag = headers.get("ETag", "")
        etag = etag if _STRONG_ETAG.fullmatch(etag) else ""
        url = response.url if response.history else None
        return Body(begin, status == 200, total, etag, url, _chunks(response, what))


class Hub:
    """The Hub.

    Args:
        environ: says how it is reached; it is read anew every time, as is the file of the token.
        patience: how long it is waited for.
    """

    def __init__(self, environ: Mapping[str, str], patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self._environ = environ
        self._threads = Threads(ASKED_AT_ONCE)
        self._own_threads = Threads(1)

    def __repr__(self) -> str:
        return "<Hub>"

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        """Opens what is needed to fetch files.

        Raises:
            HubError: the environment forbids it, or makes no sense.
        """
        access = await self._access()

        async def stay_safe(request: httpx.Request) -> None:
            if (request.url.port or 0) > MAX_PORT:  # the socket would find out, deep in anyio
                raise HubError(f"{access.shown} sends us to a port that is none", why=Why.SERVER)
            if access.endpoint.startswith("https:") and request.url.scheme != "https":
                raise HubError(f"{access.shown} sends us to an address without TLS", why=Why.SERVER)

        async with httpx.AsyncClient(
            timeout=httpx.Timeout(self.patience.stall_s, connect=self.patience.connect_s),
            headers={"User-Agent": "llamavisor"},
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            event_hooks={"request": [stay_safe]},  # called for each redirect, too
        ) as client:
            yield Connection(client, access)

    async def look(self, spec: Spec, *, reads_headers: bool = False) -> Listing:
        """What a repository holds.

        Args:
            spec: its repository and revision count.
            reads_headers: whether the beginning of every model is fetched and read, too: 64 KiB each. What cannot be
                read of those, or not in time for all, is left out.

        Raises:
            HubError: it cannot be known.
        """
        access = await self._access()
        listing = await self.patience.keep_trying(
            lambda: self._ask(spec.repository, _fetch_listing, spec, access, self.patience.stall_s)
        )
        if not reads_headers or not listing.choices:
            return listing
        choices = {number: replace(choice, unread=_TOO_MANY) for number, choice in enumerate(listing.choices)}
        limiter = anyio.CapacityLimiter(HEADERS_AT_ONCE)

        async def read(number: int, choice: Choice) -> None:
            async with limiter:
                choices[number] = await self.inspect(connection, listing, choice)

        with anyio.move_on_after(self.patience.answer_s):
            async with self.connect() as connection, anyio.create_task_group() as tasks:
                for number in _read_first(listing, spec)[:MAX_HEADERS]:
                    tasks.start_soon(read, number, listing.choices[number])
        return replace(listing, choices=tuple(choices.values()))

    async def inspect(self, connection: Connection, listing: Listing, choice: Choice) -> Choice:
        """The same model with what its first file says of it, or why that cannot be had."""
        with anyio.move_on_after(self.patience.answer_s):
            try:
                return replace(choice, header=await self._read(connection, listing, choice.first), unread="")
            except (HubError, GgufError) as exc:
                return replace(choice, unread=str(exc))
        return replace(choice, unread=_TOO_LATE)

    async def _read(self, connection: Connection, listing: Listing, file: RemoteFile) -> Header:
        prefix, url = b"", None
        for wanted in PREFIX_BYTES:
            end = min(wanted, file.size)
            async with connection.open(listing, file, begin=len(prefix), end=end, url=url) as body:
                url = body.url
                prefix = prefix[: body.begin]
                async for chunk in body.chunks:
                    prefix += chunk
                    if len(prefix) >= end:
                        break
            try:
                return parse_beginning(prefix[:end], file.size)
            except ShortError:
                if end == file.size:
                    raise
        raise HubError(f"{file.path}: its header is too long to look at", why=Why.WRONG_CONTENT)

    async def _access(self) -> Access:
        with anyio.move_on_after(self.patience.answer_s) as scope:
            access = await self._own_threads.run(find_access, self._environ, abandon_on_cancel=True)
        if scope.cancelled_caught:
            raise HubError("the token of the Hub cannot be read: its disk does not answer", why=Why.UNAUTHORIZED)
        if access.is_offline:
            hint = "Unset it for the daemon to pull."
            raise HubError("HF_HUB_OFFLINE is set: the Hub is not asked", why=Why.OFFLINE, hint=hint)
        return access

    async def _ask(self, what: str, ask: Callable[[*_Ts], _R], *args: *_Ts) -> _R:
        """Has something asked that blocks, by few at once, and within bounds."""
        with anyio.move_on_after(self.patience.answer_s):
            return await self._threads.run(ask, *args, abandon_on_cancel=True)
        raise HubError(f"{what}: the Hub does not answer", why=Why.STALLED)


def _read_first(listing: Listing, spec: Spec) -> list[int]:
    """The models by their numbers: that which is meant first, for not all of them may be looked at."""
    meant: Choice | None = None
    with suppress(HubError):
        meant = listing.choose(spec)
    return sorted(range(len(listing.choices)), key=lambda number: listing.choices[number] is not meant)


def _fetch_listing(spec: Spec, access: Access, timeout_s: float) -> Listing:
    """What a repository holds at a revision: one request. Blocking, as a stranger's thousand files take their time."""
    import httpx2  # noqa: PLC0415 (half a second, for who pulls nothing)
    from huggingface_hub import HfApi, constants, errors  # noqa: PLC0415 (likewise)

    constants.HF_HUB_DISABLE_TELEMETRY = True  # else it asks the Hub by which agent it may have been started
    token = access.token.reveal() if access.token is not None else False
    api = HfApi(endpoint=access.endpoint, token=token, library_name="llamavisor")
    try:
        info = api.model_info(spec.repository, revision=spec.revision, files_metadata=True, timeout=timeout_s)
        files = [
            {"path": each.rfilename, "size": each.size, "digest": _digest(each)}
            for each in info.siblings or ()
            if each.size is not None and is_gguf(each.rfilename)
        ]
        told = _Told.model_validate({"commit": info.sha, "files": files})
    except errors.HfHubHTTPError as exc:
        headers = {name.lower(): value for name, value in exc.response.headers.items()}
        has_token = access.token is not None
        what = f"{spec.repository} at {spec.revision}" if "Revision" in headers.get("x-error-code", "") else str(spec)
        raise refusal(exc.response.status_code, headers, what=what, has_token=has_token) from None
    except errors.OfflineModeIsEnabled as exc:
        raise HubError("HF_HUB_OFFLINE is set: the Hub is not asked", why=Why.OFFLINE) from exc
    except httpx2.ReadTimeout as exc:
        raise HubError(f"{spec.repository}: the Hub does not answer", why=Why.STALLED) from exc
    except httpx2.HTTPError as exc:
        text = f"{access.shown} cannot be reached: {_cause(exc)}"
        hint = "Look at the network, and at HF_ENDPOINT and the proxy of the daemon."
        raise HubError(text, why=Why.UNREACHABLE, hint=hint) from exc
    except ValidationError as exc:
        where = ".".join(map(str, exc.errors(include_url=False, include_input=False)[0]["loc"]))
        text = f"{spec.repository}: the Hub tells of it what cannot be ({where})"
        raise HubError(text, why=Why.SERVER, hint="Look at HF_ENDPOINT.") from exc
    except (*_NO_ANSWER, httpx2.InvalidURL) as exc:
        text = f"{access.shown} answers what is no answer of a Hub"
        raise HubError(text, why=Why.SERVER, hint="Look at HF_ENDPOINT.") from exc
    return arrange(spec.repository, spec.revision, told.commit, told.files)


def _digest(told: RepoSibling) -> str:
    """What names the content of a file; empty if the Hub does not tell."""
    if told.lfs is not None:
        return str(told.lfs.sha256).lower()
    # A mirror that does not tell of a large file's hash tells that of git's pointer to it.
    return str(told.blob_id or "") if (told.size or 0) <= GIT_MAX_BYTES else ""


async def _chunks(response: httpx.Response, what: str) -> AsyncIterator[bytes]:
    with _translated(what):
        async for chunk in response.aiter_raw():
            yield chunk


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Errors of httpx as ours. What they say themselves may hold a signed address."""
    try:
        yield
    except httpx.ConnectTimeout as exc:
        raise HubError(f"{what}: the server cannot be reached", why=Why.UNREACHABLE) from exc
    except httpx.TimeoutException as exc:
        raise HubError(f"{what}: the server sends nothing any more", why=Why.STALLED) from exc
    except httpx.ConnectError as exc:
        raise HubError(f"{what}: the server cannot be reached: {_cause(exc)}", why=Why.UNREACHABLE) from exc
    except (httpx.TransportError, httpx.StreamError) as exc:
        raise HubError(f"{what}: the connection was cut", why=Why.UNREACHABLE) from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise HubError(f"{what}: the Hub sends us elsewhere, and there is nothing", why=Why.SERVER) from exc
    except ValueError as exc:  # a number of thousands of digits, a host that no host can be called
        raise HubError(f"{what}: the server answers what cannot be understood", why=Why.SERVER) from exc


def _cause(error: BaseException) -> str:
    """What the kernel said, else the kind of error."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return type(error).__name__
