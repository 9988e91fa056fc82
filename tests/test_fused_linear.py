"""A LoRA computed in one operation with its layer: the same as the layer with the sum for a weight, and no more kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from library.quantization import LayerTable
from library.quantized_layers import QuantizedLinear, Quantizer, quantize
from networks import fused_linear, weight_norms
from networks.lora import LoRA, LoRAArgs
from networks.network_base import Layer, LayerSize
from networks.weight_norms import column_squares, row_squares

WIDTH, OUT, RANK = 12, 20, 3
ROWS = (6, 6, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted_layer(*, rows: tuple[int, ...] = (), bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, LoRA]:
    layer = nn.Linear(WIDTH, OUT, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    return layer, attached(layer.requires_grad_(False).to(dtype), rows)


def attached(layer: nn.Linear, rows: tuple[int, ...] = ()) -> LoRA:
    adapter = LoRA(Layer("x", "denoiser", layer, rows), LayerSize(RANK, 2.0), LoRAArgs(), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for seed, parameter in enumerate(adapter.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + 5))
    adapter.multiplier = 0.7
    adapter.attach()
    return adapter


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A note for every use of the operation."""
    uses: list[str] = []
    apply = fused_linear._LinearWithLowRank.apply

    def noted(*args: Any) -> Any:
        uses.append("used")
        return apply(*args)

    monkeypatch.setattr(fused_linear._LinearWithLowRank, "apply", noted)
    return uses


