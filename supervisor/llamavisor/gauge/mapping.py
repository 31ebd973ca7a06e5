"""Which physical device a router means by a name such as CUDA0, which only counts what that router can see.

Pure. Whatever is not certain is None: a wrong device would be charged for what another one holds.

The rules, from the CUDA programming guide (environment variables) and AMD's page on GPU isolation:

- CUDA_VISIBLE_DEVICES is a list of indices, of UUIDs (`GPU-…`, as few digits as make it unique), or of MIG instances
  (`MIG-<UUID>`, before driver R470 `MIG-GPU-<UUID>/<GPU instance>/<compute instance>`). The first entry that means
  nothing ends the list; what stands before it stays visible. Indices count in the order of PCI ids, but only with
  CUDA_DEVICE_ORDER=PCI_BUS_ID; CUDA's own default order (fastest first) is not known here.
- ROCR_VISIBLE_DEVICES (indices or UUIDs) hides devices from ROCm; HIP_VISIBLE_DEVICES, and in its absence
  CUDA_VISIBLE_DEVICES, then counts what is left.
- Once a GPU is divided into MIG instances, CUDA shows one of them without being told which: only names are certain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llamavisor.gauge.device import RAM_ID, Device, Kind
from llamavisor.gauge.listed import SUFFIX

_NAME = re.compile(r"(CUDA|ROCm|Vulkan)(\d{1,4})", re.ASCII)
_INDEX = re.compile(r"\d{1,4}", re.ASCII)
_IN_RAM = frozenset({"CPU", "Host"})
"""What llama.cpp calls the memory of the machine."""
_OTHERS = re.compile(r"Intel|llvmpipe|SwiftShader|Apple", re.IGNORECASE)
_MIN_PREFIX = len("GPU-") + 1


def physical_id(
    name: str, environ: Mapping[str, str], devices: Sequence[Device], *, description: str = ""
) -> str | None:
    """The id of the physical device that a router calls `name`, None if that is not certain.

    Args:
        name: as in `--list-devices`, `--device` or the output of llama-fit-params: CUDA0, ROCm1, Vulkan0, Host.
        environ: of that router.
        devices: all that the gauge has found, whatever this router can see of them.
        description: what the router says of the device, if known: it tells Vulkan devices apart.
    """
    if name in _IN_RAM:
        return RAM_ID
    found = _NAME.fullmatch(name)
    if found is None or found[1] == "Vulkan":
        return _by_itself(name, environ, devices, description)
    index = int(found[2])
    visible = visible_cuda(environ, devices) if found[1] == "CUDA" else visible_rocm(environ, devices)
    return visible[index].id if visible is not None and index < len(visible) else None


def visible_cuda(environ: Mapping[str, str], devices: Sequence[Device]) -> list[Device] | None:
    """The devices that CUDA shows with this environment, in its order; None if that is not certain."""
    ours = _of("nvidia", devices)
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    has_order = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(ours) == 1
    counted = _counted(ours) if has_order else None
    return counted if listed is None else _select(listed, ours, counted)


def visible_rocm(environ: Mapping[str, str], devices: Sequence[Device]) -> list[Device] | None:
    """Likewise ROCm."""
    ours = _of("amd", devices)
    if environ.get("GPU_DEVICE_ORDINAL"):
        return None
    # Once the driver tells which devices ROCm can use, the others do not count.
    usable = [device for device in ours if device.rank is not None] or ours
    shown = _counted(usable)
    if (runtime := environ.get("ROCR_VISIBLE_DEVICES")) is not None:
        shown = _select(runtime, usable, shown)
    listed = environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or shown is None:
        return shown
    return _select(listed, shown, shown)


def _select(listed: str, devices: Sequence[Device], counted: Sequence[Device] | None) -> list[Device] | None:
    """What a list of indices and UUIDs shows; None if that is not certain.

    Args:
        listed: the value of the variable.
        devices: those that UUIDs may mean.
        counted: those that indices count; None if their order is not certain.
    """
    shown: list[Device] = []
    form = ""
    for entry in map(str.strip, listed.split(",")):
        its_form = "index" if _INDEX.fullmatch(entry) else entry[:4].upper()
        if form and its_form != form and its_form in {"index", "GPU-", "MIG-"}:
            return None  # how mixed lists are read is written nowhere
        form = its_form
        if its_form == "index":
            if counted is None:
                return None
            device = counted[int(entry)] if int(entry) < len(counted) else None
        elif its_form == "GPU-":
            matches = _by_uuid(entry, devices)
            if len(matches) > 1 or any(not device.uuids for device in devices):
                return None  # one whose UUIDs we do not know may be meant
            device = matches[0] if matches else None
        elif its_form == "MIG-":
            device = next((each for each in devices if entry.lower() in map(str.lower, each.uuids)), None)
            if device is None:
                return None  # an instance that was made a moment ago
        else:
            device = None
        if device is None:
            return shown
        if device in shown and its_form != "MIG-":
            return None  # what is named twice ends CUDA in an error
        shown.append(device)
    return shown


def _by_uuid(prefix: str, devices: Sequence[Device]) -> list[Device]:
    wanted = prefix.lower()
    if len(wanted) < _MIN_PREFIX:
        return []
    return [device for device in devices if any(uuid.lower().startswith(wanted) for uuid in device.uuids)]


def _of(kind: Kind, devices: Sequence[Device]) -> list[Device]:
    """Devices of a kind; of those that only llama-server knows, none that it calls by another backend's name."""
    return [
        device
        for device in devices
        if device.kind == kind and (not device.id.endswith(SUFFIX) or device.rank is not None)
    ]


def _counted(devices: Sequence[Device]) -> list[Device] | None:
    """In the order of their driver, None if that is not certain."""
    ranks = [device.rank for device in devices if device.rank is not None]
    if len(devices) == 1 and not devices[0].id.startswith("MIG-"):
        return list(devices)
    if len(set(ranks)) != len(devices):
        return None
    return sorted(devices, key=lambda device: device.rank or 0)


def _by_itself(name: str, environ: Mapping[str, str], devices: Sequence[Device], description: str) -> str | None:
    """A device of a backend whose order is not known: by what is said of it, or because there is only one."""
    hides = any(environ.get(variable) for variable in ("GGML_VK_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR"))
    if not hides and any(device.id == name + SUFFIX for device in devices):
        return name + SUFFIX
    if not name.startswith("Vulkan"):
        return None
    gpus = [device for device in devices if device.kind != "ram"]
    alike = [device for device in gpus if description and device.name == description]
    if len(alike) == 1:
        return alike[0].id
    if len(gpus) == 1 and name == "Vulkan0" and not hides and not _OTHERS.search(description):
        return gpus[0].id
    return None
