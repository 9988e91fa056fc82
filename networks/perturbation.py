"""LoRA-GGPO (https://arxiv.org/abs/2502.14538v1): training disturbs every adapted weight slightly, to find flatter minima.

Row i of a layer's weight [out, in, ...] is disturbed by Gaussian noise of standard deviation
(sigma * ||w_i|| + beta * ||g_i||^2) / sqrt(out), drawn anew in every forward pass. w_i is the row of base and adapter together
(with the base layer's mean row norm in place of the row's own, as in sd-scripts), g_i the row of the adapter's gradient at the
last update. Norms of products of rank-sized matrices are computed without the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError

SAMPLED_ROWS = 1000
"""The mean row norm of a base layer is that of about so many of its rows."""


@dataclass(frozen=True)
class Perturbation:
    """Its strength, of `--network_args ggpo_sigma ggpo_beta`."""

    sigma: float
    beta: float

    @torch.no_grad()
    def deviations(
        self, pairs: Sequence[tuple[Tensor, Tensor]], gradients: Sequence[tuple[Tensor, Tensor]], base: Tensor, scale: float
    ) -> Tensor:
        """[out], of the noise in each row. `pairs`: (up [out, r], down [r, in]) of each part of the layer, and their gradients;
        base: its mean row norm; scale: of up @ down."""
        weight = torch.cat([_row_norms_squared([pair]) for pair in pairs]) * scale**2
        changes = [
            [(up, down_gradient), (up_gradient, down)]
            for (up, down), (up_gradient, down_gradient) in zip(pairs, gradients, strict=True)
        ]
        slope = torch.cat([_row_norms_squared(change) for change in changes]) * scale**2
        return (self.sigma * (base**2 + weight).sqrt() + self.beta * slope) / math.sqrt(len(weight))


def _row_norms_squared(products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Squared norms [out] of the rows of the sum of u @ d: the sum of u_i (d e^T) v_i^T over all pairs of products."""
    terms = [((u @ (d @ e.T)) * v).sum(1) for u, d in products for v, e in products]
    return torch.stack(terms).sum(0).clamp(min=0)


@torch.no_grad()
def mean_row_norm(layer: nn.Linear | nn.Conv2d, key: str) -> Tensor:
    """Of the base layer's weight, a 0-d tensor. Raises `UserError` where the weight is not there as numbers."""
    weight = layer.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(
            f"ggpo_sigma and ggpo_beta need the norms of the base weights, and that of {key} is {weight.dtype}. "
            "Remove them from --network_args, or keep the base model in fp16, bf16 or fp32."
        )
    return weight[:: -(-len(weight) // SAMPLED_ROWS)].float().flatten(1).norm(dim=1).mean()


@torch.no_grad()
def disturbance(layer: nn.Linear | nn.Conv2d, x: Tensor, deviations: Tensor) -> Tensor:
    """What noise of these deviations [out] in the layer's weight adds to its output for `x`. It passes no gradient on.

    Drawn from torch's default generator, which gradient checkpointing replays.
    """
    shape: tuple[int, ...]
    if isinstance(layer, nn.Conv2d):
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    else:
        shape = (layer.out_features, layer.in_features)
    noise = torch.randn(shape, dtype=x.dtype, device=x.device)
    noise *= deviations.to(x.dtype).view(-1, *[1] * (noise.ndim - 1))
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, noise, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
    return F.linear(x, noise)
