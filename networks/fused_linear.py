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
    """What a Linear computes in for this input: autocast's dtype where it is on. The meta device has none."""
    kind = x.device.type
    return x.dtype if x.is_meta or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


def linear_with_low_rank(layer: nn.Linear, x: Tensor, down: Tensor, up: Tensor, strength: float, rows: Sequence[int]) -> Tensor:
    """`layer(x)` for x [..., in], with strength * up @ down added to its weight.

    down [parts * r, in], up [out, r]; where there are `rows` [parts] of `up`, each part has a rank-sized space for itself.
    """
    dtype = computed_dtype(x)
    return cast(Tensor, _LinearWithLowRank.apply(x, layer.weight, layer.bias, down, up, strength, tuple(rows), dtype))


def _parts(rows: Sequence[int], rank: int) -> Iterator[tuple[slice, slice]]:
    """Of each part its outputs and its ranks."""
    start = 0
    for index, count in enumerate(rows):
        yield slice(start, start + count), slice(index * rank, (index + 1) * rank)
        start += count


def _to_up(hidden: Tensor, gradient: Tensor) -> Tensor:
    """gradient^T hidden, [out, r]; on a CPU in an order that takes half the time."""
    return gradient.t() @ hidden if gradient.is_cuda else (hidden.t() @ gradient).t()


class _LinearWithLowRank(Function):
    """What is computed of one part is written without slices: on a GPU the calls from Python take longer than the work."""

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
        dtype: torch.dtype,
    ) -> Tensor:
        needs_x, _, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        ctx.strength, ctx.rows, ctx.shape = strength, rows, x.shape
        ctx.dtypes = x.dtype, down.dtype, up.dtype
        flat = x.to(dtype).reshape(-1, x.shape[-1])  # [N, in]
        weight, down, up = weight.to(dtype), down.to(dtype), up.to(dtype)
        out = F.linear(flat, weight, None if bias is None else bias.to(dtype))
        hidden = F.linear(flat, down)  # [N, parts * r]
        if strength != 1:
            hidden *= strength
        if not rows:
            out.addmm_(hidden, up.t())
        for outputs, ranks in _parts(rows, up.shape[1]):
            out[:, outputs].addmm_(hidden[:, ranks], up[outputs].t())
        ctx.save_for_backward(
            flat if needs_down else None,
            weight if needs_x else None,
            down if needs_x else None,
            up if needs_x or needs_down else None,
            hidden if needs_up else None,
        )
        # a view would not let who comes next change it in place
        return cast(Tensor, torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, hidden = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # [N, out]
        of_x = of_down = of_up = None
        if hidden is not None:
            parts = _parts(ctx.rows, hidden.shape[1] // max(len(ctx.rows), 1))
            of_up = (
                torch.cat([_to_up(hidden[:, r], gradient[:, o]) for o, r in parts]) if ctx.rows else _to_up(hidden, gradient)
            )
            of_up = of_up.to(ctx.dtypes[2])
        if up is not None:
            if ctx.rows:
                inner = torch.cat([gradient[:, o] @ up[o] for o, _ in _parts(ctx.rows, up.shape[1])], dim=1)
            else:
                inner = gradient @ up  # [N, parts * r]
            if ctx.strength != 1:
                inner *= ctx.strength
            if flat is not None:
                of_down = (inner.t() @ flat).to(ctx.dtypes[1])
            if weight is not None:
                of_x = (gradient @ weight).addmm_(inner, down).view(ctx.shape).to(ctx.dtypes[0])
        return of_x, None, None, of_down, of_up, None, None, None
