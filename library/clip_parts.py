"""CLIP's text encoders (transformers' CLIPTextModel, with or without projection): their names in files, sizes from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from library.key_layout import TRANSPOSE, KeyMap, Rule, key_map
from library.model_io import Shapes, TensorSource, count_indices, empty_module, open_component, read_json
from library.model_parts import Component, settings_alone

HEAD_WIDTH = 64

CLIP_NAMES = KeyMap(tuple(Rule(f"text_model.{name}", name) for name in ("embeddings", "encoder", "final_layer_norm")))
"""CLIP as files name it <-> transformers' CLIPTextModel, which dropped `text_model.` in its version 5. Adapter names too."""

CLIP_BARE_NAMES = KeyMap(tuple(Rule(name, name) for name in ("embeddings", "encoder", "final_layer_norm")))
"""The second key variant of SD1 files: `text_model.` left out."""

CLIP_FOLDER_NAMES = key_map(CLIP_NAMES.rules, CLIP_BARE_NAMES.rules)
"""A diffusers folder's text_encoder, written by transformers 4 (with `text_model.`) or 5 (without)."""

CLIP_OPTIONAL = (r"(text_model\.)?embeddings\.position_ids", r"logit_scale", r"text_projection(\.weight)?")
"""What a CLIP file may have beside the weights."""

_RESBLOCK = "transformer.resblocks.{i}"
_LAYER = "encoder.layers.{i}"


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_LAYER}.self_attn.{name}_proj.{kind}" for name in "qkv")


OPEN_CLIP_NAMES = key_map(
    Rule("positional_embedding", "embeddings.position_embedding.weight"),
    Rule("token_embedding", "embeddings.token_embedding"),
    Rule("ln_final", "final_layer_norm"),
    Rule(f"{_RESBLOCK}.ln_1", f"{_LAYER}.layer_norm1"),
    Rule(f"{_RESBLOCK}.ln_2", f"{_LAYER}.layer_norm2"),
    Rule(f"{_RESBLOCK}.attn.in_proj_weight", _qkv("weight")),
    Rule(f"{_RESBLOCK}.attn.in_proj_bias", _qkv("bias")),
    Rule(f"{_RESBLOCK}.attn.out_proj", f"{_LAYER}.self_attn.out_proj"),
    Rule(f"{_RESBLOCK}.mlp.c_fc", f"{_LAYER}.mlp.fc1"),
    Rule(f"{_RESBLOCK}.mlp.c_proj", f"{_LAYER}.mlp.fc2"),
)
"""OpenCLIP's text tower (SD2, and SDXL's second encoder) <-> CLIPTextModel."""


def _inside(parent: str, rules: tuple[Rule, ...]) -> list[Rule]:
    """The same rules for a module that is `parent` of ours."""
    return [
        Rule(rule.theirs, f"{parent}.{rule.ours}" if isinstance(rule.ours, str) else tuple(f"{parent}.{n}" for n in rule.ours))
        for rule in rules
    ]


_TOWER = _inside("text_model", OPEN_CLIP_NAMES.rules)
PROJECTED_OPEN_CLIP_NAMES = key_map(Rule("text_projection", "text_projection.weight", TRANSPOSE), _TOWER)
"""The same tower <-> CLIPTextModelWithProjection. OpenCLIP multiplies by its projection from the right."""

PROJECTED_LINEAR_NAMES = key_map(Rule("text_projection", "text_projection"), _TOWER)
"""The variant of files whose projection is a linear layer's weight (`text_projection.weight`)."""

PROJECTED_FOLDER_NAMES = key_map(
    Rule("text_projection", "text_projection"),
    _inside("text_model", CLIP_FOLDER_NAMES.rules),
)
"""A diffusers folder's text_encoder_2 <-> CLIPTextModelWithProjection."""


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


def open_clip_config(shapes: Shapes, num_layers: int | None = None) -> dict[str, Any]:
    """CLIPTextModel's configuration, from an OpenCLIP tower: of all its layers, or of the first `num_layers`."""
    named = {
        "embeddings.token_embedding.weight": shapes["token_embedding.weight"],
        "embeddings.position_embedding.weight": shapes["positional_embedding"],
        "encoder.layers.0.mlp.fc1.weight": shapes["transformer.resblocks.0.mlp.c_fc.weight"],
    }
    num_layers = num_layers or count_indices(shapes, r"transformer\.resblocks\.(\d+)\.")
    return clip_config(named, num_layers=num_layers, activation="gelu")


def _text_config(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(**settings_alone(config))


def make_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIPTextModel without weights."""
    from transformers import CLIPTextModel

    return empty_module(lambda: CLIPTextModel(_text_config(config)))


def make_projected_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIPTextModelWithProjection without weights."""
    from transformers import CLIPTextModelWithProjection

    return empty_module(lambda: CLIPTextModelWithProjection(_text_config(config)))


# ---- files -----------------------------------------------------------------------------------------------------------


def file_clip(whole: TensorSource, prefix: str) -> Component:
    """CLIP-L under `prefix` of a single file."""
    source = whole.under(prefix)
    names = CLIP_NAMES if "text_model.final_layer_norm.weight" in source else CLIP_BARE_NAMES
    return Component(source, names, clip_config(source.shapes(names)), make_clip, CLIP_OPTIONAL)


def file_projected_clip(whole: TensorSource, prefix: str) -> Component:
    """An OpenCLIP tower with its projection under `prefix` of a single file."""
    source = whole.under(prefix)
    shapes = source.shapes()
    linear = "text_projection.weight" in source
    names = PROJECTED_LINEAR_NAMES if linear else PROJECTED_OPEN_CLIP_NAMES
    width = shapes["text_projection.weight"][0] if linear else shapes["text_projection"][1]
    config = open_clip_config(shapes) | {"projection_dim": width}
    optional = ("logit_scale", "attn_mask", r".*\.position_ids")
    return Component(source, names, config, make_projected_clip, optional)


def folder_clip(folder: Path, *, projected: bool = False) -> Component:
    """A text encoder's folder of a diffusers model."""
    names, make = (PROJECTED_FOLDER_NAMES, make_projected_clip) if projected else (CLIP_FOLDER_NAMES, make_clip)
    optional = (r"(text_model\.)?embeddings\.position_ids",)
    return Component(open_component(folder), names, read_json(folder / "config.json"), make, optional=optional, folder=folder)