def gradients(layer: nn.Module, adapter: LoRA, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output, and gradients of the input and of the factors."""
    adapter.zero_grad()
    x = x.detach().requires_grad_()
    out = (run or layer)(x)
    (out.float() * torch.linspace(0, 1, out.shape[-1])).square().mean().backward()
    return [out.detach(), *(t.grad for t in (x, *adapter.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 5, WIDTH), (2, 3, 2, WIDTH)], ids=str)
@pytest.mark.parametrize("rows", [(), ROWS], ids=["whole", "parts"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_with_the_sum_for_a_weight(
    shape: tuple[int, ...], rows: tuple[int, ...], bias: bool, fused: list[str]
) -> None:
    layer, adapter = adapted_layer(rows=rows, bias=bias)

    def plain(x: Tensor) -> Tensor:
        ups = adapter.lora_up.weight.split(rows) if rows else (adapter.lora_up.weight,)
        pairs = zip(ups, adapter.lora_down.weight.chunk(len(ups)), strict=True)
        change = torch.cat([up @ down for up, down in pairs]) * (2.0 / RANK * 0.7)
        return F.linear(x, layer.weight + change, layer.bias)

    for x in (randn(*shape), randn(WIDTH, *shape[:-1]).movedim(0, -1)):  # row after row in memory, and not
        expected = gradients(layer, adapter, x, plain)
        assert not fused
        found = gradients(layer, adapter, x)
        assert len(found) == len(expected) == 4 and fused
        fused.clear()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_dtype_of_autocast_or_of_its_input(dtype: torch.dtype, fused: list[str]) -> None:
    """Weights in `dtype` under autocast, and inputs in bf16 without."""
    x, found = randn(2, 5, WIDTH), []
    for kept in (dtype, torch.float32):
        layer, adapter = adapted_layer(dtype=kept)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype is torch.bfloat16
        out.float().square().mean().backward()
        found.append([out, *(parameter.grad for parameter in adapter.parameters())])
    assert len(fused) == 2 and all(tensor.dtype is torch.float32 for tensor in found[0][1:])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.05)
    layer, adapter = adapted_layer(dtype=torch.bfloat16)
    assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_nothing_is_kept_but_what_backward_needs_and_a_checkpoint_is_the_same(fused: list[str]) -> None:
    layer, adapter = adapted_layer()
    x, kept = randn(4, WIDTH), []
    with saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        layer(x)
        assert sorted(kept) == sorted([(4, WIDTH), (OUT, RANK), (4, RANK)])  # the input needs no gradient
        kept.clear()
        adapter.lora_down.requires_grad_(False)
        layer(x)
        assert kept == [(4, RANK)]  # LoRA-FA keeps no input
    adapter.lora_down.requires_grad_(True)
    expected = gradients(layer, adapter, x)
    found = gradients(layer, adapter, x, lambda x: checkpoint(layer, x, use_reentrant=False))  # type: ignore[no-any-return]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert len(fused) == 5
    with torch.no_grad():
        out = layer(x)
        out += 1  # no view of something that autograd watches


def test_what_stands_between_layer_and_adapter_is_computed_apart(fused: list[str]) -> None:
    layer, adapter = adapted_layer()
    x = randn(2, 5, WIDTH)
    base = layer(x)
    fused.clear()
    again = LoRA(Layer("x", "denoiser", layer), LayerSize(RANK, 1.0), LoRAArgs(), torch.Generator())
    again.attach()
    torch.testing.assert_close(layer(x), base)  # the inner one alone is fused
    assert len(fused) == 1
    again.detach()
    adapter.dropout = 0.5
    layer(x)
    assert len(fused) == 1
    torch.testing.assert_close(adapter.eval()(x), base)
    assert len(fused) == 2
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and len(fused) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [100, 1000])
def test_norms_of_a_sum_are_found_without_it(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_norms, "PIECE", piece)  # of 350 numbers
    weight, up, down = randn(50, 7).to(dtype), randn(50, 2, seed=1), randn(2, 7, seed=2)
    whole = weight.float() + up @ down
    torch.testing.assert_close(row_squares(weight, up, down), whole.square().sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(column_squares(weight, up, down), whole.square().sum(0), atol=1e-5, rtol=1e-5)


# ---- on a quantised layer --------------------------------------------------------------------------------------------

BITS = {
    "fp8": ("fp8", False),
    "fp8_raw": ("fp8_raw", False),
    "int8": ("int8", False),
    "nf4": ("nf4", False),
    "fp8 products": ("fp8", True),
    "int8 products": ("int8", True),
}
SIDE, TOKENS = 64, 20


def quantized_pair(kind: str, *, rows: tuple[int, ...] = (), bias: bool = True) -> tuple[QuantizedLinear, LoRA]:
    """A layer of random weights in few bits, whose rows differ in size, and its adapter."""
    scheme, eight_bit = BITS[kind]
    shell = nn.Sequential(nn.Linear(SIDE, SIDE, bias=bias).requires_grad_(False))
    quantizer = Quantizer(scheme, LayerTable(quantized=(r".*",)), eight_bit=eight_bit)
    [(layer, stored)] = quantizer.replace_layers(shell, torch.float32).values()
    weight = randn(SIDE, SIDE) * torch.logspace(-2, 0, SIDE)[:, None]
    layer.fill(quantize(weight, stored, "weight"), lambda: weight)
    assert isinstance(layer, QuantizedLinear)
    return layer, attached(layer, rows)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_with_a_quantised_layer_it_is_the_layer_and_the_adapter(
    kind: str, precision: str, fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output and the gradients of the factors to the bit: the very same products are made. The gradient of the input is the
    same sum, rounded once where it was rounded twice."""
    layer, adapter = quantized_pair(kind, rows=(16, 48) if precision == "float32" else ())
    x = randn(2, TOKENS, SIDE)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return layer(x)  # type: ignore[no-any-return]

    found = gradients(layer, adapter, x, run)
    assert len(fused) == 1
    monkeypatch.setattr("networks.lora.is_frozen_linear", lambda *_: False)
    expected = gradients(layer, adapter, x, run)
    assert len(fused) == 1 and len(found) == len(expected) == 4
    out, of_x, *of_factors = zip(found, expected, strict=True)
    exact = [out, *of_factors] if precision == "autocast" else of_factors[1:]
    assert all(torch.equal(one, other) for one, other in exact)
    for one, other in (out, of_x, *of_factors):
        assert one.dtype == other.dtype
        scale = float(other.float().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=scale * (2**-7 if precision == "autocast" else 1e-6))


@pytest.mark.parametrize("kind", BITS)
def test_a_quantised_layer_keeps_no_more_of_its_input_than_a_plain_one(kind: str) -> None:
    def kept(layer: nn.Module, weights: list[Tensor]) -> int:
        """Bytes kept for backward that are not of the layer's weight in its own form."""
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = randn(2, TOKENS, SIDE).bfloat16().requires_grad_()
        with saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            layer(x)
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        assert own <= found.keys(), "for the gradient of the input"
        return sum(size for place, size in found.items() if place not in own)

    quantized, _ = quantized_pair(kind)
    plain = nn.Linear(SIDE, SIDE, dtype=torch.bfloat16).requires_grad_(False)
    attached(plain)
    expected = 2 * 2 * TOKENS * (SIDE + RANK) + 2 * 2 * RANK * SIDE  # the input, x A^T, and the factors in bfloat16
    assert kept(plain, [plain.weight]) == kept(quantized, [quantized.stored, quantized.scale]) == expected
