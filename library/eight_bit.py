"""Products of a frozen weight in 8 bits with inputs that are rounded to 8 bits, too: int8 or fp8 e4m3.

Inputs, and gradients in the backward pass, get a scale for each row (Dettmers et al. 2022, arXiv 2208.07339), and the scales of
the weight's rows go into the gradient first. fp8 products take both kinds of scale and the bias with them (`torch._scaled_mm`),
so that no pass over the output follows; int8 products (`torch._int_mm`) are int32 and need one.

What is not a product only moves memory. Bytes for one value of a bfloat16 input forward, and of a gradient:

| | fp8 | int8 |
|---|---|---|
| operator by operator | 9, 23 | 21, 31 |
| in one kernel (CUDA with triton) | 5, 5 | 5, 5 |

The kernel reads a row twice, the second time from the cache; after an int8 product it reads 4 and writes 2.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import TypeVar, cast

import torch
from torch import Tensor

from library.errors import UserError
from library.frozen_products import Product
from library.quantization import E4M3, StoredWeight, power_of_two_scale

logger = logging.getLogger(__name__)

LEAST_ROWS = 17
"""Fewer rows of input than this are not multiplied in 8 bits: cuBLAS does not."""
WIDTH_STEP = {torch.int8: 8, E4M3: 16}
"""What the sides of a matrix have to be multiples of to be multiplied in 8 bits."""


def is_multiplied(weight: StoredWeight, rows: int) -> bool:
    """Whether a weight kept so, and so many rows of input, are ones that are multiplied in 8 bits."""
    step = WIDTH_STEP.get(weight.stored.dtype)
    if step is None or weight.scale.shape not in ((1, 1), (weight.stored.shape[0], 1)):
        return False
    return rows >= LEAST_ROWS and all(size % step == 0 for size in weight.stored.shape)


# ---- what is not a product -------------------------------------------------------------------------------------------


def _round_rows(x: Tensor, columns: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [N, K], with its columns times `columns` [1, K], in 8 bits, and the scale of each row [N, 1].

    Nothing has to be clamped: a row's largest value is at most the largest number of `dtype` by the scale that is made of it.
    A row with values that are not finite has a scale that is not.
    """
    if columns is not None:
        x = x * columns
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    if dtype == E4M3:
        scale, inverse = power_of_two_scale(largest)
        # a power of two loses nothing of bfloat16, whose range is float32's
        scaled = x * inverse.to(torch.promote_types(x.dtype, torch.bfloat16))
        return scaled.to(dtype), scale
    # a row of zeros: not the smallest number there is, whose scale compiled kernels would take for 0. And the limit is asked of
    # torch, as a compiler takes numbers of a module for variables
    scale = largest.clamp(min=2**-100) / torch.iinfo(dtype).max
    return (x / scale).round_().to(dtype), scale


def _scale_int8(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """product [N, M] int32 times rows [N, 1] times columns [1, M] or [1, 1], and bias [M]."""
    scaled = product * rows
    return (scaled * columns if bias is None else torch.addcmul(bias.float(), scaled, columns)).to(dtype)


Function = TypeVar("Function", bound=Callable[..., object])


@functools.cache
def _compiled(function: Function) -> Function:
    """For every size. Dtypes, autocast and gradients on or off are a graph each: above torch's limit it is called as it is."""
    return cast(Function, torch.compile(function, dynamic=True))


@functools.cache
def _makes_kernels(device: torch.device) -> bool:
    """Whether triton works here, tried once: it needs a C compiler, too, and its messages tell what else."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        _compiled(_round_rows)(torch.ones(32, 32, device=device), None, torch.int8)  # not all GPUs have fp8
    except (RuntimeError, OSError, ImportError, CalledProcessError) as error:
        said = str(error).strip().partition("\n")[0]
        logger.warning(
            "triton makes no kernels here, so that inputs of 8-bit products take three or four passes instead of one: %s", said
        )
        return False
    return True


def _in_one_kernel(function: Function, device_of: Tensor) -> Function:
    """`function` compiled, where that can be. What a compiler sees it fuses by itself; simulated tensors have no kernels."""
    apart = torch.compiler.is_compiling() or type(device_of) is not Tensor or not _makes_kernels(device_of.device)
    return function if apart else _compiled(function)


def quantize_rows(x: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> StoredWeight:
    """x [N, K], with its columns times `columns` [1, K] if there are any, in int8 or e4m3 row after row in memory, and the
    scale of each row [N, 1]."""
    return StoredWeight(*_in_one_kernel(_round_rows, x)(x.contiguous(), columns, dtype))


# ---- products --------------------------------------------------------------------------------------------------------


def multiply(
    x: StoredWeight, matrix: Tensor, scale: Tensor, dtype: torch.dtype, *, bias: Tensor | None = None, fast: bool = False
) -> Tensor:
    """[N, K] times [K, M], whose columns have the scales [1, M] or [1, 1], and bias [M] -> [N, M].

    matrix: column by column in memory, for cuBLAS. fast: fp8 products may be added up in fewer bits than float32.
    """
    if matrix.dtype == torch.int8:
        product = torch._int_mm(x.stored, matrix)
        return _in_one_kernel(_scale_int8, product)(product, x.scale, scale, bias, dtype)
    columns = scale.expand(1, matrix.shape[1]).contiguous()
    along = bias if dtype == torch.bfloat16 else None  # the product's dtype is the bias's
    out: Tensor = torch._scaled_mm(
        x.stored, matrix, scale_a=x.scale, scale_b=columns, bias=along, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    out = out.to(dtype)
    return out if bias is None or along is not None else out.add_(bias)


class EightBit(Product):
    """The weight in int8 or e4m3, `stored` [O, I] with `scale` [O, 1] or [1, 1], is multiplied as it is.

    Sums are those of float32 in the backward pass; forward, where errors of the inputs are far larger, fast ones will do.
    """

    def forward(self, x: Tensor, bias: Tensor | None, *kept: Tensor) -> Tensor:
        stored, scale = kept
        return multiply(quantize_rows(x, stored.dtype), stored.t(), scale.t(), x.dtype, bias=bias, fast=True)

    def of_input(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        stored, scale = kept
        by_column = stored.t().contiguous().t()
        if scale.numel() == 1:
            return multiply(quantize_rows(gradient, stored.dtype), by_column, scale, gradient.dtype)
        rows = quantize_rows(gradient, stored.dtype, scale.t())
        return multiply(rows, by_column, torch.ones_like(scale[:1]), gradient.dtype)


def check_eight_bit(scheme: str, device: torch.device) -> None:
    """Raise `UserError` where `device` cannot multiply what `scheme` stores.

    Tried on a small matrix, as torch does not tell: its builds for Windows have no fp8 products with a scale for each row.
    """
    dtype, least = (E4M3, "8.9") if scheme.startswith("fp8") else (torch.int8, "8.0")
    try:
        ones = torch.ones(32, 32, device=device, dtype=torch.bfloat16)
        EightBit().forward(ones, ones[0], *quantize_rows(ones, dtype))
    except RuntimeError as error:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else f"'{device.type}'"
        said, _, _ = str(error).partition(". ")
        raise UserError(
            f"--quantized_compute 8bit: {scheme} is multiplied by GPUs of compute capability {least} and later (fp8 not on "
            f"Windows). This run uses {found}, and torch says: {said}. Leave --quantized_compute out."
        ) from error
