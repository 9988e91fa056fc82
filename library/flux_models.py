"""FLUX.1 and Chroma: the network in its original parameter names, and its sizes told from tensor shapes.

Shapes: B batch, L image tokens, M text tokens, D width, H heads, K head width, N modulation vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.attention import Attention, split_heads
from library.dit_layers import (
    Denoiser,
    MLPEmbedder,
    Modulation,
    QKNorm,
    RMSNorm,
    Rotation,
    gated,
    layer_norm,
    modulated,
    rotary_embedding,
    rotate,
    timestep_embedding,
)
from library.offload_plan import SwapDivision

TIME_WIDTH = 256


@dataclass(frozen=True)
class ApproximatorParams:
    """Sizes of Chroma's modulation network."""

    inputs: int = 64
    hidden: int = 5120
    num_layers: int = 5


@dataclass(frozen=True)
class FluxParams:
    """Sizes of one network. `approximator` is set for Chroma alone, which has neither `vector_in` nor `guidance_in`."""

    in_channels: int = 64
    out_channels: int = 64
    width: int = 3072
    num_heads: int = 24
    mlp_width: int = 12288
    context_width: int = 4096
    pooled_width: int = 768
    num_double_blocks: int = 19
    num_single_blocks: int = 38
    guidance_embed: bool = True
    approximator: ApproximatorParams | None = None

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def axes(self) -> tuple[int, int, int]:
        """Rotary widths of (index, row, column): 16, 56, 56 in every published model, whose heads are 128 wide."""
        index = self.head_width // 8
        return index, (self.head_width - index) // 2, (self.head_width - index) // 2

    @property
    def num_modulations(self) -> int:
        """Modulation vectors of all blocks and the last layer: 344 in the published Chroma."""
        return 3 * self.num_single_blocks + 12 * self.num_double_blocks + 2

    @property
    def swap_division(self) -> SwapDivision:
        counts = ("double blocks", self.num_double_blocks), ("single blocks", self.num_single_blocks)
        return SwapDivision(counts, divide_swapped)

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> FluxParams:
        """Sizes from tensor shapes under original names."""
        width, in_channels = shapes["img_in.weight"]
        approximator = None
        if "distilled_guidance_layer.in_proj.weight" in shapes:
            hidden, inputs = shapes["distilled_guidance_layer.in_proj.weight"]
            approximator = ApproximatorParams(inputs, hidden, _count(shapes, "distilled_guidance_layer.layers."))
        return cls(
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0],
            width=width,
            num_heads=width // shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0],
            mlp_width=shapes["double_blocks.0.img_mlp.0.weight"][0],
            context_width=shapes["txt_in.weight"][1],
            pooled_width=0 if approximator else shapes["vector_in.in_layer.weight"][1],
            num_double_blocks=_count(shapes, "double_blocks."),
            num_single_blocks=_count(shapes, "single_blocks."),
            guidance_embed="guidance_in.in_layer.weight" in shapes,
            approximator=approximator,
        )


