"""What adapters must know about Stable Diffusion 1.x and 2.x. Diffusers' module names are the names in files."""

from __future__ import annotations

import re

from library.unet_names import SD_UNET_LAYERS
from networks.network_targets import BlockTable, NetworkArch, PartNames, clip_targets, unet_targets

_BLOCK = re.compile(r"_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")


def block_index(key: str) -> int | None:
    """0-11 down (0 is `conv_in`, never adapted), 12 middle, 13-24 up, as the checkpoint counts its blocks; None outside.

    Level i's layer j is the 3i + j th after its side's first number; a sampler belongs to the last block of its level.
    """
    found = _BLOCK.search(key)
    if found is None:
        return 12 if "_mid_block_" in key else None
    side, level, kind, place = found.groups()
    within = 3 * int(level) + (int(place) if kind in ("resnets", "attentions") else 2)
    return within + (1 if side == "down" else 13)


WITH_ATTENTION = (1, 2, 4, 5, 7, 8, 12, *range(16, 25))
"""The blocks of a plain LoRA: IN01, 02, 04, 05, 07, 08, MID, OUT03 to 11."""

ARCH = NetworkArch(
    name="sd",
    described=re.compile(r"sd_v.*|stable-diffusion-v.*", re.IGNORECASE),
    own_widths=frozenset({768, 1024}),
    groups=(
        unet_targets(PartNames(SD_UNET_LAYERS, "unet", "diffusion_model", spells_diffusers=True)),
        # ComfyUI's own names differ between 1.x and 2.x, sd-scripts' do not
        clip_targets("text_encoder", "lora_te", "text_encoder", diffusers="text_encoder"),
    ),
    blocks=BlockTable(
        index=block_index, lead=0, down=12, mid=1, up=12, tail=0, short_lists={17: tuple((block,) for block in WITH_ATTENTION)}
    ),
)
