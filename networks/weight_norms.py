"""Norms of a weight with a low-rank one added, without making their sum.

For a row w of W and b of B: ||w + b A||^2 = ||w||^2 + b (2 A w + A A^T b), and alike for columns. That is r products with W in
place of a product, a sum and a norm of W's size each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**24
"""Numbers of a weight in another dtype that are turned into float32 at a time."""


def row_squares(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared norms [out] of the rows of weight [out, in] + up [out, r] @ down [r, in]."""
    inner = down @ down.T
    found = [
        torch.linalg.vector_norm(rows, dim=1).square() + (torch.addmm(rows @ down.T, part, inner, beta=2) * part).sum(1)
        for rows, part in _pieces(weight, up)
    ]
    return (found[0] if len(found) == 1 else torch.cat(found)).clamp(min=0)


def column_squares(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared norms [in] of the columns of the same."""
    squares, products = zip(
        *((torch.linalg.vector_norm(rows, dim=0).square(), rows.T @ part) for rows, part in _pieces(weight, up)), strict=True
    )
    twice = torch.addmm(torch.stack(products).sum(0), down.T, up.T @ up, beta=2)  # [in, r]
    return (torch.stack(squares).sum(0) + (twice * down.T).sum(1)).clamp(min=0)


def _pieces(weight: Tensor, up: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(PIECE // weight.shape[1], 1)
    for rows, part in zip(weight.split(step), up.split(step), strict=True):
        yield rows.float(), part
