"""The noise a latent is corrupted with, and its variants. Every draw is from a keyed generator.

Shapes: B batch, C latent channels, h x w latent pixels. Formulae as in sd-scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from library.option_groups import NoiseOptions

Generators = Callable[[str, torch.device], torch.Generator]
"""(stream, device) -> generator; `rng.StepRng` is one."""


def make_noise(latents: Tensor, options: NoiseOptions, rng: Generators) -> Tensor:
    """Noise to add and to predict, [B, C, h, w] float32 on the latents' device."""
    noise = _normal(latents.shape, rng("noise", latents.device))
    if options.noise_offset:
        noise = _offset(noise, latents, options, rng)
    if options.multires_noise_iterations:
        noise = _multires(noise, options.multires_noise_iterations, options.multires_noise_discount, rng)
    return noise


def perturb(noise: Tensor, options: NoiseOptions, rng: Generators) -> Tensor:
    """The noise to mix into the input; the target stays `noise`. `noise` itself without `--ip_noise_gamma`.

    Input perturbation: Ning et al. 2023, arXiv 2301.11706.
    """
    if not options.ip_noise_gamma:
        return noise
    gamma = options.ip_noise_gamma * _strength(options.ip_noise_gamma_random_strength, "ip_noise_strength", noise.device, rng)
    return noise + gamma * _normal(noise.shape, rng("ip_noise", noise.device))


def _normal(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)


def _strength(random: bool, stream: str, device: torch.device, rng: Generators) -> Tensor | float:
    """1, or one uniform draw for the batch, left on the device so that no step waits for it."""
    return torch.rand((), generator=rng(stream, device), device=device) if random else 1.0


def _offset(noise: Tensor, latents: Tensor, options: NoiseOptions, rng: Generators) -> Tensor:
    """Noise plus one number per image and channel, so that the overall brightness is learned too.

    Adaptive: the offset grows with how far each channel's mean is from zero.
    """
    assert options.noise_offset is not None
    random = _strength(options.noise_offset_random_strength, "noise_offset_strength", noise.device, rng)
    offset: Tensor | float = options.noise_offset * random
    if options.adaptive_noise_scale:
        means = latents.float().mean(dim=(2, 3), keepdim=True).abs()  # [B, C, 1, 1]
        offset = (offset + options.adaptive_noise_scale * means).clamp(min=0)
    return noise + offset * _normal((*noise.shape[:2], 1, 1), rng("noise_offset", noise.device))


def _multires(noise: Tensor, iterations: int, discount: float, rng: Generators) -> Tensor:
    """Noise plus ever coarser noise, scaled back to a standard deviation of 1.

    Each level is drawn at h/r^i x w/r^i with r uniform in [2, 4), enlarged, and weighted discount^i.
    """
    height, width = noise.shape[-2:]
    # sizes have to be known to the host: drawn there, so that no step waits for the device
    ratios = (torch.rand(iterations, generator=rng("multires_sizes", torch.device("cpu"))) * 2 + 2).tolist()
    generator = rng("multires", noise.device)
    total = noise
    for level, ratio in enumerate(ratios):
        size = max(1, int(height / ratio**level)), max(1, int(width / ratio**level))
        coarse = _normal((*noise.shape[:2], *size), generator)
        total = total + F.interpolate(coarse, size=(height, width), mode="bilinear") * discount**level
        if 1 in size:
            break
    return total / total.std()
