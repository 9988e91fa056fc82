"""Lumina-Image-2.0: the NextDiT network in its original parameter names, and its sizes told from tensor shapes.

Classes that hold adapted layers have their original names, too: LyCORIS finds layers by them.

Shapes: B batch, L image tokens, M text tokens, D width, H heads, G groups of heads that share a key and a value, K head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.attention import Attention
from library.dit_layers import (
    Denoiser,
    Rotation,
    SiluMLP,
    WeightRMSNorm,
    gated,
    image_ids,
    layer_norm,
    rotary_embedding,
    rotate,
    timestep_embedding,
)
from library.model_io import count_indices
from library.offload_plan import SwapDivision

TIME_WIDTH = 256
NORM_EPS = 1e-5
PATCH = 2


@dataclass(frozen=True)
class LuminaParams:
    """Sizes of one network; the defaults are the published ones."""

    in_channels: int = 16
    width: int = 2304
    num_heads: int = 24
    num_kv_heads: int = 8
    mlp_width: int = 9216
    context_width: int = 2304
    num_layers: int = 26
    num_refiners: int = 2
    """Blocks that see the text alone, and as many that see the image alone."""

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_width(self) -> int:
        """Of all keys together."""
        return self.num_kv_heads * self.head_width

    @property
    def axes(self) -> tuple[int, int, int]:
        """Rotary widths of (index in the text, row, column): 32 each in the published model."""
        return (self.head_width // 3,) * 3

    @property
    def embedding_width(self) -> int:
        """Of the time embedding."""
        return min(self.width, 1024)

    @property
    def swap_division(self) -> SwapDivision:
        """The few refiners stay where they are."""
        counts = (
            ("context refiners", self.num_refiners),
            ("noise refiners", self.num_refiners),
            ("layers", self.num_layers),
        )
        return SwapDivision(counts, lambda number: (0, 0, number))

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> LuminaParams:
        """Sizes from tensor shapes under original names."""
        width, patch = shapes["x_embedder.weight"]
        head_width = shapes["layers.0.attention.q_norm.weight"][0]
        heads = shapes["layers.0.attention.out.weight"][1] // head_width
        return cls(
            in_channels=patch // PATCH**2,
            width=width,
            num_heads=heads,
            num_kv_heads=(shapes["layers.0.attention.qkv.weight"][0] // head_width - heads) // 2,
            mlp_width=shapes["layers.0.feed_forward.w1.weight"][0],
            context_width=shapes["cap_embedder.1.weight"][1],
            num_layers=count_indices(shapes, r"layers\.(\d+)\."),
            num_refiners=count_indices(shapes, r"context_refiner\.(\d+)\."),
        )


class GroupedAttention(nn.Module):
    """Self-attention in which H / G heads share a key and a value."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.widths = [params.width, params.kv_width, params.kv_width]
        self.head_width = params.head_width
        self.shared_by = params.num_heads // params.num_kv_heads
        self.qkv = nn.Linear(params.width, sum(self.widths), bias=False)
        self.out = nn.Linear(params.width, params.width, bias=False)
        self.q_norm = WeightRMSNorm(params.head_width, NORM_EPS)
        self.k_norm = WeightRMSNorm(params.head_width, NORM_EPS)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attention) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in parts)  # [B, L, H or G, K]
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        out: Tensor = self.out(attend(q, self._for_all_heads(k), self._for_all_heads(v)))
        return out

    def _for_all_heads(self, x: Tensor) -> Tensor:
        """[B, L, G, K] -> [B, L, H, K]."""
        return x.unsqueeze(3).expand(-1, -1, -1, self.shared_by, -1).flatten(2, 3)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class JointTransformerBlock(nn.Module):
    """Attention and a feed-forward part, each between two norms. modulated: the time scales and gates them."""

    def __init__(self, params: LuminaParams, *, modulated: bool) -> None:
        super().__init__()
        self.attention = GroupedAttention(params)
        self.feed_forward = FeedForward(params.width, params.mlp_width)
        self.attention_norm1 = WeightRMSNorm(params.width, NORM_EPS)
        self.ffn_norm1 = WeightRMSNorm(params.width, NORM_EPS)
        self.attention_norm2 = WeightRMSNorm(params.width, NORM_EPS)
        self.ffn_norm2 = WeightRMSNorm(params.width, NORM_EPS)
        self.adaLN_modulation = _modulation(params, 4) if modulated else None

    def forward(self, x: Tensor, rotation: Rotation, attend: Attention, vec: Tensor | None = None) -> Tensor:
        """x [B, L, D]; vec: the time embedding, for modulated blocks."""
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotation, attend))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        vectors = self.adaLN_modulation(vec).unflatten(-1, (4, -1))  # [B, 4, D]
        scale_attention, gate_attention, scale_mlp, gate_mlp = vectors.split(1, dim=1)
        change = self.attention(self.attention_norm1(x) * (1 + scale_attention), rotation, attend)
        x = gated(x, gate_attention.tanh(), self.attention_norm2(change))
        change = self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp))
        return gated(x, gate_mlp.tanh(), self.ffn_norm2(change))


