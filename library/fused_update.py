"""Fused backward: each weight is stepped as soon as its gradient is there, and the gradient freed.

Gradients of all weights are then never held together. What that means:

- The norm of all gradients is not known when a weight is stepped. `--fused_clip each` clips each gradient alone, as sd-scripts
  does; with `all` the batch is computed twice, and the first time only its gradients' norms are kept.
- With accumulation, weights are stepped in the last backward pass of an update. Until then gradients add up, and are all held:
  so to clip the norm of all is the ordinary update, which takes no more memory.
- A loss that is no number is found before the pass begins, for which a GPU is waited for. A gradient that is none though its
  loss is finite is found when weights have been stepped with it, unless `--fused_clip all` looks at them first.
- Between processes, gradients are averaged one by one, in an order that all processes keep to, whatever their order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer

from library.bf16_updates import Bf16Rounding
from library.errors import UserError
from library.fp16_updates import Fp16Rounding, Fp16Update
from library.optimizers import StandardUpdate, UpdateRule, find_optimizer, load_class, steps_jointly
from library.processes import Processes, average_gradients
from library.separate_steps import SeparateSteps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from library.number_check import NumberCheck
    from library.option_groups import TrainOptions


def check_update(options: TrainOptions) -> None:
    """Raise `UserError` for an optimizer that cannot step one weight without the others, where the options ask for that."""
    if options.fused_backward and steps_jointly(load_class(find_optimizer(options.optimizer.name), "--optimizer_type")):
        raise UserError(
            f"--fused_backward_pass: {options.optimizer.name} looks at all gradients before it steps any weight. "
            "Choose another --optimizer_type (AdamW, AdamW8bit, Adafactor, Lion, ...), or remove --fused_backward_pass."
        )


def make_update(
    options: TrainOptions,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    processes: Processes,
    numbers: NumberCheck,
) -> UpdateRule:
    """How the options want the weights of `optimizer` to be stepped."""
    inner: Optimizer = optimizer.optimizer
    parameters: list[nn.Parameter] = [parameter for group in inner.param_groups for parameter in group["params"]]
    if options.precision.full_fp16:
        fp16 = Fp16Rounding(options.training.seed or 0, kahan=False)
        return Fp16Update(SeparateSteps(inner, fp16), fp16, options.optimizer.max_grad_norm, accelerator, numbers)
    rounding = None
    if options.precision.bf16_update != "nearest" and any(p.dtype == torch.bfloat16 for p in parameters):
        rounding = Bf16Rounding(options.training.seed or 0, kahan=options.precision.bf16_update == "kahan")
    steps = SeparateSteps(inner, rounding)
    max_grad_norm = options.optimizer.max_grad_norm
    held_anyway = max_grad_norm > 0 and options.training.gradient_accumulation_steps > 1
    if options.fused_backward and not held_anyway:
        if processes.count > 1 and options.family.swapped_blocks and options.optimizer.fused_clip == "all":
            raise UserError(
                "--fused_clip all on several processes cannot be used with --blocks_to_swap: gradients leave the device before "
                "they are averaged. Use --fused_clip each or --max_grad_norm 0, or leave out one of the others."
            )
        return FusedBackwardUpdate(steps, parameters, max_grad_norm, processes, numbers, options.optimizer.fused_clip)
    add_up = processes.add_up if options.learns_in_shards else None
    return StandardUpdate(optimizer, max_grad_norm, accelerator, numbers, None if rounding is None else steps, add_up=add_up)


class FusedBackwardUpdate(UpdateRule):
    """Weights are stepped by hooks on their gradients. From its creation on, `parameters` are stepped by it alone."""

    def __init__(
        self,
        steps: SeparateSteps,
        parameters: Sequence[nn.Parameter],
        max_grad_norm: float,
        processes: Processes,
        numbers: NumberCheck,
        clip: str = "each",
    ) -> None:
        """max_grad_norm: 0 does not clip. clip: what it is the limit of, `each` gradient or `all` together."""
        self.optimizer = steps.optimizer
        self.steps = steps
        self.parameters = parameters
        self.max_grad_norm = max_grad_norm
        self.clips_all = max_grad_norm > 0 and clip == "all"
        self.processes = processes
        self.numbers = numbers
        self.norm: Tensor | None = None
        """Of all gradients of the last step before clipping."""
        self._norms: dict[int, Tensor] = {}
        """Of the gradients that were there so far in this pass."""
        self._order = list(reversed(parameters))
        """In which the processes average gradients. From the second update on, that in which the first process gets them."""
        self._arrived: dict[int, nn.Parameter] = {}
        self._arrivals_known = False
        self._turn = 0
        self._take: Callable[[nn.Parameter], None] | None = None
        """What is done with a gradient that is complete; None where gradients only add up."""
        self._share: Tensor | None = None
        self._loss = torch.zeros((), device=processes.device)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def logs(self) -> dict[str, Tensor]:
        return {} if self.norm is None else {"norm/gradient": self.norm}

    def before_last_batch(self, step: int, num_images: int, backward: Callable[[], object] | None = None) -> None:
        self.steps.begin(step)
        self._share = self.processes.share(num_images)
        if self.clips_all and backward is not None:
            self._begin_pass(self._measure)
            backward()
            self._end_pass()
            self.numbers.check(self._loss, self.norm)
        self._begin_pass(self._step)

    def before_backward(self, loss: Tensor) -> None:
        self._loss = loss.detach()
        self.numbers.settle_before_backward(loss)

    def _begin_pass(self, take: Callable[[nn.Parameter], None]) -> None:
        self._arrived, self._turn, self._take = {}, 0, take

    def _on_gradient(self, parameter: Tensor) -> None:
        if self._take is None:
            return
        assert isinstance(parameter, nn.Parameter)
        if id(parameter) in self._arrived:
            raise RuntimeError("a weight got its gradient in two portions, but has been stepped after the first (reentrant?)")
        self._arrived[id(parameter)] = parameter
        if self._share is None:
            self._take(parameter)
        else:
            self._take_those_whose_turn_it_is()

    def _take_those_whose_turn_it_is(self) -> None:
        """A gradient may also be gone again: block swap takes it to main memory. Then it is left for after the pass."""
        while self._turn < len(self._order):
            parameter = self._order[self._turn]
            if parameter.requires_grad and (id(parameter) not in self._arrived or parameter.grad is None):
                return
            self._take_averaged(parameter)
            self._turn += 1

    def _take_averaged(self, parameter: nn.Parameter) -> None:
        assert self._share is not None and self._take is not None
        average_gradients([parameter], self._share)
        if parameter.grad is not None:
            self._take(parameter)

    def _measure(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._norms[id(parameter)] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        parameter.grad = None

    def _step(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if self.clips_all and self.norm is not None:
            norm = self.norm.to(parameter.device)
            torch.nn.utils.clip_grads_with_norm_([parameter], self.max_grad_norm, norm)
        elif self.max_grad_norm > 0:
            self._norms[id(parameter)] = torch.nn.utils.clip_grad_norm_([parameter], self.max_grad_norm).float()
        else:
            self._norms[id(parameter)] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self.steps.step([parameter])
        parameter.grad = None

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Step what could not be stepped on the way, so that nothing is left to average: with accumulation, weights that the
        last batch did not reach; on several processes, those whose turn has not come."""
        self._end_pass()
        return ()

    def _end_pass(self) -> None:
        assert self._take is not None
        if self._share is None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self._take(parameter)
        else:
            for parameter in self._order[self._turn :]:
                self._take_averaged(parameter)
            self._agree_on_the_order()
        self._take = None
        if self._norms:
            norms = [self._norms.pop(id(p)).to(self.processes.device) for p in self.parameters if id(p) in self._norms]
            self.norm = torch.linalg.vector_norm(torch.stack(norms))

    def _agree_on_the_order(self) -> None:
        if self._arrivals_known:
            return
        self._arrivals_known = True
        index = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        arrived = [index[key] for key in self._arrived]
        agreed: list[list[int]] = [arrived + sorted(set(index.values()) - set(arrived), reverse=True)]
        broadcast_object_list(agreed)
        self._order = [self.parameters[number] for number in agreed[0]]

    def step(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> bool:
        if not self.clips_all:
            self.numbers.check(self._loss, self.norm, untouched=False)
        self.steps.finish()
        return True
