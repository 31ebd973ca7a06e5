"""What llama-server calls the options that have names of their own in a configuration, in all builds."""

from __future__ import annotations

from collections.abc import Mapping

from llamavisor import loadmode
from llamavisor.helptext import FlagSet, HelpOption, normal

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "gpu_layers": ("--n-gpu-layers", "--gpu-layers", "-ngl"),
    "devices": ("--device", "-dev"),
    "split_mode": ("--split-mode", "-sm"),
    "tensor_split": ("--tensor-split", "-ts"),
    "main_gpu": ("--main-gpu", "-mg"),
    "flash_attn": ("--flash-attn", "-fa"),
    "ctx_size": ("--ctx-size", "-c"),
    "parallel": ("--parallel", "-np"),
    "threads": ("--threads", "-t"),
    "batch_size": ("--batch-size", "-b"),
    "ubatch_size": ("--ubatch-size", "-ub"),
    "cache_type_k": ("--cache-type-k", "-ctk"),
    "cache_type_v": ("--cache-type-v", "-ctv"),
    "load_mode": loadmode.SPELLINGS,
    "fit": ("--fit", "-fit"),
    "jinja": ("--jinja", "--no-jinja"),
    "cont_batching": ("--cont-batching", "-cb", "--no-cont-batching", "-nocb"),
    "embeddings": ("--embeddings", "--embedding"),
    "reranking": ("--reranking", "--rerank"),
    "sleep_idle_seconds": ("--sleep-idle-seconds",),
    "temperature": ("--temperature", "--temp"),
    "top_p": ("--top-p",),
    "top_k": ("--top-k",),
    "min_p": ("--min-p",),
    "repeat_penalty": ("--repeat-penalty",),
    "max_tokens": ("--predict", "--n-predict", "-n"),
}
"""Every typed option, with its spellings in all builds since routers exist."""

MODEL_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "chat_template": ("--chat-template", "--chat-template-file"),
    "chat_template_kwargs": ("--chat-template-kwargs",),
    "mmproj": ("--mmproj", "-mm"),
    "draft": ("--spec-draft-model", "--model-draft", "-md"),
    "draft_type": ("--spec-type",),
    "draft_max": ("--spec-draft-n-max", "--draft-max", "--draft-n", "--draft"),
    "draft_min": ("--spec-draft-n-min", "--draft-min", "--draft-n-min"),
    "draft_p_min": ("--spec-draft-p-min", "--draft-p-min"),
    "draft_gpu_layers": ("--spec-draft-ngl", "--n-gpu-layers-draft", "--gpu-layers-draft", "-ngld"),
    "draft_devices": ("--spec-draft-device", "--device-draft", "-devd"),
    "draft_threads": ("--spec-draft-threads", "--threads-draft", "-td"),
    "draft_cache_type_k": ("--spec-draft-type-k", "--cache-type-k-draft", "-ctkd"),
    "draft_cache_type_v": ("--spec-draft-type-v", "--cache-type-v-draft", "-ctvd"),
    "lora": ("--lora", "--lora-scaled"),
    "grammar_file": ("--grammar-file",),
    "slot_save_path": ("--slot-save-path",),
}
"""The same for what only tables of single models have as typed options."""

ALL_SPELLINGS: Mapping[str, tuple[str, ...]] = {**SPELLINGS, **MODEL_SPELLINGS}
"""All typed options."""

LISTENER = frozenset(
    {
        "--cors-origins",
        "--cors-methods",
        "--cors-headers",
        "--cors-credentials",
        "--ui",
        "--webui",
        "--ui-config",
        "--webui-config",
        "--ui-config-file",
        "--webui-config-file",
        "--ui-mcp-proxy",
        "--webui-mcp-proxy",
        "--path",
        "--log-verbose",
        "--log-verbosity",
        "--log-prefix",
        "--log-timestamps",
    }
)
"""Options that mean something to the router's own process, so they alone go onto its command line.

They are what `server.cpp`, `server-http.cpp` and the log of llama.cpp read in router mode, less what is
reserved; the models inherit them and do not mind.
"""

_TYPED_BY_SPELLING = {spelling: name for name, spellings in ALL_SPELLINGS.items() for spelling in spellings}


def typed_name(spelling: str) -> str | None:
    """The typed option that `spelling` (dashes included) is another word for, None if it is for none."""
    return _TYPED_BY_SPELLING.get(normal(spelling))


def find_typed(name: str, flags: FlagSet) -> HelpOption | None:
    """The option of a build that a typed option stands for, None if the build has none."""
    return next((known for spelling in ALL_SPELLINGS[name] if (known := flags.find(spelling))), None)
