"""Rotations as OFT and BOFT have them, and their limit as the programs that read the files take it.

| `alpha` in a file | sd-scripts, A1111 | LyCORIS | ComfyUI |
|---|---|---|---|
| limits ||Q|| to | alpha times the outputs | alpha times the outputs | alpha |
| 0 | never turns | no limit | no limit |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from library.errors import UserError

BLOCKS = "oft_blocks"
ALPHA = "alpha"
NO_LIMIT = 1e6
"""Instead of 0 in files of OFT: no limit to everyone."""


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1, a rotation, of skew-symmetric matrices [..., b, b]."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    rotation: Tensor = torch.linalg.solve(eye - skew, eye + skew)
    return rotation


def limited_skew(blocks: Tensor, limit: float) -> Tensor:
    """B - B^T, float32, shrunk as a whole to a norm of at most `limit` where that is not 0."""
    skew = blocks.float() - blocks.float().transpose(-1, -2)
    if not limit:
        return skew
    norm = torch.linalg.vector_norm(skew)
    return skew * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))


def limit_in_file(tensors: Mapping[str, Tensor]) -> float:
    """`alpha` of a layer of a file, 0 for no limit."""
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
    return 0.0 if alpha >= NO_LIMIT else alpha


def listed_blocks(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Blocks of each part of a layer of a file that is turned in parts; empty where it is turned as one."""
    return [tensors[name] for name in sorted(tensors) if name.startswith(f"{BLOCKS}.")]


def as_one_turn(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer of OFT or BOFT for readers that know one stack of blocks and another limit: the blocks are limited already, and
    parts that are turned by themselves are blocks of one size.

    Raises `UserError` for parts whose blocks do not go into blocks of one size.
    """
    limit, listed = limit_in_file(tensors), listed_blocks(tensors)
    halves = []
    for blocks in listed or [tensors[BLOCKS]]:
        width = blocks.shape[-3] * blocks.shape[-1]
        # what is half of Q has Q for its difference with its own transpose
        halves.append((limited_skew(blocks, limit * width) / 2 if limit else blocks.float()).to(blocks.dtype))
    if listed:
        halves = [torch.cat(_in_one_size(key, halves))]
    return {BLOCKS: halves[0], ALPHA: torch.tensor(0.0)}


def _in_one_size(key: str, parts: Sequence[Tensor]) -> list[Tensor]:
    """Blocks [n, b, b] of each part as larger ones, of the size of the largest."""
    size = max(blocks.shape[-1] for blocks in parts)
    if wrong := [blocks for blocks in parts if size % blocks.shape[-1] or len(blocks) % (size // blocks.shape[-1])]:
        raise UserError(
            f"{key}: its parts are turned in blocks of {wrong[0].shape[-1]} and of {size}. ComfyUI reads blocks of one size, "
            f"and {len(wrong[0])} of the smaller ones do not make whole larger ones. Train with a --network_dim that is a "
            "multiple of 4, or keep sd-scripts' names."
        )
    joined = []
    for blocks in parts:
        count = size // blocks.shape[-1]
        joined.append(torch.stack([torch.block_diag(*blocks[i : i + count]) for i in range(0, len(blocks), count)]))
    return joined
