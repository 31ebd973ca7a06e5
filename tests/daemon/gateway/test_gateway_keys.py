"""The file of API keys: what may stand in it, what comes of it, and what it never gives away."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamavisord.gateway.keys import FILE_BYTES, KEYS_MAX, Key, Keys, KeysError, glob, read_keys

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of keys that nobody else may read."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "keys"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return write


def keys_in(path: Path) -> Keys:
    """The keys of a file."""
    return read_keys(path)[0]


def test_a_file_of_one_line_is_a_key_that_may_do_everything(write: Write) -> None:
    """With and without a line break at its end, as files of keys have always been."""
    for text in ("s3same", "s3same\n", "  s3same \r\n"):
        keys = keys_in(write(text))
        found = keys.find("s3same")
        assert found is not None
        assert (found.name, found.is_admin, found.models) == ("key", True, None)
        assert keys.find("s3sam") is None
        assert keys.find("") is None
        assert keys


def test_a_line_says_who_it_is_and_what_they_may_do(write: Write) -> None:
    """The words after the key in any order; comments and empty lines are skipped."""
    keys = keys_in(
        write(
            "# who may come in\n\nalice sk-alice-1\n\tbob   sk-bob-123 admin\n"
            "c.d@x-1_2 sk-carol-1 models=qwen*,Alpha admin # no comment\n".replace(" # no comment", "")
            + "nameless-1\nnameless-2\n"
        )
    )
    assert list(map(str, keys.keys)) == [
        "alice",
        "bob admin",
        "c.d@x-1_2 admin models=qwen*,Alpha",
        "key admin",
        "key-2 admin",
    ]
    found = keys.find("sk-carol-1")
    assert found is not None
    assert (found.name, found.is_admin, found.models) == ("c.d@x-1_2", True, ("qwen*", "Alpha"))


def test_two_readings_are_equal_and_a_changed_key_is_not(write: Write) -> None:
    """A reload must see the difference, though no key is kept."""
    assert keys_in(write("alice sk-alice-1\n")) == keys_in(write("alice sk-alice-1\n"))
    assert keys_in(write("alice sk-alice-1\n")) != keys_in(write("alice sk-alice-2\n"))
    assert not Keys()


def test_no_key_is_shown(write: Write) -> None:
    """Neither itself nor its digest, from which a weak one could be found."""
    keys = keys_in(write("alice sk-alice-1\nsesame-1\n"))
    for text in (repr(keys), str(keys), *map(repr, keys.keys), *map(str, keys.keys)):
        assert "sesame" not in text
        assert "sk-alice" not in text
        assert "digest" not in text


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", None, "holds no key"),
        ("# sesame-1\n\n", None, "holds no key"),
        ("ok-key-1\nalice  \n\nsesame \u00e9\n", 4, "a character that is not ASCII"),
        ("sesame-1\x00", 1, "a control character"),
        ("a\x0bsesame-1", 1, "a control character"),
        ("sesame,1\n", 1, "a key has no comma in it"),
        ("alice sesame,1\n", 1, "a key has no comma in it"),
        ("a/b sesame-1\n", 1, "a name is 1 to 32 letters"),
        (f"{'x' * 33} sesame-1\n", 1, "a name is 1 to 32 letters"),
        ("alice sesame\n", 1, "a key of less than 8 characters can be guessed"),
        ("sesame-1 admin\n", 1, "has no name, or no key"),
        ("sesame-1 models=a\n", 1, "has no name, or no key"),
        ("alice sesame-1 admim\n", 1, "after the key only admin and models=GLOB,… may follow, each once"),
        ("alice sesame-1 admin admin\n", 1, "after the key only admin"),
        ("alice sesame-1 models=a models=b\n", 1, "after the key only admin"),
        ("alice sesame-1 # hers\n", 1, "after the key only admin"),
        ("alice sesame-1 models=\n", 1, "models= wants names or globs"),
        ("alice sesame-1 models=a,,b\n", 1, "models= wants names or globs"),
        ("alice sesame-1\n\nalice sesame-2\n", 3, "its name is taken by line 1"),
        ("key sesame-1\nsesame-2\n", 2, "its name is taken by line 1"),
        ("alice sesame-1\nbob sesame-1\n", 2, "the same key as on line 1"),
        ("sesame-1\nbob sesame-1\n", 2, "the same key as on line 1"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_nothing_is_repeated(
    write: Write, text: str, line: int | None, says: str
) -> None:
    """A key in the wrong place must not end up in a log."""
    path = write(text)
    with pytest.raises(KeysError) as caught:
        read_keys(path)
    told = str(caught.value)
    assert told.startswith(f"{path}:{line}: {says}" if line else f"{path} {says}")
    assert "sesame" not in told


def test_more_keys_than_a_thousand_and_longer_files_are_refused(write: Write) -> None:
    """The last that fits still does."""
    assert len(keys_in(write("".join(f"{number}-abcdefg\n" for number in range(KEYS_MAX)))).keys) == KEYS_MAX
    with pytest.raises(KeysError, match=f":{KEYS_MAX + 1}: more than {KEYS_MAX} keys"):
        read_keys(write("".join(f"{number}-abcdefg\n" for number in range(KEYS_MAX + 1))))
    assert keys_in(write(b"sesame-1\n" + b"#" * (FILE_BYTES - 9)))
    with pytest.raises(KeysError, match="is longer than 64 KiB"):
        read_keys(write(b"sesame-1\n" + b"#" * (FILE_BYTES - 8)))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe would keep the daemon waiting for somebody to write into it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(KeysError, match="is not a regular file"):
            read_keys(path)
    with pytest.raises(KeysError, match="cannot be read: No such file or directory"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(("mode", "is_public"), [(0o600, False), (0o640, False), (0o604, True), (0o602, True)])
def test_a_file_that_others_may_read_or_change_is_noticed(write: Write, mode: int, is_public: bool) -> None:
    """A group may be meant; everybody cannot be."""
    path = write("sesame-1\n")
    path.chmod(mode)
    assert read_keys(path)[1] is is_public


def test_globs_match_whole_names() -> None:
    """As those of [model] tables do; none of them matches nothing."""
    assert glob(("qwen*", "a?c")).fullmatch("qwen3-8b")
    assert glob(("qwen*", "a?c")).fullmatch("abc")
    for name in ("abcd", "my-qwen", "Qwen3", ""):
        assert not glob(("qwen*", "a?c")).fullmatch(name)
    assert not glob(()).fullmatch("")
    assert not glob(()).fullmatch("a")


def test_a_key_that_is_no_text_is_nobodys(write: Write) -> None:
    """What aiohttp makes of bytes that are not UTF-8 can be looked up too."""
    assert keys_in(write("sesame-1\n")).find("\udcff") is None


_WORDS = st.sampled_from(["alice", "bob", "sesame-1", "sesame-2", "admin", "models=a,b*", "#", "\n", "\n", "\t", "é"])


@given(st.binary(max_size=200) | st.lists(_WORDS, max_size=12).map(lambda words: " ".join(words).encode()))
def test_no_bytes_make_more_than_an_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Keys, each of them found by itself alone, or an error that is one printable line without any."""
    path = tmp_path_factory.getbasetemp() / "any-keys"
    path.write_bytes(raw)
    keys, told = Keys(), ""
    try:
        keys = keys_in(path)
    except KeysError as error:
        told = str(error)
    assert bool(keys) is not bool(told)
    assert told.isprintable()
    assert "sesame" not in told
    words = {word for line in raw.decode("ascii", "replace").split("\n") for word in line.split()}
    found = {key.name for word in words if (key := keys.find(word)) is not None}
    assert found == {key.name for key in keys.keys}


def test_keys_are_hashable() -> None:
    """They are looked up by themselves."""
    assert {Key("a", b"1"): 1}[Key("a", b"1")] == 1
