"""What the strategies of the UNet families (Stable Diffusion 1.x/2.x, SDXL) share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from library.strategy_base import LatentsCachingStrategy
from library.vae_parts import encode_images


@dataclass(frozen=True)
class UnetLatentsCachingStrategy(LatentsCachingStrategy):
    """A sample of the VAE's posterior, not yet scaled."""

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return encode_images(vae, images, seeds)

    def fingerprint(self) -> str:
        return "posterior-sample-1"
