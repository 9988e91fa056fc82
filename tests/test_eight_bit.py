"""Inputs of 8-bit products: how they are rounded, how much memory that moves, and what devices can do."""

from __future__ import annotations

import pytest
import torch

from library import eight_bit
from library.eight_bit import check_eight_bit, quantize_rows
from library.errors import UserError
from library.memory_tracker import MemoryTracker
from library.quantization import E4M3

DTYPES = (torch.int8, E4M3)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_device_that_cannot_multiply_8_bits_is_told_from_one_that_can(scheme: str) -> None:
    check_eight_bit(scheme, torch.device("cpu"))
    with pytest.raises(UserError, match=f"8bit: {scheme} is multiplied by GPUs .* This run uses 'mps', and torch says: "):
        check_eight_bit(scheme, torch.device("mps"))


def test_rows_are_row_after_row_in_memory_whatever_they_are_made_from() -> None:
    """As cuBLAS wants them, also of a gradient that comes transposed."""
    x = torch.randn(64, 32).t()
    for dtype in (torch.int8, E4M3):
        rows, scale = quantize_rows(x, dtype)
        assert rows.is_contiguous() and scale.shape == (32, 1) and scale.is_contiguous()
        assert torch.equal(rows.float(), quantize_rows(x.contiguous(), dtype).stored.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_is_rounded_by_a_scale_of_its_own(dtype: torch.dtype, given: torch.dtype) -> None:
    """int8: by half a step of 1/127 of the largest value. e4m3: by 2^-4 of a value or 2^-10 of the scale, a power of two."""
    x = torch.randn(30, 48) * torch.logspace(-5, 2, 30)[:, None]
    x[7] = 0
    x = x.to(given)
    columns = torch.logspace(-2, 1, 48)[None]
    for factor in (None, columns):
        wanted = x.float() if factor is None else x.float() * factor
        stored, scale = quantize_rows(x, dtype, factor)
        lost = (stored.float() * scale - wanted).abs()
        bound = torch.maximum(wanted.abs() * 2**-4, scale * 2**-10) if dtype == E4M3 else scale * (0.5 + 1e-4)
        assert (lost <= bound).all() and lost.max() > 0
        largest = stored.float().abs().amax(1)
        least, most = (224, 448) if dtype == E4M3 else (127, 127)
        assert ((largest >= least) & (largest <= most) | (torch.arange(30) == 7)).all() and largest[7] == 0
        assert dtype == torch.int8 or (torch.frexp(scale).mantissa == 0.5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(3, 32)
    x[1, 5] = value
    stored, scale = quantize_rows(x, dtype)
    finite = (stored.float() * scale).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(E4M3, 9, 23), (torch.int8, 21, 31)])
def test_rounding_operator_by_operator_moves_as_many_bytes_as_is_written(
    dtype: torch.dtype, forward: int, backward: int
) -> None:
    """At FLUX.1's size, without computing; what is made for a row adds a little."""
    rows, width = 4608, 3072
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    columns = torch.empty(1, width, device="meta")
    for factor, expected in ((None, forward), (columns, backward)):
        with MemoryTracker() as tracker:
            quantize_rows(x, dtype, factor)
        assert tracker.work.moved_bytes / (rows * width) == pytest.approx(expected, abs=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_kernel_gives_what_the_operators_give(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    assert eight_bit._makes_kernels(device)
    for rows, width in ((40, 96), (512, 3072)):
        x = (torch.randn(rows, width) * torch.logspace(-5, 2, rows)[:, None]).to(device, torch.bfloat16)
        for factor in (None, torch.logspace(-2, 1, width, device=device)[None]):
            for one, other in zip(quantize_rows(x, dtype, factor), eight_bit._round_rows(x, factor, dtype), strict=True):
                assert torch.equal(one.float(), other.float())
