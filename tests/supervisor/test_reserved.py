"""Environment variables of a router that belong to the supervisor."""

from __future__ import annotations

import pytest

from llamavisor.errors import OptionError
from llamavisor.reserved import check_env, find_reserved_key


def test_variables_for_drivers_and_tokens_are_free() -> None:
    """What a router needs an environment for is not refused."""
    check_env({"CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "hf_x", "GGML_CUDA_P2P": "1", "LLAMA_FOO": "a=b"})


@pytest.mark.parametrize(
    "name",
    [
        "LLAMA_ARG_CTX_SIZE",
        "LLAMA_API_KEY",
        "LLAMA_CACHE",
        "LLAMA_SERVER_ROUTER_PORT",
        "LLAMA_APP_CMD",
        "XDG_CONFIG_HOME",
        "AIP_MODE",
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "WATCHDOG_USEC",
        "LLAMAVISOR_INSTANCE",
    ],
)
def test_variables_that_would_fight_the_supervisor_are_refused(name: str) -> None:
    """The error names the variable and the table that sets it."""
    with pytest.raises(OptionError, match=rf"\[\[router\]\] gpu0: {name} "):
        check_env({name: "1"}, source="[[router]] gpu0")


@pytest.mark.parametrize(("name", "value"), [("", "1"), ("A=B", "1"), ("A\0", "1"), ("A", "x\0y")])
def test_what_no_environment_can_hold_is_refused(name: str, value: str) -> None:
    """A name or value that execve(2) would cut fails with the configuration, not with the start."""
    with pytest.raises(OptionError):
        check_env({name: value})


def test_keys_of_a_preset_are_reserved_as_their_options_are() -> None:
    """A key stands for the long spelling and the short one alike."""
    assert find_reserved_key("models-dir")
    assert find_reserved_key("m")
    assert find_reserved_key("top-k") is None
