"""A frozen Linear, quantised or not, and a low-rank weight beside it as one operation, forward and backward.

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

from library.frozen_products import KeptLinear, Product, computed_dtype, frozen_weight

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def is_frozen_linear(layer: nn.Module, forward: Callable[..., Any] | None) -> bool:
    """Whether `forward`, of `layer`, is a Linear's own, of a weight that does not learn."""
    if not isinstance(layer, nn.Linear):
        return False
    known = KeptLinear if isinstance(layer, KeptLinear) else nn.Linear
    if getattr(forward, "__func__", None) is not known.forward or (layer.bias is not None and layer.bias.requires_grad):
        return False
    return known is KeptLinear or not layer.weight.requires_grad


def linear_with_low_rank(layer: nn.Linear, x: Tensor, down: Tensor, up: Tensor, strength: float, rows: Sequence[int]) -> Tensor:
    """`layer(x)` for x [..., in], with strength * up @ down added to its weight.

    down [parts * r, in], up [out, r]; where there are `rows` [parts] of `up`, each part has a rank-sized space for itself.
    """
    dtype = computed_dtype(x)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    product, kept = frozen_weight(layer, x.numel() // x.shape[-1], dtype)
    return cast(Tensor, _LinearWithLowRank.apply(x, bias, down, up, strength, tuple(rows), dtype, product, *kept))


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
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        strength: float,
        rows: tuple[int, ...],
        dtype: torch.dtype,
        product: Product,
        *kept: Tensor,
    ) -> Tensor:
        needs_x, _, needs_down, needs_up, *_ = ctx.needs_input_grad
        ctx.strength, ctx.rows, ctx.shape, ctx.product = strength, rows, x.shape, product
        ctx.dtypes = x.dtype, down.dtype, up.dtype
        flat = x.to(dtype).reshape(-1, x.shape[-1])  # [N, in]
        down, up = down.to(dtype), up.to(dtype)
        out = product.forward(flat, bias, *kept)
        hidden = F.linear(flat, down)  # [N, parts * r]
        if strength != 1:
            hidden *= strength
        if not rows:
            out.addmm_(hidden, up.t())
        for outputs, ranks in _parts(rows, up.shape[1]):
            out[:, outputs].addmm_(hidden[:, ranks], up[outputs].t())
        ctx.save_for_backward(
            flat if needs_down else None,
            down if needs_x else None,
            up if needs_x or needs_down else None,
            hidden if needs_up else None,
            *(tensor if needs_x else None for tensor in kept),
        )
        # a view would not let who comes next change it in place
        return cast(Tensor, torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, down, up, hidden, *kept = ctx.saved_tensors
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
            if down is not None:
                of_x = ctx.product.of_input(gradient, *kept).addmm_(inner, down).view(ctx.shape).to(ctx.dtypes[0])
        return of_x, None, of_down, of_up, *(None for _ in range(4 + len(kept)))
