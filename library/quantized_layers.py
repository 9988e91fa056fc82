"""Linear and Conv2d layers whose frozen weight is kept in 8 or 4 bits, and their gradients.

The weight is dequantised for each use, in the dtype that is computed in, and again in the backward pass: what autograd keeps is
what is stored. With 8-bit compute a Linear multiplies in int8 or fp8 instead (`eight_bit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from library.eight_bit import EightBit, is_multiplied
from library.errors import UserError
from library.frozen_products import FrozenWeight, KeptLinear, Product, computed_dtype
from library.quantization import SCHEMES, LayerTable, StoredWeight, dequantize, requantize

# ---- dequantised products --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dequantized(Product):
    """The weight is made for each product, in the dtype of the input or the gradient, and never kept."""

    weight_shape: tuple[int, ...]

    def forward(self, x: Tensor, bias: Tensor | None, *kept: Tensor) -> Tensor:
        return F.linear(x, dequantize(StoredWeight(*kept), self.weight_shape, x.dtype), bias)

    def of_input(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        return gradient @ dequantize(StoredWeight(*kept), self.weight_shape, gradient.dtype)


@dataclass(frozen=True)
class _Convolution:
    """All that a convolution is but for its weight."""

    weight_shape: tuple[int, ...]
    stride: Any
    padding: Any
    dilation: Any
    groups: int


class _Conv2d(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, kind: _Convolution) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.kind, ctx.input_shape = kind, x.shape
        weight = dequantize(StoredWeight(stored, scale), kind.weight_shape, x.dtype)
        return F.conv2d(x, weight, bias, kind.stride, kind.padding, kind.dilation, kind.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), kind = gradients, ctx.kind
        weight = dequantize(StoredWeight(*ctx.saved_tensors), kind.weight_shape, gradient.dtype)
        of_input: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            ctx.input_shape, weight, gradient, kind.stride, kind.padding, kind.dilation, kind.groups
        )
        return of_input, None, None, None, None


# ---- layers ----------------------------------------------------------------------------------------------------------


class QuantizedLayer(nn.Module):
    """What both kinds of layer share. `stored` and `scale` are buffers (see `quantization`); `weight` is made from them."""

    stored: Tensor
    scale: Tensor
    weight_shape: torch.Size
    dtype: torch.dtype
    """Of `weight`."""
    exact: Callable[[], Tensor] | None = None
    """The weight that was quantised, in main memory, read again; None where it is not known."""

    def _prepare(self, base: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
        """Everything but `stored` and `scale`, which are empty until `fill`. The bias is `base`'s."""
        nn.Module.__init__(self)  # not the layer's own, which would make a weight
        self.weight_shape, self.dtype = base.weight.shape, dtype
        self.register_parameter("bias", cast("nn.Parameter | None", base.bias))
        for name in ("stored", "scale"):
            self.register_buffer(name, torch.empty(0, device="meta"))
        self.train(base.training)

    def fill(self, weight: StoredWeight, exact: Callable[[], Tensor]) -> None:
        self.stored, self.scale = weight
        self.exact = exact

    @property
    def weight(self) -> Tensor:
        """The weight as it is used, made anew at every access. What is written into it is lost: see `change_weight`."""
        return dequantize(self._stored_weight, self.weight_shape, self.dtype)

    @property
    def _stored_weight(self) -> StoredWeight:
        return StoredWeight(self.stored, self.scale)

    @torch.no_grad()
    def change_weight(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put change(weight), both float32 of the weight's shape, in the weight's place for good. It is computed from the
        weight before it was quantised, and quantised once: merging costs no more exactness than quantising does."""
        before = self.exact
        if before is None:
            raise UserError("an adapter cannot be merged into a quantised layer whose own weight is not at hand.")

        def merged() -> Tensor:
            return change(before().float()).to("cpu", torch.float32)

        self.exact = merged  # holds the adapter: see `end_merging`
        new = requantize(merged().flatten(1).to(self.stored.device), self._stored_weight)
        self.stored.copy_(new.stored)
        self.scale.copy_(new.scale)


def end_merging(module: nn.Module) -> None:
    """Nothing more is merged into the layers of `module`: they let go of what they were made from, adapters among it."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLayer):
            layer.exact = None


class QuantizedLinear(QuantizedLayer, KeptLinear):  # type: ignore[override]
    """A frozen Linear."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype, *, eight_bit: bool = False) -> None:
        self._prepare(base, dtype)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.eight_bit = eight_bit

    def frozen_weight(self, rows: int) -> FrozenWeight:
        kept = self._stored_weight
        multiplied = self.eight_bit and is_multiplied(kept, rows)
        return FrozenWeight(EightBit() if multiplied else Dequantized((self.out_features, self.in_features)), kept)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[override]
    """A frozen Conv2d that pads with zeros. It is always dequantised.

    Called with the arguments of Conv2d, the class gives an ordinary one: LyCORIS makes its layers of the class it finds.
    """

    def __new__(cls, base: nn.Conv2d | int, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls) if isinstance(base, nn.Module) else nn.Conv2d(base, *args, **kwargs)

    def __init__(self, base: nn.Conv2d, dtype: torch.dtype) -> None:
        self._prepare(base, dtype)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
            "groups", "padding_mode", "_reversed_padding_repeated_twice",
        ):  # fmt: skip
            setattr(self, name, getattr(base, name))

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(computed_dtype(input))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        kind = _Convolution(self.weight_shape, self.stride, self.padding, self.dilation, self.groups)
        return cast(Tensor, _Conv2d.apply(x, self.stored, self.scale, bias, kind))


# ---- putting them in -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantizer:
    """How one part of a model is kept."""

    scheme: str
    """One of `SCHEMES`."""
    layers: LayerTable
    eight_bit: bool = False
    device: torch.device | None = None
    """Where weights are quantised; where they are loaded to unless given."""

    @property
    def name(self) -> str:
        return f"{self.scheme}-8bit" if self.eight_bit else self.scheme

    @property
    def keeps_fp8(self) -> bool:
        """Whether weights that are in fp8 on disk stay as they are."""
        return self.scheme.startswith("fp8")

    def replace_layers(self, module: nn.Module, dtype: torch.dtype) -> dict[str, tuple[QuantizedLayer, str]]:
        """Put quantised layers, still without weights, in the place of those in the table. Gives them and their schemes, by
        the name of the weight they replace. Raises `ValueError` for a table that fits no layer."""
        found: dict[str, tuple[QuantizedLayer, str]] = {}
        for path, layer in list(module.named_modules()):
            scheme = self.layers.scheme(path, self.scheme)
            if scheme is None:
                continue
            made: QuantizedLayer
            if type(layer) is nn.Linear:
                made = QuantizedLinear(layer, dtype, eight_bit=self.eight_bit)
            elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                made = QuantizedConv2d(layer, dtype)
            else:
                continue
            module.set_submodule(path, made)
            found[f"{path}.weight"] = made, self.stored_scheme(scheme)
        if not found:
            raise ValueError(f"the table of quantised layers fits no layer of {type(module).__name__}")
        return found

    def stored_scheme(self, scheme: str) -> str:
        return "fp8_rows" if self.eight_bit and scheme == "fp8" else scheme


def quantize(weight: Tensor, scheme: str, name: str) -> StoredWeight:
    """weight [O, ...] by `scheme`. name: for the `UserError` about what is not a number."""
    with torch.autocast(weight.device.type, enabled=False):  # a part may be read when it is first used, within a step
        made = SCHEMES[scheme](weight.flatten(1))
    _check_finite(made.scale.isfinite(), name)
    return made


def kept_fp8(weight: StoredWeight, name: str) -> StoredWeight:
    """e4m3 as it is in a file. It has no infinities, and two values that are not numbers: all bits set but for the sign."""
    _check_finite(weight.scale.isfinite(), name)
    _check_finite(weight.stored.view(torch.uint8) & 0x7F != 0x7F, name)
    return weight


def _check_finite(finite: Tensor, name: str) -> None:
    """Raise `UserError` unless all of `finite` is set. Simulated tensors have no values."""
    if type(finite) is Tensor and not finite.all():
        raise UserError(f"'{name}' has values that are not finite. The file is damaged; download it again.")