def divide_swapped(number: int) -> tuple[int, int]:
    """(double, single) blocks that sd-scripts swaps for `--blocks_to_swap number`: two single ones weigh about a double one."""
    return number // 2, 2 * (number - number // 2)


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbers follow `prefix`."""
    return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})


class SelfAttention(nn.Module):
    """The projections of one stream's attention; the attention itself is joint."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v of [B, L, H, K], q and k normed."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.norm(q, k)
        return q, k, v


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, attending to each other."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        width = params.width
        own = params.approximator is None
        self.img_mod = Modulation(width, 6) if own else None
        self.img_norm1, self.img_norm2 = layer_norm(width), layer_norm(width)
        self.img_attn = SelfAttention(width, params.num_heads)
        self.img_mlp = _mlp(width, params.mlp_width)
        self.txt_mod = Modulation(width, 6) if own else None
        self.txt_norm1, self.txt_norm2 = layer_norm(width), layer_norm(width)
        self.txt_attn = SelfAttention(width, params.num_heads)
        self.txt_mlp = _mlp(width, params.mlp_width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rotation: Rotation, attend: Attention) -> tuple[Tensor, Tensor]:
        """img [B, L, D], txt [B, M, D]; vec: FLUX's embedding [B, D], or Chroma's vectors [B, 12, D]."""
        i, j = (vectors.split(1, dim=1) for vectors in self._vectors(vec))  # shift, scale, gate, twice; each [B, 1, D]
        img_heads = self.img_attn.heads(modulated(self.img_norm1, img, i[0], i[1]))
        txt_heads = self.txt_attn.heads(modulated(self.txt_norm1, txt, j[0], j[1]))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_heads, img_heads, strict=True))  # [B, M+L, H, K]
        out = attend(rotate(q, rotation), rotate(k, rotation), v)
        txt_out, img_out = out.split([txt.shape[1], img.shape[1]], dim=1)
        img = gated(img, i[2], self.img_attn.proj(img_out))
        img = gated(img, i[5], self.img_mlp(modulated(self.img_norm2, img, i[3], i[4])))
        txt = gated(txt, j[2], self.txt_attn.proj(txt_out))
        txt = gated(txt, j[5], self.txt_mlp(modulated(self.txt_norm2, txt, j[3], j[4])))
        return img, txt

    def _vectors(self, vec: Tensor) -> Sequence[Tensor]:
        """The image's and the text's, each [B, 6, D]."""
        if self.img_mod is None or self.txt_mod is None:
            return vec.chunk(2, dim=1)
        return self.img_mod(vec), self.txt_mod(vec)


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side in two fused layers."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        width = params.width
        self.num_heads = params.num_heads
        self.widths = [width, width, width, params.mlp_width]
        self.linear1 = nn.Linear(width, 3 * width + params.mlp_width)
        self.linear2 = nn.Linear(width + params.mlp_width, width)
        self.norm = QKNorm(params.head_width)
        self.pre_norm = layer_norm(width)
        self.modulation = Modulation(width, 3) if params.approximator is None else None

    def forward(self, x: Tensor, vec: Tensor, rotation: Rotation, attend: Attention) -> Tensor:
        """x [B, M+L, D]; vec: FLUX's embedding [B, D], or Chroma's vectors [B, 3, D]."""
        shift, scale, gate = (vec if self.modulation is None else self.modulation(vec)).split(1, dim=1)
        *heads, hidden = self.linear1(modulated(self.pre_norm, x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in heads)
        q, k = self.norm(q, k)
        out = attend(rotate(q, rotation), rotate(k, rotation), v)
        return gated(x, gate, self.linear2(torch.cat([out, F.gelu(hidden, approximate="tanh")], dim=-1)))


class LastLayer(nn.Module):
    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        width = params.width
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, params.out_channels)
        if params.approximator is None:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x [B, L, D]; vec: FLUX's embedding [B, D], or Chroma's vectors [B, 2, D]."""
        vectors = self.adaLN_modulation(vec).unflatten(-1, (2, -1)) if hasattr(self, "adaLN_modulation") else vec
        shift, scale = vectors.split(1, dim=1)
        out: Tensor = self.linear(modulated(self.norm_final, x, shift, scale))
        return out


class Approximator(nn.Module):
    """Chroma's one network for the modulation vectors of all blocks."""

    def __init__(self, params: ApproximatorParams, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(params.inputs, params.hidden)
        self.layers = nn.ModuleList(MLPEmbedder(params.hidden, params.hidden) for _ in range(params.num_layers))
        self.norms = nn.ModuleList(RMSNorm(params.hidden) for _ in range(params.num_layers))
        self.out_proj = nn.Linear(params.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, inputs] -> [B, N, D]."""
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        out: Tensor = self.out_proj(x)
        return out


@dataclass(frozen=True)
class Vectors:
    """What modulates each block: for FLUX the same embedding everywhere, for Chroma each block's own vectors."""

    of_single: Sequence[Tensor]
    of_double: Sequence[Tensor]
    of_last: Tensor


class Flux(Denoiser):
    """FLUX.1 (Black Forest Labs 2024), and Chroma, which replaces its modulation layers by one approximator."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.img_in = nn.Linear(params.in_channels, width)
        self.txt_in = nn.Linear(params.context_width, width)
        if params.approximator is None:
            self.time_in = MLPEmbedder(TIME_WIDTH, width)
            self.vector_in = MLPEmbedder(params.pooled_width, width)
            if params.guidance_embed:
                self.guidance_in = MLPEmbedder(TIME_WIDTH, width)
        else:
            self.distilled_guidance_layer = Approximator(params.approximator, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params) for _ in range(params.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(params) for _ in range(params.num_single_blocks))
        self.final_layer = LastLayer(params)

    def block_groups(self) -> Sequence[Sequence[nn.Module]]:
        return list(self.double_blocks), list(self.single_blocks)

    @property
    def dtype(self) -> torch.dtype:
        """What inputs have to be in where autocast does not see to it."""
        return self.img_in.weight.dtype

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        *,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        txt_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity, noise - data, of every image token, [B, L, out_channels].

        img [B, L, in_channels], txt [B, M, context_width], ids [B or 1, L or M, 3], t and guidance [B] float32 (t in [0, 1],
        1 = noise), pooled [B, pooled_width], txt_mask [B, M] bool: text tokens that are attended to.
        """
        vectors = self._vectors(t, pooled, guidance, img.dtype)
        batch = img.shape[0]
        ids = torch.cat([txt_ids.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)], dim=1)
        rotation = rotary_embedding(ids, self.params.axes)
        mask = None
        if txt_mask is not None:
            mask = torch.cat([txt_mask.bool(), txt_mask.new_ones(batch, img.shape[1], dtype=torch.bool)], dim=1)
        attend = Attention.of(self.attention_mode, mask)
        x, context = self.img_in(img), self.txt_in(txt)
        for block, vec in zip(self.double_blocks, vectors.of_double, strict=True):
            x, context = self.run_block(block, x, context, vec, rotation, attend)
        x = torch.cat([context, x], dim=1)  # [B, M+L, D]
        for block, vec in zip(self.single_blocks, vectors.of_single, strict=True):
            x = self.run_block(block, x, vec, rotation, attend)
        out: Tensor = self.final_layer(x[:, txt.shape[1] :], vectors.of_last)
        return out

    def _vectors(self, t: Tensor, pooled: Tensor | None, guidance: Tensor | None, dtype: torch.dtype) -> Vectors:
        params = self.params
        if params.approximator is not None:
            return self._approximated(t, params.approximator.inputs, dtype)
        if pooled is None or (params.guidance_embed and guidance is None):
            raise ValueError("FLUX needs the pooled text embedding, and guidance where it has a guidance embedding")
        vec = self.time_in(timestep_embedding(t, TIME_WIDTH).to(dtype)) + self.vector_in(pooled)
        if params.guidance_embed and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_WIDTH).to(dtype))
        return Vectors([vec] * params.num_single_blocks, [vec] * params.num_double_blocks, vec)

    def _approximated(self, t: Tensor, inputs: int, dtype: torch.dtype) -> Vectors:
        """Vectors in the approximator's order: single blocks, image streams, text streams, last layer."""
        singles, doubles, count = self.params.num_single_blocks, self.params.num_double_blocks, self.params.num_modulations
        time = timestep_embedding(torch.stack([t, torch.zeros_like(t)], dim=1), inputs // 4).flatten(1)  # guidance is 0
        index = timestep_embedding(torch.arange(count, device=t.device), inputs // 2)  # [N, inputs / 2]
        joined = torch.cat([time[:, None].expand(-1, count, -1), index.expand(len(t), -1, -1)], dim=-1)
        vectors = self.distilled_guidance_layer(joined.to(dtype))  # [B, N, D]
        single, img, txt, last = vectors.split([3 * singles, 6 * doubles, 6 * doubles, 2], dim=1)
        of_double = [torch.cat(pair, dim=1) for pair in zip(img.split(6, dim=1), txt.split(6, dim=1), strict=True)]
        return Vectors(single.split(3, dim=1) if singles else [], of_double, last)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4C]: 2x2 patches as tokens, row by row."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse; height and width of the latents."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))  # [B, h/2, w/2, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)
