"""How much memory there is and how much of it is used: RAM, and every GPU whose driver tells."""

from __future__ import annotations

from llamavisor.gauge.cgroup import oom_kills
from llamavisor.gauge.device import RAM, RAM_ID, Device, Gauge, Pressure, Reading
from llamavisor.gauge.machine import MachineGauge, open_gauge
from llamavisor.gauge.mapping import physical_id
from llamavisor.gauge.pressure import cgroup_pressure, machine_pressure, worst_pressure
from llamavisor.gauge.ram import ProcessMemory, RamGauge, memory_of, memory_of_all

__all__ = [
    "RAM",
    "RAM_ID",
    "Device",
    "Gauge",
    "MachineGauge",
    "Pressure",
    "ProcessMemory",
    "RamGauge",
    "Reading",
    "cgroup_pressure",
    "machine_pressure",
    "memory_of",
    "memory_of_all",
    "oom_kills",
    "open_gauge",
    "physical_id",
    "worst_pressure",
]
