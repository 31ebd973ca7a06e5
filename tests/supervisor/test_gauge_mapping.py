"""Which physical device a router means by CUDA0: tables of environments and devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.gauge import RAM, Device, physical_id
from llamavisor.gauge.mapping import visible_cuda, visible_rocm

A = Device(
    "0000:01:00.0", "nvidia", "NVIDIA GeForce RTX 3090", uuids=("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",), rank=0
)
B = Device(
    "0000:41:00.0", "nvidia", "NVIDIA GeForce RTX 3060", uuids=("GPU-8932aaaa-d72c-4106-c12f-20bd9faed9f6",), rank=1
)
C = Device(
    "0000:a1:00.0", "nvidia", "NVIDIA GeForce RTX 3090", uuids=("GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77",), rank=2
)
OLD_MIG = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0"
M = Device("MIG-c6d4f1ef-42e4", "nvidia", "A100 MIG 1g.5gb", uuids=("MIG-c6d4f1ef-42e4", OLD_MIG))
N = Device("MIG-77777777-42e4", "nvidia", "A100 MIG 1g.5gb", uuids=("MIG-77777777-42e4", "MIG-88888888-42e4"))
X = Device("0000:03:00.0", "amd", "AMD GPU 0x744c", uuids=("GPU-deadbeefdeadbeef",), rank=0)
Y = Device("0000:83:00.0", "amd", "AMD GPU 0x744c", uuids=("GPU-0123456789abcdef",), rank=1)
UNUSABLE = Device("0000:c3:00.0", "amd", "AMD GPU 0x164e", is_ram_shared=True)
L0 = Device("CUDA0@llama-server", "nvidia", "NVIDIA RTX A4000", rank=0)
L1 = Device("CUDA1@llama-server", "nvidia", "NVIDIA RTX A4000", rank=1)
V0 = Device("Vulkan0@llama-server", "other", "Intel(R) Arc(TM) A770 Graphics (DG2)")
PCI = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def cuda(visible: str | None, *, order: bool = True) -> dict[str, str]:
    """The environment of a router."""
    env = dict(PCI) if order else {}
    return env if visible is None else env | {"CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        (None, [A, B, C]),
        ("0", [A]),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("0,2,-1,1", [A, C]),
        ("0,7,1", [A]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("GPU-5d5b", [C]),
        ("gpu-5D5B", [C]),
        ("GPU-8932a,GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", [B, A]),
        ("GPU-ffff,GPU-5d5b", []),
        ("GPU-5d5b,GPU-ffff", [C]),
        ("GPU-8932", None),
        ("GPU-", []),
        ("0,0", None),
        ("0,GPU-5d5b", None),
        ("MIG-unheard-of", None),
        ("1;2", []),
    ],
)
def test_what_cuda_shows(visible: str | None, shown: list[Device] | None) -> None:
    """The list ends at what means nothing; what is not certain is None."""
    assert visible_cuda(cuda(visible), [RAM, C, X, A, B]) == shown


def test_without_the_order_of_the_bus_indices_mean_nothing() -> None:
    """CUDA's own order is by speed, which is not known here; UUIDs need no order, and one device has only one."""
    assert visible_cuda(cuda("0", order=False), [A, B]) is None
    assert visible_cuda(cuda(None, order=False), [A, B]) is None
    assert visible_cuda(cuda("GPU-8932f,GPU-8932a", order=False), [A, B]) == [A, B]
    assert visible_cuda(cuda("0", order=False), [A, X]) == [A]


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        ("MIG-c6d4f1ef-42e4", [M]),
        (OLD_MIG, [M]),
        ("MIG-88888888-42e4", [N]),
        ("MIG-77777777-42e4,MIG-88888888-42e4", [N, N]),
        ("MIG-c6d4", None),
        ("0", None),
        (None, None),
    ],
)
def test_mig_instances_are_known_by_name_only(visible: str | None, shown: list[Device] | None) -> None:
    """Compute instances that share one memory are one device."""
    assert visible_cuda(cuda(visible), [M, N, B]) == shown


def test_a_device_without_a_uuid_may_be_any() -> None:
    """One that did not answer may be meant by every UUID."""
    silent = Device("0000:f1:00.0", "nvidia", "NVIDIA GPU", rank=3)
    assert visible_cuda(cuda("GPU-5d5b"), [A, C, silent]) is None
    assert visible_cuda(cuda("3"), [A, B, C, silent]) == [silent]


