"""Tiny Stable Diffusion parts built straight from diffusers and transformers, for the adapter tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks import lora
from networks.network_base import LayerNetwork

WIDTH = 16
CONV = {"conv_dim": 3, "conv_alpha": 1}


def tiny_unet(*, linear_projection: bool = False, seed: int = 0) -> nn.Module:
    """SD1's layout at two levels of two layers: every layer kind, samplers included. SD2 projects linearly."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=linear_projection,
        )
    return unet.eval().requires_grad_(False)


def tiny_text_encoder(seed: int = 1) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=63,
        pad_token_id=63,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config)
    return encoder.eval().requires_grad_(False)


def predict(unet: nn.Module, encoder: nn.Module) -> Tensor:
    """What the two give together for one fixed input: [2, 4, 16, 16]."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    ids = torch.randint(0, 62, (2, 16), generator=generator)
    ids[:, -1] = 63
    context = encoder(ids).last_hidden_state
    return unet(x, torch.tensor([10, 500]), context).sample


@torch.no_grad()
def fill(module: nn.Module, seed: int = 3, scale: float = 0.2) -> None:
    """Random values for every parameter, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def make(model: tuple[nn.Module, nn.Module], dim: int | None = 4, alpha: float | None = 2.0, **kwargs: Any) -> LayerNetwork:
    unet, encoder = model
    return lora.create_network(1.0, dim, alpha, None, encoder, unet, **kwargs)
