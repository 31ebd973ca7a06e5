"""What `install-service` would do, worked out for machines of all kinds; that it does it is seen in tests/systemd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamavisord.cli import main
from llamavisord.cli.errors import CommandError
from llamavisord.cli.installer import Installer
from llamavisord.cli.machine import is_roots_alone
from llamavisord.config import Config
from llamavisord.installation import Folder, Machine, Remove, Run, Wish, Write, plan, removal
from llamavisord.loading import load

SYSTEM = Path("/etc/systemd/system")
MODELS = Path("/srv/models")
DEBIAN = Machine(program=Path("/usr/bin/llamavisor"), needs=(), systemd=252, has_gpu=True)


def files(
    wish: Wish, machine: Machine = DEBIAN, *, config: Config | None = None, models_dir: Path = MODELS
) -> dict[str, str]:
    """The texts of all files by their paths."""
    steps = plan(wish, machine, config, models_dir)
    return {str(step.path): step.text for step in steps if isinstance(step, Write)}


def configured(folder: Path, text: str) -> Config:
    """A configuration of these lines."""
    file = folder / "llamavisor.toml"
    file.write_text(f'models_dir = "/srv/models"\n{text}')
    return load(file, {})


def commands(wish: Wish) -> list[Sequence[str]]:
    """What is run."""
    return [step.argv for step in plan(wish, DEBIAN, None, MODELS) if isinstance(step, Run)]


def test_units_are_the_shipped_ones() -> None:
    """Word for word, where the program is where packages put it."""
    made = files(Wish())
    shipped = Path(__file__).parents[2] / "systemd"
    for name in ("llamavisor.service", "llamavisor@.service", "llamavisor.socket", "llamavisor-nvidia.service"):
        assert made[str(SYSTEM / name)] == (shipped / name).read_text()


def test_an_instance_is_the_service_with_a_name() -> None:
    """Everything else of the template is as in the one unit: what hardens one, hardens all."""
    shipped = Path(__file__).parents[2] / "systemd"
    service, template = ((shipped / name).read_text() for name in ("llamavisor.service", "llamavisor@.service"))

    def settings(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    as_template = service.replace("llamavisor, keeps", "llamavisor %i, keeps")
    cache = "Environment=CUDA_CACHE_PATH"
    as_template = as_template.replace(cache, f"Environment=LLAMAVISOR_CONFIG=/etc/llamavisor/%i.toml\n{cache}")
    for key in ("WorkingDirectory=%S/", "StateDirectory=", "CacheDirectory=", "LogsDirectory=", "RuntimeDirectory="):
        as_template = as_template.replace(f"{key}llamavisor\n", f"{key}llamavisor-%i\n")
    as_template = as_template.replace("%C/llamavisor/", "%C/llamavisor-%i/")
    as_template = as_template.replace("=llamavisor.keys", "=llamavisor.keys:llamavisor-%i.keys")
    without_socket = as_template.replace("Wants=llamavisor.socket ", "Wants=").replace(" llamavisor.socket", "")
    assert settings(template) == settings(without_socket.replace("Also=llamavisor.socket\n", ""))


def test_the_program_is_where_it_was_installed() -> None:
    """In every unit and drop-in, however its folder is called."""
    machine = Machine(program=Path("/opt/my 100%/bin/llamavisor"), needs=(), systemd=254, has_gpu=True)
    made = files(Wish(), machine)
    assert 'ExecStart="/opt/my 100%%/bin/llamavisor" serve\n' in made[str(SYSTEM / "llamavisor.service")]
    assert 'ExecReload="/opt/my 100%%/bin/llamavisor" reload\n' in made[str(SYSTEM / "llamavisor@.service")]


def test_what_the_sandbox_hides_is_shown() -> None:
    """Models and program in a home, or in /tmp: the folder of models to write to, the program to read alone."""
    machine = Machine(
        program=Path("/home/al/venv/bin/llamavisor"), needs=(Path("/home/al/venv"),), systemd=252, has_gpu=True
    )
    text = files(Wish(), machine, models_dir=Path("/home/al/my models"))[
        str(SYSTEM / "llamavisor.service.d/10-install.conf")
    ]
    assert 'RequiresMountsFor="/home/al/my models"\n' in text
    assert 'BindPaths="-/home/al/my models"\n' in text
    assert "BindReadOnlyPaths=-/home/al/venv\n" in text
    elsewhere = files(Wish())[str(SYSTEM / "llamavisor.service.d/10-install.conf")]
    assert "ReadWritePaths=-/srv/models\n" in elsewhere
    assert "Bind" not in elsewhere
    assert "/root" not in elsewhere
    in_root = files(Wish(), models_dir=Path("/root/models"))[str(SYSTEM / "llamavisor.service.d/10-install.conf")]
    assert "BindPaths=-/root/models\nTemporaryFileSystem=/root:ro,mode=0755\n" in in_root


def test_the_socket_listens_where_the_configuration_says(tmp_path: Path) -> None:
    """Only if that is not what the unit says; not at all where there is no gateway, or nobody wants it."""
    drop_in, socket = str(SYSTEM / "llamavisor.socket.d/10-install.conf"), str(SYSTEM / "llamavisor.socket")
    assert drop_in not in files(Wish())
    assert drop_in not in files(Wish(), config=configured(tmp_path, "port = 8080"))
    local = files(Wish(), config=configured(tmp_path, "port = 9000"))[drop_in]
    assert local.endswith("ListenStream=127.0.0.1:9000\nListenStream=[::1]:9000\n")
    public = configured(tmp_path, 'host = "0.0.0.0"\n[gateway]\npublic_without_key = true')
    assert files(Wish(), config=public)[drop_in].endswith("control.sock\nListenStream=0.0.0.0:8080\n")
    assert socket not in files(Wish(), config=configured(tmp_path, 'serve = "router"'))
    assert socket not in files(Wish(has_socket=False))
    unwanted = [step.path for step in plan(Wish(has_socket=False), DEBIAN, None, MODELS) if isinstance(step, Remove)]
    assert Path(socket) in unwanted


@pytest.mark.parametrize(("has_gpu", "systemd"), [(True, 252), (False, 252), (True, 254), (False, 257)])
def test_drop_ins_are_those_of_the_machine(has_gpu: bool, systemd: int) -> None:
    """And those of another day, before a GPU or after an upgrade, are taken away."""
    machine = Machine(program=DEBIAN.program, needs=(), systemd=systemd, has_gpu=has_gpu)
    steps = list(plan(Wish(), machine, None, MODELS))
    gpu, new = (SYSTEM / f"llamavisor.service.d/{name}" for name in ("20-no-gpu.conf", "30-systemd-254.conf"))
    written = {step.path for step in steps if isinstance(step, Write)}
    removed = {step.path for step in steps if isinstance(step, Remove)}
    assert (gpu in written, gpu in removed) == (not has_gpu, has_gpu)
    assert (new in written, new in removed) == (systemd >= 254, systemd < 254)


def test_folders_of_models_are_for_a_group() -> None:
    """The service's is 2775, a user's own theirs alone."""
    (folder,) = [s for s in plan(Wish(), DEBIAN, None, MODELS) if isinstance(s, Folder) and s.path == MODELS]
    assert (folder.mode, folder.group) == (0o2775, "llamavisor")
    steps = plan(Wish(home=Path("/home/al")), DEBIAN, None, Path("/home/al/models"))
    assert [(s.path, s.group) for s in steps if isinstance(s, Folder)] == [(Path("/home/al/models"), None)]


def test_a_folder_that_is_a_link_is_seen_with_what_it_leads_to(tmp_path: Path) -> None:
    """Both are mounted before the service starts; hidden is what it leads to, and that is shown."""
    (tmp_path / "true").mkdir()
    (tmp_path / "link").symlink_to("true")
    text = files(Wish(), models_dir=tmp_path / "link")[str(SYSTEM / "llamavisor.service.d/10-install.conf")]
    for name in ("link", "true"):
        assert f"RequiresMountsFor={tmp_path / name}\n" in text
        assert f"BindPaths=-{tmp_path / name}\n" in text


def test_further_instances_have_ports_of_their_own() -> None:
    """Each one more than the last."""
    texts = [files(Wish(instance=name, number=n))[f"/etc/llamavisor/{name}.toml"] for n, name in enumerate("ab")]
    assert [text.count("port = 8081") + text.count("port = 9156") for text in texts] == [2, 0]
    assert [text.count("port = 8082") + text.count("port = 9157") for text in texts] == [0, 2]


def test_a_user_needs_no_root() -> None:
    """Every file is in the user's home, every command is systemctl --user."""
    wish = Wish(home=Path("/home/al"), is_started=True)
    assert all(path.startswith("/home/al/.config/") for path in files(wish))
    assert all(argv[:2] == ("systemctl", "--user") for argv in commands(wish))
    assert commands(wish)[-1] == ("systemctl", "--user", "restart", "llamavisor.service")


