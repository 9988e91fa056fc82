"""Weights that learn in bf16: each step is computed in float32, and what a step changes is not lost when it is rounded.

bf16 has 8 significant bits, so adding less than 1/512 of a weight to it, as most steps do, leaves it where it was when the sum
is rounded to the nearest value. Two ways out, both around any optimizer:

- stochastic: up or down with a probability such that the expected value is the exact one;
- kahan: to the nearest, while a second bf16 tensor per weight remembers what was cut off and joins in at the next step.

What the optimizer remembers of each element is kept in bf16, too, and rounded stochastically in either case: rounded to the
nearest, a decay of 0.999 never changes it. Quantised states (bitsandbytes) and factored ones (Adafactor) stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.rng import key_to_seed

COMPENSATION = "bf16_compensation"
"""Under this name an optimizer's state has what rounding cut off the weight, so that it is saved and resumed with the rest."""

_LOW_BITS = 16
"""Of a float32, those that bf16 does not have."""
_MULTIPLIER = 0x45D9F3B
"""Of Thomas Mueller's hash of 32 bits: x ^= x >> 16, times this, twice, and x ^= x >> 16 once more."""


def keyed_bits(key: int, count: int, device: torch.device) -> Tensor:
    """`count` random int16, each a function of `key` (56 bits, see `key_to_seed`) and of its place: the same on every device.

    torch's generators are not. Here a weight that is swapped is stepped in main memory in one run and on the GPU in another.
    """
    first, second = key & 0x3FFFFFFF, key >> 30  # of 30 bits, and of 26
    words = torch.arange(first, first + (count + 1) // 2, dtype=torch.int32, device=device)
    halves = words.view(torch.int16).view(-1, 2)
    low, high = (halves[:, 0], halves[:, 1]) if sys.byteorder == "little" else (halves[:, 1], halves[:, 0])
    low.bitwise_xor_(high)
    words.mul_(_MULTIPLIER).add_(second)
    low.bitwise_xor_(high)
    words.mul_(_MULTIPLIER)
    low.bitwise_xor_(high)
    return halves.flatten()[:count]


def round_stochastically(values: Tensor, key: int) -> Tensor:
    """float32 -> bf16, to one of the two neighbours, with an expected value equal to the input; bf16 values stay as they are.

    A random number below one unit in the last place, of `key` and the element's place, is added to the magnitude, and the rest
    cut off. inf and NaN stay so.
    """
    noise = keyed_bits(key, values.numel(), values.device).view(values.shape)  # from -2^15 to 2^15 - 1
    bits = values.view(torch.int32).add(noise).add_(1 << (_LOW_BITS - 1)).bitwise_and_(-1 << _LOW_BITS)
    rounded = bits.view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)  # NaN plus noise may wrap around to a number


@dataclass(frozen=True)
class Bf16Rounding:
    """How bf16 parameters, and states of their shape, are widened for a step and rounded after it.

    The random numbers depend on the seed, the update, the parameter and the element: they are the same for every process,
    wherever a parameter is stepped, and whether parameters are stepped together or one by one.
    """

    seed: int
    kahan: bool
    dtype: ClassVar[torch.dtype] = torch.bfloat16
    narrows_state: ClassVar[bool] = True
    """Whether what the optimizer remembers of each element is kept in `dtype`, too."""

    def gradient(self, gradient: Tensor) -> Tensor:
        """In float32, as the step is made with."""
        return gradient.float()

    def rounded(self, values: Tensor, key: int) -> Tensor:
        """float32 -> `dtype`."""
        return round_stochastically(values, key)

    @contextmanager
    def widened(self, optimizer: Optimizer, parameters: Sequence[tuple[int, nn.Parameter]], step: int) -> Iterator[None]:
        """Inside, `parameters` of `dtype`, each with its number, are float32, and so are their gradients and states.

        Afterwards they are rounded into the memory they were in, and their gradients are gone.
        """
        narrow = [(number, p, p.data) for number, p in parameters if p.dtype == self.dtype and p.grad is not None]
        keep = frozenset(getattr(optimizer, "non_castable_tensor_keys", ()))  # bitsandbytes: what it has quantised itself
        with torch.no_grad():
            for _, parameter, _ in narrow:
                self._widen(parameter, optimizer.state.get(parameter, {}), keep)
            try:
                yield
            finally:
                for number, parameter, stored in narrow:
                    state = optimizer.state[parameter] if self.kahan else optimizer.state.get(parameter, {})
                    self._round(parameter, stored, state, keep, (self.seed, "bf16", step, number))

    def _widen(self, parameter: nn.Parameter, state: dict[str, Any], keep: frozenset[str]) -> None:
        assert parameter.grad is not None
        gradient = self.gradient(parameter.grad)
        compensation = state.pop(COMPENSATION, None)  # an optimizer may take a state with anything in it for its own
        parameter.grad = None
        parameter.data = parameter.data.float()
        if self.kahan and compensation is not None:
            parameter.data.add_(compensation)
        parameter.grad = gradient
        for key in _elementwise(parameter, state, self.dtype, keep):
            state[key] = state[key].float()

    def _round(
        self, parameter: nn.Parameter, stored: Tensor, state: dict[str, Any], keep: frozenset[str], key: tuple[object, ...]
    ) -> None:
        value = parameter.data
        parameter.grad = None
        stored.copy_(value if self.kahan else self.rounded(value, key_to_seed(*key, "weight")))
        parameter.data = stored
        for name in _elementwise(parameter, state, torch.float32, keep) if self.narrows_state else ():
            state[name] = self.rounded(state[name], key_to_seed(*key, name))
        if self.kahan:
            state[COMPENSATION] = value.sub_(stored).to(torch.bfloat16)


def _elementwise(parameter: nn.Parameter, state: dict[str, Any], dtype: torch.dtype, keep: frozenset[str]) -> list[str]:
    """Keys of the tensors of `dtype` that have a value for each of the parameter's elements."""
    return [
        key
        for key, value in state.items()
        if isinstance(value, Tensor)
        and value.dtype == dtype
        and value.dim() > 0
        and value.shape == parameter.shape
        and key not in keep
    ]


def drop_compensation(optimizer: Optimizer) -> None:
    """Forget what rounding cut off: it belongs to the weights as Kahan summation left them, and to no later ones."""
    for state in optimizer.state.values():
        state.pop(COMPENSATION, None)
