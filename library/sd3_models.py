"""Stable Diffusion 3 and 3.5: the network in its original parameter names, and its sizes told from tensor shapes.

Shapes: B batch, C latent channels, L image tokens, M text tokens, D width, H heads, K head width, N rows of the position table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal, cast

import torch
from torch import Tensor, nn

from library.attention import Attention, split_heads
from library.dit_layers import (
    Denoiser,
    SiluMLP,
    WeightRMSNorm,
    gated,
    layer_norm,
    modulated,
    timestep_embedding,
)
from library.errors import UserError
from library.model_io import count_indices
from library.offload_plan import SwapDivision
from library.sd3_names import HEAD_WIDTH

TIME_WIDTH = 256
NATIVE_SIDE = 64
"""Rows and columns of tokens of a picture of 1024 x 1024, which all of these models were made for."""

Kind = Literal["m", "5-medium", "5-large"]


@dataclass(frozen=True)
class Sd3Params:
    """Sizes of one network; the defaults are SD3 medium's."""

    channels: int = 16
    out_channels: int = 16
    patch: int = 2
    width: int = 1536
    mlp_width: int = 6144
    context_width: int = 4096
    pooled_width: int = 2048
    num_blocks: int = 24
    head_width: int = HEAD_WIDTH
    positions: int = 192
    """Rows, and columns, of the table of positions."""
    qk_norm: bool = False
    dual_blocks: tuple[int, ...] = ()
    """Blocks in which the image attends to itself a second time."""

    @property
    def num_heads(self) -> int:
        return max(1, self.width // self.head_width)

    @property
    def kind(self) -> Kind:
        """sd-scripts' name of the model."""
        return "5-medium" if self.dual_blocks else "5-large" if self.qk_norm else "m"

    @property
    def swap_division(self) -> SwapDivision:
        return SwapDivision((("joint blocks", self.num_blocks),))

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Sd3Params:
        """Sizes from tensor shapes under original names."""
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        norm = "joint_blocks.0.x_block.attn.ln_q.weight"
        num_blocks = count_indices(shapes, r"joint_blocks\.(\d+)\.")
        return cls(
            channels=channels,
            out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
            patch=patch,
            width=width,
            mlp_width=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0],
            context_width=shapes["context_embedder.weight"][1],
            pooled_width=shapes["y_embedder.mlp.0.weight"][1],
            num_blocks=num_blocks,
            head_width=shapes[norm][0] if norm in shapes else HEAD_WIDTH,
            positions=isqrt(shapes["pos_embed"][1]),
            qk_norm=norm in shapes,
            dual_blocks=tuple(
                number for number in range(num_blocks) if f"joint_blocks.{number}.x_block.attn2.qkv.weight" in shapes
            ),
        )


