"""What one router is to serve: the models of its folder, as the rules of the configuration make them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import anyio
import anyio.lowlevel

from llamavisor.budgets import Allowance
from llamavisor.catalog import Entry, EntryState
from llamavisor.cause import Cause, Verdict
from llamavisor.folder import Folder
from llamavisor.options import OptionLayer
from llamavisor.rules import ModelRule
from llamavisor.sections import ModelSpec, specify
from llamavisor.shelf import change
from llamavisor.states import Change

FIRST_LOOK_S = 10.0
"""How long a start waits for the first look at its folder; ten thousand headers take five seconds."""
LOOK_AGAIN_S = 1.0
"""How long the end of a model waits for a look at its file."""
_BATCH = 256


class Supply:
    """The models of one folder for one router. Written by the fleet alone.

    Args:
        folder: where the models are.
        router: name of the router.
        rules: tables of options of models, in the order of the configuration.
        base: the option tables of the router, lowest precedence first.
        allowance: what the memory budgets of the router come to, None when they are not known (yet).
        deliver: told of all that is to be served whenever it has changed, and why some of what was is not any more.
    """

    def __init__(
        self,
        folder: Folder,
        router: str,
        rules: Sequence[ModelRule],
        *,
        base: tuple[OptionLayer, ...] = (),
        allowance: Allowance | None = None,
        deliver: Callable[[Mapping[str, ModelSpec], Mapping[str, Change]], None],
    ) -> None:
        self.folder = folder
        self._router = router
        self._rules = tuple(rules)
        self._base = base
        self._allowance = allowance
        self._deliver = deliver
        self._specs: dict[str, ModelSpec] = {}
        self._leaving: dict[str, Change] = {}  # what is not to be served any more, and not simply gone
        self._is_delivered = False
        self._settled: Mapping[str, ModelSpec] = {}  # as it was when the last look had ended: never half of one
        self._take_over(folder.catalog, is_news=False)
        self.settle()

    def __repr__(self) -> str:
        return f"<Supply of {self._router}: {len(self._specs)} models>"

    def update(self, changed: Iterable[Entry], removed: Iterable[str] = ()) -> None:
        """Take over what has changed in the folder."""
        self._take_over(changed, removed, is_news=True)

    def _take_over(self, changed: Iterable[Entry], removed: Iterable[str] = (), *, is_news: bool) -> None:
        """Take over entries; those that are no news have been there before, and nobody waited for them."""
        for name in removed:
            self._specs.pop(name, None)
            self._leaving.pop(name, None)
        for entry in changed:
            is_ready = entry.state is EntryState.READY
            spec = specify(entry, self._rules, router=self._router, base=self._base, allowance=self._allowance)
            known = self._specs.get(entry.name)
            self._leaving.pop(entry.name, None)
            if spec is not None and is_ready:
                if known is None or not known.is_same(spec):
                    self._specs[entry.name] = spec if is_news else replace(spec, changed_at=0.0)
                continue
            self._specs.pop(entry.name, None)
            if is_ready:
                self._leaving[entry.name] = Change.MOVED
            elif known is not None and spec is not None and change(known, spec) is Change.OVERWRITTEN:
                self._leaving[entry.name] = Change.OVERWRITTEN

    def settle(self) -> None:
        """A look at the folder has ended. Before the first one nothing is known, which is not the same as nothing."""
        if not self.folder.catalog.has_looked:
            return
        if not _is_same(self._settled, self._specs) or not self._is_delivered:
            self._is_delivered = True
            self._settled = dict(self._specs)
            self.deliver()

    def deliver(self) -> None:
        """Tell what is to be served."""
        self._deliver(self._settled, dict(self._leaving))

    async def follow(
        self, rules: Sequence[ModelRule], base: tuple[OptionLayer, ...], allowance: Allowance | None = None
    ) -> tuple[str, ...]:
        """Go over to other tables and budgets; returns the names of the models for which they say something else."""
        if (tuple(rules), base, allowance) == (self._rules, self._base, self._allowance):
            return ()
        self._rules, self._base, self._allowance, before = tuple(rules), base, allowance, self._settled
        entries = list(self.folder.catalog)
        for at in range(0, len(entries), _BATCH):
            self._take_over(entries[at : at + _BATCH], is_news=False)
            await anyio.lowlevel.checkpoint()
        self.settle()
        after = self._settled
        return tuple(sorted(name for name in before.keys() | after if before.get(name) is not after.get(name)))

    async def take(self) -> Mapping[str, ModelSpec] | Verdict:
        """What is to be served now, or why that is not known: the folder was never seen.

        A folder that was seen once and cannot be looked at now is served as it was.
        """
        catalog = self.folder.catalog
        if not catalog.has_looked and not catalog.stale:
            with anyio.move_on_after(FIRST_LOOK_S):
                await self.folder.answered.wait()
        if catalog.has_looked:
            return self._settled
        reason = catalog.stale or f"does not answer for {FIRST_LOOK_S:.0f} s"
        hint = "create it, correct models_dir, or let this user read it"
        return Verdict(Cause.MODELS_DIR, f"models_dir {self.folder.path} {reason}", hint, is_obstacle=True)

    async def look_again(self) -> None:
        """See that what is known of the files is not older than this call, or give up soon."""
        if not self.folder.catalog.stale and not self.folder.is_late:  # the second of two need not wait for nothing
            await self.folder.look(within_s=LOOK_AGAIN_S)


class Sized:
    """A supply that is told before every start what its router may take of this machine; a `launch.ModelSource`.

    Args:
        supply: what there is to be served.
        size_up: tells it that.
    """

    def __init__(self, supply: Supply, size_up: Callable[[], Awaitable[None]]) -> None:
        self._supply = supply
        self._size_up = size_up

    def __repr__(self) -> str:
        return f"<Sized {self._supply!r}>"

    async def take(self) -> Mapping[str, ModelSpec] | Verdict:
        """What there is to be served, by name, or why that is not known."""
        await self._size_up()
        return await self._supply.take()

    async def look_again(self) -> None:
        """See that what is known is not older than this call."""
        await self._supply.look_again()


def _is_same(one: Mapping[str, ModelSpec], other: Mapping[str, ModelSpec]) -> bool:
    """Whether both hold the very same specs: one that says nothing new is never replaced by an equal one."""
    return len(one) == len(other) and all(one.get(name) is spec for name, spec in other.items())
