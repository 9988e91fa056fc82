"""The Gemma-2 text encoder (transformers' Gemma2Model) of Lumina-Image-2.0: names in files, sizes, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from library.clip_tokenizer import TokenizerKind
from library.dit_parts import what_it_is
from library.errors import UserError
from library.key_layout import IDENTITY
from library.model_io import Shapes, TensorSource, count_indices, empty_module, open_checkpoint, open_component, read_json
from library.model_parts import Component, settings_alone
from library.padded_tokenizer import PaddedTokenizer, without_padding

GEMMA2_TOKENIZER, GEMMA2_TOKENIZER_FOLDER = "Alpha-VLLM/Lumina-Image-2.0", "tokenizer"
"""The same as google/gemma-2-2b's, which is given to those alone who are logged in."""
PAD, BOS = 0, 2
HEAD_WIDTH = 256
"""Of Gemma-2 2B and 9B; a model whose keys are narrower in all has one head of them."""

WHOLE_PREFIX = "text_encoders.gemma2_2b.transformer.model."
"""Where single files that hold everything have it."""
_PREFIXES = (WHOLE_PREFIX, "model.", "")
_FIRST = "embed_tokens.weight"
_OPTIONAL = ("lm_head\\.weight", "logit_scale", "spiece_model")
"""What files may hold beside the encoder: the head of the language model, and what ComfyUI adds."""


def gemma2_config(shapes: Shapes) -> dict[str, Any]:
    """Gemma2Model's configuration, from shapes. What they do not tell is the same in Gemma-2 2B and 9B."""
    vocabulary, width = shapes[_FIRST]
    keys = shapes["layers.0.self_attn.k_proj.weight"][0]
    head_width = min(HEAD_WIDTH, keys)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": count_indices(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head_width,
        "num_key_value_heads": keys // head_width,
        "head_dim": head_width,
        "query_pre_attn_scalar": head_width,
        "use_cache": False,
    }


def make_gemma2(config: Mapping[str, Any]) -> nn.Module:
    """A Gemma2Model without weights."""
    from transformers import Gemma2Config, Gemma2Model

    kept = settings_alone(config) | {"use_cache": False}
    return empty_module(lambda: Gemma2Model(Gemma2Config(**kept)))


def open_gemma2(path: Path, flag: str) -> Component:
    """Gemma-2: a file with or without prefix, or a transformers folder. flag: the option that `path` was given as."""
    whole = open_component(path) if path.is_dir() else open_checkpoint(path)
    source = next((whole.under(prefix) for prefix in _PREFIXES if f"{prefix}{_FIRST}" in whole), whole)
    if not _is_gemma2(source):
        raise UserError(f"{flag} {path} has no Gemma-2 in it{what_it_is(whole)}.")
    config = read_json(path / "config.json") if path.is_dir() else gemma2_config(source.shapes())
    folder = path if path.is_dir() else None
    return Component(source, IDENTITY, config, make_gemma2, optional=_OPTIONAL, folder=folder)


def _is_gemma2(source: TensorSource) -> bool:
    """Unlike Gemma 1 and Llama it has four norms in a layer, unlike Gemma 3 none of queries."""
    first = "layers.0.pre_feedforward_layernorm.weight"
    return _FIRST in source and first in source and "layers.0.self_attn.q_norm.weight" not in source


# ---- tokenizer -------------------------------------------------------------------------------------------------------

GEMMA2_KIND = TokenizerKind(
    "Gemma-2",
    ("tokenizer.json",),
    ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
)


@dataclass(frozen=True, eq=False)
class Gemma2Tokenizer(PaddedTokenizer):
    """See `PaddedTokenizer`."""

    pad: ClassVar[int] = PAD
    first: ClassVar[tuple[int, ...]] = (BOS,)


@lru_cache(maxsize=4)
def load_gemma2_tokenizer(folder: Path) -> Gemma2Tokenizer:
    """The tokenizer in `folder` (tokenizer.json)."""
    from tokenizers import Tokenizer

    if not GEMMA2_KIND.is_in(folder):
        raise UserError(f"{folder} has no Gemma-2 tokenizer ({GEMMA2_KIND.expected}).")
    backend = without_padding(Tokenizer.from_file(str(folder / "tokenizer.json")))
    if (backend.token_to_id("<pad>"), backend.token_to_id("<bos>")) != (PAD, BOS):
        raise UserError(f"{folder} is not Gemma's tokenizer: its <pad> and <bos> are not {PAD} and {BOS}.")
    return Gemma2Tokenizer(backend, folder)
