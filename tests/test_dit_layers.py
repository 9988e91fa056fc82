"""Norms and rotations of the transformers: what they compute, in whichever of two ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library.dit_layers import Rotation, layer_norm, modulated, rms_norm, rotate
from library.rng import keyed_generator


def draw(key: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("dit_layers", key))


def modulated_gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, shift, scale = draw("x", 2, 600, 64), draw("shift", 2, 1, 64), draw("scale", 2, 1, 64)
    leaves = [value.to(dtype).requires_grad_() for value in (x, shift, scale)]
    out = modulated(layer_norm(64), *leaves)
    assert out.dtype == dtype
    (out.float() * (1 + draw("weight", 2, 600, 64))).sum().backward()  # type: ignore[no-untyped-call]
    return (out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


def test_a_modulated_norm_is_the_norm_scaled_and_shifted_for_each_sample() -> None:
    x, shift, scale = draw("x", 2, 600, 64), draw("shift", 2, 1, 64), draw("scale", 2, 1, 64)
    torch.testing.assert_close(modulated_gradients(torch.float32)[0], layer_norm(64)(x) * (1 + scale) + shift)


def test_half_precision_rounds_and_does_not_lose_gradients_of_many_tokens() -> None:
    """Sums over 600 tokens in bfloat16 would be wrong by tenths."""
    for half, exact in zip(modulated_gradients(torch.bfloat16), modulated_gradients(torch.float32), strict=True):
        assert (half.float() - exact).norm() < 0.01 * exact.norm()


def test_rms_norms_round_once() -> None:
    x, weight = draw("x", 2, 5, 64), 1 + draw("weight", 64)
    exact = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), exact)
    assert torch.equal(
        rms_norm(x.bfloat16(), weight.bfloat16(), 1e-6),
        rms_norm(x.bfloat16().float(), weight.bfloat16().float(), 1e-6).bfloat16(),
    )


def last_dimension_far_apart(x: Tensor) -> Tensor:
    """The same values in another order of memory, which attention's gradients may have."""
    return x.transpose(-1, 1).contiguous().transpose(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_turned_alike_with_complex_numbers_and_where_they_are_compiled(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    angle = draw("angle", 2, 5, 1, 4)
    rotation, x = Rotation(angle.cos(), angle.sin()), draw("q", 2, 5, 3, 8).to(dtype)

    def turned() -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        out = rotate(given, rotation)
        (gradient,) = torch.autograd.grad(out, given, last_dimension_far_apart(draw("gradient", *x.shape).to(dtype)))
        return out.detach(), gradient

    by_complex_numbers = turned()
    for was, is_now in zip((x, draw("gradient", *x.shape)), by_complex_numbers, strict=True):
        lengths = (value.float().unflatten(-1, (-1, 2)).norm(dim=-1) for value in (was, is_now))
        torch.testing.assert_close(*lengths, rtol=1e-2, atol=1e-2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(by_complex_numbers, turned())
