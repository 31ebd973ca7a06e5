"""How much memory a model will take, before it is loaded."""

from __future__ import annotations

from llamavisor.footprint.estimate import (
    LEAST_CTX,
    Footprint,
    Source,
    cache_ram_bytes,
    default_ctx_size,
    estimate,
    fit_target,
)
from llamavisor.footprint.fitparams import Fit, FitParams, FitRow, find_tool
from llamavisor.footprint.formula import Device, Plan, Weights, context_size, slot_context, work_out
from llamavisor.footprint.options import MemoryOptions, read_options, read_said, said_by
from llamavisor.gauge.device import RAM_ID as RAM

__all__ = [
    "LEAST_CTX",
    "RAM",
    "Device",
    "Fit",
    "FitParams",
    "FitRow",
    "Footprint",
    "MemoryOptions",
    "Plan",
    "Source",
    "Weights",
    "cache_ram_bytes",
    "context_size",
    "default_ctx_size",
    "estimate",
    "find_tool",
    "fit_target",
    "read_options",
    "read_said",
    "said_by",
    "slot_context",
    "work_out",
]
