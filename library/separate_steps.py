"""Stepping some of an optimizer's parameters at a time: one by one during the backward pass, or a few in float32.

There is one optimizer object, with all of its groups and its whole state: schedules, logs and saved states know nothing of it.
For a step it sees the parameters in question and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from library.bf16_updates import Bf16Rounding
from library.errors import UserError
from library.optimizers import steps_jointly

CHUNK_ELEMENTS = 2**24
"""Elements that are in float32 at a time. A whole model in float32 is what bf16 weights avoid."""


class SeparateSteps:
    """The updates of one optimizer, in portions.

    Some optimizers count steps, or sum weights of steps, in their groups. Every portion starts from a group's values as they
    were before the update, and what the portions leave there holds from the next update on: so it is the same as in one step.
    An optimizer whose portions do not all leave the same, as it looks at its parameters together, ends in a `UserError`.
    """

    def __init__(self, optimizer: Optimizer, rounding: Bf16Rounding | None = None) -> None:
        self.optimizer = optimizer
        self.rounding = rounding
        self.joint = steps_jointly(type(optimizer))
        numbered = [(number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self._places = {id(parameter): (index, number) for index, (number, parameter) in enumerate(numbered)}
        self._step = 0
        self._before: dict[int, dict[str, Any]] = {}
        self._after: dict[int, dict[str, Any]] = {}

    def begin(self, step: int) -> None:
        """`step`: updates made before this one."""
        self._step = step
        self._before = {number: _values(group) for number, group in enumerate(self.optimizer.param_groups)}
        self._after = {}

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Step these, which are of one group and have gradients, once an update. bf16 ones lose their gradients."""
        number = self._places[id(parameters[0])][1]
        indexed = [(self._places[id(parameter)][0], parameter) for parameter in parameters]
        for parameter in parameters:
            self._bring_state(parameter, self.optimizer.param_groups[number])
        rounding = nullcontext() if self.rounding is None else self.rounding.widened(self.optimizer, indexed, self._step)
        with rounding, self._only(number, parameters):
            counts = _own_counts(self.optimizer)
            self.optimizer.step()
            if _own_counts(self.optimizer) != counts:
                raise self._not_separable("counts its steps by itself")

    def _bring_state(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Swapped weights may be elsewhere than at their last step, or than where their state was loaded to."""
        counts_on_device = group.get("fused") or group.get("capturable")
        state = self.optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.device != parameter.device and (value.dim() or counts_on_device):
                state[key] = value.to(parameter.device)

    def finish(self) -> None:
        """The end of an update: every group has its new values, also where none of its parameters had a gradient."""
        for number, group in enumerate(self.optimizer.param_groups):
            if number not in self._after:
                with self._only(number, group["params"]):
                    self.optimizer.step()
            group.update(self._after[number])

    def step_all(self) -> None:
        """The whole update, in portions of `CHUNK_ELEMENTS`; in one, if the optimizer has to see everything."""
        if self.joint:
            self._step_jointly()
            return
        for group in self.optimizer.param_groups:
            for chunk in _chunks([parameter for parameter in group["params"] if parameter.grad is not None]):
                self.step(chunk)
        self.finish()

    def _step_jointly(self) -> None:
        everything = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        indexed = [(self._places[id(parameter)][0], parameter) for parameter in everything]
        with nullcontext() if self.rounding is None else self.rounding.widened(self.optimizer, indexed, self._step):
            self.optimizer.step()

    @contextmanager
    def _only(self, number: int, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The optimizer has one group of these parameters. The list and the group stay the objects they are, as an optimizer
        around another one shares them with it."""
        groups = self.optimizer.param_groups
        everything, group = list(groups), groups[number]
        members = group["params"]
        groups[:], group["params"] = [group], list(parameters)
        try:
            yield
        finally:
            groups[:], group["params"] = everything, members
        after = _values(group)
        if any(isinstance(value, torch.Tensor) for value in after.values()):
            raise self._not_separable("keeps tensors in its parameter groups")
        if self._after.setdefault(number, after) != after:
            raise self._not_separable("looks at all parameters of a group together")
        group.update(self._before[number])

    def _not_separable(self, reason: str) -> UserError:
        cls = type(self.optimizer)
        return UserError(
            f"{cls.__module__}.{cls.__name__} {reason}, so its parameters cannot be stepped one after another. "
            "Remove --fused_backward_pass and add --bf16_update nearest, or choose another --optimizer_type."
        )


def _values(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _own_counts(optimizer: Optimizer) -> dict[str, int | float]:
    """Numbers that the optimizer keeps outside of groups and states."""
    return {key: value for key, value in vars(optimizer).items() if type(value) in (int, float)}


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        chunk.append(parameter)
        if sum(member.numel() for member in chunk) >= CHUNK_ELEMENTS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
