"""`quantize`: what it makes of a source, a type and a tool that is scripted here; tests/e2e has the true one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.control_stub import ControlStub, details
from fakes.waiting import PATIENCE_S, eventually
from llamavisor.quantizer import Order, QuantizeError, Quantizer, parts_of, target_beside
from llamavisord.exit_codes import ExitCode
from llamavisord.tiny_model import write_tiny_model
from terminal import INTERRUPT, Terminal

COMMAND = [sys.executable, "-m", "llamavisord", "quantize"]
HELP = """\
allowed quantization types

   2  or  Q4_0    :  4.34G, +0.4685 ppl @ Llama-3-8B
  15  or  Q4_K    : alias for Q4_K_M
  15  or  Q4_K_M  :  4.58G, +0.1754 ppl @ Llama-3-8B
   7  or  Q8_0    :  7.96G, +0.0026 ppl @ Llama-3-8B
   0  or  F32     : 26.00G              @ 7B
          COPY    : only copy tensors, no quantizing
"""
TYPES = ("Q4_0", "Q4_K", "Q4_K_M", "Q8_0", "F16", "COPY")

Make = Callable[..., dict[str, str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model, alone in its folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_tiny_model(folder / "tiny-F32.gguf", ["hi"])
    return folder / "tiny-F32.gguf"


@pytest.fixture
def tool(tmp_path: Path) -> Make:
    """Makes an environment with a llama-quantize that runs a shell script on `$in` and `$out`."""

    def make(does: str = 'cp "$in" "$out"', *, megabytes: float = 0.1) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "llama-server").write_text("#!/bin/sh\n")
        (folder / "help").write_text(f"usage: --dry-run --allow-requantize\n{HELP}")
        (folder / "llama-quantize").write_text(
            f"""#!/bin/sh
case "$*" in
--help) cat {folder}/help; exit 1;;
--dry-run*) echo "llama_model_quantize_impl: quant size  =   {megabytes:.2f} MiB (8 BPW)" >&2; exit 0;;
esac
echo "$*" >> {folder}/asked
while :; do case "$1" in --imatrix) shift 2;; --*) shift;; *) break;; esac; done
in="$1"; out="$2"
echo "[   1/   2] output.weight - [ 32, 1, 1, 1], type = f32, converting to q8_0 .." >&2
{does}
""",
            encoding="utf-8",
        )
        for name in ("llama-server", "llama-quantize"):
            (folder / name).chmod(0o755)
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LLAMAVISOR_LLAMA_SERVER": str(folder / "llama-server"),
            "LLAMAVISOR_SOCKET": str(tmp_path / "control.sock"),
        }

    return make


def quantize(env: dict[str, str], *argv: str | Path, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """The command with pipes all around."""
    return subprocess.run(
        [*launcher, *COMMAND, *map(str, argv)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE_S,
    )


def powerless() -> list[str]:
    """What makes a program of root, put before it, obey the modes of files."""
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("m.gguf", "m-Q4_K_M.gguf"),
        ("m-F16.gguf", "m-Q4_K_M.gguf"),
        ("m.q8_0.gguf", "m.Q4_K_M.gguf"),
        ("m-Q4_K.gguf", "m-Q4_K_M.gguf"),
        ("F16.gguf", "F16-Q4_K_M.gguf"),
        ("m-F16-00001-of-00003.gguf", "m-Q4_K_M.gguf"),
    ],
)
def test_the_result_is_called_by_its_type(source: str, target: str) -> None:
    """In the place of an old one; a model in parts becomes one file."""
    assert target_beside(Path("/d", source), "Q4_K_M", TYPES) == Path("/d", target)


def test_all_parts_of_a_model_are_its_source() -> None:
    """By the pattern of their names."""
    names = [part.name for part in parts_of(Path("/d/m-00001-of-00002.gguf"))]
    assert names == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def test_a_type_is_found_in_any_spelling(tool: Make) -> None:
    """What the tool lists, and nothing else."""
    quantizer = Quantizer(Path(tool()["LLAMAVISOR_LLAMA_SERVER"]), os.environ)
    assert list(quantizer.types) == ["Q4_0", "Q4_K", "Q4_K_M", "Q8_0", "F32", "COPY"]
    assert quantizer.type_named("q4-k-m") == "Q4_K_M"


def test_the_result_stands_beside_the_source(tool: Make, source: Path) -> None:
    """Whole, alone, under a name that tells its type; what was asked for reaches the tool."""
    env = tool()
    matrix = source.with_name("imatrix")
    done = quantize(env, source, "q8_0", "--threads", "3", "--allow-requantize", "--imatrix", matrix)
    assert (done.returncode, done.stderr) == (0, "")
    target = source.with_name("tiny-Q8_0.gguf")
    assert done.stdout.startswith(f"{target}: ")
    assert sorted(path.name for path in source.parent.iterdir()) == ["tiny-F32.gguf", "tiny-Q8_0.gguf"]
    options, given, staged, type_, threads = (
        Path(env["LLAMAVISOR_LLAMA_SERVER"]).with_name("asked").read_text().rsplit(" ", 4)
    )
    assert options == f"--allow-requantize --imatrix {matrix}"
    assert (given, type_, threads) == (str(source), "Q8_0", "3\n")
    assert Path(staged).parent.parent == source.parent
    assert Path(staged).parent.name.startswith(".llamavisor-quantize-")


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o755), (0o002, 0o755), (0o077, 0o700)])
def test_nobody_else_writes_where_it_is_made(tool: Make, source: Path, umask: int, mode: int) -> None:
    """The tool follows a link that somebody plants there; whatever the umask, only the user who quantizes can."""
    env = tool(f'stat -c %a "${{out%/*}}" > {source.parent}/mode; cp "$in" "$out"')
    before = os.umask(umask)
    try:
        done = quantize(env, source, "Q8_0")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    assert int((source.parent / "mode").read_text(), 8) == mode


def test_a_file_that_is_there_stays_unless_forced(tool: Make, source: Path) -> None:
    """And the source stays in any case."""
    env = tool()
    there = source.with_name("there.gguf")
    there.write_text("mine")
    refused = quantize(env, source, "Q8_0", there)
    assert (refused.returncode, there.read_text()) == (ExitCode.USAGE, "mine")
    assert refused.stderr == f"llamavisor: {there} exists already; --force replaces it\n"
    assert quantize(env, source, "Q8_0", there, "--force").returncode == 0
    assert there.read_bytes() == source.read_bytes()
    itself = quantize(env, source, "Q8_0", source, "--force")
    assert (itself.returncode, "is the source itself" in itself.stderr) == (ExitCode.USAGE, True)


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_comes_meanwhile_stays_unless_forced(
    tool: Make, source: Path, monkeypatch: pytest.MonkeyPatch, *, has_links: bool
) -> None:
    """The hours of a quantization are long enough for a pull of the same name; also where a disk knows no links."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    target = source.with_name("tiny-Q8_0.gguf")
    quantizer = Quantizer(Path(tool()["LLAMAVISOR_LLAMA_SERVER"]), os.environ)
    order = Order(source=source, target=target, type="Q8_0")
    with pytest.raises(QuantizeError) as refused:
        quantizer.make(order, lambda *_: target.write_text("mine") and None)
    assert (str(refused.value), refused.value.hint) == (
        f"{target} has come meanwhile, and stays",
        "--force replaces it",
    )
    assert (target.read_text(), len(list(source.parent.iterdir()))) == ("mine", 2)
    quantizer.make(replace(order, may_replace=True), lambda *_: None)
    assert target.read_bytes() == source.read_bytes()
    target.unlink()
    quantizer.make(order, lambda *_: None)
    assert target.read_bytes() == source.read_bytes()
    assert len(list(source.parent.iterdir())) == 2


