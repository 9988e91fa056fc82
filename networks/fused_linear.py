"""A frozen Linear and a low-rank weight beside it as one operation, forward and backward.

Both products go into one output, y = x W^T + b and then y += (s x A^T) B^T in place, and so do both gradients of the input. By
themselves they would each be a tensor of the output's or the input's size, written, read and added up again. What backward
needs is kept and nothing more: the input (for A's gradient alone) and the rank-sized x A^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def is_frozen_linear(layer: nn.Module, forward: Callable[..., Any] | None) -> bool:
    """Whether `forward`, of `layer`, is torch's own, of a weight that does not learn."""
    if getattr(forward, "__func__", None) is not nn.Linear.forward or not isinstance(layer, nn.Linear):
        return False
    return not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)


def computed_dtype(x: Tensor) -> torch.dtype:
    """What a Linear computes in for this input: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear_with_low_rank(layer: nn.Linear, x: Tensor, down: Tensor, up: Tensor, strength: float, rows: Sequence[int]) -> Tensor:
    """`layer(x)` for x [..., in], with strength * up @ down added to its weight.

    down [parts * r, in], up [out, r]; `rows` [parts] of `up` have a rank-sized space each.
    """
    dtype = computed_dtype(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    tensors = (x.to(dtype), layer.weight.to(dtype), bias, down.to(dtype), up.to(dtype))
    return cast(Tensor, _LinearWithLowRank.apply(*tensors, strength, tuple(rows)))


def _parts(rows: Sequence[int], rank: int) -> Iterator[tuple[slice, slice]]:
    """Of each part its outputs and its ranks."""
    start = 0
    for index, count in enumerate(rows):
        yield slice(start, start + count), slice(index * rank, (index + 1) * rank)
        start += count


class _LinearWithLowRank(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        strength: float,
        rows: tuple[int, ...],
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [N, in]
        out = F.linear(flat, weight, bias)
        hidden = F.linear(flat, down)  # [N, parts * r]
        if strength != 1:
            hidden *= strength
        for outputs, ranks in _parts(rows, up.shape[1]):
            out[:, outputs].addmm_(hidden[:, ranks], up[outputs].t())
        of_x, of_down, of_up = (ctx.needs_input_grad[index] for index in (0, 3, 4))
        ctx.save_for_backward(
            flat if of_down else None,
            weight if of_x else None,
            down if of_x else None,
            up if of_x or of_down else None,
            hidden if of_up else None,
        )
        ctx.strength, ctx.rows, ctx.shape = strength, rows, x.shape
        # a view would not let who comes next change it in place
        return cast(Tensor, torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, hidden = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # [N, out]
        of_x = of_down = of_up = None
        if hidden is not None:
            rank = hidden.shape[1] // len(ctx.rows)
            # in this order a CPU takes half the time
            parts = [(hidden[:, ranks].t() @ gradient[:, outputs]).t() for outputs, ranks in _parts(ctx.rows, rank)]
            of_up = parts[0] if len(parts) == 1 else torch.cat(parts)
        if up is not None:
            parts = [gradient[:, outputs] @ up[outputs] for outputs, _ in _parts(ctx.rows, up.shape[1])]
            inner = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [N, parts * r]
            if ctx.strength != 1:
                inner *= ctx.strength
            if flat is not None:
                of_down = inner.t() @ flat
            if weight is not None:
                of_x = (gradient @ weight).addmm_(inner, down).view(ctx.shape)
        return of_x, None, None, of_down, of_up, None, None
