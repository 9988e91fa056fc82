"""Products with the frozen weight of a Linear, however the layer keeps it, and the gradients of their inputs.

An operation that is computed together with a layer, an adapter's say, asks for the layer's product instead of its weight, and
never needs to know in how many bits the weight is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def computed_dtype(x: Tensor) -> torch.dtype:
    """What a layer computes in for this input: autocast's dtype where it is on. The meta device has none."""
    kind = x.device.type
    return x.dtype if x.is_meta or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)


class Product(ABC):
    """How a weight W [O, I] is multiplied with. It holds no tensors: those that W is kept in are handed in, so that autograd
    keeps them for backward as it keeps any others."""

    @abstractmethod
    def forward(self, x: Tensor, bias: Tensor | None, *kept: Tensor) -> Tensor:
        """x [N, I], bias [O] of the same dtype -> x W^T + bias [N, O] in memory of its own."""

    @abstractmethod
    def of_input(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        """gradient [N, O] -> gradient W [N, I] in memory of its own."""


class Plain(Product):
    """The weight as it is, in the dtype that is computed in."""

    def forward(self, x: Tensor, bias: Tensor | None, *kept: Tensor) -> Tensor:
        return F.linear(x, kept[0], bias)

    def of_input(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        return gradient @ kept[0]


class FrozenWeight(NamedTuple):
    product: Product
    kept: tuple[Tensor, ...]


class KeptLinear(nn.Linear, ABC):
    """A frozen Linear that keeps its weight in a form of its own; `weight` is made from that at every access."""

    @abstractmethod
    def frozen_weight(self, rows: int) -> FrozenWeight:
        """For an input of so many rows."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(computed_dtype(input))
        flat = x.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product, kept = self.frozen_weight(flat.shape[0])
        out = cast(Tensor, _FrozenLinear.apply(flat, bias, product, *kept))
        return out.view(*x.shape[:-1], self.out_features)


def frozen_weight(layer: nn.Linear, rows: int, dtype: torch.dtype) -> FrozenWeight:
    """Of any Linear, to multiply `rows` rows of `dtype` with."""
    return layer.frozen_weight(rows) if isinstance(layer, KeptLinear) else FrozenWeight(Plain(), (layer.weight.to(dtype),))


class _FrozenLinear(Function):
    """Of the input alone there is a gradient, and for that no more is kept than the weight in the layer's own form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, product: Product, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.product = product
        return product.forward(x, bias, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return ctx.product.of_input(gradients[0], *kept), None, None, *(None for _ in kept)
