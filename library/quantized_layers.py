"""Linear and Conv2d layers whose frozen weight is kept in 8 or 4 bits, and their gradients.

The weight is dequantised for each use, in the dtype that is computed in, and again in the backward pass: what autograd keeps is
what is stored. With 8-bit compute a Linear multiplies in int8 or fp8 instead: inputs, and gradients in the backward pass, get a
scale for each row (Dettmers et al. 2022, arXiv 2208.07339), and the scales of the weight's rows go into the gradient first.
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

from library.errors import UserError
from library.quantization import E4M3, SCHEMES, LayerTable, StoredWeight, dequantize, requantize

LEAST_ROWS = 17
"""Fewer rows of input than this are not multiplied in 8 bits: cuBLAS does not."""
WIDTH_STEP = {torch.int8: 8, E4M3: 16}
"""What the sides of a matrix have to be multiples of to be multiplied in 8 bits."""


# ---- dequantised products --------------------------------------------------------------------------------------------


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.weight_shape = (out_features, x.shape[-1])
        return F.linear(x, dequantize(StoredWeight(stored, scale), ctx.weight_shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        weight = dequantize(StoredWeight(*ctx.saved_tensors), ctx.weight_shape, gradient.dtype)
        return gradient @ weight, None, None, None, None


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


# ---- 8-bit products --------------------------------------------------------------------------------------------------


def quantize_rows(x: Tensor, dtype: torch.dtype) -> StoredWeight:
    """x [N, K] in int8 or e4m3, row after row in memory, and the scale of each row [N, 1]."""
    # asked of torch, as a compiler takes numbers of a module for variables
    limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    # a row of zeros: not the smallest number there is, whose scale compiled kernels would take for 0
    largest = x.float().abs().amax(dim=1, keepdim=True).clamp(min=2**-100)
    scale = largest / limit
    scaled = x.float() / scale
    rounded = scaled if dtype.is_floating_point else scaled.round()
    return StoredWeight(rounded.clamp(-limit, limit).to(dtype, memory_format=torch.contiguous_format), scale)


def _product(x: StoredWeight, matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] times [K, M], whose columns have the scales [1, M] -> [N, M]. matrix: column by column in memory, for cuBLAS."""
    if matrix.dtype == torch.int8:
        return (torch._int_mm(x.stored, matrix).float() * x.scale * scale).to(dtype)
    out: Tensor = torch._scaled_mm(x.stored, matrix, scale_a=x.scale, scale_b=scale, out_dtype=torch.bfloat16)
    return out.to(dtype)


class _EightBitLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        """x [N, I], stored [O, I], scale [O, 1] -> [N, O]."""
        ctx.save_for_backward(stored, scale)
        return _product(quantize_rows(x, stored.dtype), stored.t(), scale.t().contiguous(), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (stored, scale) = gradients, ctx.saved_tensors
        rows = quantize_rows(gradient.float() * scale.t(), stored.dtype)
        by_column = stored.t().contiguous().t()
        ones = torch.ones(1, stored.shape[1], device=stored.device)
        return _product(rows, by_column, ones, gradient.dtype), None, None


def check_eight_bit(scheme: str, device: torch.device) -> None:
    """Raise `UserError` where `device` cannot multiply what `scheme` stores.

    Tried on a small matrix, as torch does not tell: its builds for Windows have no fp8 products with a scale for each row.
    """
    dtype, least = (E4M3, "8.9") if scheme.startswith("fp8") else (torch.int8, "8.0")
    try:
        ones = quantize_rows(torch.ones(32, 32, device=device), dtype)
        _product(ones, ones.stored.t(), ones.scale.t().contiguous(), torch.bfloat16)
    except RuntimeError as error:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else f"'{device.type}'"
        said, _, _ = str(error).partition(". ")
        raise UserError(
            f"--quantized_compute 8bit: {scheme} is multiplied by GPUs of compute capability {least} and later (fp8 not on "
            f"Windows). This run uses {found}, and torch says: {said}. Leave --quantized_compute out."
        ) from error


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

    def _input_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

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


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[override]
    """A frozen Linear."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype, *, eight_bit: bool = False) -> None:
        self._prepare(base, dtype)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.eight_bit = eight_bit

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(self._input_dtype(input))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.eight_bit and self._multiplies(x):
            scale = self.scale.expand(self.out_features, 1)
            rows = cast(Tensor, _EightBitLinear.apply(x.reshape(-1, self.in_features), self.stored, scale))
            out = rows.view(*x.shape[:-1], self.out_features)
            return out if bias is None else out + bias
        return cast(Tensor, _Linear.apply(x, self.stored, self.scale, bias, self.out_features))

    def _multiplies(self, x: Tensor) -> bool:
        """Whether this layer and this many rows are ones that are multiplied in 8 bits."""
        step = WIDTH_STEP.get(self.stored.dtype)
        if step is None or self.scale.shape not in ((1, 1), (self.out_features, 1)):
            return False
        return x.numel() >= LEAST_ROWS * self.in_features and self.in_features % step == self.out_features % step == 0


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
        x = input.to(self._input_dtype(input))
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
