"""Stable Diffusion 1.x/2.x: sizes inferred from tensor shapes, key tables, and the modules built from both.

The networks are diffusers' and transformers' classes; files of the original (LDM) layout carry no configuration, so it is
told from their shapes. That way a tiny model in the official layout runs through the real scripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from library.key_layout import CONV_TO_LINEAR, IDENTITY, KeyMap, Rule, key_map, nested
from library.model_io import empty_module

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor shapes by name, without the file's prefix."""

SD1_HEADS = 8
HEAD_WIDTH = 64

# ---- key tables: original (LDM) names on the left, diffusers' and transformers' on the right -------------------------

_UNET_RESNET = (
    Rule("in_layers.0", "norm1"),
    Rule("in_layers.2", "conv1"),
    Rule("emb_layers.1", "time_emb_proj"),
    Rule("out_layers.0", "norm2"),
    Rule("out_layers.3", "conv2"),
    Rule("skip_connection", "conv_shortcut"),
)
_UNET_ENDS = (
    Rule("time_embed.0", "time_embedding.linear_1"),
    Rule("time_embed.2", "time_embedding.linear_2"),
    Rule("label_emb.0.0", "add_embedding.linear_1"),
    Rule("label_emb.0.2", "add_embedding.linear_2"),
    Rule("input_blocks.0.0", "conv_in"),
    Rule("out.0", "conv_norm_out"),
    Rule("out.2", "conv_out"),
)


