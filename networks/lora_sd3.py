"""What adapters must know about Stable Diffusion 3 and 3.5: their layers, and sd-scripts' arguments of `networks.lora_sd3`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.sd3_names import SD3_LAYERS
from networks.lora import LoRA
from networks.network_args import INTEGER, INTEGERS, arg
from networks.network_base import bind
from networks.network_targets import NetworkArch, PartNames, TargetGroup, clip_targets, t5_targets
from networks.part_args import PartArgsWithT5, fused_qkv

_BLOCK = re.compile(r"lora_unet_joint_blocks_(\d+)_")


@dataclass(frozen=True, kw_only=True)
class Sd3Args(PartArgsWithT5):
    """sd-scripts' names. A part's rank 0 leaves it out; without one it has --network_dim."""

    context_attn_dim: int | None = arg(INTEGER, "rank of the text's attention")
    context_mlp_dim: int | None = arg(INTEGER, "rank of the text's MLP")
    context_mod_dim: int | None = arg(INTEGER, "rank of the text's modulation")
    x_attn_dim: int | None = arg(INTEGER, "rank of the image's attention, the second one of SD3.5 medium, too")
    x_mlp_dim: int | None = arg(INTEGER, "rank of the image's MLP")
    x_mod_dim: int | None = arg(INTEGER, "rank of the image's modulation")
    emb_dims: tuple[int, ...] | None = arg(INTEGERS, "ranks of the layers outside of the blocks, which are left alone without")

    block: ClassVar[re.Pattern[str]] = _BLOCK
    parts: ClassVar[Mapping[str, str]] = {
        "context_attn_dim": "_context_block_attn_",
        "context_mlp_dim": "_context_block_mlp_",
        "context_mod_dim": "_context_block_adaLN_modulation_",
        "x_attn_dim": "_x_block_attn",
        "x_mlp_dim": "_x_block_mlp_",
        "x_mod_dim": "_x_block_adaLN_modulation_",
    }
    outside: ClassVar[str] = "emb_dims"
    outside_modules: ClassVar[tuple[str, ...]] = (
        "context_embedder", "t_embedder", "x_embedder", "y_embedder", "final_layer.adaLN_modulation", "final_layer.linear",
    )  # fmt: skip
    size_args: ClassVar[tuple[str, ...]] = (*parts, "emb_dims")


def block_number(key: str) -> int | None:
    """Number of the joint block that a layer is in, by its key; None outside."""
    found = _BLOCK.match(key)
    return None if found is None else int(found[1])


ARCH = NetworkArch(
    name="sd3",
    described=re.compile(r"m|5-.*|sd3.*|stable-diffusion-3.*", re.IGNORECASE),
    own_widths=frozenset({1536, 6144, 2432, 9728}),
    groups=(
        TargetGroup("denoiser", "lora_unet", ("JointBlock",), names=PartNames(SD3_LAYERS, "transformer", "diffusion_model")),
        clip_targets("clip_l", "lora_te1", diffusers="text_encoder", comfy="text_encoders.clip_l.transformer"),
        clip_targets("clip_g", "lora_te2", diffusers="text_encoder_2", comfy="text_encoders.clip_g.transformer"),
        t5_targets("t5xxl", "lora_te3", comfy="text_encoders.t5xxl.transformer"),
    ),
    arguments=Sd3Args,
    fused_rows=fused_qkv,
    block_number=block_number,
    diffusers_reads_kohya=False,
)

factory = bind(LoRA, ARCH)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
