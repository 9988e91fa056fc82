"""Frozen weights in 8 or 4 bits: how they are stored, and what they stand for. Pure functions of tensors.

A weight is a matrix [O, I] (a convolution's is flattened to one) and becomes two plain tensors, `stored` and `scale`:

- e4m3 or int8 [O, I], with a scale [a, b] in float32 for each of a * b equal tiles: one number for the matrix, one for each
  row, or a grid. The weight is stored * scale.
- uint8 [ceil(O * I / 64) * 32], two values in a byte, with a scale [blocks] for each 64 of them in a row: NF4 (Dettmers et al.
  2023, arXiv 2305.14314), packed as bitsandbytes packs it.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
INT8_MAX = 127.0
TILE = 128
"""Side of a tile of fp8."""
LEAST_TILE = 16
"""Where a side of the matrix has no tile of at least this size, the tile takes the whole side."""
NF4_BLOCK = 64

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4, as published."""
_NF4_PAIRS = torch.cartesian_prod(torch.tensor(NF4_CODE), torch.tensor(NF4_CODE))
"""[256, 2]: the two values of every byte. A tensor: a compiler would take the numbers for variables."""

_ELEMENTS = 1 << 24
"""Quantised at a time: what a large matrix needs beside itself stays small."""


class StoredWeight(NamedTuple):
    stored: Tensor
    scale: Tensor


# ---- grids of scales -------------------------------------------------------------------------------------------------


def tile_grid(rows: int, columns: int) -> tuple[int, int]:
    """How many tiles fp8 divides a matrix into, down and across: 128 x 128, or the power of two that divides the side."""

    def count(size: int) -> int:
        tile = math.gcd(size, TILE)
        return size // tile if tile >= LEAST_TILE else 1

    return count(rows), count(columns)


