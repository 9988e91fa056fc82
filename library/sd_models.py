"""Stable Diffusion 1.x/2.x: sizes inferred from tensor shapes, key tables, and the modules built from both.

The networks are diffusers' and transformers' classes; files of the original (LDM) layout carry no configuration, so it is
told from their shapes. That way a tiny model in the official layout runs through the real scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from library.clip_parts import HEAD_WIDTH, clip_config
from library.key_layout import KeyMap, Rule, key_map, nested
from library.model_io import Shapes, count_indices, empty_module

SD1_HEADS = 8

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

# ---- sizes from shapes -----------------------------------------------------------------------------------------------


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