class StreamAttention(nn.Module):
    """The projections of one stream's attention. projects: whether what it attends to is used."""

    def __init__(self, params: Sd3Params, *, projects: bool = True) -> None:
        super().__init__()
        self.num_heads = params.num_heads
        self.qkv = nn.Linear(params.width, 3 * params.width)
        normed = params.qk_norm
        self.ln_q, self.ln_k = (WeightRMSNorm(params.head_width) if normed else nn.Identity() for _ in range(2))
        if projects:
            self.proj = nn.Linear(params.width, params.width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v of [B, L, H, K], q and k normed where the model norms them."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.ln_q(q), self.ln_k(k), v


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class SingleDiTBlock(nn.Module):
    """One stream's weights in a joint block: of the image (dual or not) or of the text (the last ends in attention).

    LyCORIS looks for the blocks of this model by the name of this class, which is sd-scripts'.
    """

    def __init__(self, params: Sd3Params, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        width = params.width
        self.count = 2 if last else 9 if dual else 6
        self.norm1 = layer_norm(width)
        self.attn = StreamAttention(params, projects=not last)
        self.attn2 = StreamAttention(params) if dual else None
        self.norm2 = None if last else layer_norm(width)
        self.mlp = None if last else Mlp(width, params.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.count * width))

    def vectors(self, vec: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> shift, scale and gate of the attention, of the MLP and of the second attention, as far as there are such;
        each [B, 1, D]."""
        return self.adaLN_modulation(vec).unflatten(-1, (self.count, -1)).split(1, dim=1)

    def after(self, x: Tensor, attended: Tensor, vectors: Sequence[Tensor], second: Tensor | None = None) -> Tensor:
        """x [B, L, D] with what was attended to and the MLP added to it."""
        assert self.mlp is not None and self.norm2 is not None
        x = gated(x, vectors[2], self.attn.proj(attended))
        if self.attn2 is not None and second is not None:
            x = gated(x, vectors[8], self.attn2.proj(second))
        return gated(x, vectors[5], self.mlp(modulated(self.norm2, x, vectors[3], vectors[4])))


class JointBlock(nn.Module):
    """Text and image with weights of their own, attending to each other."""

    def __init__(self, params: Sd3Params, number: int) -> None:
        super().__init__()
        self.context_block = SingleDiTBlock(params, last=number == params.num_blocks - 1)
        self.x_block = SingleDiTBlock(params, dual=number in params.dual_blocks)

    def forward(self, x: Tensor, context: Tensor, vec: Tensor, attend: Attention) -> tuple[Tensor, Tensor]:
        """x [B, L, D], context [B, M, D], vec [B, D]. The last block leaves the context as it is: nothing follows it."""
        image, text = self.x_block, self.context_block
        i, j = image.vectors(vec), text.vectors(vec)
        x_heads = image.attn.heads(modulated(image.norm1, x, i[0], i[1]))
        context_heads = text.attn.heads(modulated(text.norm1, context, j[0], j[1]))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(context_heads, x_heads, strict=True))  # [B, M+L, H, K]
        context_out, x_out = attend(q, k, v).split([context.shape[1], x.shape[1]], dim=1)
        second = None if image.attn2 is None else attend(*image.attn2.heads(modulated(image.norm1, x, i[6], i[7])))
        x = image.after(x, x_out, i, second)
        return x, context if text.mlp is None else text.after(context, context_out, j)


class PatchEmbedder(nn.Module):
    def __init__(self, params: Sd3Params) -> None:
        super().__init__()
        self.proj = nn.Conv2d(params.channels, params.width, params.patch, stride=params.patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, L, D], row by row."""
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class LastLayer(nn.Module):
    def __init__(self, params: Sd3Params) -> None:
        super().__init__()
        width = params.width
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, params.patch**2 * params.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x [B, L, D], vec [B, D]."""
        shift, scale = self.adaLN_modulation(vec).unflatten(-1, (2, -1)).split(1, dim=1)
        out: Tensor = self.linear(modulated(self.norm_final, x, shift, scale))
        return out


class Sd3(Denoiser):
    """The multimodal diffusion transformer of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206) and 3.5."""

    pos_embed: Tensor

    def __init__(self, params: Sd3Params) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.x_embedder = PatchEmbedder(params)
        self.t_embedder = SiluMLP(TIME_WIDTH, width)
        self.y_embedder = SiluMLP(params.pooled_width, width)
        self.context_embedder = nn.Linear(params.context_width, width)
        self.register_buffer("pos_embed", torch.empty(1, params.positions**2, width))  # [1, N*N, D]
        self.joint_blocks = nn.ModuleList(JointBlock(params, number) for number in range(params.num_blocks))
        self.final_layer = LastLayer(params)

    def block_groups(self) -> Sequence[Sequence[nn.Module]]:
        return (list(self.joint_blocks),)

    @property
    def dtype(self) -> torch.dtype:
        """What inputs have to be in where autocast does not see to it."""
        return self.x_embedder.proj.weight.dtype

    def unused_modules(self) -> tuple[nn.Module, ...]:
        """The last block's text asks for nothing that is used."""
        last = cast(JointBlock, self.joint_blocks[-1])
        return (last.context_block.attn.ln_q,) if self.params.qk_norm else ()

    def positions_of(
        self, x: Tensor, chances: Mapping[str, Tensor], *, scaled: bool = False, crop_rate: float = 0.0
    ) -> Tensor | None:
        """Of the tokens of x [B, C, h, w]; None for the middle of the table. Raises `UserError` for what is beyond it.

        scaled: as of a picture of 1024 x 1024. crop_rate: of pictures that have those of anywhere in the table, by `chances`
        ([B] each; none where nothing is drawn).
        """
        rows, columns = (side // self.params.patch for side in x.shape[-2:])
        side = self.params.positions
        if not reaches(self.pos_embed, rows, columns, scaled=scaled):
            raise UserError(
                f"a picture of {columns} x {rows} tokens is beyond the model's positions, of which there are {side} x {side}. "
                "Lower --resolution or --max_bucket_reso."
            )
        if scaled:
            return scaled_positions(self.pos_embed, rows, columns)
        if not crop_rate or "crop" not in chances:
            return None
        moved = chances["crop"] < crop_rate
        top, left = (
            torch.where(moved, (chances[f"crop_{edge}"] * (side - size + 1)).long(), (side - size) // 2)
            for edge, size in (("top", rows), ("left", columns))
        )
        return cropped_positions(self.pos_embed, rows, columns, top, left)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, positions: Tensor | None = None) -> Tensor:
        """The velocity, noise - data, the shape of x [B, C, h, w].

        t [B] float32 in [0, 1], 1 = noise; context [B, M, context_width]; pooled [B, pooled_width]; positions [B or 1, L, D]:
        the middle of the table unless given.
        """
        rows, columns = (side // self.params.patch for side in x.shape[-2:])
        if positions is None:
            positions = middle_positions(self.pos_embed, rows, columns)
        tokens = self.x_embedder(x)
        tokens = tokens + positions.to(tokens.dtype)
        vec = self.t_embedder(timestep_embedding(t, TIME_WIDTH).to(x.dtype)) + self.y_embedder(pooled)
        attend = Attention.of(self.attention_mode)
        text = self.context_embedder(context)
        for block in self.joint_blocks:
            tokens, text = self.run_block(block, tokens, text, vec, attend)
        return unpatchify(self.final_layer(tokens, vec), rows, columns, self.params.patch)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """[B, L, patch * patch * C] -> [B, C, h, w]."""
    patches = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))  # [B, rows, columns, p, p, C]
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * patch, columns * patch)


