"""What of the denoiser is recomputed, and what of it waits in main memory while it trains.

`MemoryPlan` is what the options ask for, checked before anything is loaded. `attach` makes it so for a model that is complete
(its adapters attached), and gives the `MemoryPolicy` that the loop and what learns keep to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import AutocastKwargs
from torch import nn

from library.activation_offload import MIN_BYTES, ActivationOffload
from library.custom_offloading_utils import BlockGroup, BlockSwap
from library.dit_layers import Denoiser
from library.errors import UserError
from library.family_base import ModelBundle, ModelFamily
from library.offload_plan import FLAG, RingPlan
from library.offload_transport import PinnedBudget, local_processes
from library.sharded_weights import ShardedWeights

if TYPE_CHECKING:
    from library.option_groups import TrainOptions

logger = logging.getLogger(__name__)


def read_to(part: str, options: TrainOptions, device: torch.device) -> torch.device:
    """Where a part of the model is read to: the denoiser to main memory if its blocks are swapped or weights are shared out,
    as the device may be too small for it."""
    waits = bool(options.family.swapped_blocks) or options.memory.shard_weights
    return torch.device("cpu") if part == "denoiser" and waits else device


@dataclass(frozen=True)
class MemoryPolicy:
    """Where weights are while the model trains. Without a swap or shards, on the device at all times."""

    swap: BlockSwap | None = None
    offload: ActivationOffload | None = None
    shards: ShardedWeights | None = None

    @property
    def autocast(self) -> AutocastKwargs:
        """Weights that learn are cast as they are used. Kept until the end of the forward pass, as autocast does, the casts of
        all blocks would be on the device together."""
        return AutocastKwargs(cache_enabled=self.swap is None and self.shards is None)

    @property
    def learns_in_shards(self) -> bool:
        """Whether gradients are summed over all processes as they come, each into the part that a process has of its weight."""
        return self.shards is not None and self.shards.learns

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """What this process steps, averages and saves of a parameter of the model: a part where weights are sharded."""
        return parameter if self.shards is None else self.shards.own(parameter)

    def replicated(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Those of them, as `own` gives them, whose gradients the processes have to average."""
        return parameters if self.shards is None else self.shards.replicated(parameters)

    def gathered(self, dtype: torch.dtype | None, keep: bool) -> AbstractContextManager[None]:
        """What learns in shards whole, and in `dtype`, on a process that asks to `keep` it. For all processes to enter."""
        return self.shards.gathered(dtype, keep) if self.shards is not None and self.shards.learns else nullcontext()

    def updating(self) -> AbstractContextManager[None]:
        """Where gradients are averaged and clipped, and weights stepped: each weight is beside its gradient and its optimizer
        state. Not to be nested."""
        if self.shards is not None:
            return self.shards.updating()
        return nullcontext() if self.swap is None else self.swap.updating()

    def host_weights(self) -> AbstractContextManager[None]:
        """Where weights are read or replaced; those that are swapped are in main memory meanwhile. Not to be nested."""
        return nullcontext() if self.swap is None else self.swap.host_weights()


@dataclass(frozen=True)
class MemoryPlan:
    """What one run does to save device memory."""

    recomputes: bool = False
    offloads: bool = False
    rings: tuple[RingPlan, ...] = ()
    """Of each group of the denoiser's blocks; none where nothing is swapped."""
    shards: bool = False
    """Whether each process holds a part of the weights."""
    pinned_limit: int | None = None
    """Bytes of main memory that this process may pin; None for its share of half the machine's."""

    @classmethod
    def of(cls, family: ModelFamily, options: TrainOptions, device: torch.device) -> MemoryPlan:
        """Raises `UserError` for what this model or `device` cannot do. Reads no more than the headers of files."""
        memory = options.memory
        swapped = options.family.swapped_blocks
        wanted = [FLAG] * bool(swapped) + ["--cpu_offload_checkpointing"] * memory.cpu_offload_checkpointing
        if wanted and device.type not in ("cuda", "cpu"):
            raise UserError(
                f"{' and '.join(wanted)}: main memory takes turns with that of a CUDA device, and this run uses "
                f"'{device.type}'. Leave {'it' if len(wanted) == 1 else 'them'} out."
            )
        rings: tuple[RingPlan, ...] = ()
        if swapped:
            division = family.swap_division(options)
            if division is None:
                raise UserError(f"{FLAG} {swapped}: the blocks of {family.title} cannot be swapped. Leave {FLAG} out.")
            rings = division.plans(swapped)
        if wanted and device.type == "cpu":
            logger.warning("%s: a CPU's memory is main memory, so this costs time and gains nothing.", " and ".join(wanted))
        limit = memory.pinned_memory_limit
        return cls(
            recomputes=memory.recomputes,
            offloads=memory.cpu_offload_checkpointing,
            rings=rings,
            shards=memory.shard_weights,
            pinned_limit=None if limit is None else int(limit * 2**30) // local_processes(),
        )

    def attach(self, family: ModelFamily, bundle: ModelBundle, parts: Iterable[str]) -> MemoryPolicy:
        """Recompute `parts`; swap the denoiser's blocks and offload its activations. With a swap, the denoiser moves to the
        device here, but for its blocks; only what learns by now may be changed by `MemoryPolicy.updating`."""
        if self.recomputes:
            for part in sorted(parts):
                family.enable_gradient_checkpointing(part, bundle.part(part))
        if self.shards:
            return MemoryPolicy(shards=ShardedWeights({part: bundle.part(part) for part in sorted(parts)}, bundle.device))
        if not self.rings and not self.offloads:
            return MemoryPolicy()
        swap = self._swap(bundle) if self.rings else None
        if not self.offloads:
            return MemoryPolicy(swap)
        budget = PinnedBudget(self.pinned_limit) if swap is None else swap.transport.budget
        # where nothing can be gained, everything takes the way that large tensors take on a GPU: it is there to be tested
        least = 0 if bundle.device.type == "cpu" else MIN_BYTES
        return MemoryPolicy(swap, ActivationOffload(bundle.denoiser, bundle.device, budget=budget, min_bytes=least))

    def _swap(self, bundle: ModelBundle) -> BlockSwap:
        denoiser = cast(Denoiser, bundle.denoiser)
        groups = [
            BlockGroup(blocks, ring.num_swapped, ring.name)
            for blocks, ring in zip(denoiser.block_groups(), self.rings, strict=True)
        ]
        learning = any(parameter.requires_grad for parameter in denoiser.parameters())
        swap = BlockSwap(denoiser, groups, bundle.device, learning=learning, pinned_limit=self.pinned_limit)
        swapped = " and ".join(f"{ring.num_swapped} of {ring.num_blocks} {ring.name}" for ring in self.rings)
        logger.info("%s are in main memory until they are needed", swapped)
        return swap