def test_a_source_that_may_not_be_read_is_told(tool: Make, source: Path) -> None:
    """With whose it is and what helps, before anything else is done; by its path, by a model's name, by its folder."""
    env = tool()
    source.chmod(0)
    whose = f"it is {source.owner()}'s; let your user read it and its folder, or run this as its owner; "
    with ControlStub(Path(env["LLAMAVISOR_SOCKET"])) as stub:
        answer = details(files=[{"path": str(source), "size_bytes": 1, "mtime_unix": 0.0}])
        stub.answer("GET", "/control/v1/models/tiny", answer)
        for word in (str(source), "tiny"):
            refused = quantize(env, word, "Q8_0", launcher=powerless())
            assert refused.returncode == ExitCode.NOT_PERMITTED
            assert refused.stderr.startswith(f"llamavisor: {source} cannot be read: Permission denied; {whose}")
        source.parent.chmod(0o600)
        refused = quantize(env, source, "Q8_0", launcher=powerless())
        source.parent.chmod(0o700)
    assert refused.returncode == ExitCode.NOT_PERMITTED
    assert refused.stderr.startswith(f"llamavisor: {source} cannot be read: Permission denied; it is not for everybody")


@pytest.mark.parametrize(
    ("argv", "said", "code"),
    [
        (["SRC", "Q4_KM"], "Did you mean Q4_K_M or", ExitCode.USAGE),
        (["SRC", "q4"], "Did you mean Q4_0 or Q4_K or Q4_K_M?", ExitCode.USAGE),
        (["SRC", "xyz"], "It knows Q4_0, Q4_K, Q4_K_M, Q8_0, F32, COPY.", ExitCode.USAGE),
        (["nix", "Q8_0"], "there is no file nix, and no daemon to ask", ExitCode.NOT_FOUND),
        (["no/such.gguf", "Q8_0"], "there is no such file no/such.gguf; there is no folder no", ExitCode.NOT_FOUND),
        (["such.gguf", "Q8_0"], "there is no such file such.gguf; name a GGUF file, or", ExitCode.NOT_FOUND),
        (["MISTYPED", "Q8_0"], "tiny-F23.gguf; did you mean SRC?", ExitCode.NOT_FOUND),
        (["DIR", "Q8_0"], "is a folder; name the file in it", ExitCode.USAGE),
        (["JUNK", "Q8_0"], 'llamavisor: JUNK: the file begins with "junk", not with GGUF', ExitCode.FAILED),
        (["SRC", "Q8_0", "no/such/x.gguf"], "there is no folder no/such", ExitCode.NOT_FOUND),
        (["SRC", "Q8_0", "x.bin"], "its name must end in .gguf", ExitCode.USAGE),
        (["SRC", "Q8_0", "--threads", "0"], "expected a whole number from 1 up", ExitCode.USAGE),
    ],
)
def test_what_makes_no_sense_is_refused(
    tool: Make, source: Path, tmp_path: Path, argv: list[str], said: str, code: ExitCode
) -> None:
    """Before anything is written, with what would do instead."""
    junk = tmp_path / "junk.gguf"
    junk.write_text("junk")
    places = {"SRC": source, "DIR": source.parent, "JUNK": junk, "MISTYPED": source.with_name("tiny-F23.gguf")}
    done = quantize(tool(), *(places.get(word, word) for word in argv))
    assert done.returncode == code
    assert said.replace("SRC", str(source)).replace("JUNK", str(junk)) in done.stderr
    assert list(source.parent.iterdir()) == [source]


