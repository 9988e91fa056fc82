"""An exponential moving average of what learns, kept beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from library.errors import UserError
from library.optimizers import find_optimizer, load_class, weights_put_back

if TYPE_CHECKING:
    from library.option_groups import AverageOptions, TrainOptions


def check_average(options: TrainOptions) -> None:
    """Raise `UserError` where an average makes no sense."""
    if options.average.ema and hasattr(load_class(find_optimizer(options.optimizer.name), "--optimizer_type"), "eval"):
        raise UserError(
            f"--ema: {options.optimizer.name} averages weights itself, and what it saves is its average. Remove one of them."
        )


class WeightAverage:
    """Float32 averages of `parameters`, each where its parameter is, or in main memory."""

    def __init__(self, options: AverageOptions, parameters: Sequence[nn.Parameter]) -> None:
        self.options = options
        self.updates = 0
        device = "cpu" if options.ema_on_cpu else None
        self.values = [p.detach().to(device or p.device, torch.float32, copy=True) for p in parameters]

    def decay(self) -> float:
        """Of the update that comes now: early ones count more, so that the start is soon forgotten.

        min(decay, (1 + n) / (10 + n)) after n updates, as in TensorFlow's ExponentialMovingAverage; with
        `--ema_update_every` k, one update stands for k steps.
        """
        every, options = self.options.ema_update_every, self.options
        decay = options.ema_decay**every
        return decay if options.ema_no_warmup else min(decay, (1 + self.updates) / (10 + self.updates))

    def update(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Take up the weights of `step` updates. The host waits for the device only where averages are in main memory."""
        if step % self.options.ema_update_every:
            return
        average = get_ema_multi_avg_fn(self.decay())
        for place in sorted({value.device for value in self.values}, key=str):
            pairs = [(v, p.detach()) for v, p in zip(self.values, parameters, strict=True) if v.device == place]
            average([v for v, _ in pairs], [p.to(place, torch.float32) for _, p in pairs], self.updates)  # type: ignore[no-untyped-call]
        self.updates += 1

    @contextmanager
    def applied(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The parameters are their averages; afterwards they are what they were, bit for bit."""
        with weights_put_back(parameters), torch.no_grad():
            for parameter, value in zip(parameters, self.values, strict=True):
                parameter.copy_(value)
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """By number, in the order of the parameter groups."""
        return {f"{number:06d}": value for number, value in enumerate(self.values)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        own = self.state_dict()
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in tensors.items()}:
            raise UserError(
                "the saved averages (--ema) are of other weights. Resume with the flags about what learns as they were."
            )
        for name, value in own.items():
            value.copy_(tensors[name])
        self.updates = updates
