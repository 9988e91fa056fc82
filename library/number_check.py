"""Losses and gradients that are no numbers: known before weights are stepped with them, and with the pictures they are from.

On a GPU a number is known when the device has got that far, and the host is ahead of it by most of a step. What that costs:

- The loss and the norm of all gradients are copied together, and waited for once an update, between the backward pass and the
  optimizer. The device is idle from then until the optimizer's first kernel arrives: about a millisecond for those of torch,
  nothing for those that wait by themselves (bitsandbytes after each weight, Prodigy and D-Adaptation for their estimate).
- torch's one-kernel optimizers, which AdamW is unless `--optimizer_args` says otherwise, do not even cost that: they are asked
  for before the wait, and told by a number on the device (`found_inf`, as loss scaling does) to leave everything as it is.
- fp16 with loss scaling skips steps with such gradients, so only losses count, and only many of them in a row.
- Fused backward steps weights while gradients still come, so the loss is waited for before each backward pass.

Several processes decide alike, since what they look at is the sum over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.late_copy import LateCopy

if TYPE_CHECKING:
    from library.processes import Processes

SCALED_PATIENCE = 20
"""Losses in a row that may not be finite where loss scaling skips such steps."""
SHOWN_PICTURES = 8


class NotFinite(UserError):
    """The loss or the gradients of an update are no numbers."""

    def __init__(self, message: str, *, untouched: bool) -> None:
        """untouched: weights and optimizer are what they were before the update."""
        super().__init__(message)
        self.untouched = untouched


class NumberCheck:
    """Of one update at a time: `begin`, then `seen` for every micro-batch, then what the update rule calls."""

    def __init__(self, processes: Processes, patience: int = 1) -> None:
        """patience: so many losses in a row that are not finite stop the run; above 1, gradients are not looked at."""
        self.processes = processes
        self.patience = patience
        self._num_bad = 0
        self._step = 0
        self._seen: list[tuple[Sequence[str], Tensor]] = []
        self._late: LateCopy[None] = LateCopy()
        self._known: list[tuple[None, Sequence[float]]] = []

    def begin(self, step: int) -> None:
        """`step`: updates made before this one."""
        self._step = step + 1
        self._seen = []

    def seen(self, names: Sequence[str], loss: Tensor) -> None:
        """The loss of this process's micro-batch of the pictures `names`."""
        self._seen.append((names, loss.detach()))

    def ask(self, loss: Tensor, norm: Tensor | None) -> Tensor | None:
        """Have the update's loss and the norm of its gradients copied. Gives a float32 scalar on their device: 1 where one of
        them is no number, else 0; None where nothing is computed (`simulated`)."""
        values = loss.detach().float().reshape(1)
        if norm is not None and self.patience == 1:
            values = torch.cat([values, norm.detach().float().reshape(1).to(loss.device)])
        if type(values) is not Tensor:
            return None
        self._known = self._late.push(None, values)
        return 1.0 - values.isfinite().all().float()

    def settle(self, *, untouched: bool = True) -> None:
        """Wait for what was asked for. Raises `NotFinite`."""
        known, self._known = [*self._known, *self._late.flush()], []
        for _, values in known:
            if all(map(math.isfinite, values)):
                self._num_bad = 0
                continue
            self._num_bad += 1
            if self._num_bad >= self.patience:
                raise self._not_finite(*values, untouched=untouched)

    def check(self, loss: Tensor, norm: Tensor | None = None, *, untouched: bool = True) -> None:
        """Ask and wait at once."""
        self.ask(loss, norm)
        self.settle(untouched=untouched)

    def settle_before_backward(self, loss: Tensor) -> None:
        """Wait for the loss of a micro-batch, with all processes, before a backward pass that steps weights."""
        if type(loss) is not Tensor:
            return
        bad = 1.0 - loss.detach().isfinite().float()
        self.processes.add_up(bad)
        if bad.item():
            raise self._not_finite(math.nan if self.processes.count > 1 else loss.item(), untouched=True)

    def _not_finite(self, loss: float, norm: float = 0.0, *, untouched: bool) -> NotFinite:
        is_loss = not math.isfinite(loss)
        own = [name for names, value in self._seen if not (is_loss and torch.isfinite(value)) for name in names]
        names = list(dict.fromkeys(name for process in self.processes.everybody(own) for name in process))
        shown = ", ".join(names[:SHOWN_PICTURES])
        shown += f" and {len(names) - SHOWN_PICTURES} more" if len(names) > SHOWN_PICTURES else ""
        what = f"the loss is {loss}" if is_loss else f"the norm of the gradients is {norm}, of a loss of {loss:g},"
        when = "before the weights were stepped" if untouched else "after weights were stepped (--fused_backward_pass)"
        return NotFinite(
            f"{what} at step {self._step}: training stopped, {when}. Its pictures: {shown}. "
            "Lower the learning rate, train in bf16 instead of fp16, or add --no_half_vae if latents overflow.",
            untouched=untouched,
        )
