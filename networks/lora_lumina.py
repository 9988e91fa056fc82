"""What adapters must know about Lumina-Image-2.0: its layers, and sd-scripts' arguments of `networks.lora_lumina`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.key_layout import KeyMap, Rule
from library.lumina_names import LUMINA_DIFFUSERS
from networks.lora import LoRA
from networks.network_args import INTEGER, INTEGERS, Kind, arg, one_of
from networks.network_base import bind
from networks.network_targets import Layer, NetworkArch, PartNames, TargetGroup
from networks.part_args import PartArgs

_BLOCKS = {
    "transformer": ("layers",),
    "refiners": ("noise_refiner", "context_refiner"),
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}
BLOCKS = Kind(f"all, {', '.join(_BLOCKS)}", one_of("all", *_BLOCKS))


@dataclass(frozen=True, kw_only=True)
class LuminaArgs(PartArgs):
    """sd-scripts' names. A part's rank 0 leaves it out; without one it has --network_dim."""

    attn_dim: int | None = arg(INTEGER, "rank of attention, in refiners too")
    mlp_dim: int | None = arg(INTEGER, "rank of feed-forward layers, in refiners too")
    mod_dim: int | None = arg(INTEGER, "rank of the modulation, in refiners and the last layer too")
    refiner_dim: int | None = arg(INTEGER, "rank of what else there is in refiners")
    embedder_dims: tuple[int, ...] | None = arg(INTEGERS, "ranks of the embedders, which are left alone without")
    train_blocks: str | None = arg(BLOCKS, "blocks that learn (all)")

    block: ClassVar[re.Pattern[str]] = re.compile(r"lora_unet_(?!.{1,3}_embedder)")
    parts: ClassVar[Mapping[str, str]] = {
        "attn_dim": "_attention_",
        "mlp_dim": "_feed_forward_",
        "mod_dim": "_adaLN_modulation_",
        "refiner_dim": "_refiner_",
    }
    outside: ClassVar[str] = "embedder_dims"
    outside_modules: ClassVar[tuple[str, ...]] = ("x_embedder", "t_embedder", "cap_embedder")
    size_args: ClassVar[tuple[str, ...]] = (*parts, "embedder_dims", "train_blocks")

    def chooses(self, key: str) -> bool:
        blocks = _BLOCKS.get(self.train_blocks or "all")
        if blocks is None or not self.block.match(key):
            return True
        return key.startswith(tuple(f"lora_unet_{block}_" for block in blocks))


def fused_rows(layer: Layer) -> tuple[int, ...]:
    """q, k and v of `qkv`; there are fewer keys and values than queries."""
    if not layer.key.endswith("_qkv"):
        return ()
    rows, width = layer.module.weight.shape[:2]
    return (width, (rows - width) // 2, (rows - width) // 2)


GEMMA2_LAYERS = KeyMap(
    tuple(
        Rule(path, path)
        for layer in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
        for path in [f"layers.{{i}}.{layer}"]
    )
)

ARCH = NetworkArch(
    name="lumina",
    described=re.compile(r"lumina.*", re.IGNORECASE),
    groups=(
        TargetGroup(
            "denoiser",
            "lora_unet",
            ("JointTransformerBlock", "FinalLayer"),
            names=PartNames(LUMINA_DIFFUSERS, "transformer", "diffusion_model"),
        ),
        TargetGroup(
            "gemma2",
            "lora_te",
            ("Gemma2Attention", "Gemma2MLP"),
            names=PartNames(GEMMA2_LAYERS, comfy="text_encoders.gemma2_2b.transformer.model"),
        ),
    ),
    arguments=LuminaArgs,
    fused_rows=fused_rows,
    diffusers_reads_kohya=False,
)

factory = bind(LoRA, ARCH)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
