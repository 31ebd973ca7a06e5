"""Everything that must be right before a router can be started, and its start: the clean room of one llama-server.

A router starts with an environment of our own making, empty configuration and cache folders (a stray config.ini can
turn it into a single-model server), a generated preset, and explicit values for every option that has ever changed its
default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import anyio

from llamavisor import flags, footprint, gauge, preset
from llamavisor.api import RouterApi, try_model
from llamavisor.appraisal import Appraisal, Appraiser
from llamavisor.binary import Binary, ProbeCache, find, list_devices
from llamavisor.cause import Cause, Verdict
from llamavisor.child import Child
from llamavisor.child import find as find_child
from llamavisor.errors import BinaryError, OptionError
from llamavisor.offer import link_all, make_offer, to_preset
from llamavisor.output import OutputFile
from llamavisor.ports import find_port, is_listener
from llamavisor.process import Process, Spawner
from llamavisor.rules import ModelRule
from llamavisor.sections import ModelSpec, NamedFile, named_files, section, try_rule
from llamavisor.settings import RouterSettings, base_url
from llamavisor.shelf import Offer, Offered
from llamavisor.shortage import SHORTAGE_HINT, is_shortage
from llamavisor.sight import Sights
from llamavisor.threads import Threads, run_in_thread
from llamavisor.usage import UsageReader

REQUEST_TIMEOUT_S = 3600
"""llama-server's own read and write timeout, said explicitly: a long prompt is silent for minutes."""
FILES_TIMEOUT_S = 5.0
"""How long files that tables name may take to be found: they may lie on a dead mount."""
LOOKS_MAX = 16
"""How many such files are looked at side by side, those included that never answer."""
HTTP_THREADS = 256
"""llama-server starves when requests outnumber its HTTP threads; 256 never did in our trials."""

PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH")
PASSED_ON_PREFIXES = ("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "GGML_", "VK_", "OMP_")
_START_LINES = 1000
_SYSTEM_CONFIG = Path("/etc/llama.cpp/config.ini")


class ModelSource(Protocol):
    """Knows the models that there are for a router; `supply.Supply` is the real one. It answers within seconds."""

    async def take(self) -> Mapping[str, ModelSpec] | Verdict:
        """What there is to be served, by name, or why that is not known."""
        ...

    async def look_again(self) -> None:
        """See that what is known is not older than this call."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A router that can be started.

    Attributes:
        found: the llama-server and what it can do.
        options: what its models are told.
        env: the whole environment of the process.
        port: TCP port that it will listen on.
        specs: the models that it is to serve, by name; llama-server opens the file of every one before it listens.
        warnings: what a person should know although the router can start.
    """

    found: Binary
    options: flags.LaunchOptions
    env: Mapping[str, str]
    port: int
    specs: Mapping[str, ModelSpec] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Launcher:
    """Prepares and starts the processes of one router.

    Args:
        settings: what the router is told to be.
        spawner: starts processes that carry our marker.
        state_dir: folder for the generated files of this router; created when missing.
        log_dir: folder for its output.
        log_size_bytes: size at which its output file is rotated.
        probes: remembers what each llama-server can do.
        source: knows which models there are for this router.
        environ: the daemon's own environment, of which a short list is passed on.
        sights: knows which GPUs llama-servers see; one for all routers.
        appraiser: knows what models are expected to take; likewise.
    """

    def __init__(
        self,
        settings: RouterSettings,
        *,
        spawner: Spawner,
        state_dir: Path,
        log_dir: Path,
        log_size_bytes: int,
        probes: ProbeCache,
        source: ModelSource,
        environ: Mapping[str, str],
        sights: Sights | None = None,
        appraiser: Appraiser | None = None,
    ) -> None:
        self.settings = settings
        self.output = OutputFile(log_dir / f"{settings.name}.log", cap_bytes=log_size_bytes)
        self._spawner = spawner
        self._dir = state_dir / "routers" / settings.name
        self._preset = self._dir / "preset.ini"
        self._links = self._dir / "models"
        self._probes = probes
        self._source = source
        self._standing: tuple[Binary, Offer] | None = None  # what was written last, and for which build
        self._looks: dict[str, Threads] = {}  # at files that tables name, by path; one may never come back
        self._environ = environ
        self._sights = sights or Sights()
        self._appraiser = appraiser or Appraiser()

    def __repr__(self) -> str:
        return f"<Launcher {self.settings.name} in {self._dir}>"

    async def prepare(self) -> Launch | Verdict:
        """Look at everything that a start needs, and change nothing: what can be started, or what stands in the way.

        Called before every start, and every second while a router is FAILED, so that it recovers by itself.
        """
        specs = await self._source.take()
        if isinstance(specs, Verdict):
            return specs
        return await run_in_thread(self._prepare, specs)

    def _prepare(self, specs: Mapping[str, ModelSpec]) -> Launch | Verdict:
        env = self._env()
        try:
            found = self._find(env)
            options = flags.resolve(self.settings.layers, found.flags, binary=str(found.path))
        except BinaryError as error:
            if is_shortage(error.__cause__):
                return Verdict(Cause.SPAWN, str(error), SHORTAGE_HINT)
            return Verdict(Cause.BAD_BINARY, str(error), error.hint, is_obstacle=True)
        except OptionError as error:
            return Verdict(Cause.BAD_OPTION, str(error), error.hint, is_obstacle=True)
        port = find_port(self.settings.host, self.settings.port)
        if isinstance(port, Verdict):
            return port
        warnings = []
        if _SYSTEM_CONFIG.exists():
            warnings.append(f"{_SYSTEM_CONFIG} is read by llama-server too and may change what it does")
        return Launch(found, options, env, port, specs, tuple(warnings))

    async def sight(
        self, devices: Sequence[gauge.Device], *, is_fresh: bool = False
    ) -> tuple[footprint.Device, ...] | None:
        """The GPUs that the router sees, in its order; None when its llama-server cannot be asked.

        Args:
            devices: all that the gauge has found.
            is_fresh: whether it is asked in any case; else what it said lately will do.
        """
        env = self._env()
        try:
            found = await run_in_thread(self._find, env, abandon_on_cancel=True)
        except BinaryError:
            return None
        if is_fresh:
            self._sights.forget(found, env)
        return await self._sights.look(found, env, devices, router=self.settings.name)

    async def appraise(
        self, launch: Launch, offered: Offered, devices: tuple[footprint.Device, ...]
    ) -> Appraisal | None:
        """What a model is expected to take, None when nobody can say.

        Args:
            launch: what `prepare` returned.
            offered: the model, as the router was told of it.
            devices: the GPUs that the router sees, as `sight` told.
        """
        return await self._appraiser.appraise(launch.found, launch.env, offered, devices)

    def _find(self, env: Mapping[str, str]) -> Binary:
        return self._probes.probe(find(self.settings.llama_server), env)

    async def missing_devices(self, launch: Launch) -> tuple[str, ...]:
        """The devices that the options ask for and llama-server does not show, seen with the router's own environment.

        A driver may load late at boot; nothing falls back to the CPU silently.
        """
        if not launch.options.needs_gpu:
            return ()
        try:
            visible = await run_in_thread(list_devices, launch.found.path, launch.env)
        except BinaryError:
            visible = ()
        missing = tuple(device for device in launch.options.required_devices if device not in visible)
        if not launch.options.required_devices and not visible:
            missing = ("any GPU",)
        if missing:
            self._sights.forget(launch.found, launch.env)
        return missing

    async def is_replaced(self, launch: Launch) -> bool:
        """Whether llama-server or one of its libraries is no longer the file that was started.

        A router starts every model from its own path: the models of a replaced one would be of another build, and
        those of a removed one fail in an endless loop.
        """
        return await run_in_thread(_is_replaced, launch.found)

    async def write_offer(
        self, launch: Launch, specs: Mapping[str, ModelSpec], *, kept: Mapping[str, Offered], before: Offer
    ) -> Offer:
        """Write down what the router is told of its models: it reads that when it starts, and in a reload.

        A start on a full disk is a start on what was written last: the models that came since can wait, the others not.

        Args:
            launch: what `prepare` returned.
            specs: what it is to serve, by name.
            kept: what must stand there as before, because it runs.
            before: the last offer to the same process; there is none at a start.

        Returns:
            What stands there.

        Raises:
            OptionError: what would be written would stop or wedge the router; the old files stay.
            OSError: it cannot be written; the old files stay.
        """
        missing = await self._missing({name: spec for name, spec in specs.items() if name not in kept})

        def work() -> Offer:
            offer = make_offer(
                specs,
                kept=kept,
                before=before,
                missing=missing,
                flags=launch.found.flags,
                binary=str(launch.found.path),
            )
            try:
                self._write(launch, offer)
            except OSError:
                standing = None if before.models else self._still_stands(launch)
                if standing is None:
                    raise
                return standing
            return offer

        return await run_in_thread(work)

    async def _missing(self, specs: Mapping[str, ModelSpec]) -> dict[str, str]:
        """Which models cannot be served because of files that their tables name, and why."""
        named = {name: files for name, spec in specs.items() if (files := named_files(spec.layers))}
        problems = await self._look_at({file for files in named.values() for file in files})
        found = {name: [problem for file in files if (problem := problems[file])] for name, files in named.items()}
        return {name: reasons[0] for name, reasons in found.items() if reasons}

    async def _look_at(self, files: Collection[NamedFile]) -> dict[NamedFile, str | None]:
        """What is wrong with each of these files.

        One may lie on a dead mount: it is given up then, and not looked at again before that look has come back.
        """
        problems: dict[NamedFile, str | None] = {file: file.complain("does not answer") for file in files}

        async def look(path: str) -> None:
            self._looks = {path: threads for path, threads in self._looks.items() if threads.at_work}
            if path in self._looks or len(self._looks) >= LOOKS_MAX:
                return
            threads = self._looks[path] = Threads(1)
            same = [file for file in files if file.path == path]  # several tables may name it
            with anyio.move_on_after(FILES_TIMEOUT_S):
                problems.update(await threads.run(_problems_of, same, abandon_on_cancel=True))

        remaining = sorted({file.path for file in files})
        while remaining:
            batch, remaining = remaining[: LOOKS_MAX // 2], remaining[LOOKS_MAX // 2 :]
            async with anyio.create_task_group() as group:
                for path in batch:
                    group.start_soon(look, path)
        return problems

    async def objection(self, launch: Launch, spec: ModelSpec) -> str | None:
        """Why a model would be withheld, None if it would not: it is better left as it is then."""
        missing = await self._missing({spec.name: spec})
        try:
            section(spec, launch.found.flags, binary=str(launch.found.path))
        except OptionError as error:
            return str(error)
        return missing.get(spec.name)

    async def put_back(self, launch: Launch, offer: Offer) -> None:
        """Write an earlier offer down again, after the router has refused the one that followed it.

        Raises:
            OSError: it cannot be written.
        """
        await run_in_thread(self._write, launch, offer)

    def _write(self, launch: Launch, offer: Offer) -> None:
        for folder in (self._dir, self._dir / "config", self._dir / "cache", self.output.path.parent):
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        wanted = to_preset(offer)
        preset.lint(wanted, launch.found.flags)
        preset.write(self._preset, wanted)
        link_all(self._links, offer)
        self._standing = launch.found, offer

    def _still_stands(self, launch: Launch) -> Offer | None:
        """What was written last for this very build, if there are models in it and the preset still says so."""
        build, offer = self._standing or (None, Offer())
        stands = build is launch.found and offer.models and preset.stands(self._preset, to_preset(offer))
        return offer if stands else None

    async def refusals(self, rules: Sequence[ModelRule]) -> list[str]:
        """What of the tables of models cannot be done, one line for each; empty if all can.

        It is looked at with the llama-server that is found, and whether the files are there that they name.
        """
        problems = await run_in_thread(self._refusals, rules)
        missing = await self._look_at({file for rule in rules for file in named_files((rule.layer,))})
        return [*problems, *(problem for problem in missing.values() if problem)]

    def _refusals(self, rules: Sequence[ModelRule]) -> list[str]:
        try:
            found = self._find(self._env())
        except BinaryError:
            return []  # nothing can be said without one
        problems = []
        for rule in rules:
            try:
                try_rule(rule, self.settings.layers, found.flags, binary=str(found.path))
            except OptionError as error:
                problems.append(f"{error} ({error.hint})" if error.hint else str(error))
        return problems

    async def spawn(self, launch: Launch, *, autoload: bool) -> Process:
        """Start the router on what `write_offer` wrote.

        Args:
            launch: what `prepare` returned.
            autoload: whether a client's request may load a model, if the settings allow it.

        Raises:
            SpawnError: the process could not be started.
        """
        return await self._spawner.spawn(
            self._argv(launch, autoload=autoload), env=launch.env, output=self.output.path, cwd=self._dir
        )

    async def look_again(self) -> None:
        """See that what is known of the models' files is not older than this call, or give up soon."""
        await self._source.look_again()

    def usage_of(self, port: int) -> UsageReader:
        """A reader of how busy the model behind a child's port is."""
        return UsageReader(port, api_key=self.settings.api_key)

    async def try_model(self, port: int) -> str | None:
        """Have the model behind a child's port do something; what went wrong, None if it works."""
        return await try_model(port, api_key=self.settings.api_key)

    def connect(self, launch: Launch) -> RouterApi:
        """A client of this router, started as `launch` says."""
        return RouterApi(base_url(self.settings.host, launch.port), api_key=self.settings.api_key)

    async def find_child(self, router_pid: int, model: str) -> Child | None:
        """The process that serves `model` under this router's process, None when there is none yet."""
        return await run_in_thread(find_child, router_pid, model)

    async def is_listening(self, router_pid: int, launch: Launch, *, log_mark: int) -> bool:
        """Whether this very process holds the router's port, and not somebody else who answers there.

        Args:
            router_pid: the process.
            launch: what it was started as.
            log_mark: size of the output in bytes when it was started. What it says of itself since then is the quick
                answer; the kernel's, over ten milliseconds for all of its sockets, is for routers told to be silent.
        """
        if any("listening on" in line for line in self.output.tail(_START_LINES, since=log_mark)):
            return True
        return await run_in_thread(is_listener, router_pid, launch.port)

    def _argv(self, launch: Launch, *, autoload: bool) -> list[str]:
        settings = self.settings
        argv = [
            *(str(launch.found.path), "--host", settings.host, "--port", str(launch.port)),
            *("--models-dir", str(self._links), "--models-preset", str(self._preset)),
            # Its own cap would cut off whom it does not know to be busy: who decides about loads counts models too.
            *("--models-max", str(settings.models_max if settings.autoload else 0)),
            *("--timeout", str(REQUEST_TIMEOUT_S), "--threads-http", str(HTTP_THREADS)),
        ]
        if launch.found.flags.find("--log-colors") is not None:
            argv += ["--log-colors", "off"]
        if not (autoload and settings.autoload):
            argv.append("--no-models-autoload")
        # By default llama-server lets every web page that a browser shows talk to it.
        cors = "--cors-origins"
        if launch.found.flags.find(cors) is not None and cors not in launch.options.listener_args:
            argv += [cors, "localhost"]
        return [*argv, *launch.options.listener_args]

    def _env(self) -> dict[str, str]:
        env = {
            name: value
            for name, value in self._environ.items()
            if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
        }
        # Without this CUDA numbers devices by speed, nvidia-smi by bus: the same name must mean the same card.
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        # Where gdb is installed, a failing assertion runs it: a second of delay and a hundred lines of log.
        env["GGML_NO_BACKTRACE"] = "1"
        env |= dict(self.settings.env)
        env["XDG_CONFIG_HOME"] = str(self._dir / "config")
        env["LLAMA_CACHE"] = str(self._dir / "cache")
        if self.settings.api_key is not None:
            env["LLAMA_API_KEY"] = self.settings.api_key
        return env


def _problems_of(files: Iterable[NamedFile]) -> dict[NamedFile, str | None]:
    return {file: file.problem() for file in files}


def _is_replaced(found: Binary) -> bool:
    """Looked at by name: to list a folder takes a descriptor, and without one nothing would seem to be there."""
    return any(_is_other(found.path.parent / name, known) for name, *known in found.fingerprint.files)


def _is_other(path: Path, known: Sequence[int]) -> bool:
    try:
        now = path.stat()
    except OSError:
        return any(known)  # a dangling link is known as such
    return [now.st_ino, now.st_mtime_ns, now.st_size] != known
