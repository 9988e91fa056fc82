"""Element losses, masks and the reduction of a batch to one number. Pure functions of float32 tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def element_loss(pred: Tensor, target: Tensor, kind: str, threshold: Tensor | None = None) -> Tensor:
    """Loss of each element, [B, ...]. kind: l2, l1, huber or smooth_l1; threshold: c of the last two, [B].

    The two Huber forms are pseudo-Huber losses, 2c(sqrt(d² + c²) - c) and 2(sqrt(d² + c²) - c), as in sd-scripts.
    """
    if kind == "l2":
        return F.mse_loss(pred, target, reduction="none")
    if kind == "l1":
        return F.l1_loss(pred, target, reduction="none")
    if threshold is None:
        raise ValueError(f"loss {kind} needs a threshold")
    c = threshold.view(-1, *[1] * (pred.ndim - 1))
    root = torch.sqrt((pred - target) ** 2 + c**2) - c
    return 2 * c * root if kind == "huber" else 2 * root


def reduce_loss(error: Tensor, *, mask: Tensor | None, weight: Tensor) -> Tensor:
    """Mean over each image, times its weight, then mean over the batch.

    error [B, C, h, w]; mask [B, 1, H, W] in [0, 1], shrunk to h x w by area; weight [B].
    """
    if mask is not None:
        error = error * F.interpolate(mask.float(), size=error.shape[-2:], mode="area")
    return (error.flatten(1).mean(1) * weight).mean()
