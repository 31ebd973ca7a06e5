"""Why a router ended, and why a model did not load: read from real words of llama-server b11434."""

from __future__ import annotations

import signal

import pytest

from llamavisor.cause import Cause, classify, load_failure, was_told_to_stop
from llamavisor.process import ExitStatus

BAD_PRESET = """
0.00.001.212 I srv  llama_server: initializing ...
0.00.005.271 E srv  llama_server: failed to initialize router models: option 'nosuchkey' not recognized in preset '*'
"""
BAD_VALUE = """
error while handling argument "--threads-http": stoi

usage:
--threads-http N                        number of threads used to process HTTP requests (default: -1)
                                        (env: LLAMA_ARG_THREADS_HTTP)


to show complete usage, run with -h
"""
NAME_CLASH = """
0.00.005.586 E gguf_init_from_reader: failed to read magic
0.00.006.005 E srv  llama_server: failed to initialize router models: alias 'alpha' for model 'gamma' conflicts with \
existing model name
"""
NO_FOLDER = """
0.00.006.628 E srv  llama_server: failed to initialize router models: error: '/no' does not exist or is not a directory
"""
PORT_TAKEN = """
0.00.003.934 I srv  llama_server: starting server in router mode. models will be automatically loaded on-demand
0.00.004.007 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18098
0.00.004.022 I srv    operator(): operator(): cleaning up before exit...
0.00.004.166 E srv  llama_server: exiting due to HTTP server error
"""
NO_LIBRARY = "llama-server: error while loading shared libraries: libcuda.so.1: cannot open shared object file"


@pytest.mark.parametrize(
    ("words", "cause", "is_permanent", "reason"),
    [
        ("error: invalid argument: --nosuch", Cause.BAD_OPTION, True, "invalid argument: --nosuch"),
        (BAD_PRESET, Cause.BAD_OPTION, True, "option 'nosuchkey' not recognized"),
        (BAD_VALUE, Cause.BAD_OPTION, True, 'argument "--threads-http": stoi'),
        (NAME_CLASH, Cause.BAD_OPTION, True, "alias 'alpha' for model 'gamma' conflicts"),
        (NO_FOLDER, Cause.MODELS_DIR, False, "'/no' does not exist"),
        (PORT_TAKEN, Cause.PORT_TAKEN, False, "port: 18098"),
        (NO_LIBRARY, Cause.BAD_BINARY, True, "libcuda.so.1"),
        ("something else altogether", Cause.EXIT, False, "exit code 1"),
        ("", Cause.EXIT, False, "exit code 1"),
    ],
)
def test_last_words(words: str, cause: Cause, is_permanent: bool, reason: str) -> None:
    """The last words of a router that never was ready tell the cause, and whether it stays."""
    verdict = classify(ExitStatus(code=1), was_ready=False, last_lines=words.splitlines())
    assert (verdict.cause, verdict.is_permanent) == (cause, is_permanent)
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("status", "was_ready", "cause"),
    [
        (ExitStatus(code=1), True, Cause.EXIT),
        (ExitStatus(code=0), False, Cause.EXIT),
        (ExitStatus(signal=signal.SIGSEGV), False, Cause.SIGNAL),
    ],
)
def test_words_do_not_count_when_something_else_ended_it(status: ExitStatus, was_ready: bool, cause: Cause) -> None:
    """A router that had been ready, ended well, or was ended by a signal did not fail for what stands in its log."""
    verdict = classify(status, was_ready=was_ready, last_lines=["error: invalid argument: --old"])
    assert (verdict.cause, verdict.is_permanent) == (cause, False)


def test_sigkill_may_be_the_kernel() -> None:
    """P1: a SIGKILL that nobody owns up to may be the kernel short of memory, and is told so."""
    verdict = classify(ExitStatus(signal=signal.SIGKILL), was_ready=True, last_lines=[])
    assert "SIGKILL" in verdict.reason
    assert "possibly out of memory" in verdict.reason


TRUNCATED = """
0.00.493.360 I srv          load: spawning server instance with name=trunc on port 45863
0.00.493.461 I srv          load: spawning server instance with args:
[45863] 0.00.001.503 I srv  llama_server: initializing ...
[45863] 0.00.005.623 W srv  llama_server: security: no API key is set and CORS allows all origins
[45863] 0.00.024.649 E llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds
[45863] 0.00.024.758 E llama_model_load_from_file_impl: failed to load model
[45863] 0.00.033.307 E srv  llama_server: exiting due to model loading error
0.00.542.139 I srv           run: instance name=trunc exited with status 1
""".splitlines()


