"""Weights that learn in fp16 (`--full_fp16`): their steps are computed in float32, from gradients that stay scaled until then.

fp16 holds nothing below 6e-8, and what gradients of many weights are lies there: that is why the loss is scaled. sd-scripts
takes the scale off the fp16 gradients themselves, and lets the optimizer keep squares of them in fp16, where most are zero.
Here the scale comes off, and clipping is done, in the float32 copy that a step is computed from; what the optimizer remembers
stays float32; and the weight is rounded stochastically, as bf16 ones are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.bf16_updates import Bf16Rounding, keyed_bits
from library.errors import UserError
from library.optimizers import UpdateRule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.number_check import NumberCheck
    from library.separate_steps import SeparateSteps

_SIGN = -(2**15)  # of an int16, the highest bit


def round_to_fp16(values: Tensor, key: int) -> Tensor:
    """float32 -> fp16, to one of the two neighbours, with an expected value equal to the input; fp16 values stay as they are.

    The random numbers are of `key` and the element's place. What is beyond fp16's range, and NaN, becomes inf and NaN.
    """
    nearest, size = values.to(torch.float16), values.abs()
    above = nearest.abs().float() > size
    low = (nearest.view(torch.int16) & ~_SIGN) - above.to(torch.int16)
    lower, upper = low.view(torch.float16).float(), (low + 1).view(torch.float16).float()
    draw = (keyed_bits(key, values.numel(), values.device).view(values.shape).float() + 2**15) / 2**16  # in [0, 1)
    bits = torch.where(draw < (size - lower) / (upper - lower), low + 1, low)
    rounded = torch.where(values.signbit(), bits | _SIGN, bits).view(torch.float16)
    return torch.where(nearest.isfinite(), rounded, nearest)


@dataclass(frozen=True)
class Fp16Rounding(Bf16Rounding):
    """The same for fp16 weights, whose gradients are `scale` times too large."""

    scale: list[Tensor | float] = field(default_factory=lambda: [1.0])
    """One value, of the step that is made."""
    dtype = torch.float16
    narrows_state = False

    def gradient(self, gradient: Tensor) -> Tensor:
        return gradient.float() / self.scale[0]

    def rounded(self, values: Tensor, key: int) -> Tensor:
        return round_to_fp16(values, key)


class Fp16GradScaler(torch.amp.GradScaler):
    """Finds gradients that overflowed, and leaves all as they are."""

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """torch's refuses fp16 gradients; its search, with a factor of 1."""
        found: dict[torch.device, Tensor] = super()._unscale_grads_(optimizer, torch.ones_like(inv_scale), found_inf, True)
        return found


class _Whole:
    """All of an update, as an optimizer for the scaler to step or not."""

    def __init__(self, steps: SeparateSteps) -> None:
        self.steps = steps
        self.param_groups = steps.optimizer.param_groups
        self.stepped = False

    def step(self) -> None:
        self.steps.step_all()
        self.stepped = True


class Fp16Update(UpdateRule):
    """The ordinary update of fp16 weights: skipped, and the scale halved, where a gradient overflowed."""

    def __init__(
        self,
        steps: SeparateSteps,
        rounding: Fp16Rounding,
        max_grad_norm: float,
        accelerator: Accelerator,
        numbers: NumberCheck,
    ) -> None:
        """rounding: that of `steps`."""
        self.optimizer = steps.optimizer
        self.steps = steps
        self.rounding = rounding
        self.max_grad_norm = max_grad_norm
        self.accelerator = accelerator
        self.numbers = numbers
        self.norm: Tensor | None = None

    def watch(self, on_gradients: Callable[[], None]) -> None:
        raise UserError(
            "--full_fp16 keeps gradients scaled, and ggpo_sigma and ggpo_beta in --network_args need them as they are. "
            "Use --full_bf16, or remove one of them."
        )

    def before_last_batch(self, step: int, num_images: int, backward: Callable[[], object] | None = None) -> None:
        self.steps.begin(step)

    def logs(self) -> dict[str, Tensor]:
        return {} if self.norm is None else {"norm/gradient": self.norm}

    def step(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> bool:
        self.numbers.check(loss)
        scaler, whole = self.accelerator.scaler, _Whole(self.steps)
        scale: Tensor | float = 1.0
        if scaler is not None:
            scaler.unscale_(whole)
            scale = scaler.get_scale()
        if self.max_grad_norm > 0:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            self.norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
            scale = scale / (self.max_grad_norm / (self.norm + 1e-6)).clamp(max=1.0)
        self.rounding.scale[0] = scale
        if scaler is None:
            whole.step()
        else:
            scaler.step(whole)
            scaler.update()
        self.optimizer.zero_grad()
        return whole.stepped
