"""The autoencoder of the example model, trained from scratch on drawings. Stride 8, four latent channels, 0.7 M parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from examples.shapes import SIZE, Scene, draw, scenes
from library.rng import keyed_generator, keyed_random

if TYPE_CHECKING:
    from torch import Tensor

CROP = SIZE // 2
KL_WEIGHT = (
    1e-3  # on the mean over latents: the posterior's deviation becomes a tenth of the latents', so small errors are forgiven
)


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = 4
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """[B, 3, H, W] in [-1, 1]."""
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(picture.cpu().numpy()) for picture in pixels]


def _pool(name: str, count: int) -> Tensor:
    rng, known = keyed_random(name), list(scenes())
    return to_tensor([draw(rng.choice(known), name.removeprefix("tiny-"), index) for index in range(count)])


def _batch(pool: Tensor, step: int, whole: bool) -> Tensor:
    """8 whole pictures, or 24 crops of half the side: edges are the same everywhere, and crops cost a quarter."""
    generator = keyed_generator("tiny-vae", step)
    rows = pool[torch.randint(0, len(pool), (8 if whole else 24,), generator=generator)]
    if not whole:
        corners = torch.randint(0, SIZE - CROP + 1, (len(rows), 2), generator=generator).tolist()
        rows = torch.stack([row[:, y : y + CROP, x : x + CROP] for row, (y, x) in zip(rows, corners, strict=True)])
    return rows.flip(-1) if torch.rand((), generator=generator) < 0.5 else rows


def train_vae(vae: Any, *, steps: int = 1600, decoder_steps: int = 500, pool_size: int = 700) -> None:
    """Train in place. The last eighth of the steps sees whole pictures; then comes a first phase for the decoder alone.

    Also sets `scaling_factor`, which makes the latents' variance one.
    """
    pool = _pool("tiny-vae", pool_size)
    _run(vae, vae, pool, steps, 2e-3)
    _run(vae, vae.decoder, pool, decoder_steps, 1e-3)
    vae.eval()
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in pool[:320].split(16)])
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))


def sharpen_decoder(vae: Any, *, steps: int = 2000, pool_size: int = 2000) -> float:
    """Train the decoder alone on new drawings, which leaves the latents as they are; gives the mean absolute error."""
    pool = _pool("tiny-vae decoder", pool_size)
    _run(vae, vae.decoder, pool, steps, 2e-3)
    vae.eval()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pool[:64]).latent_dist.mean).sample
    return (decoded - pool[:64]).abs().mean().item()


def _run(vae: Any, part: Any, pool: Tensor, count: int, rate: float) -> None:
    """`count` steps of `part`, which is the whole autoencoder or its decoder."""
    parameters = list(part.parameters())
    vae.to(memory_format=torch.channels_last).requires_grad_(False)
    part.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, count))
    for step in range(count):
        images = _batch(pool, step, whole=part is not vae or step >= count * 7 / 8)
        error = _step(vae, images.contiguous(memory_format=torch.channels_last), encoder_learns=part is vae)
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"vae {'both' if part is vae else 'decoder'} {step}/{count}: loss {error.item():.4f}", flush=True)


def _rate(count: int, step: int) -> float:
    """Warm-up, then half a cosine down to 2 %."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / max(count, 1))))


def _step(vae: Any, images: Tensor, *, encoder_learns: bool) -> Tensor:
    with torch.set_grad_enabled(encoder_learns):
        posterior = vae.encode(images).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape)
    difference = vae.decode(latents).sample - images
    loss = difference.abs().mean() + difference.square().mean()
    if encoder_learns:
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = loss + KL_WEIGHT * kl
    return loss


def round_trip(vae: Any, wanted: Sequence[Scene]) -> list[Image.Image]:
    """Drawings of `wanted` through the autoencoder and back."""
    with torch.no_grad():
        images = to_tensor([draw(scene, "round trip") for scene in wanted])
        decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(8)]
    return to_pictures(torch.cat(decoded))
