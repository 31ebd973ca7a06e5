"""Names of devices, and what goes over the wire between the daemon and who asks the drivers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisor.gauge.device import RAM, Device, Reading, is_integrated, once, parse_pci_id, pci_order, unknown
from llamavisor.gauge.wire import Answer, decode_answer, decode_question, encode_answer, encode_question


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00000000:0A:00.0", "0000:0a:00.0"),
        ("0000:0a:00.0", "0000:0a:00.0"),
        ("0a:00.0", "0000:0a:00.0"),
        ("0000000F:01:00.0", "000f:01:00.0"),
        ("00010000:01:00.0", "10000:01:00.0"),
        (" 0000:41:00.1\n", "0000:41:00.1"),
        ("0000:01:00", None),
        ("0000:01:20.0", None),
        ("0000:01:00.8", None),
        ("CUDA0", None),
        ("", None),
    ],
)
def test_pci_ids_have_one_form(text: str, expected: str | None) -> None:
    """NVML, sysfs and people write the same device the same way afterwards."""
    assert parse_pci_id(text) == expected


@given(st.text())
def test_any_text_is_a_pci_id_or_none(text: str) -> None:
    """Nothing raises, and the normal form of a normal form is itself."""
    known = parse_pci_id(text)
    assert known is None or parse_pci_id(known) == known
    pci_order(text)


def test_pci_ids_are_ordered_as_numbers() -> None:
    """A domain of five digits comes after one of four."""
    ids = ["10000:01:00.0", "0000:0a:00.0", "0000:09:00.0", "000f:01:00.0", "MIG-x"]
    assert sorted(ids, key=pci_order) == ["0000:09:00.0", "0000:0a:00.0", "000f:01:00.0", "10000:01:00.0", "MIG-x"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA GB10", True),
        ("Orin", True),
        ("NVIDIA Thor", True),
        ("AMD Radeon Graphics (RADV RENOIR)", True),
        ("AMD Radeon 780M", True),
        ("AMD Radeon 8060S", True),
        ("Intel(R) UHD Graphics 770 (ADL-S GT1)", True),
        ("Intel(R) Iris(R) Xe Graphics", True),
        ("llvmpipe (LLVM 19.1.7, 256 bits)", True),
        ("NVIDIA GeForce RTX 3090", False),
        ("NVIDIA H200", False),
        ("NVIDIA GB200", False),
        ("AMD Radeon RX 7700S", False),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", False),
        ("AMD Radeon Pro W7900", False),
        ("Intel(R) Arc(TM) A770 Graphics (DG2)", False),
        ("", False),
    ],
)
def test_integrated_devices_are_known_by_name(name: str, expected: bool) -> None:
    """Mobile cards of their own are not taken for integrated ones."""
    assert is_integrated(name) is expected


def test_a_device_that_shares_ram_is_counted_as_ram() -> None:
    """Its bytes are RAM's; a card's are its own."""
    assert Device("0000:01:00.0", "nvidia", "x", is_ram_shared=True).memory_id == RAM.id
    assert Device("0000:01:00.0", "nvidia", "x").memory_id == "0000:01:00.0"


def test_a_device_that_two_gauges_read_is_there_once() -> None:
    """The first reading counts."""
    first, second, other = unknown(RAM, 1.0, "a"), unknown(RAM, 2.0, "b"), unknown(Device("x", "other", "x"), 1.0, "")
    assert once([first, other, second]) == (first, other)


_sizes = st.none() | st.integers(0, 2**63)
_devices = st.builds(
    Device,
    st.text(),
    st.sampled_from(["ram", "nvidia", "amd", "other"]),
    st.text(),
    st.booleans(),
    st.lists(st.text()).map(tuple),
    st.none() | st.integers(0, 100),
)
_readings = st.builds(
    Reading,
    _devices,
    _sizes,
    _sizes,
    _sizes,
    st.just(7.5),
    st.text(),
    st.none() | st.dictionaries(st.integers(1, 2**22), _sizes),
)
_answers = st.builds(Answer, st.integers(0, 2**31), st.lists(_readings).map(tuple), st.text(), st.booleans())


@given(_answers)
def test_an_answer_arrives_as_it_was_sent(answer: Answer) -> None:
    """In one line, whatever the names of devices hold; unknown stays unknown."""
    line = encode_answer(answer)
    assert line.count(b"\n") == 1
    assert decode_answer(line, 7.5) == answer


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
_parts = st.fixed_dictionaries(
    {"number": st.integers(), "failure": st.text(), "readings": st.lists(st.dictionaries(st.text(), _json))}
)


@given(st.binary() | _json.map(lambda value: json.dumps(value).encode()) | _parts.map(lambda x: json.dumps(x).encode()))
def test_any_line_is_an_answer_or_none(line: bytes) -> None:
    """Nothing raises."""
    answer = decode_answer(line, 0.0)
    assert answer is None or isinstance(answer.number, int)
    decode_question(line)


@given(_answers.filter(lambda answer: bool(answer.readings)), st.data())
def test_an_answer_with_one_wrong_field_is_none(answer: Answer, data: st.DataObject) -> None:
    """Half an answer would make a device vanish."""
    message = json.loads(encode_answer(answer))
    reading = data.draw(st.sampled_from(message["readings"]))
    key = data.draw(st.sampled_from(["id", "kind", "name", "reason", "uuids", "bytes"]))
    reading[key] = data.draw(st.sampled_from([None, 5, {}, [[1]], [-1, None, None], [1.5, 2, 3], [True, 1, 1]]))
    assert decode_answer(json.dumps(message).encode(), 0.0) is None


def test_a_question_arrives_as_it_was_sent() -> None:
    """Only a number is one."""
    assert decode_question(encode_question(41)) == 41
    assert decode_question(b"-1\n") is None
    assert decode_question(b"9" * 30) is None
