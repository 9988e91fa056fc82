"""Weights that the processes of a run share out: each holds a part of every tensor, and a block is whole while it computes.

    shards = ShardedWeights({"denoiser": denoiser}, device)

The exchange is torch's `fully_shard`: before a block computes, forward or backward, its weights are gathered; afterwards they
are given up; and gradients are summed into the parts. To everything else a process has the plain tensors that `own` gives: its
part of each parameter, which shares memory with what is gathered. So an optimizer, an average or a saved state needs to know
nothing of parts, as long as what it does to an element does not depend on the others.

Every process has to make every forward pass. What each would do for itself (previews, validation, saving) they do together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from library.compiling import repeated_blocks
from library.errors import UserError
from library.model_parts import cast as cast_to
from library.optimizers import find_optimizer

if TYPE_CHECKING:
    from library.dataset import TrainData
    from library.option_groups import TrainOptions

FLAG = "--shard_weights"

ELEMENTWISE: Mapping[str, tuple[str, ...]] = {
    "torch.optim": (
        "AdamW", "Adam", "Adamax", "NAdam", "RAdam", "SGD", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD",
    ),
    "lion_pytorch": ("Lion",),
    "schedulefree": ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
}  # fmt: skip
"""Module -> its optimizers that step an element by what they know of that element alone."""


def check_sharding(options: TrainOptions, processes: int) -> None:
    """Raise `UserError` where `--shard_weights` is asked for and cannot be."""
    if not options.memory.shard_weights:
        return
    if processes == 1:
        raise UserError(
            f"{FLAG}: this is one process, and there is nobody to share the weights with. Start several, such as "
            "`accelerate launch --multi_gpu --num_processes 2 ...`, or remove it."
        )
    source = find_optimizer(options.optimizer.name)
    if options.learns_in_shards and source.attribute not in ELEMENTWISE.get(source.module, ()):
        raise UserError(
            f"{FLAG}: {options.optimizer.name} looks at more than one element of a weight at a time (a row, a portion in 8 "
            "bits, all of them), or is not known to do without, and a process holds a part of each weight. Use SGDNesterov or "
            f"{', '.join(name for names in ELEMENTWISE.values() for name in names)}."
        )


def check_shared_passes(options: TrainOptions, data: TrainData) -> None:
    """Raise `UserError` for forward passes that processes would make each for itself."""
    if options.learns_in_shards and data.preserves:
        raise UserError(
            f"{FLAG}: what the untrained model predicts (--preserve_prior, diff_output_preservation) is made by each process "
            "for pictures of its own, which it cannot do with a part of the weights. Remove one of them, or train an adapter."
        )


def gathered_modules(part: nn.Module) -> list[nn.Module]:
    """What of a part of the model is gathered at a time, the inner ones first: the denoiser's blocks, and with it the rest.

    Of a text encoder its layers and each module beside them, as some are called by themselves, without the encoder around them.
    Only weights that two modules share are gathered with the encoder.
    """
    blocks = repeated_blocks(part)
    if blocks:
        return [*blocks, part]
    lists = [list(module) for module in part.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=len, default=[])
    inside = {module for layer in layers for module in layer.modules()}
    uses = Counter(p for module in part.modules() for p in module.parameters(recurse=False))
    beside = [
        module
        for module in reversed(list(part.modules()))
        if module not in inside and all(uses[p] == 1 for p in module.parameters(recurse=False))
        if any(True for _ in module.parameters(recurse=False))
    ]
    return [*layers, *beside, *([part] if max(uses.values()) > 1 else [])]


class ShardedWeights:
    """The parameters of whole modules, shared out among all processes. Buffers stay with each."""

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device) -> None:
        """`parts` are in main memory or on `device`, the same on every process; blocks move there one by one."""
        self.parts = parts
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for part in parts.values():
            for module in gathered_modules(part):
                _shard(module, mesh)
        parameters = {id(p): p for part in parts.values() for p in part.parameters()}
        self._own = {key: nn.Parameter(_part_of(p), p.requires_grad) for key, p in parameters.items()}
        self._pairs = [(parameter, self._own[key]) for key, parameter in parameters.items()]
        self.learns = any(parameter.requires_grad for parameter, _ in self._pairs)

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """This process's part of a parameter; one that is not shared out, itself."""
        return self._own.get(id(parameter), parameter)

    def replicated(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `parameters`, as `own` gives them, that every process has whole."""
        parts = {id(own) for _, own in self._pairs}
        return [parameter for parameter in parameters if id(parameter) not in parts]

    @contextmanager
    def updating(self) -> Iterator[None]:
        """What `own` gives has the gradients that came so far."""
        for parameter, own in self._pairs:
            if parameter.grad is not None:
                own.grad = _part_of(parameter.grad)
                parameter.grad = None
        yield

    @contextmanager
    def gathered(self, dtype: torch.dtype | None, keep: bool) -> Iterator[None]:
        """The modules are whole and in main memory, in `dtype`, on a process that asks to `keep` them. All have to take part:
        a tensor at a time is put together on the device."""
        shared = {id(parameter) for parameter, _ in self._pairs}
        whole = {id(parameter): _whole(parameter, dtype, keep) for parameter, _ in self._pairs}
        places = [
            (module, name, parameter)
            for part in self.parts.values()
            for module in part.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in shared
        ]
        if not keep:
            yield
            return
        try:
            for module, name, parameter in places:
                module._parameters[name] = whole[id(parameter)]
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Share out what is not shared out yet of `module`, and gather it while it computes.

    Gradients are summed: each process's count by its images, which the loss they are of is multiplied by. What one process has
    no gradient of counts as zero there.
    """
    kind = type(module)
    # the last modules to be gathered, too: kept from one pass to the next, they would not see weights that change in between
    sharded: FSDPModule = fully_shard(module, mesh=mesh, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_reduce_scatter_unused_params(True)
    module.__class__ = kind  # only those methods need another, and libraries know their own classes by name


def _part_of(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(DTensor, tensor.detach()).to_local()


def _whole(parameter: nn.Parameter, dtype: torch.dtype | None, keep: bool) -> nn.Parameter | None:
    tensor = cast(DTensor, parameter.detach()).full_tensor()
    return nn.Parameter(cast_to(tensor, dtype).to("cpu"), requires_grad=False) if keep else None
