"""What is looked at before a router is started, and what it is started with."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from fakes import FakeLlamaServer
from llamavisor import footprint, gauge, gguf
from llamavisor.binary import ProbeCache
from llamavisor.catalog import FileId
from llamavisor.cause import Cause, Verdict
from llamavisor.launch import Launch, Launcher, ModelSource
from llamavisor.options import ModelOptions, OptionLayer
from llamavisor.process import Spawner
from llamavisor.rules import ModelRule, ModelSettings
from llamavisor.sections import ModelSpec, NamedFile
from llamavisor.settings import RouterSettings
from llamavisor.shelf import Offer

pytestmark = pytest.mark.anyio

Make = Callable[..., Launcher]
FOLDER_MISSING = Verdict(Cause.MODELS_DIR, "models_dir /srv/models does not exist", "create it", is_obstacle=True)


class Known:
    """Models that are known without a folder, or why they are not."""

    def __init__(self, known: Mapping[str, ModelSpec] | Verdict) -> None:
        self.known = known

    async def take(self) -> Mapping[str, ModelSpec] | Verdict:
        """What is known."""
        return self.known

    async def look_again(self) -> None:
        """Nothing changes."""


def spec(name: str, path: Path, **how: object) -> ModelSpec:
    """A model of one file."""
    return ModelSpec(name=name, path=str(path), files=(FileId(1, 1, path.stat().st_size, 1),), **how)


@pytest.fixture
def launcher(
    tmp_path: Path, models_dir: Path, free_port: int, fake_llama_server: Callable[..., FakeLlamaServer]
) -> Make:
    """Makes a launcher of a fake llama-server; what is not said is in order."""

    def make(
        *, environ: dict[str, str] | None = None, source: ModelSource | None = None, **settings: object
    ) -> Launcher:
        told = {"port": free_port, "models_dir": models_dir, "llama_server": str(fake_llama_server()), **settings}
        return Launcher(
            RouterSettings(name="main", **told),
            spawner=Spawner("test"),
            state_dir=tmp_path / "state",
            log_dir=tmp_path / "logs",
            log_size_bytes=1_000_000,
            probes=ProbeCache(),
            source=source or Known({path.stem: spec(path.stem, path) for path in models_dir.iterdir()}),
            environ=environ or {"PATH": os.environ["PATH"]},
        )

    return make


async def launch_of(launcher: Launcher) -> Launch:
    """What can be started."""
    found = await launcher.prepare()
    assert isinstance(found, Launch), found
    return found


async def obstacle_of(launcher: Launcher) -> Verdict:
    """What stands in the way; a start would be pointless, and we can see for ourselves when it has gone."""
    found = await launcher.prepare()
    assert isinstance(found, Verdict)
    assert found.is_permanent
    assert found.is_obstacle
    assert found.hint
    return found


async def test_the_models_are_told(launcher: Make) -> None:
    """What there is to serve is known before the start: its deadline grows with it."""
    assert sorted((await launch_of(launcher())).specs) == ["alpha", "beta", "gamma"]


async def test_prepare_changes_nothing(launcher: Make, tmp_path: Path) -> None:
    """A look writes no file: it is taken every second while a router is FAILED."""
    await launch_of(launcher())
    assert not (tmp_path / "state").exists()


async def test_environment_is_a_short_list(launcher: Make) -> None:
    """Nothing of the daemon's environment that could change llama-server reaches it; what drivers need does."""
    environ = {
        "PATH": "/bin",
        "HOME": "/home/me",
        "CUDA_VISIBLE_DEVICES": "1",
        "HIP_VISIBLE_DEVICES": "0",
        "LLAMA_ARG_MODEL": "/evil.gguf",
        "LLAMA_SERVER_ROUTER_PORT": "1",
        "LLAMA_CACHE": "/home/me/cache",
        "XDG_CONFIG_HOME": "/home/me/.config",
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "LISTEN_FDS": "1",
        "HF_TOKEN": "secret",
        "http_proxy": "http://proxy",
    }
    env = dict((await launch_of(launcher(environ=environ))).env)
    assert env.pop("XDG_CONFIG_HOME").endswith("state/routers/main/config")
    assert env.pop("LLAMA_CACHE").endswith("state/routers/main/cache")
    assert env == {
        "PATH": "/bin",
        "HOME": "/home/me",
        "CUDA_VISIBLE_DEVICES": "1",
        "HIP_VISIBLE_DEVICES": "0",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GGML_NO_BACKTRACE": "1",
    }


