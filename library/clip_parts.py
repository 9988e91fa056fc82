"""CLIP's text encoder (transformers' CLIPTextModel): its names in files, and its sizes from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from library.key_layout import KeyMap, Rule, key_map
from library.model_io import Shapes, count_indices, empty_module

HEAD_WIDTH = 64

CLIP_NAMES = KeyMap(tuple(Rule(f"text_model.{name}", name) for name in ("embeddings", "encoder", "final_layer_norm")))
"""CLIP as files name it <-> transformers' CLIPTextModel, which dropped `text_model.` in its version 5. Adapter names too."""

CLIP_BARE_NAMES = KeyMap(tuple(Rule(name, name) for name in ("embeddings", "encoder", "final_layer_norm")))
"""The second key variant of SD1 files: `text_model.` left out."""

CLIP_FOLDER_NAMES = key_map(CLIP_NAMES.rules, CLIP_BARE_NAMES.rules)
"""A diffusers folder's text_encoder, written by transformers 4 (with `text_model.`) or 5 (without)."""


def clip_config(shapes: Shapes, *, num_layers: int | None = None, activation: str = "quick_gelu") -> dict[str, Any]:
    """CLIPTextModel's configuration, from shapes under transformers' names. Heads are 64 wide, one where it is narrower.

    The vocabulary's last two entries are BOS and EOS in every published CLIP.
    """
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": num_layers or count_indices(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def make_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIPTextModel without weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "transformers_version")}
    kept = {key: value for key, value in kept.items() if key not in ("torch_dtype", "dtype", "_name_or_path")}
    return empty_module(lambda: CLIPTextModel(CLIPTextConfig(**kept)))
