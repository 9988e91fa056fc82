"""Pictures from a Stable Diffusion model, with or without a LoRA, many at a time; how many show what was asked.

Everything runs through the family that is trained: its strategies, its `predict`, its samplers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.shapes import SIZE, Scene, check
from library.option_groups import NetworkTrainOptions
from library.options import from_flags
from library.picture_maker import to_picture
from library.rng import keyed_generator
from library.sampling import guided_pair, make_scheduler, sample_diffusion
from library.sd_train_utils import SdFamily
from library.strategy_sd import SdConditioning

STEPS, GUIDANCE, SAMPLER = 20, 3.0, "ddim"


class Model:
    """A base model in float32 on the CPU, ready to draw."""

    def __init__(self, folder: Path) -> None:
        self.options = from_flags(NetworkTrainOptions, pretrained_model_name_or_path=str(folder))
        self.family = SdFamily()
        self.bundle = self.family.load(self.options, device=torch.device("cpu"), dtype=torch.float32)

    @cached_property
    def _strategies(self) -> tuple:
        strategies = self.family.strategies(self.options)
        return strategies.tokenize, strategies.text_encoding

    @contextmanager
    def with_lora(self, file: Path) -> Iterator[None]:
        """The LoRA is in effect inside the block."""
        from networks.lora import factory

        network, _ = factory.for_arch(self.family.arch).create_network_from_weights(
            1.0, file, None, self.bundle.text_encoders, self.bundle.denoiser, for_inference=True
        )
        network.attach()
        try:
            yield
        finally:
            network.detach()

    def _encode(self, prompts: Sequence[str]) -> SdConditioning:
        tokenize, encoding = self._strategies
        found: SdConditioning = encoding.encode(self.bundle.text_encoders, tokenize.tokenize(prompts))
        return found

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 20) -> list[Image.Image]:
        """A picture for each prompt; the same prompts in the same order give the same pictures."""
        pictures = []
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            cond = self._encode([*part, *[""] * len(part)])

            def predict(x_t: Tensor, t: Tensor, cond: SdConditioning = cond) -> Tensor:
                return self.family.predict(self.bundle.denoiser, x_t, t, cond, None, self.options)

            spec = self.family.latent(self.options)
            latents = sample_diffusion(
                guided_pair(predict, GUIDANCE),
                make_scheduler(SAMPLER, self.family.objective(self.options)),
                (len(part), spec.channels, SIZE // spec.stride, SIZE // spec.stride),
                steps=STEPS,
                seed=keyed_generator("gallery", seed, start).initial_seed(),
                device="cpu",
            )
            pictures += [to_picture(image) for image in self.family.decode(self.bundle.vae, latents, self.options)]
        return pictures


def score(pictures: Sequence[Image.Image], wanted: Sequence[Scene]) -> float:
    """Share of pictures in which shape, colour and background are as wanted."""
    return sum(check(picture).matches(scene) for picture, scene in zip(pictures, wanted, strict=True)) / len(wanted)
