"""Why a router ended, and why a model did not load: read from real words of llama-server b11434."""

from __future__ import annotations

import signal

import pytest

from llamavisor.cause import (
    Cause,
    Consequence,
    Subject,
    Traces,
    classify,
    classify_model,
    consequence,
    last_errors,
    load_failure,
    was_told_to_stop,
)
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
    assert load_failure("trunc", TRUNCATED)[0] == (
        "llama_model_load: error loading model: tensor 'output.weight' data is not within the file bounds"
    )


def test_errors_of_others_do_not_count() -> None:
    """The errors of another model's process, or of an earlier process of this one, are not the reason."""
    assert load_failure("other", TRUNCATED) == ()
    again = "0.09.000.000 I srv          load: spawning server instance with name=trunc on port 50000"
    assert load_failure("trunc", [*TRUNCATED, again]) == ()
    assert load_failure("trunc", []) == ()


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
    assert load_failure("junk", JUNK)[0] == "gguf_init_from_reader: invalid magic characters: 'this', expected 'GGUF'"
    assert load_failure("nolayer", ASSERTION)[0] == (
        "GGML_ASSERT(hparams.n_layer_all > 0 && hparams.n_layer_all <= 512) failed"
    )


def test_an_assertion_after_an_error_is_a_consequence() -> None:
    """An error that was said comes before the assertion that fails because of it."""
    both = [*JUNK[:5], "[39775] ggml.c:1: GGML_ASSERT(false) failed"]
    assert load_failure("junk", both)[0] == "gguf_init_from_reader: invalid magic characters: 'this', expected 'GGUF'"


def test_a_name_within_a_name() -> None:
    """The process of one model is not taken for that of another whose name contains it."""
    lines = [
        "0.1 I srv          load: spawning server instance with name=a on port 1 on port 11",
        "0.1 I srv          load: spawning server instance with name=a on port 22",
        "[11] 0.1 E eleven",
        "[22] 0.1 E twenty-two",
    ]
    assert load_failure("a", lines) == ("twenty-two",)
    assert load_failure("a on port 1", lines) == ("eleven",)


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
    assert load_failure("alpha", lines)[0] == 'error while handling argument "--threads": stoi'


# --- models: one table of causes, and one of what follows -------------------------------------------------------------

NO_MEMORY = """
0.20.010.000 I srv          load: spawning server instance with name=big on port 41000
[41000] 0.20.410.621 E ggml_aligned_malloc: insufficient memory (attempted to allocate 6103.53 MB)
[41000] 0.20.410.643 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 6400016384
[41000] 0.20.674.172 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
[41000] 0.20.687.032 E srv  llama_server: exiting due to model loading error
""".splitlines()
NO_GPU_MEMORY = """
0.20.010.000 I srv          load: spawning server instance with name=big on port 41000
[41000] 0.01.410.621 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 40960.00 MiB on device 0: cudaMalloc \
failed: out of memory
[41000] 0.01.410.643 E alloc_tensor_range: failed to allocate CUDA0 buffer of size 42949672960
[41000] 0.01.410.700 E llama_model_load: error loading model: unable to allocate CUDA0 buffer
[41000] 0.01.410.800 E llama_model_load_from_file_impl: failed to load model
""".replace("\\\n", "").splitlines()
ABORTED = """
0.20.010.000 I srv          load: spawning server instance with name=big on port 41000
[41000] CUDA error: out of memory
[41000]   current device: 0, in function alloc at ggml-cuda.cu:471
0.00.597.829 I srv           run: instance name=big exited with status 1
""".splitlines()
LIBRARY = """
0.20.010.000 I srv          load: spawning server instance with name=big on port 41000
[41000] /opt/llama-server: error while loading shared libraries: libggml.so.0: cannot open shared object file
""".splitlines()
OPTION = """
0.20.010.000 I srv          load: spawning server instance with name=big on port 41000
[41000] error while handling argument "--threads": stoi
""".splitlines()


