"""Every error that llamavisor raises on purpose: what failed, which object, why, and what to do next."""

from __future__ import annotations


class LlamavisorError(Exception):
    """Raised when something failed in a way that a person or a program is told about.

    `str(error)` is one line: what failed, on which object, and why. `hint` says what to do next, and may be empty.
    `code` is stable: programs match on it, and it becomes the `code` of a problem document. `log_tail` is the end of
    what the process in question had printed; it is for those who look after the machine, and not for clients.
    """

    code = "internal"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.log_tail: tuple[str, ...] = ()


class OptionError(LlamavisorError):
    """Raised when a llama-server option cannot be used: unknown to this build, reserved, or unfit for a preset."""

    code = "option_invalid"


class BinaryError(LlamavisorError):
    """Raised when no usable llama-server is found: missing, not executable, or without router mode."""

    code = "llama_server_unusable"


class SpawnError(LlamavisorError):
    """Raised when a process could not be started.

    `is_permanent` tells whether trying again unchanged is pointless (no such file) or sensible (out of memory).
    """

    code = "spawn_failed"

    def __init__(self, message: str, *, hint: str = "", is_permanent: bool) -> None:
        super().__init__(message, hint=hint)
        self.is_permanent = is_permanent


class ApiError(LlamavisorError):
    """Raised when a router's HTTP API refuses, fails, or cannot be reached.

    `status` is the HTTP status, or None when no whole answer came.
    """

    code = "router_api_failed"

    def __init__(self, message: str, *, hint: str = "", status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status

    @property
    def origin(self) -> BaseException | None:
        """What had gone wrong in the first place: HTTP clients wrap the errors of the kernel."""
        error: BaseException | None = self
        while error is not None and (inner := error.__cause__ or error.__context__) is not None:
            error = inner
        return error


class RouterNotFoundError(LlamavisorError):
    """Raised when a name is not one of the configured routers."""

    code = "router_not_found"


class RouterNotReadyError(LlamavisorError):
    """Raised when a request needs a router that is serving, and this one is not."""

    code = "router_not_ready"


class ModelNotFoundError(LlamavisorError):
    """Raised when no router lists a model of that name."""

    code = "model_not_found"


class ModelLoadError(LlamavisorError):
    """Raised when a model was asked for and did not become loaded."""

    code = "model_load_failed"


class ModelsMaxError(LlamavisorError):
    """Raised when `models_max` models are loaded and none of them can leave now."""

    code = "models_max_reached"


class DemandRefusedError(LlamavisorError):
    """Raised when a model that was asked for is not to be had now: too large, too many wait, memory is short.

    `reason` is a `demands.Why` in one word. `retry_after_s` is the number of seconds after which the same demand may
    succeed, None if that takes a person.
    """

    code = "demand_refused"

    def __init__(self, message: str, *, hint: str = "", reason: str, retry_after_s: float | None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeviceMissingError(LlamavisorError):
    """Raised when a model needs a device that llama-server does not see: it is never moved to the CPU silently."""

    code = "device_missing"


class ModelInUseError(LlamavisorError):
    """Raised when a model is to be removed that is in memory, in use or pinned, and nobody has said to force it."""

    code = "model_in_use"


class ModelAmbiguousError(LlamavisorError):
    """Raised when models folders have a model of the same name each, and none of them was named."""

    code = "model_ambiguous"


class FilesChangedError(LlamavisorError):
    """Raised when files are not those any more that were looked at, or agreed upon, before they are removed."""

    code = "files_changed"


class NotRemovableError(LlamavisorError):
    """Raised when files cannot be removed: the rights or the disk forbid it, or they lie outside of the folder."""

    code = "not_removable"
