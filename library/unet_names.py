"""The names of Stable Diffusion's UNets: the original (LDM) ones of checkpoint files on the left, diffusers' on the right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from library.key_layout import KeyMap, Rule, key_map, nested

_RESNET = (
    Rule("in_layers.0", "norm1"),
    Rule("in_layers.2", "conv1"),
    Rule("emb_layers.1", "time_emb_proj"),
    Rule("out_layers.0", "norm2"),
    Rule("out_layers.3", "conv2"),
    Rule("skip_connection", "conv_shortcut"),
)
_ENDS = (
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
    rules: list[Rule] = [*_ENDS]
    block = 1
    for level, attends in enumerate(attention):
        for layer in range(num_layers):
            rules += nested(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", _RESNET)
            rules += [Rule(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}")] if attends else []
            block += 1
        if level < len(attention) - 1:
            rules.append(Rule(f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            block += 1
    rules += nested("middle_block.0", "mid_block.resnets.0", _RESNET)
    rules.append(Rule("middle_block.1", "mid_block.attentions.0"))
    rules += nested("middle_block.2", "mid_block.resnets.1", _RESNET)
    block = 0
    for up, attends in enumerate(reversed(attention)):
        for layer in range(num_layers + 1):
            rules += nested(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{layer}", _RESNET)
            rules += [Rule(f"output_blocks.{block}.1", f"up_blocks.{up}.attentions.{layer}")] if attends else []
            if layer == num_layers and up < len(attention) - 1:
                upsampler = f"output_blocks.{block}.{2 if attends else 1}.conv"
                rules.append(Rule(upsampler, f"up_blocks.{up}.upsamplers.0.conv"))
            block += 1
    return key_map(rules)


def unet_key_map_for(config: Mapping[str, Any]) -> KeyMap:
    """The table for a UNet2DConditionModel of this configuration."""
    return unet_key_map(["Cross" in kind for kind in config["down_block_types"]], config["layers_per_block"])


_ATTENTION = tuple(f"transformer_blocks.{{i}}.attn{number}.to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out.0"))
_TRANSFORMER = (
    "proj_in", *_ATTENTION, "transformer_blocks.{i}.ff.net.0.proj", "transformer_blocks.{i}.ff.net.2", "proj_out",
)  # fmt: skip


def unet_layer_map(attention: Sequence[bool], num_layers: int) -> KeyMap:
    """`unet_key_map` with a row for every layer: names with underscores for dots can be told apart by it."""
    leaves = [Rule(layer, layer) for layer in _TRANSFORMER]
    rules = unet_key_map(attention, num_layers).rules
    return key_map(*(nested(r.theirs, str(r.ours), leaves) if ".attentions." in str(r.ours) else r for r in rules))


SDXL_LEVELS, SD_LEVELS = (False, True, True), (True, True, True, False)
"""Of the published UNets: for each level, whether it has transformer blocks."""
SDXL_UNET_NAMES = unet_key_map(SDXL_LEVELS, 2)
"""The one layout that SDXL's UNet has, whatever its widths and depths."""
SDXL_UNET_LAYERS, SD_UNET_LAYERS = unet_layer_map(SDXL_LEVELS, 2), unet_layer_map(SD_LEVELS, 2)

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)[._](\d+)[._]")
_FIRST = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def sdxl_block(original: str) -> int | None:
    """As sd-scripts counts: 0 the embeddings of time and size, 1-9 input, 10-12 middle, 13-21 output, 22 the end; else None.

    original: LDM name of a module or tensor, with dots or, as in adapter files, underscores.
    """
    found = _BLOCK.match(original)
    if found is not None:
        return _FIRST[found[1]] + int(found[2])
    if original.startswith(("time_embed", "label_emb")):
        return 0
    return 22 if original.startswith(("out.", "out_")) else None
