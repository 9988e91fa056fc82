"""What the processes of one run tell each other in a step: gradients, the loss, and that one of them was asked to stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from library.run_requests import REQUESTS
from library.tracking import LossLog

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET_ELEMENTS = 2**25
"""Gradients are exchanged in portions of about this size, so that no second copy of all of them is held."""


class Processes:
    """Makes an update of several processes the one that a single process would make of all their images.

    On a single process nothing is exchanged.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.count = accelerator.num_processes
        self.rank = accelerator.process_index
        self.device = accelerator.device
        self._answers = LossLog()
        self._agreed: frozenset[str] = frozenset()

    def share(self, num_images: int) -> Tensor | None:
        """This process's share of the images of all, a 0-d tensor; None on a single process."""
        if self.count == 1:
            return None
        images = torch.full((), float(num_images), device=self.device)
        everybody = images.clone()
        torch.distributed.all_reduce(everybody)
        return images / everybody

    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor, num_images: int, asked: Sequence[bool]) -> Tensor:
        """Average the gradients in place; returns the loss, a 0-d tensor, over the images of all processes.

        `loss` and the gradients are means over this process's `num_images`. asked: which of `REQUESTS` this process has.
        """
        if self.count == 1:
            self._agreed = frozenset(name for name, value in zip(REQUESTS, asked, strict=True) if value)
            return loss
        images, *wanted = (torch.full((), float(value), device=self.device) for value in (num_images, *asked))
        facts = torch.stack([loss.float() * images, images, *wanted])
        torch.distributed.all_reduce(facts)
        average_gradients(parameters, images / facts[1])
        self._agreed = frozenset()
        for row in self._answers.push(0, 0, dict(zip(REQUESTS, facts[2:].unbind(), strict=True))):
            self._agreed |= {name for name, value in row.values.items() if value > 0}
        return facts[0] / facts[1]

    def add_up(self, values: Tensor) -> None:
        """Sum `values` over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(values)

    def everybody(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of their ranks. All have to ask."""
        return gather_object([value])

    @property
    def agreed(self) -> frozenset[str]:
        """What any process was asked for. All of them learn it after the same update: had one stopped alone, the others would
        wait for it for ever. On a GPU that is an update late, so that no step waits for the answer."""
        return self._agreed


def average_gradients(parameters: Sequence[nn.Parameter], share: Tensor) -> None:
    """Sum of every process's gradients, each times its `share` of the images.

    A learning parameter without a gradient here counts as zero, so that every process sends the same shapes. One that no
    longer learns keeps none: with zeros, the optimizer would go on moving it.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for gradients in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(share.device).mul_(share)
        torch.distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and place (those of swapped blocks are in main memory) at a time, in portions of
    `BUCKET_ELEMENTS`."""
    for kind in sorted({(gradient.dtype, gradient.device) for gradient in gradients}, key=str):
        bucket: list[Tensor] = []
        size = 0
        for gradient in gradients:
            if (gradient.dtype, gradient.device) != kind:
                continue
            bucket.append(gradient)
            size += gradient.numel()
            if size >= BUCKET_ELEMENTS:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
