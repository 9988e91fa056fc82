"""What adapters must know about Lumina-Image-2.0: its layers, and sd-scripts' arguments of `networks.lora_lumina`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from library.key_layout import KeyMap, Rule
from library.lumina_names import LUMINA_DIFFUSERS
from networks.lora import LoRA
from networks.network_args import BOOLEAN, INTEGER, INTEGERS, ArchArgs, Kind, arg, one_of
from networks.network_base import bind
from networks.network_targets import Layer, NetworkArch, PartNames, TargetGroup

_EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
_PARTS = {"attn_dim": "_attention_", "mlp_dim": "_feed_forward_", "mod_dim": "_adaLN_modulation_", "refiner_dim": "_refiner_"}
"""Argument -> what stands in the file keys of its layers. The first that fits and is given counts, as in sd-scripts."""
_BLOCKS = {
    "transformer": ("layers",),
    "refiners": ("noise_refiner", "context_refiner"),
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}
BLOCKS = Kind(f"all, {', '.join(_BLOCKS)}", one_of("all", *_BLOCKS))


@dataclass(frozen=True, kw_only=True)
class LuminaArgs(ArchArgs):
    """sd-scripts' names. A part's rank 0 leaves it out; without one it has --network_dim."""

    attn_dim: int | None = arg(INTEGER, "rank of attention, in refiners too")
    mlp_dim: int | None = arg(INTEGER, "rank of feed-forward layers, in refiners too")
    mod_dim: int | None = arg(INTEGER, "rank of the modulation, in refiners and the last layer too")
    refiner_dim: int | None = arg(INTEGER, "rank of what else there is in refiners")
    embedder_dims: tuple[int, ...] | None = arg(INTEGERS, f"ranks of {', '.join(_EMBEDDERS)}, which are left alone without")
    train_blocks: str | None = arg(BLOCKS, "blocks that learn (all)")
    split_qkv: bool | None = arg(BOOLEAN, "an adapter of its own for each of q, k and v (false)")
    verbose: bool | None = arg(BOOLEAN, "no effect: what is adapted is always logged")

    size_args: ClassVar[tuple[str, ...]] = (*_PARTS, "embedder_dims", "train_blocks")

    def __post_init__(self) -> None:
        if self.embedder_dims is not None and len(self.embedder_dims) != len(_EMBEDDERS):
            count = len(_EMBEDDERS)
            raise UserError(f"--network_args embedder_dims={self.embedder_dims}: {count} ranks, of {', '.join(_EMBEDDERS)}.")

    @property
    def _embedder_ranks(self) -> dict[str, int]:
        return dict(zip(_EMBEDDERS, self.embedder_dims or (), strict=False))

    def extra_modules(self) -> tuple[str, ...]:
        return tuple(name for name, rank in self._embedder_ranks.items() if rank)

    def chooses(self, key: str) -> bool:
        blocks = _BLOCKS.get(self.train_blocks or "all")
        if blocks is None or not key.startswith("lora_unet_") or self._embedder(key):
            return True
        return key.startswith(tuple(f"lora_unet_{block}_" for block in blocks))

    def rank(self, key: str, default: int) -> int:
        if not key.startswith("lora_unet_"):
            return default
        if embedder := self._embedder(key):
            return self._embedder_ranks.get(embedder, default)
        own = (getattr(self, name) for name, sign in _PARTS.items() if sign in key)
        return next((rank for rank in own if rank is not None), default)

    def _embedder(self, key: str) -> str | None:
        return next((name for name in _EMBEDDERS if key.startswith(f"lora_unet_{name}")), None)

    def splits_fused(self) -> bool:
        return bool(self.split_qkv)


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
)

factory = bind(LoRA, ARCH)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
