"""What a person would write with diffusers, transformers and peft alone: the other side of `step_speed.py`.

Everything is imported where a process uses it: imports are part of what is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def pictures(folder: Path) -> list[tuple[Tensor, str]]:
    """([1, 3, H, W] in [-1, 1], caption) of every picture in `folder`."""
    from PIL import Image

    found = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path).convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        tensor = pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
        found.append((tensor, path.with_suffix(".txt").read_text()))
    return found


class PlainModel(ABC):
    """A frozen denoiser, and everything it is trained on as cached tensors."""

    denoiser: Any
    targets: list[str] | str
    """peft's `target_modules`: the layers that our network adapts, too."""

    @abstractmethod
    def __init__(self, model: Path, images: Path, device: str) -> None: ...

    @abstractmethod
    def loss(self, rows: list[int]) -> Tensor:
        """Of one batch of these pictures."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many pictures there are."""


class PlainSd(PlainModel):
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]

    def __init__(self, model: Path, images: Path, device: str) -> None:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.denoiser = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device).requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)
        text: Any = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
        text.to(device)
        tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self.latents, self.contexts = [], []
        with torch.no_grad():
            for image, caption in pictures(images):
                ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
                self.latents.append(vae.encode(image.to(device)).latent_dist.sample() * vae.config.scaling_factor)
                self.contexts.append(text(ids.to(device)).last_hidden_state)

    @property
    def count(self) -> int:
        return len(self.latents)

    def loss(self, rows: list[int]) -> Tensor:
        x0, context = torch.cat([self.latents[r] for r in rows]), torch.cat([self.contexts[r] for r in rows])
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(rows),), device=x0.device)
        prediction = self.denoiser(self.scheduler.add_noise(x0, noise, t), t, context).sample
        return nn.functional.mse_loss(prediction.float(), noise.float())


class PlainFlux(PlainModel):
    targets = (
        r"transformer_blocks\.\d+\.("
        r"norm1(_context)?\.linear|attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)"
    )
    text_length = 64

    def __init__(self, model: Path, images: Path, device: str) -> None:
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

        transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer")
        self.denoiser = transformer.to(device).requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)
        clip: Any = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
        t5: Any = T5EncoderModel.from_pretrained(model, subfolder="text_encoder_2")
        tokenizers: list[Any] = [AutoTokenizer.from_pretrained(model / name) for name in ("tokenizer", "tokenizer_2")]
        lengths = 77, self.text_length
        self.latents, self.contexts, self.pooled = [], [], []
        with torch.no_grad():
            for image, caption in pictures(images):
                clip_ids, t5_ids = (
                    tokenizer(caption, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
                    for tokenizer, length in zip(tokenizers, lengths, strict=True)
                )
                latents = vae.encode(image.to(device)).latent_dist.sample()
                self.latents.append((latents - vae.config.shift_factor) * vae.config.scaling_factor)
                self.pooled.append(clip.to(device)(clip_ids.to(device)).pooler_output)
                self.contexts.append(t5.to(device)(t5_ids.to(device)).last_hidden_state)
        height, width = (side // 2 for side in self.latents[0].shape[-2:])
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
        self.image_ids = nn.functional.pad(grid, (1, 0)).to(device)  # (0, row, column)
        self.text_ids = torch.zeros(self.text_length, 3, device=device)

    @property
    def count(self) -> int:
        return len(self.latents)

    def loss(self, rows: list[int]) -> Tensor:
        x0 = nn.functional.pixel_unshuffle(torch.cat([self.latents[r] for r in rows]), 2).flatten(2).transpose(1, 2)
        noise = torch.randn_like(x0)
        t = torch.randn(len(rows), device=x0.device).sigmoid()
        noised = torch.lerp(x0, noise, t[:, None, None])
        prediction = self.denoiser(
            hidden_states=noised,
            encoder_hidden_states=torch.cat([self.contexts[r] for r in rows]),
            pooled_projections=torch.cat([self.pooled[r] for r in rows]),
            timestep=t,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            guidance=torch.ones_like(t),
            return_dict=False,
        )[0]
        return nn.functional.mse_loss(prediction.float(), (noise - x0).float())


def train(plain: PlainModel, rank: int, batch: int, steps: int) -> None:
    """Prints a line for how many numbers learn, and one at the end of every step."""
    from facts import step_done
    from peft import LoraConfig

    plain.denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=plain.targets))
    plain.denoiser.train()
    parameters = [p for p in plain.denoiser.parameters() if p.requires_grad]
    print(f"LEARNING {sum(p.numel() for p in parameters)}")
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for step in range(steps):
        loss = plain.loss([(step * batch + i) % plain.count for i in range(batch)])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as a person would, to print it
        step_done()
