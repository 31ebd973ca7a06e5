"""Tiny models are GGUF files like any other; that they load and speak is tested with llama-server itself."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from llamavisord.tiny_model import write_tiny_model


def test_is_a_gguf(tmp_path: Path) -> None:
    """The reader of llama.cpp's own package finds the words, and weights of which only the table is not zero."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, ["Hello", "world"], n_layer=2, n_ctx=512)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["llama.context_length"].contents() == 512
    assert reader.fields["llama.block_count"].contents() == 2
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-2:] == ["▁Hello", "▁world"]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 9
    assert not tensors["blk.1.attn_q.weight"].any()
    successors = {axis: int(column.argmax()) for axis, column in enumerate(tensors["output.weight"].T) if column.any()}
    assert successors == {0: 259, 1: 260, 2: 2}


def test_loops_when_told(tmp_path: Path) -> None:
    """The last word of a looping model leads back to the first."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, ["on", "and"], loop=True)
    output = next(tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output.weight")
    assert int(output[:, 2].argmax()) == 259


def test_is_the_same_every_time(tmp_path: Path) -> None:
    """Two models of the same words are the same bytes, about 100 KB of them."""
    for name in ("one", "two"):
        write_tiny_model(tmp_path / name, ["I", "am"])
    first = (tmp_path / "one").read_bytes()
    assert first == (tmp_path / "two").read_bytes()
    assert 90_000 < len(first) < 110_000


def test_has_room_for_many_words(tmp_path: Path) -> None:
    """More words than one row holds make the rows longer."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, [f"word{number}" for number in range(100)])
    assert gguf.GGUFReader(path).fields["llama.embedding_length"].contents() == 128


def test_padding_is_a_hole(tmp_path: Path) -> None:
    """Padding makes the file longer and takes no room on the disk; the model stays whole."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, ["big"], pad_bytes=10**9)
    assert path.stat().st_size > 10**9
    assert path.stat().st_blocks * 512 < 10**6
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"


@pytest.mark.parametrize("words", [[], ["twice", "or", "twice"]])
def test_refuses_what_it_cannot_say(tmp_path: Path, words: list[str]) -> None:
    """No words, or a word with two successors, are refused before anything is written."""
    with pytest.raises(ValueError, match="each only once"):
        write_tiny_model(tmp_path / "tiny.gguf", words)
    assert not (tmp_path / "tiny.gguf").exists()
