"""What is SDXL's own about its parts: what makes its UNet one, and which of their layers are never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from library.unet_names import SDXL_UNET_NAMES, sdxl_block

SIZE_WIDTH = 256
"""Numbers that each of the six size conditions is embedded in."""
NUM_SIZES = 6


def added_width(unet_config: Mapping[str, Any]) -> int:
    """Width of the pooled text that a UNet of this configuration takes beside the sizes; 0 for one that takes none."""
    width: int = unet_config.get("projection_class_embeddings_input_dim") or 0
    return max(0, width - NUM_SIZES * (unet_config.get("addition_time_embed_dim") or SIZE_WIDTH))


def block_number(name: str) -> int:
    """Which of the 23 blocks of `--block_lr` a parameter of the UNet (diffusers' name) is in."""
    block = sdxl_block(SDXL_UNET_NAMES.their_name(name) or name)
    assert block is not None, f"{name} is in no block of SDXL"
    return block


def unused_modules(clip_l: nn.Module) -> tuple[nn.Module, ...]:
    """What of CLIP-L is behind the hidden states that are taken: its last layer and the final norm."""
    encoder: Any = clip_l
    return encoder.encoder.layers[-1], encoder.final_layer_norm