# ---- positions -------------------------------------------------------------------------------------------------------


def middle_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The middle of the table [1, N*N, D], of the picture's size: [1, L, D]."""
    grid = table.unflatten(1, (isqrt(table.shape[1]), -1))  # [1, N, N, D]
    top, left = ((grid.shape[1] - size) // 2 for size in (rows, columns))
    return grid[:, top : top + rows, left : left + columns].flatten(1, 2)


def cropped_positions(table: Tensor, rows: int, columns: int, top: Tensor, left: Tensor) -> Tensor:
    """A cut of the table [1, N*N, D] for each picture, from top and left [B] int64 on: [B, L, D]."""
    side = isqrt(table.shape[1])
    down = (top[:, None] + torch.arange(rows, device=table.device)) * side  # [B, rows]
    across = left[:, None] + torch.arange(columns, device=table.device)  # [B, columns]
    return table[0, (down[:, :, None] + across[:, None, :]).flatten(1)]


def scaled_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Those of a picture of 1024 x 1024's area, whatever this one's is, [1, L, D]: read between the entries of the table."""
    side = isqrt(table.shape[1])
    step = NATIVE_SIDE / (rows * columns) ** 0.5
    grid = table[0].unflatten(0, (side, side))  # [N, N, D]
    for dim, size in enumerate((rows, columns)):
        place = (side - 1) / 2 + (torch.arange(size, device=table.device) - (size - 1) / 2) * step
        below = place.floor().clamp(0, side - 2)
        share = (place - below).to(table.dtype).view([-1 if axis == dim else 1 for axis in range(3)])
        index = below.long()
        grid = torch.lerp(grid.index_select(dim, index), grid.index_select(dim, index + 1), share)
    return grid.flatten(0, 1)[None]


def reaches(table: Tensor, rows: int, columns: int, *, scaled: bool) -> bool:
    """Whether the table has the positions of a picture of this size."""
    step = NATIVE_SIDE / (rows * columns) ** 0.5 if scaled else 1
    return (max(rows, columns) - 1) * step <= isqrt(table.shape[1]) - 1