def test_a_result_that_has_no_room_is_not_begun(tool: Make, source: Path) -> None:
    """The tool says how large it will be."""
    done = quantize(tool(megabytes=1e12), source, "Q8_0")
    assert done.returncode == ExitCode.FAILED
    assert "free, and the result takes" in done.stderr
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ('cp "$in" "$out"; echo "llama_model_quantize: failed to quantize: no reason" >&2; exit 1', "no reason"),
        ('head -c 1000 "$in" > "$out"', "no usable file"),
        ('head -c -100 "$in" > "$out"', "no whole model"),
        ("true", "cannot be written"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("echo 'out of luck' >&2; exit 3", "ended with status 3\n  | out of luck"),
    ],
)
def test_a_result_that_is_not_whole_never_appears(tool: Make, source: Path, does: str, said: str) -> None:
    """Nothing is left of it, and one line says why."""
    done = quantize(tool(does), source, "Q8_0")
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, "")
    assert said in done.stderr
    assert list(source.parent.iterdir()) == [source]


def test_an_interrupt_leaves_nothing(tool: Make, source: Path) -> None:
    """The tool has ended, too; until then a line on the terminal shows how far it is."""
    env = tool(': > "$out"; echo "[   2/   2] next - [], size = 1" >&2; exec sleep 600')
    with Terminal([*COMMAND, str(source), "Q8_0"], env) as terminal:
        terminal.until("quantizing tiny-F32.gguf to Q8_0 [############............] 50% output.weight")
        terminal.until("100% next")
        assert len(list(source.parent.iterdir())) == 2
        terminal.type(INTERRUPT)
        assert terminal.wait() == ExitCode.INTERRUPTED
    assert list(source.parent.iterdir()) == [source]


def test_a_terminal_that_closes_leaves_nothing_either(tool: Make, source: Path) -> None:
    """Nor does a kill."""
    env = tool(': > "$out"; exec sleep 600')
    for number in (signal.SIGTERM, signal.SIGHUP):
        with subprocess.Popen([*COMMAND, source, "Q8_0"], env=env, stderr=subprocess.DEVNULL) as process:
            eventually(lambda: len(list(source.parent.iterdir())) == 2, what="a result under way")
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == ExitCode.INTERRUPTED
        assert list(source.parent.iterdir()) == [source]


def test_a_model_is_found_by_its_name(tool: Make, source: Path) -> None:
    """The daemon says where its file is; a name that it does not know is refused in its words."""
    env = tool()
    with ControlStub(Path(env["LLAMAVISOR_SOCKET"])) as stub:
        answer = details(files=[{"path": str(source), "size_bytes": 1, "mtime_unix": 0.0}])
        stub.answer("GET", "/control/v1/models/tiny", answer)
        assert quantize(env, "tiny", "Q8_0").returncode == 0
        stub.problem("GET", "/control/v1/models/tony", "model_not_found", "no model 'tony'", "did you mean tiny?")
        refused = quantize(env, "tony", "Q8_0")
        stub.problem("GET", "/control/v1/models/nix%2Fnix", "model_not_found", "no model 'nix/nix'")
        mistyped = quantize(env, "nix/nix", "Q8_0")
    assert mistyped.stderr.startswith("llamavisor: there is no such file nix/nix; ")
    assert source.with_name("tiny-Q8_0.gguf").is_file()
    assert (refused.returncode, refused.stderr) == (
        ExitCode.NOT_FOUND,
        "llamavisor: no model 'tony'; did you mean tiny?\n",
    )


def test_a_build_without_the_tool_is_told(tool: Make, source: Path) -> None:
    """With where it was looked for."""
    env = tool()
    Path(env["LLAMAVISOR_LLAMA_SERVER"]).with_name("llama-quantize").unlink()
    done = quantize(env, source, "Q8_0")
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, "")
    assert "there is no llama-quantize beside" in done.stderr