def unet_key_map(attention: Sequence[bool], num_layers: int) -> KeyMap:
    """LDM UNet <-> UNet2DConditionModel.

    attention: for each level, the finest first, whether it has transformer blocks. num_layers: ResNet blocks of a down level.
    """
    rules: list[Rule] = [*_UNET_ENDS]
    block = 1
    for level, attends in enumerate(attention):
        for layer in range(num_layers):
            rules += nested(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET)
            rules += [Rule(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}")] if attends else []
            block += 1
        if level < len(attention) - 1:
            rules.append(Rule(f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            block += 1
    rules += nested("middle_block.0", "mid_block.resnets.0", _UNET_RESNET)
    rules.append(Rule("middle_block.1", "mid_block.attentions.0"))
    rules += nested("middle_block.2", "mid_block.resnets.1", _UNET_RESNET)
    block = 0
    for up, attends in enumerate(reversed(attention)):
        for layer in range(num_layers + 1):
            rules += nested(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{layer}", _UNET_RESNET)
            rules += [Rule(f"output_blocks.{block}.1", f"up_blocks.{up}.attentions.{layer}")] if attends else []
            if layer == num_layers and up < len(attention) - 1:
                upsampler = f"output_blocks.{block}.{2 if attends else 1}.conv"
                rules.append(Rule(upsampler, f"up_blocks.{up}.upsamplers.0.conv"))
            block += 1
    return key_map(rules)


_VAE_RESNET = (
    Rule("norm1", "norm1"),
    Rule("conv1", "conv1"),
    Rule("norm2", "norm2"),
    Rule("conv2", "conv2"),
    Rule("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    Rule("norm", "group_norm"),
    Rule("q", "to_q", CONV_TO_LINEAR),
    Rule("k", "to_k", CONV_TO_LINEAR),
    Rule("v", "to_v", CONV_TO_LINEAR),
    Rule("proj_out", "to_out.0", CONV_TO_LINEAR),
)


def vae_key_map(num_levels: int) -> KeyMap:
    """LDM autoencoder <-> AutoencoderKL. LDM numbers the decoder's levels from the finest, diffusers from the coarsest."""
    rules: list[Rule] = [Rule("quant_conv", "quant_conv"), Rule("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        rules += [Rule(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out")]
        rules.append(Rule(f"{half}.norm_out", f"{half}.conv_norm_out"))
        rules += nested(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET)
        rules += nested(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        rules += nested(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET)
    rules += nested("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", _VAE_RESNET)
    rules.append(Rule("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"))
    for level in range(num_levels):
        theirs, ours = f"decoder.up.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        rules += nested(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}", _VAE_RESNET)
        rules.append(Rule(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv"))
    return key_map(rules)


CLIP_NAMES = KeyMap(tuple(Rule(f"text_model.{name}", name) for name in ("embeddings", "encoder", "final_layer_norm")))
"""CLIP as files name it <-> transformers' CLIPTextModel, which dropped `text_model.` in its version 5. Adapter names too."""

CLIP_BARE_NAMES = KeyMap(tuple(Rule(name, name) for name in ("embeddings", "encoder", "final_layer_norm")))
"""The second key variant of SD1 files: `text_model.` left out."""

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

CLIP_FOLDER_NAMES = key_map(CLIP_NAMES.rules, CLIP_BARE_NAMES.rules)
"""A diffusers folder's text_encoder, written by transformers 4 (with `text_model.`) or 5 (without)."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

VAE_FOLDER_NAMES = key_map(
    (
        Rule(f"{half}.mid_block.attentions.0.{old}", f"{half}.mid_block.attentions.0.{new}", CONV_TO_LINEAR)
        for half in ("encoder", "decoder")
        for old, new in _OLD_ATTENTION.items()
    ),
    IDENTITY.rules,
)
"""A diffusers VAE, its attention named as before diffusers 0.15 or as now."""

# ---- sizes from shapes -----------------------------------------------------------------------------------------------


def count_indices(shapes: Shapes, pattern: str) -> int:
    """How many different numbers `pattern`'s group takes at the start of the names."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """UNet2DConditionModel's configuration, from an LDM UNet.

    Head counts are the one thing shapes do not tell: a UNet with convolutional projections is SD1 and has 8 heads at every
    level; one with linear projections is SD2 and has heads 64 wide (one head in a level narrower than that).
    """
    channels: list[int] = []
    depths: list[int] = []  # transformer blocks of each level; 0 = none
    layers = 0
    for block in range(1, count_indices(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            layers = 0
            continue
        if layers == 0:
            channels.append(shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0])
            depths.append(count_indices(shapes, rf"input_blocks\.{block}\.1\.transformer_blocks\.(\d+)\."))
        layers += 1
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    attends = [depth > 0 for depth in depths]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in channels] if linear else SD1_HEADS,
        "use_linear_projection": linear,
    }
    if set(depths) - {0, 1}:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def unet_key_map_for(config: Mapping[str, Any]) -> KeyMap:
    return unet_key_map(["Cross" in kind for kind in config["down_block_types"]], config["layers_per_block"])


def vae_config(shapes: Shapes, scale: float) -> dict[str, Any]:
    """AutoencoderKL's configuration, from an LDM autoencoder. `scale` of the latents is not in the file."""
    levels = count_indices(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "layers_per_block": count_indices(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": scale,
    }


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


def open_clip_layers(shapes: Shapes) -> int:
    """How many of the file's layers SD2 uses.

    SD2 conditions on the output of OpenCLIP's last layer but one. A whole OpenCLIP tower (it has a text projection) has one
    layer that is never run; a file with 23 layers, or without the projection, was cut to those that are.
    """
    in_file = count_indices(shapes, r"transformer\.resblocks\.(\d+)\.")
    return in_file - 1 if "text_projection" in shapes and in_file != 23 else in_file


def open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """CLIPTextModel's configuration, from SD2's OpenCLIP tower."""
    named = {
        "embeddings.token_embedding.weight": shapes["token_embedding.weight"],
        "embeddings.position_embedding.weight": shapes["positional_embedding"],
        "encoder.layers.0.mlp.fc1.weight": shapes["transformer.resblocks.0.mlp.c_fc.weight"],
    }
    return clip_config(named, num_layers=open_clip_layers(shapes), activation="gelu")


# ---- modules ---------------------------------------------------------------------------------------------------------


def make_unet(config: Mapping[str, Any]) -> nn.Module:
    """A UNet2DConditionModel without weights (parameters on the meta device)."""
    from diffusers import UNet2DConditionModel

    return empty_module(lambda: UNet2DConditionModel.from_config(dict(config)))


def make_vae(config: Mapping[str, Any]) -> nn.Module:
    """An AutoencoderKL without weights."""
    from diffusers import AutoencoderKL

    return empty_module(lambda: AutoencoderKL.from_config(dict(config)))


def make_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIPTextModel without weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "transformers_version")}
    kept = {key: value for key, value in kept.items() if key not in ("torch_dtype", "dtype", "_name_or_path")}
    return empty_module(lambda: CLIPTextModel(CLIPTextConfig(**kept)))
