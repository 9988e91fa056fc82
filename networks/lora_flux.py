"""What adapters must know about FLUX.1 and Chroma: their layers, and sd-scripts' arguments of `networks.lora_flux`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.flux_names import FLUX_DIFFUSERS
from networks.lora import LoRA
from networks.network_args import INDICES, INTEGER, INTEGERS, Kind, arg, one_of
from networks.network_base import bind
from networks.network_targets import Layer, NetworkArch, PartNames, TargetGroup, clip_targets, t5_targets
from networks.part_args import PartArgsWithT5, fused_qkv

_INPUTS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
_BLOCK = re.compile(r"lora_unet_(double|single)_blocks_(\d+)_")


BLOCKS = Kind("all, single or double", one_of("all", "single", "double"))


@dataclass(frozen=True, kw_only=True)
class FluxArgs(PartArgsWithT5):
    """sd-scripts' names. A part's rank 0 leaves it out; without one it has --network_dim."""

    img_attn_dim: int | None = arg(INTEGER, "rank of the image's attention in double blocks")
    txt_attn_dim: int | None = arg(INTEGER, "rank of the text's attention in double blocks")
    img_mlp_dim: int | None = arg(INTEGER, "rank of the image's MLP in double blocks")
    txt_mlp_dim: int | None = arg(INTEGER, "rank of the text's MLP in double blocks")
    img_mod_dim: int | None = arg(INTEGER, "rank of the image's modulation in double blocks")
    txt_mod_dim: int | None = arg(INTEGER, "rank of the text's modulation in double blocks")
    single_dim: int | None = arg(INTEGER, "rank of linear1 and linear2 in single blocks")
    single_mod_dim: int | None = arg(INTEGER, "rank of the modulation in single blocks")
    in_dims: tuple[int, ...] | None = arg(INTEGERS, f"ranks of {', '.join(_INPUTS)}, which are left alone without")
    train_blocks: str | None = arg(BLOCKS, "kind of blocks that learn (all)")
    train_double_block_indices: frozenset[int] | None = arg(INDICES, "double blocks that learn (all)")
    train_single_block_indices: frozenset[int] | None = arg(INDICES, "single blocks that learn (all)")

    block: ClassVar[re.Pattern[str]] = _BLOCK
    parts: ClassVar[Mapping[str, str]] = {
        "img_attn_dim": "_img_attn_",
        "txt_attn_dim": "_txt_attn_",
        "img_mlp_dim": "_img_mlp_",
        "txt_mlp_dim": "_txt_mlp_",
        "img_mod_dim": "_img_mod_",
        "txt_mod_dim": "_txt_mod_",
        "single_dim": "_linear",
        "single_mod_dim": "_modulation_",
    }
    outside: ClassVar[str] = "in_dims"
    outside_modules: ClassVar[tuple[str, ...]] = _INPUTS
    size_args: ClassVar[tuple[str, ...]] = (
        *parts, "in_dims", "train_blocks", "train_double_block_indices", "train_single_block_indices",
    )  # fmt: skip

    def chooses(self, key: str) -> bool:
        block = _BLOCK.match(key)
        if block is None:
            return True
        kind, number = block[1], int(block[2])
        chosen = self.train_double_block_indices if kind == "double" else self.train_single_block_indices
        return self.train_blocks in (None, "all", kind) and (chosen is None or number in chosen)


def fused_rows(layer: Layer) -> tuple[int, ...]:
    """q, k, v of `qkv`; q, k, v and MLP of `linear1`."""
    width, rows = layer.module.weight.shape[1], layer.module.weight.shape[0]
    return (*(width,) * 3, rows - 3 * width) if layer.key.endswith("_linear1") else fused_qkv(layer)


ARCH = NetworkArch(
    name="flux",
    described=re.compile(r"flux.*|chroma.*", re.IGNORECASE),
    own_widths=frozenset({3072, 12288}),
    groups=(
        TargetGroup(
            "denoiser",
            "lora_unet",
            ("DoubleStreamBlock", "SingleStreamBlock"),
            names=PartNames(FLUX_DIFFUSERS, "transformer", "diffusion_model"),
        ),
        clip_targets("clip_l", "lora_te1", diffusers="text_encoder", comfy="text_encoders.clip_l.transformer"),
        t5_targets("t5xxl", "lora_te3", comfy="text_encoders.t5xxl.transformer"),
    ),
    arguments=FluxArgs,
    fused_rows=fused_rows,
)

factory = bind(LoRA, ARCH)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
