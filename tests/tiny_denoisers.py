"""A tiny denoiser of every family with its table of layers, and what it computes for one fixed input; gradients pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import network_models
import tiny_flux
import tiny_lumina
import tiny_sd3
import tiny_sdxl
import torch
from torch import Tensor, nn

from library.dit_layers import image_ids
from library.rng import keyed_generator
from networks import lora_flux, lora_lumina, lora_sd, lora_sd3, lora_sdxl
from networks.network_targets import NetworkArch


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("tiny-denoisers", key))


def unet_output(unet: Any) -> Tensor:
    context = randn(1, 5, unet.config.cross_attention_dim, key="context")
    added = None
    if unet.config.addition_embed_type is not None:
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": randn(1, width, key="pooled"), "time_ids": torch.full((1, 6), 64.0)}
    sample: Tensor = unet(
        randn(1, 4, 8, 8, key="x"), torch.tensor([500]), encoder_hidden_states=context, added_cond_kwargs=added
    ).sample
    return sample


def flux_output(model: Any) -> Tensor:
    params = model.params
    out: Tensor = model(
        randn(1, 12, params.in_channels, key="x"),
        image_ids(8, 6, "cpu"),
        randn(1, 5, params.context_width, key="context"),
        torch.zeros(1, 5, 3),
        torch.tensor([0.4]),
        pooled=randn(1, params.pooled_width, key="pooled") if params.pooled_width else None,
        guidance=torch.tensor([3.0]) if params.guidance_embed else None,
    )
    return out


def lumina_output(model: Any) -> Tensor:
    params = model.params
    out: Tensor = model(
        randn(1, params.in_channels, 8, 6, key="x"), torch.tensor([0.4]), randn(1, 5, params.context_width, key="context")
    )
    return out


def sd3_output(model: Any) -> Tensor:
    context, pooled = (randn(1, *shape, key=str(shape)) for shape in ((5, tiny_sd3.T5_WIDTH), (96,)))
    out: Tensor = model(randn(1, 4, 8, 6, key="x"), torch.tensor([0.4]), context, pooled)
    return out


@dataclass(frozen=True)
class TinyDenoiser:
    arch: NetworkArch
    make: Callable[[], nn.Module]
    output: Callable[[Any], Tensor]
    few: str
    """A pattern of three layers: attention, fused where the family fuses it, and outside of it."""


_UNET = "transformer_blocks_0_(attn1_to_q|attn2_to_k|ff_net_2)$"
_SD3 = "joint_blocks_(0_x_block_attn_qkv|1_context_block_adaLN_modulation_1|1_x_block_mlp_fc1)$"
_FLUX = "double_blocks_0_img_attn_qkv|single_blocks_1_linear1|double_blocks_1_txt_mlp_0"
DENOISERS = {
    "sd": TinyDenoiser(lora_sd.ARCH, network_models.tiny_unet, unet_output, f"_mid_block.*{_UNET}"),
    "sdxl": TinyDenoiser(lora_sdxl.ARCH, lambda: tiny_sdxl.modules()["denoiser"], unet_output, f"_middle_block.*{_UNET}"),
    "flux": TinyDenoiser(lora_flux.ARCH, lambda: tiny_flux.modules("dev")["denoiser"], flux_output, _FLUX),
    "lumina": TinyDenoiser(
        lora_lumina.ARCH,
        lambda: tiny_lumina.modules()["denoiser"],
        lumina_output,
        "layers_0_attention_qkv|layers_1_feed_forward_w1|noise_refiner_0_adaLN_modulation_1",
    ),
    "sd3": TinyDenoiser(lora_sd3.ARCH, lambda: tiny_sd3.modules()["denoiser"], sd3_output, _SD3),
    "chroma": TinyDenoiser(lora_flux.ARCH, lambda: tiny_flux.modules("chroma")["denoiser"], flux_output, _FLUX),
}