def quantize_grid(weight: Tensor, dtype: torch.dtype, grid: tuple[int, int]) -> StoredWeight:
    """weight [O, I] with a scale for each of `grid`'s tiles, which divide it.

    fp8: the scale is a power of two, so that a tile's largest value is above 224 and at most 448. Of a value v at most
    2^-4 |v| is lost, or 2^-10 of the scale where v is among the subnormals (below 2^-6 of the scale); weights that are e4m3
    already lose nothing. int8: the scale is the largest value over 127, and at most half of it is lost.
    """
    (rows, columns), (down, across) = weight.shape, grid
    per_tile = rows // down
    step = max(_ELEMENTS // (per_tile * columns), 1)
    parts = []
    for tiles in weight.unflatten(0, (down, per_tile)).split(step):
        blocks = tiles.float().unflatten(2, (across, columns // across))  # [tiles, rows of one, across, columns of one]
        largest = blocks.abs().amax(dim=(1, 3))
        scale = power_of_two_scale(largest)[0] if dtype == E4M3 else _or_one(largest / INT8_MAX)
        parts.append(StoredWeight(_round(blocks / scale[:, None, :, None], dtype).flatten(2), scale))
    return StoredWeight(torch.cat([part.stored for part in parts]).flatten(0, 1), torch.cat([part.scale for part in parts]))


def _round(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == E4M3:
        return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(dtype)
    return scaled.round_().clamp_(-INT8_MAX, INT8_MAX).to(dtype)


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def power_of_two_scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The least power of two that is not below largest / 448, and its inverse, both float32; inf and NaN have themselves for a
    scale. largest: float32, at least 0; what is below 2^-117 counts as that.

    Found from the bits, which every kernel gives alike: 448 is 1.75 * 2^8, so that it is the exponent of `largest` less 8, or
    less 7 where the mantissa is above 1.75.
    """
    exponent = ((largest.view(torch.int32) + (0x7FFFFF - 0x600000)) >> 23).clamp(min=10) - 8  # as it is stored, 127 too high
    scale, inverse = ((bits << 23).view(torch.float32) for bits in (exponent, 254 - exponent))
    return torch.where(largest.isfinite(), scale, largest), inverse


def as_grid(scale: Tensor, rows: int, columns: int) -> Tensor | None:
    """A file's scale of a matrix, as [a, b] that divides it: one number, [O], [O, 1], [O, b, 1] or [a, b]. None for others."""
    grid = scale.float()
    if grid.numel() == 1:
        return grid.reshape(1, 1)
    if grid.ndim == 3 and grid.shape[2] == 1:
        grid = grid.squeeze(2)
    if grid.ndim == 1:
        grid = grid[:, None]
    fits = grid.ndim == 2 and rows % grid.shape[0] == 0 and columns % grid.shape[1] == 0
    return grid.contiguous() if fits else None


def _dequantize_grid(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Multiplied in float32 and rounded once: what is stored is exact in every dtype that is computed in."""
    (rows, columns), (down, across) = weight.stored.shape, weight.scale.shape
    tiles = weight.stored.to(dtype).view(down, rows // down, across, columns // across)
    return tiles.mul_(weight.scale[:, None, :, None]).view(rows, columns)


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def quantize_nf4(weight: Tensor) -> StoredWeight:
    """Each value becomes the nearest of 16, times the largest of its block of 64: at most 0.152 of that largest is lost."""
    if weight.is_cuda:
        _register_kernel()
    code = torch.tensor(NF4_CODE, device=weight.device)
    middles = (code[1:] + code[:-1]) / 2
    flat = F.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    stored, scales = [], []
    for blocks in flat.split(_ELEMENTS // NF4_BLOCK):
        scale = blocks.float().abs().amax(dim=1)
        index = torch.bucketize(blocks.float() / _or_one(scale)[:, None], middles).to(torch.uint8).flatten()
        stored.append(index[::2] * 16 + index[1::2])
        scales.append(scale)
    return StoredWeight(torch.cat(stored), torch.cat(scales))


def _dequantize_nf4(weight: StoredWeight, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` values."""
    if weight.stored.is_cuda and _has_kernel():
        kernel: Any = torch.ops.bitsandbytes.dequantize_4bit
        size = [weight.scale.numel() * NF4_BLOCK]
        found: Tensor = kernel(weight.stored[:, None], weight.scale, NF4_BLOCK, "nf4", size, dtype)
        return found.flatten()[:count]
    table = _NF4_PAIRS.to(weight.stored.device, non_blocking=True)
    pairs = F.embedding(weight.stored.int(), table)  # [bytes, 2]
    return pairs.view(-1, NF4_BLOCK).mul_(weight.scale[:, None]).flatten()[:count].to(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernel() -> bool:
    return "bitsandbytes" in sys.modules


def _register_kernel() -> None:
    """bitsandbytes dequantises to the same numbers in one kernel instead of several."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes  # noqa: F401


# ---- both ------------------------------------------------------------------------------------------------------------


def dequantize(weight: StoredWeight, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `weight` stands for, of the shape it had, in `dtype`."""
    if weight.stored.dtype == torch.uint8:
        return _dequantize_nf4(weight, math.prod(shape), dtype).view(shape)
    return _dequantize_grid(weight, dtype).view(shape)


def requantize(weight: Tensor, like: StoredWeight) -> StoredWeight:
    """`weight` [O, I] in tensors of the same shapes and dtypes as `like`'s."""
    if like.stored.dtype == torch.uint8:
        return quantize_nf4(weight)
    down, across = like.scale.shape
    return quantize_grid(weight, like.stored.dtype, (down, across))


def _fp8_raw(weight: Tensor) -> StoredWeight:
    """sd-scripts' cast: one scale, which is 1. Values below 2^-6 are among the subnormals and lose up to 2^-10."""
    portions = weight.split(max(_ELEMENTS // weight.shape[1], 1))
    largest = torch.stack([rows.float().abs().amax() for rows in portions]).amax()
    stored = torch.cat([_round(rows.float(), E4M3) for rows in portions])
    return StoredWeight(stored, torch.where(largest.isfinite(), 1.0, largest).view(1, 1))  # inf and NaN for `quantize` to find


SCHEMES: dict[str, Callable[[Tensor], StoredWeight]] = {
    "fp8": lambda weight: quantize_grid(weight, E4M3, tile_grid(weight.shape[0], weight.shape[1])),
    "fp8_rows": lambda weight: quantize_grid(weight, E4M3, (weight.shape[0], 1)),
    "fp8_raw": _fp8_raw,
    "int8": lambda weight: quantize_grid(weight, torch.int8, (weight.shape[0], 1)),
    "nf4": quantize_nf4,
}
"""Name -> what makes it from a matrix. `fp8_rows` stands in for `fp8` where the product itself is computed in fp8, as the
scales of its columns can then be taken out of it."""


# ---- which layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerTable:
    """Which Linear and Conv2d layers of a network are quantised, as regular expressions that their whole path fits."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...] = ()
    """Of these, the ones that stay as they are."""
    sensitive: tuple[str, ...] = ()
    """Of these, the ones that every token passes through: int8, which is about three times as exact as fp8 and as large."""

    def scheme(self, path: str, wanted: str) -> str | None:
        """How the layer at `path` is stored where `wanted` is asked for; None: in the dtype that is computed in."""
        if not _fits(self.quantized, path) or _fits(self.kept, path):
            return None
        return "int8" if wanted != "fp8_raw" and _fits(self.sensitive, path) else wanted


def _fits(patterns: tuple[str, ...], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


TEXT_LAYERS = LayerTable(quantized=(r"(text_model\.)?encoder\.(layers|block)\..*", r"layers\..*"))
"""Of CLIP and T5, and of Gemma-2: attention and MLP. Embeddings and projections of the whole text stay as they are."""

UNET_LAYERS = LayerTable(
    quantized=(r"(down_blocks|mid_block|up_blocks)\..*",),
    kept=(r".*\.time_emb_proj",),
)
"""Of diffusers' UNets. What comes in and goes out, and what the time passes through, stays as it is."""
