"""What a model can do, in the words of llama-server's GET /models, read from its header: it need not be loaded.

Checked against the answers of build b11434 for loaded models (`get_res_model_info` in tools/server/server-context.cpp,
`llama_ftype_name` in src/llama-model-loader.cpp, `llama_vocab::impl::load` in src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping

from llamavisor.gguf import Header
from llamavisor.gguf.tensortypes import FILE_TYPES, GUESSED
from llamavisor.sections import ModelSpec

_VOCABULARIES: Mapping[str, int] = {
    "no_vocab": 0,
    "none": 0,
    "llama": 1,
    "gpt2": 2,
    "hybriddna": 2,
    "whitespace": 2,
    "gemma4": 2,
    "bert": 3,
    "t5": 4,
    "rwkv": 5,
    "plamo2": 6,
    "test": 7,
}
"""`llama_vocab_type` by what the file calls its tokenizer."""
_TITLES: Mapping[str, str] = {
    "F32": "all F32",
    "MXFP4_MOE": "MXFP4 MoE",
    "Q2_K": "Q2_K - Medium",
    "Q2_K_S": "Q2_K - Small",
    "Q3_K_S": "Q3_K - Small",
    "Q3_K_M": "Q3_K - Medium",
    "Q3_K_L": "Q3_K - Large",
    "Q4_K_S": "Q4_K - Small",
    "Q4_K_M": "Q4_K - Medium",
    "Q5_K_S": "Q5_K - Small",
    "Q5_K_M": "Q5_K - Medium",
    "TQ1_0": "TQ1_0 - 1.69 bpw ternary",
    "TQ2_0": "TQ2_0 - 2.06 bpw ternary",
    "IQ2_XXS": "IQ2_XXS - 2.0625 bpw",
    "IQ2_XS": "IQ2_XS - 2.3125 bpw",
    "IQ2_S": "IQ2_S - 2.5 bpw",
    "IQ2_M": "IQ2_M - 2.7 bpw",
    "IQ3_XS": "IQ3_XS - 3.3 bpw",
    "IQ3_XXS": "IQ3_XXS - 3.0625 bpw",
    "IQ1_S": "IQ1_S - 1.5625 bpw",
    "IQ1_M": "IQ1_M - 1.75 bpw",
    "IQ4_NL": "IQ4_NL - 4.5 bpw",
    "IQ4_XS": "IQ4_XS - 4.25 bpw",
    "IQ3_S": "IQ3_S - 3.4375 bpw",
    "IQ3_M": "IQ3_S mix - 3.66 bpw",
}
"""How llama.cpp shows a file type, where that is not simply its name."""
_MEDIUM = frozenset({"Q3_K", "Q4_K", "Q5_K"})
"""Tensor types that llama.cpp takes for the medium mix where a file does not say its type."""
_UNKNOWN = "unknown, may not work"


def architecture_of(spec: ModelSpec) -> dict[str, object]:
    """What goes into the model and what comes out of it, as llama-server says it of a model that is not loaded.

    A projector that a table of the configuration names is not known here: its header was never read.
    """
    return {"input_modalities": ["text", *spec.senses], "output_modalities": ["text"]}


def meta_of(spec: ModelSpec) -> dict[str, object]:
    """What llama-server says of the model once it is loaded, without `n_ctx`, which nobody knows before.

    What the file does not say is left out; all of it, if the file could not be read.
    """
    header = spec.header
    if header is None:
        return {}
    said = {
        "vocab_type": _VOCABULARIES.get(header.tokenizer),
        "n_vocab": header.vocabulary_size,
        "n_ctx_train": header.context_length,
        "n_embd": header.embedding_length,
        "n_params": spec.parameter_count or header.parameter_count or None,
        "size": _size_bytes(spec, header),
        "ftype": _file_type(header),
    }
    return {key: value for key, value in said.items() if value is not None}


def _size_bytes(spec: ModelSpec, header: Header) -> int:
    """Of all tensors. Of a split model its files have to do: only the header of the first is at hand."""
    return spec.own_bytes if len(spec.own_files) > 1 else sum(share.size_bytes for share in header.type_mix)


def _file_type(header: Header) -> str:
    if header.file_type is not None:
        name = FILE_TYPES.get(header.file_type & ~GUESSED)
        guessed = "(guessed) " if header.file_type & GUESSED else ""
        return guessed + (_TITLES.get(name, name) if name is not None else _UNKNOWN)
    # As llama.cpp guesses: by the type of the most tensors; of the same number, the first counts.
    common = max(header.type_mix, key=lambda share: share.tensors, default=None)
    name = common.type if common is not None else "F32"
    name = f"{name}_M" if name in _MEDIUM else name
    return f"(guessed) {_TITLES.get(name, name)}"
