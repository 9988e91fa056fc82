"""What the strategies of the transformer families share.

Shapes: B batch, M text tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, nn

from library.strategy_base import Conditioning, LatentsCachingStrategy
from library.vae_parts import encode_images

CLIP_L, CLIP_G, T5XXL = "clip_l", "clip_g", "t5xxl"
"""Names of text encoders."""

TextT = TypeVar("TextT", bound="PaddedText")


@dataclass(frozen=True)
class PaddedText(Conditioning):
    """Text whose padding may be hidden from the transformer."""

    whole: bool = field(default=False, kw_only=True)
    """No token has to be hidden, though padding is."""

    def fitted(self: TextT, lengths: Sequence[int]) -> TextT:
        return replace(super().fitted(lengths), whole=min(lengths) == max(lengths))


@dataclass(frozen=True)
class ScaledLatentsCachingStrategy(LatentsCachingStrategy):
    """A sample of the autoencoder's posterior, scaled: (z - shift) * scale."""

    scale: float
    shift: float

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return (encode_images(vae, images, seeds) - self.shift) * self.scale

    def fingerprint(self) -> str:
        return f"posterior-sample-scaled-{self.scale}-{self.shift}"


def ids_for(encoder: nn.Module, ids: Tensor) -> Tensor:
    """[B, 1, M] -> [B, M] on the encoder's device."""
    return ids[:, 0].to(next(encoder.parameters()).device)