def test_removal_is_of_all_that_was_written() -> None:
    """But for the configuration, the user and their folders; and for what other instances need."""
    machine = Machine(program=DEBIAN.program, needs=(), systemd=254, has_gpu=False)
    written = {step.path for step in plan(Wish(), machine, None, MODELS) if isinstance(step, Write)}
    removed = {step.path for step in removal(Wish(), is_last=True) if isinstance(step, Remove)}
    kept = {"/etc/llamavisor/llamavisor.toml", "/etc/sysusers.d/llamavisor.conf", "/etc/tmpfiles.d/llamavisor.conf"}
    assert {str(path) for path in written - removed} == kept
    not_last = {step.path for step in removal(Wish(), is_last=False) if isinstance(step, Remove)}
    assert {path.name for path in removed - not_last} == {"llamavisor@.service", "llamavisor-nvidia.service"}


def test_the_socket_is_started_anew_only_where_it_has_changed() -> None:
    """Nobody is refused while the service is installed again, as after an upgrade."""
    steps = [step for step in plan(Wish(is_started=True), DEBIAN, None, MODELS) if isinstance(step, Run)]
    (stop,) = [step for step in steps if "stop" in step.argv]
    assert {path.name for path in stop.only_after} == {"llamavisor.socket", "10-install.conf"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--instance", "llamavisor"], 2, "that is not llamavisor"),
        (["--models-dir", "/"], 2, "is not for models alone"),
        (["--models-dir", "/home"], 2, "is not for models alone"),
        (["--models-dir", "~root"], 2, "is not for models alone"),
        (["--instance", "a/b"], 2, "expected a name of letters"),
        (["--user", "--instance", "a"], 2, "--instance is for services of the machine"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is touched."""
    expanded = [os.path.expanduser(word) for word in words]
    assert main(["install-service", "--dry-run", *expanded]) == code
    assert said in capsys.readouterr().err


def test_a_dry_run_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """It tells every step, with what would be written."""
    if shutil.which("systemctl") is None:
        pytest.skip("no systemd: systemctl is not installed here")
    assert main(["install-service", "--dry-run", "--instance", "test"]) == 0
    said = capsys.readouterr().out
    assert "would write /etc/llamavisor/test.toml\n  | # Everything that can stand here" in said
    assert not Path("/etc/llamavisor/test.toml").exists()


def test_root_makes_folders_only_where_root_alone_says_what_they_are(tmp_path: Path) -> None:
    """Whoever may write on the way there could have another folder made, and opened to the group."""
    if os.geteuid() != 0:
        pytest.skip("it takes root")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    assert is_roots_alone(Path("/srv/models"))
    assert is_roots_alone(Path("/usr/share/nothing/models"))
    assert not is_roots_alone(theirs / "models")  # /tmp is everybody's
    with pytest.raises(CommandError, match="not root alone can say what it is; make it: mkdir"):
        Installer(is_dry=False).carry_out([Folder(theirs / "models", 0o2775, "root")])
    assert not list(theirs.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    """It is a person's."""
    (tmp_path / "models").mkdir(mode=0o700)
    Installer(is_dry=False).carry_out([Folder(tmp_path / "models", 0o2775, "root")])
    assert (tmp_path / "models").stat().st_mode & 0o7777 == 0o700


def test_files_are_readable_whatever_the_umask_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of a careful root would keep the service out of its own configuration; afterwards it is as it was."""
    before = os.umask(0o077)
    try:
        Installer(is_dry=False).carry_out([Write(tmp_path / "etc" / "file", "text"), Folder(tmp_path / "made", 0o755)])
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert (tmp_path / "etc").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "etc" / "file").stat().st_mode & 0o7777 == 0o644
    assert capsys.readouterr().out.splitlines() == [
        f"write {tmp_path}/etc/file",
        f"make the folder {tmp_path}/made (mode 755)",
    ]
