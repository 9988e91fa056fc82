"""What adapters must know about SDXL. The names in files are those of the original (LDM) UNet."""

from __future__ import annotations

import re
from functools import cache

from library.unet_names import SDXL_UNET_LAYERS, SDXL_UNET_NAMES, sdxl_block
from networks.network_targets import BlockTable, NetworkArch, PartNames, clip_targets, unet_targets

_PREFIX = "lora_unet_"
_COMFY = "text_encoders"


def block_index(key: str) -> int | None:
    """Number of the block that a layer of the UNet is in, by its key; None outside."""
    return sdxl_block(key.removeprefix(_PREFIX)) if key.startswith(_PREFIX) else None


@cache
def original_name(path: str) -> str:
    """Path in diffusers' UNet -> path in the original one; what the table does not know (a container) stays."""
    return SDXL_UNET_NAMES.their_name(path) or path


IN, MID, OUT = tuple((block,) for block in range(1, 10)), (10, 11, 12), tuple((block,) for block in range(13, 22))
"""Blocks as lists of block weights name them, where the middle counts once."""

ARCH = NetworkArch(
    name="sdxl",
    described=re.compile(r"sdxl.*|stable-diffusion-xl.*", re.IGNORECASE),
    own_widths=frozenset({2048}),
    groups=(
        unet_targets(PartNames(SDXL_UNET_LAYERS, "unet", "diffusion_model"), original_name),
        clip_targets(
            "text_encoder1", "lora_te1", "text_encoder", diffusers="text_encoder", comfy=f"{_COMFY}.clip_l.transformer"
        ),
        clip_targets(
            "text_encoder2", "lora_te2", "text_encoder_2", diffusers="text_encoder_2", comfy=f"{_COMFY}.clip_g.transformer"
        ),
    ),
    blocks=BlockTable(
        index=block_index,
        lead=1,
        down=9,
        mid=3,
        up=9,
        tail=1,
        short_lists={12: (IN[4], IN[5], IN[7], IN[8], MID, *OUT[:6]), 20: (*IN, MID, *OUT)},
    ),
    marker="add_embedding",
)
