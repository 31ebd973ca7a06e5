"""What a GGUF file is for, as far as its header tells."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from enum import Enum

from llamavisor.gguf.container import Tensors
from llamavisor.gguf.values import Values


class Kind(Enum):
    """What a file is for."""

    MODEL = "model"
    """Generates text; or is something that this program does not know, of an architecture of its own."""
    EMBEDDING = "embedding"
    """Turns text into vectors."""
    RERANK = "rerank"
    """Scores texts against a query."""
    DRAFT = "draft"
    """Works only beside another model, for speculative decoding.

    Only a draft that can be nothing else is told. A small model that somebody uses as a draft is a `MODEL`.
    """
    PROJECTOR = "projector"
    """Lets another model see or hear (mmproj)."""
    LORA = "lora"
    """Changes another model."""
    CONTROL_VECTOR = "control-vector"
    """Steers another model."""
    IMATRIX = "imatrix"
    """Statistics by which a model is quantized."""
    PART = "part"
    """A later part of a split file. The first part says what they all are."""
    VOCABULARY = "vocabulary"
    """A tokenizer without a model."""
    OTHER = "other"
    """Nothing that llama-server loads: an adapter that is no LoRA, or a file that names no architecture."""


_ENCODERS = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""Architectures of llama.cpp's src/llama-arch.cpp that give vectors and never text."""
_DRAFTS = frozenset({"eagle3", "dflash", "gemma4-assistant"})
"""Those that llama-server uses only as drafts (`--spec-type`)."""
_SCORES = frozenset({b"cls.output.weight", b"cls.weight"})
"""Tensors of a model that scores."""


def find_kind(values: Values, tensors: Tensors, *, part: int | None, pooling: str | None) -> Kind:
    """What a file is for. There are ten cases; the first that holds counts.

    1. A part of a split file after the first: `split.no`.
    2. A projector: its architecture is `clip`, the only one that tools/mtmd/clip.cpp loads.
    3. An adapter: `general.type`; a LoRA when `adapter.type` says so (src/llama-adapter.cpp asks for both).
    4. A control vector: the architecture that llama-cvector-generator writes.
    5. An importance matrix: `general.type`, as llama-imatrix writes it.
    6. No architecture: nothing that is loaded.
    7. A tokenizer only: no tensors.
    8. A draft: its architecture; or a model with layers for multi-token prediction, of which only those are there.
    9. A reranker: its pooling; or, where that is not said, an encoder with a tensor for the score.
    10. An embedding model: an encoder; or its pooling, which is written only for models that embed.

    Args:
        values: of the header.
        tensors: what is known of them.
        part: which part of a split file it is, from 0 on, None when it is not split.
        pooling: its pooling, None when it is not said.
    """
    architecture, purpose = values.architecture, values.text("general.type")
    if part:
        return Kind.PART
    if architecture == "clip":
        return Kind.PROJECTOR
    if purpose == "adapter":
        return Kind.LORA if values.text("adapter.type") == "lora" else Kind.OTHER
    if architecture == "controlvector":
        return Kind.CONTROL_VECTOR
    if purpose == "imatrix":
        return Kind.IMATRIX
    if not architecture:
        return Kind.OTHER
    if not tensors.count and part is None:
        return Kind.VOCABULARY
    if architecture in _DRAFTS or _has_only_nextn_layers(values, tensors.names):
        return Kind.DRAFT
    if pooling == "rank" or (pooling is None and architecture in _ENCODERS and not _SCORES.isdisjoint(tensors.names)):
        return Kind.RERANK
    if architecture in _ENCODERS or pooling in ("mean", "cls", "last"):
        return Kind.EMBEDDING
    return Kind.MODEL


def _has_only_nextn_layers(values: Values, tensors: AbstractSet[bytes]) -> bool:
    """Whether all layers before those for multi-token prediction are missing, as `convert_hf_to_gguf.py --mtp` does."""
    layers = values.count(values.key("block_count"))
    nextn = values.count(values.key("nextn_predict_layers"))
    if not layers or not nextn:
        return False
    numbers = {name.split(b".", 2)[1] for name in tensors if name.startswith(b"blk.")}
    return bool(numbers) and all(number.isdigit() and int(number) >= layers - nextn for number in numbers)