def test_first_error_of_the_child_is_the_reason() -> None:
    """The first error that a model's process printed is the cause; the later ones are its consequences."""
    assert load_failure("trunc", TRUNCATED) == (
        "llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds"
    )


def test_errors_of_others_do_not_count() -> None:
    """The errors of another model's process, or of an earlier process of this one, are not the reason."""
    assert load_failure("other", TRUNCATED) is None
    again = "0.09.000.000 I srv          load: spawning server instance with name=trunc on port 50000"
    assert load_failure("trunc", [*TRUNCATED, again]) is None
    assert load_failure("trunc", []) is None


JUNK = """
0.04.057.394 I srv          load: spawning server instance with name=junk on port 39775
[39775] 0.00.009.952 I srv    load_model: loading model 'models/junk.gguf'
[40237] 0.01.529.624 E srv    operator(): an error of somebody else
[39775] 0.00.010.156 E gguf_init_from_reader: invalid magic characters: 'this', expected 'GGUF'
[39775] 0.00.010.344 E llama_model_load: error loading model: llama_model_loader: failed to load model from junk.gguf
[39775] 0.00.011.091 E srv  llama_server: exiting due to model loading error
0.04.084.242 I srv           run: instance name=junk exited with status 1
""".splitlines()
ASSERTION = """
0.00.014.712 I srv          load: spawning server instance with name=nolayer on port 47391
[47391] 0.00.006.211 I srv    load_model: loading model 'models/nolayer.gguf'
[47391] /llama.cpp/src/llama-model.cpp:1330: GGML_ASSERT(hparams.n_layer_all > 0 && hparams.n_layer_all <= 512) failed
[47391] [New LWP 1175]
[47391] #2  0x00007f019977d84e in ggml_abort () from libggml-base.so.0
0.00.597.829 I srv           run: instance name=nolayer exited with status 1
""".splitlines()


def test_reasons_of_broken_files() -> None:
    """Junk is called junk, and an assertion that failed is a reason too."""
    assert load_failure("junk", JUNK) == "gguf_init_from_reader: invalid magic characters: 'this', expected 'GGUF'"
    assert load_failure("nolayer", ASSERTION) == (
        "GGML_ASSERT(hparams.n_layer_all > 0 && hparams.n_layer_all <= 512) failed"
    )


def test_an_assertion_after_an_error_is_a_consequence() -> None:
    """An error that was said comes before the assertion that fails because of it."""
    both = [*JUNK[:5], "[39775] ggml.c:1: GGML_ASSERT(false) failed"]
    assert load_failure("junk", both) == "gguf_init_from_reader: invalid magic characters: 'this', expected 'GGUF'"


def test_a_name_within_a_name() -> None:
    """The process of one model is not taken for that of another whose name contains it."""
    lines = [
        "0.1 I srv          load: spawning server instance with name=a on port 1 on port 11",
        "0.1 I srv          load: spawning server instance with name=a on port 22",
        "[11] 0.1 E eleven",
        "[22] 0.1 E twenty-two",
    ]
    assert load_failure("a", lines) == "twenty-two"
    assert load_failure("a on port 1", lines) == "eleven"


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("0.01.601.174 I srv        unload: stopping model instance name=trunc", True),
        ("0.06.639.072 I srv  force-killing model instance name=trunc after timeout", True),
        ("0.01.601.174 I srv        unload: stopping model instance name=other", False),
    ],
)
def test_end_by_order_is_told_from_a_crash(last: str, told: bool) -> None:
    """A process that its router was ending did not crash; a later process of the same model is another matter."""
    assert was_told_to_stop("trunc", [*TRUNCATED, last]) is told
    again = "0.09.000.000 I srv          load: spawning server instance with name=trunc on port 50000"
    assert not was_told_to_stop("trunc", [*TRUNCATED, last, again])


def test_value_that_llama_server_refuses_is_the_reason() -> None:
    """A value that only the model's process looks at is told in its words, which have no time and no level."""
    lines = """
0.00.612.300 I srv          load: spawning server instance with name=alpha on port 56393
[56393] error while handling argument "--threads": stoi
[56393]
[56393] usage:
0.00.678.548 I srv           run: instance name=alpha exited with status 1
""".splitlines()
    assert load_failure("alpha", lines) == 'error while handling argument "--threads": stoi'
