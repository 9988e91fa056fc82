"""What the parity tests of our own networks share: random weights, and the same network as diffusers computes it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from library.dit_layers import run_recomputing
from library.key_layout import KeyMap
from library.rng import keyed_generator

Network = TypeVar("Network", bound=nn.Module)


class Draw:
    """Numbers of one family's tests, by name."""

    def __init__(self, family: str) -> None:
        self.family = family

    def __call__(self, *shape: int, key: str) -> Tensor:
        return torch.randn(shape, generator=keyed_generator(self.family, key))

    def fill(self, model: Network, norms: str, deviation: float, **others: float) -> Network:
        """Every weight random, those that begin as zeros or ones too, so that no wrong modulation can hide.

        norms: in the names of vectors that are about 1. others: deviations of tensors by name.
        """
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                noise = self(*tensor.shape, key=name)
                is_norm = tensor.ndim == 1 and norms in name
                tensor.copy_(1 + 0.2 * noise if is_norm else noise * others.get(name, deviation))
        return model


def assert_same_outputs_and_gradients(
    ours: nn.Module,
    theirs: nn.Module,
    names: KeyMap,
    inputs: Callable[[], dict[str, Tensor]],
    run_ours: Callable[[dict[str, Tensor]], Tensor],
    run_theirs: Callable[[dict[str, Tensor]], Tensor],
    weight: Callable[..., Tensor],
    unused: Collection[int] = (),
) -> None:
    """With our weights in `theirs`. unused: ids of parameters whose gradients are 0."""
    theirs.load_state_dict(names.to_ours(ours.state_dict()), strict=True)
    mine, their = inputs(), inputs()
    out, expected = run_ours(mine), run_theirs(their)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    factor = weight(*out.shape, key="weight")
    (out * factor).mean().backward()
    (expected * factor).mean().backward()
    for name in mine:
        if mine[name].requires_grad:
            torch.testing.assert_close(mine[name].grad, their[name].grad, atol=1e-5, rtol=1e-4)
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    fused = names.to_theirs(gradients)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (id(parameter) not in unused), name
        torch.testing.assert_close(parameter.grad, fused[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def assert_recomputing_changes_no_gradient(make: Callable[[], Any], run: Callable[[Any], Tensor]) -> None:
    grads = []
    for recomputes in (False, True):
        model = make()
        if recomputes:
            model.run_block = run_recomputing
        run(model).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def assert_names_survive(names: KeyMap, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """There and back bit for bit. Gives the tensors under diffusers' names."""
    there = names.to_ours(tensors)
    back = names.to_theirs(there)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    return there


def assert_times_stay_float32(model: Any, given: dict[str, Tensor]) -> None:
    """bf16 has no number between 0.75 and 0.7539; the embedding of a time there is made in float32."""
    with torch.no_grad():
        low, high = (model(**given | {"t": torch.tensor([t, t])}) for t in (0.7505, 0.7515))
    assert torch.tensor(0.7505).bfloat16() == torch.tensor(0.7515).bfloat16()
    assert not torch.equal(low, high)
