"""Where LoRA starts: its factors before the first step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERSAMPLING, ROUNDS = 8, 4


def uniform(down: Tensor, generator: torch.Generator) -> None:
    """Kaiming's, in place; with `up` at zero this is LoRA as published."""
    torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)


def orthogonal(down: Tensor, generator: torch.Generator) -> None:
    """Rows of length 1 that stand at right angles, in place: no two ranks look at the same thing."""
    torch.nn.init.orthogonal_(down, generator=generator)


@torch.no_grad()
def principal_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """down [rank, in, ...] and up [out, rank] with up @ down the best approximation of `weight` [out, in, ...] of that rank,
    each with the square root of the singular values (PiSSA, https://arxiv.org/abs/2404.02948, equations 2 and 3).

    By randomised subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4).
    """
    matrix = weight.float().flatten(1)
    tried = min(rank + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], tried, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = (basis @ left)[:, :rank] * root, root[:, None] * right[:rank]
    return down.view(-1, *weight.shape[1:]), up