def test_devices_whose_places_are_not_known_have_no_index() -> None:
    """Two of the same place are no order either."""
    lost = Device("0000:f1:00.0", "nvidia", "NVIDIA GPU")
    assert visible_cuda(cuda("0"), [A, lost]) is None
    assert visible_cuda(cuda("0"), [A, Device("0000:02:00.0", "nvidia", "x", rank=0)]) is None


@pytest.mark.parametrize(
    ("env", "shown"),
    [
        ({}, [X, Y]),
        ({"HIP_VISIBLE_DEVICES": "1"}, [Y]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [Y]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [X]),
        ({"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "1"}, [Y]),
        ({"ROCR_VISIBLE_DEVICES": "1"}, [Y]),
        ({"ROCR_VISIBLE_DEVICES": "1,GPU-DEADBEEFDEADBEEF"}, None),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0123456789ABCDEF,GPU-DEADBEEFDEADBEEF"}, [Y, X]),
        ({"ROCR_VISIBLE_DEVICES": "1,0", "HIP_VISIBLE_DEVICES": "0"}, [Y]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"GPU_DEVICE_ORDINAL": "1"}, None),
    ],
)
def test_what_rocm_shows(env: dict[str, str], shown: list[Device] | None) -> None:
    """HIP counts what ROCR has left; devices that ROCm cannot use have no place."""
    assert visible_rocm(env, [Y, A, X, UNUSABLE]) == shown


def test_amd_devices_without_an_order_are_uncertain() -> None:
    """Unless there is only one."""
    first, second = Device("0000:03:00.0", "amd", "x"), Device("0000:83:00.0", "amd", "x")
    assert visible_rocm({}, [first, second]) is None
    assert visible_rocm({}, [first]) == [first]


@pytest.mark.parametrize(
    ("name", "env", "devices", "expected"),
    [
        ("CUDA0", cuda("1"), [A, B], B.id),
        ("CUDA1", cuda("1"), [A, B], None),
        ("CUDA1", cuda(None), [A, B], B.id),
        ("CUDA0", cuda(None), [], None),
        ("CUDA0", cuda(None), [X], None),
        ("ROCm1", {}, [X, Y], Y.id),
        ("CPU", {}, [], "RAM"),
        ("Host", {}, [A], "RAM"),
        ("CUDA1", cuda(None), [RAM, L0, L1], L1.id),
        ("CUDA0", cuda("1"), [RAM, L0, L1], L1.id),
        ("Vulkan0", {}, [RAM, V0], V0.id),
        ("Vulkan0", {"GGML_VK_VISIBLE_DEVICES": "1"}, [RAM, V0, A], None),
        ("Vulkan0", {}, [RAM, A], A.id),
        ("Vulkan1", {}, [RAM, A], None),
        ("Vulkan0", {}, [A, B], None),
        ("SYCL0", {}, [A], None),
        ("CUDA", cuda(None), [A], None),
        ("CUDA٣", cuda(None), [A], None),
        ("", {}, [A], None),
    ],
)
def test_names_of_routers(name: str, env: dict[str, str], devices: list[Device], expected: str | None) -> None:
    """A name means one physical device, or nothing that is certain."""
    assert physical_id(name, env, devices) == expected


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", B.id),
        ("NVIDIA GeForce RTX 3090", None),
        ("Intel(R) UHD Graphics 770", None),
    ],
)
def test_a_vulkan_device_is_known_by_what_is_said_of_it(description: str, expected: str | None) -> None:
    """If only one device is called that."""
    assert physical_id("Vulkan1", {}, [A, B, C], description=description) == expected


def test_a_vulkan_device_of_another_maker_is_not_the_only_one_that_is_known() -> None:
    """An integrated GPU that no gauge reads is not charged to the card."""
    assert physical_id("Vulkan0", {}, [A], description="Intel(R) UHD Graphics 770") is None


@given(
    st.text() | st.sampled_from(["CUDA0", "CUDA1", "ROCm0", "Vulkan0"]),
    st.dictionaries(
        st.sampled_from(["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"]),
        st.text() | st.lists(st.sampled_from(["0", "1", "-1", "GPU-8932f", "MIG-c6d4f1ef-42e4", ""])).map(",".join),
    ),
    st.lists(st.sampled_from([A, B, C, M, N, X, Y, UNUSABLE, L0, V0, RAM]), unique=True),
    st.text(),
)
def test_any_name_is_a_device_that_there_is_or_none(
    name: str, env: dict[str, str], devices: list[Device], description: str
) -> None:
    """Nothing raises, and nothing is invented."""
    known = physical_id(name, env, devices, description=description)
    assert known is None or known == "RAM" or known in {device.id for device in devices}