def _modulation(params: LuminaParams, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(params.embedding_width, count * params.width))


class FinalLayer(nn.Module):
    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.norm_final = layer_norm(params.width)
        self.linear = nn.Linear(params.width, PATCH**2 * params.in_channels)
        self.adaLN_modulation = _modulation(params, 1)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, 4C]."""
        out: Tensor = self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(vec).unsqueeze(1)))
        return out


class Lumina(Denoiser):
    """Lumina-Image-2.0 (Qin et al. 2025, arXiv 2503.21758): text and image as one sequence, each refined by itself before."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.params = params
        self.t_embedder = SiluMLP(TIME_WIDTH, params.embedding_width)
        self.cap_embedder = nn.Sequential(
            WeightRMSNorm(params.context_width, NORM_EPS), nn.Linear(params.context_width, params.width)
        )
        self.x_embedder = nn.Linear(PATCH**2 * params.in_channels, params.width)
        self.context_refiner = nn.ModuleList(JointTransformerBlock(params, modulated=False) for _ in range(params.num_refiners))
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(params, modulated=True) for _ in range(params.num_refiners))
        self.layers = nn.ModuleList(JointTransformerBlock(params, modulated=True) for _ in range(params.num_layers))
        self.final_layer = FinalLayer(params)

    def block_groups(self) -> Sequence[Sequence[nn.Module]]:
        return list(self.context_refiner), list(self.noise_refiner), list(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """What inputs have to be in where autocast does not see to it."""
        return self.x_embedder.weight.dtype

    def forward(self, x: Tensor, t: Tensor, txt: Tensor, txt_mask: Tensor | None = None) -> Tensor:
        """The network's own velocity, data - noise, the shape of x.

        x [B, C, h, w], t [B] float32 (0 = noise, 1 = data: the other way round than everywhere else here), txt
        [B, M, context_width], txt_mask [B, M] bool: which tokens are text, the first ones of each row; all where None.
        """
        height, width = x.shape[-2:]
        rotation = rotary_embedding(_positions(height, width, txt, txt_mask), self.params.axes)
        of_text, of_image = rotation.of(slice(0, txt.shape[1])), rotation.of(slice(txt.shape[1], None))
        vec = self.t_embedder(timestep_embedding(t, TIME_WIDTH, factor=1.0).to(x.dtype))
        context, tokens = self.cap_embedder(txt), self.x_embedder(patchify(x))
        attend = Attention.of(self.attention_mode, txt_mask)
        for block in self.context_refiner:
            context = self.run_block(block, context, of_text, attend)
        attend = Attention.of(self.attention_mode)
        for block in self.noise_refiner:
            tokens = self.run_block(block, tokens, of_image, attend, vec)
        if txt_mask is not None:
            attend = Attention.of(self.attention_mode, F.pad(txt_mask, (0, tokens.shape[1]), value=True))
        joined = torch.cat([context, tokens], dim=1)  # [B, M+L, D]
        for block in self.layers:
            joined = self.run_block(block, joined, rotation, attend, vec)
        return unpatchify(self.final_layer(joined[:, txt.shape[1] :], vec), height, width)


def _positions(height: int, width: int, txt: Tensor, txt_mask: Tensor | None) -> Tensor:
    """[B, M+L, 3]: (index, 0, 0) of text tokens, (length of the row's text, row, column) of the image's."""
    batch, length, device = txt.shape[0], txt.shape[1], txt.device
    index = torch.arange(length, device=device, dtype=torch.float32)
    lengths = torch.full((batch,), float(length), device=device) if txt_mask is None else txt_mask.sum(1).float()
    text = F.pad(index[None, :, None], (0, 2)).expand(batch, -1, -1)
    image = image_ids(height, width, device) + F.pad(lengths[:, None, None], (0, 2))
    return torch.cat([text, image], dim=1)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def patchify(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4C]: 2x2 patches as tokens, row by row; channels of one latent pixel lie together."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, height * width // PATCH**2, PATCH**2 * channels)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse; height and width of the latents."""
    patches = tokens.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, (height // PATCH, width // PATCH))  # [B, h/2, w/2, 2, 2, C]
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)