@pytest.mark.parametrize(
    ("lines", "cause", "then"),
    [
        (NO_MEMORY, Cause.NO_MEMORY, Consequence.EVICT),
        (NO_GPU_MEMORY, Cause.NO_MEMORY, Consequence.EVICT),
        (ABORTED, Cause.NO_MEMORY, Consequence.EVICT),
        (LIBRARY, Cause.BAD_BINARY, Consequence.QUARANTINE),
        (OPTION, Cause.BAD_OPTION, Consequence.QUARANTINE),
        ([line.replace("junk", "big") for line in JUNK], Cause.BAD_FILE, Consequence.QUARANTINE),
        ([line.replace("trunc", "big") for line in TRUNCATED], Cause.BAD_FILE, Consequence.QUARANTINE),
        ([line.replace("nolayer", "big") for line in ASSERTION], Cause.EXIT, Consequence.QUARANTINE),
    ],
)
def test_words_of_a_load(lines: list[str], cause: Cause, then: Consequence) -> None:
    """What a load has failed for stands in its log; the first error is the reason that is told."""
    words = load_failure("big", lines)
    found, reason = classify_model(Traces(words=words), Subject.LOADING)
    assert (found, reason) == (cause, words[0])
    assert consequence(found, Subject.LOADING) is then


@pytest.mark.parametrize(
    ("traces", "subject", "cause", "then"),
    [
        (Traces(ExitStatus(signal=signal.SIGSEGV)), Subject.SERVING, Cause.SIGNAL, Consequence.RETRY),
        (Traces(ExitStatus(signal=signal.SIGSEGV)), Subject.LOADING, Cause.SIGNAL, Consequence.RETRY),
        (Traces(ExitStatus(code=1)), Subject.SERVING, Cause.EXIT, Consequence.RETRY),
        (Traces(), Subject.SERVING, Cause.EXIT, Consequence.RETRY),
        (Traces(), Subject.LOADING, Cause.UNKNOWN, Consequence.RETRY),
        (Traces(ExitStatus(signal=signal.SIGBUS)), Subject.SERVING, Cause.FILE_CHANGED, Consequence.RETRY),
        (Traces(ExitStatus(signal=signal.SIGBUS)), Subject.LOADING, Cause.FILE_CHANGED, Consequence.QUARANTINE),
        (Traces(was_overwritten=True), Subject.SERVING, Cause.FILE_CHANGED, Consequence.RETRY),
        (Traces(ExitStatus(signal=signal.SIGKILL), was_oom=True), Subject.SERVING, Cause.OOM, Consequence.QUARANTINE),
        (Traces(ExitStatus(signal=signal.SIGKILL), was_oom=True), Subject.LOADING, Cause.OOM, Consequence.EVICT),
        (Traces(was_oom=True), Subject.SERVING, Cause.OOM, Consequence.QUARANTINE),
        (Traces(ExitStatus(signal=signal.SIGSEGV), was_oom=True), Subject.SERVING, Cause.SIGNAL, Consequence.RETRY),
        (Traces(ExitStatus(signal=signal.SIGKILL)), Subject.SERVING, Cause.KILLED, Consequence.RETRY),
        (Traces(ExitStatus(signal=signal.SIGTERM)), Subject.LOADING, Cause.KILLED, Consequence.RETRY),
    ],
)
def test_how_a_model_ends(traces: Traces, subject: Subject, cause: Cause, then: Consequence) -> None:
    """The kernel's word goes before the log's, and what is certain before what is likely."""
    found, reason = classify_model(traces, subject)
    assert found is cause
    assert consequence(found, subject) is then
    if traces.status is not None and traces.status.signal is not None and cause is not Cause.OOM:
        assert str(traces.status) in reason


def test_only_the_last_words_of_a_model_that_served_count() -> None:
    """An error of hours ago has not ended it."""
    lines = [NO_MEMORY[1], NO_MEMORY[2], *["[41000] 1.00.000.000 I srv  request: POST /completion 200"] * 40]
    assert last_errors("big", lines) == ()
    assert last_errors("big", [*lines, *ABORTED[2:]]) == ("CUDA error: out of memory",)
    assert last_errors("other", lines) == ()


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_its_consequences(cause: Cause) -> None:
    """The table is total, and only routers are given up for good."""
    assert consequence(cause, Subject.ROUTER) in {Consequence.RETRY, Consequence.LATCH}
    assert consequence(cause, Subject.LOADING) is not Consequence.LATCH
    assert consequence(cause, Subject.SERVING) in {Consequence.RETRY, Consequence.QUARANTINE}