async def test_own_environment_and_key(launcher: Make) -> None:
    """The router's own variables win over the daemon's, and the key is in the environment, not on the command line."""
    told = launcher(
        environ={"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}, env=(("CUDA_VISIBLE_DEVICES", "1"),), api_key="k3y"
    )
    launch = await launch_of(told)
    assert launch.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert launch.env["LLAMA_API_KEY"] == "k3y"
    assert "k3y" not in " ".join(told._argv(launch, autoload=True))
    assert "k3y" not in repr(told.settings)


async def test_who_decides_about_loads(launcher: Make) -> None:
    """A router that loads by itself has a cap of its own; one that does not has none, for it would cut off clients."""
    told = launcher(models_max=3)
    launch = await launch_of(told)
    for autoload, expected in ((True, []), (False, ["--no-models-autoload"])):
        argv = told._argv(launch, autoload=autoload)
        assert argv[argv.index("--models-max") + 1] == "3"
        assert [word for word in argv if "autoload" in word] == expected
    ours = launcher(models_max=3, autoload=False)
    for autoload in (True, False):
        argv = ours._argv(launch, autoload=autoload)
        assert argv[argv.index("--models-max") + 1] == "0"
        assert argv.count("--no-models-autoload") == 1


async def test_what_the_router_sees(launcher: Make, fake_llama_server: Callable[..., FakeLlamaServer]) -> None:
    """Its llama-server is asked, which need not be able to start a router now; one that is not there sees nothing."""
    build = fake_llama_server(devices=["CUDA0: NVIDIA A card (100 MiB, 60 MiB free)"])
    card = gauge.Device("0000:01:00.0", "nvidia", "NVIDIA A card", rank=0)
    told = launcher(llama_server=str(build), source=Known(FOLDER_MISSING))
    assert await told.sight((gauge.RAM, card)) == (footprint.Device("CUDA0", card.id, 60 * 1024**2),)
    assert await launcher().sight((gauge.RAM, card)) == ()
    assert await launcher(llama_server="/no/llama-server").sight((card,)) is None


async def test_what_a_model_is_expected_to_take(launcher: Make, models_dir: Path) -> None:
    """It is appraised as the router was told of it; a build without the tool leaves what the header says."""
    path = models_dir / "alpha.gguf"
    told = launcher(source=Known({"alpha": spec("alpha", path, header=gguf.read(path))}))
    launch = await launch_of(told)
    offer = await told.write_offer(launch, launch.specs, kept={}, before=Offer())
    found = await told.appraise(launch, offer.models["alpha"], ())
    assert found is not None
    assert found.footprint.source is footprint.Source.FORMULA
    assert found.footprint.bytes[footprint.RAM] > path.stat().st_size
    assert found.n_ctx == 4096


async def test_models_options_are_in_the_preset_alone(launcher: Make, tmp_path: Path) -> None:
    """What concerns models is in the preset, because the command line would beat every model's own settings."""
    layer = OptionLayer("[defaults]", ModelOptions(ctx_size=512, args=("--temp", "0.5")))
    known = await launcher().prepare()
    assert isinstance(known, Launch)
    source = Known({name: replace(each, base=(layer,)) for name, each in known.specs.items()})
    told = launcher(layers=(layer,), source=source)
    launch = await launch_of(told)
    argv = " ".join(told._argv(launch, autoload=True))
    assert "512" not in argv.replace(str(told.settings.port), "")
    assert "--temp" not in argv
    await told.write_offer(launch, launch.specs, kept={}, before=Offer())
    preset = (tmp_path / "state/routers/main/preset.ini").read_text()
    assert "ctx-size = 512" in preset
    assert "temperature = 0.5" in preset
    assert "stop-timeout = 3" in preset


async def test_unknown_models(launcher: Make) -> None:
    """Why it is not known what there is to serve is told before anything else is looked at."""
    assert await obstacle_of(launcher(source=Known(FOLDER_MISSING), llama_server="/no")) == FOLDER_MISSING


async def test_taken_port(launcher: Make) -> None:
    """N1: a taken port is told with who holds it."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        told = await obstacle_of(launcher(port=holder.getsockname()[1]))
    assert told.cause is Cause.PORT_TAKEN
    assert f"(pid {os.getpid()})" in told.reason


@pytest.mark.parametrize("host", ["a..b", "no-such-host.invalid", "192.0.2.1", f"{'x' * 64}.org"])
async def test_address_that_is_not_ours(launcher: Make, host: str) -> None:
    """An address that cannot be bound is told with itself, whatever the name service makes of it."""
    told = await obstacle_of(launcher(host=host))
    assert told.cause is Cause.PORT_TAKEN
    assert host in told.reason
    assert "host" in told.hint


async def test_missing_binary(launcher: Make, tmp_path: Path) -> None:
    """P5: a llama-server that is not there is told by its name."""
    told = await obstacle_of(launcher(llama_server=str(tmp_path / "llama-server")))
    assert told.cause is Cause.BAD_BINARY
    assert str(tmp_path / "llama-server") in told.reason


async def test_option_that_the_build_does_not_know(
    launcher: Make, fake_llama_server: Callable[..., FakeLlamaServer]
) -> None:
    """An option that the build does not know is told with its name and the binary."""
    old = fake_llama_server(missing_options=["--fit", "-fit"])
    layers = (OptionLayer("[defaults]", ModelOptions(fit=True)),)
    told = await obstacle_of(launcher(llama_server=str(old), layers=layers))
    assert told.cause is Cause.BAD_OPTION
    assert "fit" in told.reason
    assert str(old) in told.reason


async def test_unwritable_state(launcher: Make, tmp_path: Path) -> None:
    """R1: a state folder that cannot be written is an OSError with its name."""
    (tmp_path / "state").write_text("a file where the folder should be")
    told = launcher()
    launch = await launch_of(told)
    with pytest.raises(OSError, match="state"):
        await told.write_offer(launch, launch.specs, kept={}, before=Offer())


@pytest.mark.parametrize(
    ("options", "shown", "missing"),
    [
        (ModelOptions(), [], ()),
        (ModelOptions(gpu_layers="auto"), [], ()),
        (ModelOptions(gpu_layers="all"), [], ("any GPU",)),
        (ModelOptions(gpu_layers="all"), ["CUDA0: A card (1 MiB, 1 MiB free)"], ()),
        (ModelOptions(devices=("CUDA0", "CUDA1")), ["CUDA0: A card (1 MiB, 1 MiB free)"], ("CUDA1",)),
        (ModelOptions(devices=("none",)), [], ()),
    ],
)
async def test_missing_devices(
    launcher: Make,
    fake_llama_server: Callable[..., FakeLlamaServer],
    options: ModelOptions,
    shown: list[str],
    missing: tuple[str, ...],
) -> None:
    """What the options ask for and llama-server does not show is missing; "auto" asks for nothing."""
    told = launcher(llama_server=str(fake_llama_server(devices=shown)), layers=(OptionLayer("x", options),))
    assert await told.missing_devices(await launch_of(told)) == missing


async def test_files_that_do_not_answer(launcher: Make, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F14: a file that a table names on a dead mount keeps its model from the router, and nothing else waits for it."""
    answers, looks = threading.Event(), []

    def problem(file: NamedFile) -> str | None:
        if not file.path.startswith("/dead"):
            return None
        looks.append(file.path)
        answers.wait()
        return None

    monkeypatch.setattr(NamedFile, "problem", problem)
    monkeypatch.setattr("llamavisor.launch.FILES_TIMEOUT_S", 0.5)
    specs = {path.stem: spec(path.stem, path) for path in models_dir.iterdir()}
    for name, folder in (("alpha", "/dead"), ("beta", "/alive")):
        table = OptionLayer(f'[model."{name}"]', ModelSettings(chat_template=f"{folder}/t.jinja"))
        specs[name] = replace(specs[name], layers=(table,))
    told = launcher(source=Known(specs))
    launch = await launch_of(told)
    try:
        for _ in range(3):
            offer = await told.write_offer(launch, specs, kept={}, before=Offer())
            assert set(offer.models) == {"beta", "gamma"}
            assert offer.withheld["alpha"].reason == '[model."alpha"]: chat_template /dead/t.jinja does not answer'
            assert await told.objection(launch, specs["alpha"]) == offer.withheld["alpha"].reason
            assert await told.objection(launch, specs["beta"]) is None
        assert looks == ["/dead/t.jinja"], "a second look beside one that hangs"
    finally:
        answers.set()


async def test_files_are_looked_at_however_busy_others_are(launcher: Make, models_dir: Path, tmp_path: Path) -> None:
    """A file that hangs elsewhere takes the threads of nobody who looks here."""
    (tmp_path / "t.jinja").touch()
    table = OptionLayer('[model."alpha"]', ModelSettings(chat_template=f"{tmp_path}/t.jinja"))
    alpha = replace(spec("alpha", models_dir / "alpha.gguf"), layers=(table,))
    told = launcher(source=Known({"alpha": alpha}))
    launch = await launch_of(told)
    limiter = anyio.to_thread.current_default_thread_limiter()
    others = [object() for _ in range(int(limiter.total_tokens))]
    for other in others:
        limiter.acquire_on_behalf_of_nowait(other)
    assert await told.objection(launch, alpha) is None
    for other in others:
        limiter.release_on_behalf_of(other)


async def test_a_file_that_two_tables_name(launcher: Make, models_dir: Path, tmp_path: Path) -> None:
    """It is there for both; and if it is not, each model is told so."""
    file = tmp_path / "t.jinja"
    specs = {
        name: replace(spec(name, models_dir / "alpha.gguf"), layers=(OptionLayer(f"[model.{name}]", settings),))
        for name, settings in dict.fromkeys(("one", "two"), ModelSettings(chat_template=str(file))).items()
    }
    told = launcher(source=Known(specs))
    launch = await launch_of(told)
    missing = await told.write_offer(launch, specs, kept={}, before=Offer())
    assert {name: each.reason for name, each in missing.withheld.items()} == {
        name: f"[model.{name}]: chat_template {file} is not there" for name in specs
    }
    file.touch()
    assert not (await told.write_offer(launch, specs, kept={}, before=Offer())).withheld


async def test_rules_are_tried_with_their_files(launcher: Make, tmp_path: Path) -> None:
    """A table that the found llama-server does not take, or that names a file that is not there, is refused."""
    gone = tmp_path / "gone.gguf"
    rules = [
        ModelRule.of("a*", ModelSettings(mmproj=str(gone))),
        ModelRule.of("b", ModelSettings(args=("--no-such-option",))),
        ModelRule.of("c", ModelSettings(ctx_size=512)),
    ]
    refused = await launcher().refusals(rules)
    assert len(refused) == 2
    assert any("--no-such-option" in line for line in refused)
    assert any(str(gone) in line for line in refused)
