"""Latents as Stable Diffusion's families (1.x/2.x, SDXL, 3) store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from library.strategy_base import LatentsCachingStrategy
from library.vae_parts import encode_images


@dataclass(frozen=True)
class UnscaledLatentsCachingStrategy(LatentsCachingStrategy):
    """A sample of the VAE's posterior, not yet scaled."""

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return encode_images(vae, images, seeds)

    def fingerprint(self) -> str:
        return "posterior-sample-1"
