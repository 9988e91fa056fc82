"""What adapters must know about FLUX.1 and Chroma: their layers, and sd-scripts' arguments of `networks.lora_flux`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.flux_names import FLUX_DIFFUSERS
from networks.lora import LoRA
from networks.network_args import BOOLEAN, INDICES, INTEGER, INTEGERS, ArchArgs, Kind, arg, one_of
from networks.network_base import bind
from networks.network_targets import T5_LAYERS, Layer, NetworkArch, PartNames, TargetGroup, clip_targets

_INPUTS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
_PARTS = {
    "img_attn_dim": "_img_attn_",
    "txt_attn_dim": "_txt_attn_",
    "img_mlp_dim": "_img_mlp_",
    "txt_mlp_dim": "_txt_mlp_",
    "img_mod_dim": "_img_mod_",
    "txt_mod_dim": "_txt_mod_",
    "single_dim": "_linear",
    "single_mod_dim": "_modulation_",
}
"""Argument -> what stands in the file keys of its layers."""
_BLOCK = re.compile(r"lora_unet_(double|single)_blocks_(\d+)_")


BLOCKS = Kind("all, single or double", one_of("all", "single", "double"))


@dataclass(frozen=True, kw_only=True)
class FluxArgs(ArchArgs):
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
    split_qkv: bool | None = arg(BOOLEAN, "an adapter of its own for each of q, k, v and MLP of fused layers (false)")
    train_t5xxl: bool | None = arg(BOOLEAN, "train T5, too (false)")
    verbose: bool | None = arg(BOOLEAN, "no effect: what is adapted is always logged")

    size_args: ClassVar[tuple[str, ...]] = (
        *_PARTS, "in_dims", "train_blocks", "train_double_block_indices", "train_single_block_indices",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.in_dims is not None and len(self.in_dims) != len(_INPUTS):
            raise UserError(f"--network_args in_dims={self.in_dims}: {len(_INPUTS)} ranks, of {', '.join(_INPUTS)}.")

    def learns(self, part: str) -> bool:
        return part != "t5xxl" or bool(self.train_t5xxl)

    def extra_modules(self) -> tuple[str, ...]:
        return tuple(name for name, rank in zip(_INPUTS, self.in_dims or (), strict=False) if rank)

    def chooses(self, key: str) -> bool:
        block = _BLOCK.match(key)
        if block is None:
            return True
        kind, number = block[1], int(block[2])
        chosen = self.train_double_block_indices if kind == "double" else self.train_single_block_indices
        return self.train_blocks in (None, "all", kind) and (chosen is None or number in chosen)

    def rank(self, key: str, default: int) -> int:
        if _BLOCK.match(key) is None:
            ranks = dict(zip(_INPUTS, self.in_dims or (), strict=False))
            return next((rank for name, rank in ranks.items() if key.startswith(f"lora_unet_{name}")), default)
        own = next((getattr(self, name) for name, sign in _PARTS.items() if sign in key), None)
        return default if own is None else own

    def splits_fused(self) -> bool:
        return bool(self.split_qkv)


def fused_rows(layer: Layer) -> tuple[int, ...]:
    """q, k, v of `qkv`; q, k, v and MLP of `linear1`."""
    width, rows = layer.module.weight.shape[1], layer.module.weight.shape[0]
    if layer.key.endswith("_qkv"):
        return (width,) * 3
    return (*(width,) * 3, rows - 3 * width) if layer.key.endswith("_linear1") else ()


ARCH = NetworkArch(
    name="flux",
    groups=(
        TargetGroup(
            "denoiser",
            "lora_unet",
            ("DoubleStreamBlock", "SingleStreamBlock"),
            names=PartNames(FLUX_DIFFUSERS, "transformer", "diffusion_model"),
        ),
        clip_targets("clip_l", "lora_te1", diffusers="text_encoder", comfy="text_encoders.clip_l.transformer"),
        TargetGroup(
            "t5xxl",
            "lora_te3",
            ("T5Attention", "T5DenseGatedActDense"),
            names=PartNames(T5_LAYERS, comfy="text_encoders.t5xxl.transformer"),
        ),
    ),
    arguments=FluxArgs,
    fused_rows=fused_rows,
)

factory = bind(LoRA, ARCH)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
