"""The T5 text encoder (transformers' T5EncoderModel) of FLUX.1, Chroma and SD3: names in files, sizes, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from library.clip_tokenizer import TokenizerKind
from library.errors import UserError
from library.key_layout import Rule, key_map
from library.model_io import Shapes, count_indices, empty_module
from library.model_parts import settings_alone
from library.padded_tokenizer import PaddedTokenizer, without_padding

T5_TOKENIZER = "google/t5-v1_1-xxl"
PAD, EOS = 0, 1
"""Ids of every published T5; no text gives the first."""

T5_NAMES = key_map(
    Rule("shared", "encoder.embed_tokens"),
    Rule("encoder.block", "encoder.block"),
    Rule("encoder.final_layer_norm", "encoder.final_layer_norm"),
)
"""T5 as files name it <-> `make_t5`'s module, which has the embedding once."""

T5_STACK_NAMES = key_map(Rule("encoder", "encoder"))
"""The same for files that name the embedding after the encoder alone."""

T5_OPTIONAL = (r"encoder\.embed_tokens\.weight",)
"""What files may hold beside `shared`: the same tensor again."""


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """T5EncoderModel's configuration, from shapes."""
    vocabulary, width = shapes["shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"]
    inner = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_indices(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def make_t5(config: Mapping[str, Any]) -> nn.Module:
    """A T5EncoderModel without weights. The embedding is kept under one of its two names, so that it is loaded once."""
    from transformers import T5Config, T5EncoderModel

    module = empty_module(lambda: T5EncoderModel(T5Config(**settings_alone(config))))
    encoder: Any = module.encoder
    embedding = encoder.embed_tokens
    del module.shared
    module.__dict__["shared"] = embedding  # for transformers' own methods; not a second parameter
    return module


# ---- tokenizer -------------------------------------------------------------------------------------------------------

T5 = TokenizerKind(
    "T5",
    ("tokenizer.json", "spiece.model"),
    ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    inside="tokenizer_2",
    flag=None,
)


@dataclass(frozen=True, eq=False)
class T5Tokenizer(PaddedTokenizer):
    """See `PaddedTokenizer`."""

    pad: ClassVar[int] = PAD
    last: ClassVar[tuple[int, ...]] = (EOS,)


@lru_cache(maxsize=4)
def load_t5_tokenizer(folder: Path) -> T5Tokenizer:
    """The tokenizer in `folder` (tokenizer.json, or spiece.model)."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    if not T5.is_in(folder):
        raise UserError(f"{folder} has no T5 tokenizer ({T5.expected}).")
    loaded = T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)
    backend = without_padding(loaded.backend_tokenizer)
    if (loaded.pad_token_id, loaded.eos_token_id) != (PAD, EOS):
        raise UserError(
            f"{folder} is not T5's tokenizer: its padding and end are {loaded.pad_token_id}, {loaded.eos_token_id}."
        )
    return T5Tokenizer(backend, folder)
