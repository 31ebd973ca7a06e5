"""As much of a GGUF file as a model's process must know: its size, its vocabulary, what a tiny model says."""

from __future__ import annotations

import struct

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NORMAL_TOKEN = 1
_EOS = 2
_TINY = 1000
"""A vocabulary larger than this is a true model's, and what it would say cannot be read off."""


class ModelFile:
    """One GGUF file.

    Attributes:
        n_ctx: context length that it was trained with.
        meta: what GET /models tells of it, but for `n_ctx`.
        words: what it says.
        is_endless: whether it begins again after the last word.

    Raises:
        ValueError: llama-server would not load it; the message is llama-server's.
        OSError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._data = file.read()
        self._at = 4
        if len(self._data) < 4:
            raise ValueError("gguf_init_from_reader: failed to read magic")
        if self._data[:4] != b"GGUF":
            magic = self._data[:4].decode("ascii", "replace")
            raise ValueError(f"gguf_init_from_reader: invalid magic characters: '{magic}', expected 'GGUF'")
        try:
            self._read()
        except (struct.error, LookupError) as exc:
            raise ValueError("gguf_init_from_reader: failed to read the header") from exc
        del self._data

    def _read(self) -> None:
        _, n_tensors, n_entries = self._unpack("<IQQ")
        entries = {self._string(): self._value(self._unpack("<I")[0]) for _ in range(n_entries)}
        tensors = {}
        for _ in range(n_tensors):
            name = self._string()
            shape = self._unpack(f"<{self._unpack('<I')[0]}Q")
            kind, offset = self._unpack("<IQ")
            tensors[name] = (shape, kind, offset)
        start = -(-self._at // 32) * 32
        n_params = n_bytes = 0
        for name, (shape, kind, offset) in tensors.items():
            count = 1
            for length in shape:
                count *= length
            n_params += count
            n_bytes += 4 * count
            if start + offset + (4 * count if kind == 0 else 0) > len(self._data):
                reason = "data is not within the file bounds, model is corrupted or incomplete"
                raise ValueError(f"llama_model_load: error loading model: tensor '{name}' {reason}")
        tokens = entries["tokenizer.ggml.tokens"]
        kinds = entries.get("tokenizer.ggml.token_type", [])
        architecture = entries["general.architecture"]
        self.n_ctx = entries[f"{architecture}.context_length"]
        self.meta = {
            "vocab_type": 1,
            "n_vocab": len(tokens),
            "n_ctx_train": self.n_ctx,
            "n_embd": entries[f"{architecture}.embedding_length"],
            "n_params": n_params,
            "size": n_bytes,
            "ftype": "all F32",
        }
        words = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _NORMAL_TOKEN]
        is_tiny = 0 < len(words) <= _TINY and "output.weight" in tensors
        self.words = [word.replace("\u2581", " ") for word in words] if is_tiny else [" hello"]
        self.is_endless = False
        if is_tiny:  # its output matrix is a table: does the end of the text follow the last word?
            (width, _), _, offset = tensors["output.weight"]
            at = start + offset + 4 * (_EOS * width + len(words))
            self.is_endless = struct.unpack_from("<f", self._data, at)[0] == 0.0

    def _unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", "replace")

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._unpack("<IQ")
            if inner in _FORMATS:
                return list(self._unpack(f"<{count}{_FORMATS[inner]}"))
            return [self._value(inner) for _ in range(count)]
        return self._unpack(f"<{_FORMATS[kind]}")[0]
