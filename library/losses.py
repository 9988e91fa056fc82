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


def image_means(error: Tensor, mask: Tensor | None, *, by_mask: bool = False) -> Tensor:
    """The mean of each image, [B]. error [B, C, h, w]; mask [B, 1, H, W] in [0, 1], shrunk to h x w by area.

    The mean is over all elements, masked or not, as in sd-scripts, so that a small mask makes a small loss. by_mask: over what
    the mask leaves, so that every image counts alike; one that leaves nothing counts nothing.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    weights = F.interpolate(mask.float(), size=error.shape[-2:], mode="area")
    means = (error * weights).flatten(1).mean(1)
    if not by_mask:
        return means
    share = weights.flatten(1).mean(1)
    return means / share.clamp(min=torch.finfo(share.dtype).tiny)
