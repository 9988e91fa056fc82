"""What a run needs before its first step: precision, processes, the seed, and how many updates it makes."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)

from library.errors import UserError
from library.fp16_updates import Fp16GradScaler

if TYPE_CHECKING:
    from library.option_groups import PrecisionOptions, TrainingOptions, TrainOptions

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound="TrainOptions")

DTYPES = {
    "no": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Launches of accelerate's in which each process holds a part of the weights, as its environment variables name them."""

PLAIN_PROCESSES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def compute_dtype(precision: PrecisionOptions) -> torch.dtype:
    """The dtype of frozen weights and of autocast: float32 without mixed precision."""
    return DTYPES[precision.mixed_precision]


def learning_dtype(precision: PrecisionOptions) -> torch.dtype:
    """The dtype of the weights that learn: float32 unless `--full_bf16` or `--full_fp16` asks for that of the computation."""
    return compute_dtype(precision) if precision.learns_in_half else torch.float32


def save_dtype(precision: PrecisionOptions) -> torch.dtype | None:
    """The dtype of saved tensors; None keeps the one they learn in."""
    return DTYPES[precision.save_precision] if precision.save_precision else None


def make_accelerator(options: TrainOptions) -> Accelerator:
    """Processes, device and mixed precision.

    Accumulation is counted by the loop, which knows the true size of each update: a count from accelerate's own
    configuration would divide the loss a second time. Raises `UserError` for what this machine or launch cannot do.
    """
    _check_launch()
    handlers: list[Any] = []
    if options.training.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=options.training.ddp_timeout)))
    if PartialState._shared_state:
        # a second run in one process may use another precision; accelerate keeps the first one's otherwise
        AcceleratorState._reset_state()
    precision = options.precision.mixed_precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=handlers,
        )
    except ValueError as error:
        if precision == "no":
            raise
        raise _unusable(precision, PartialState().device) from error
    if precision == "fp16" and accelerator.scaler is None:  # accelerate says nothing, and would train in fp16 unscaled
        raise _unusable(precision, accelerator.device)
    if options.precision.full_fp16:
        accelerator.scaler = Fp16GradScaler(accelerator.device.type)
    if accelerator.distributed_type not in PLAIN_PROCESSES:
        raise _unknown_launch(accelerator.distributed_type.value)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def _check_launch() -> None:
    """Raise `UserError` for a launch that would share out the weights. On a CPU accelerate leaves that out by itself, and says
    nothing."""
    for kind in SHARDED:
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            raise _unknown_launch(kind)


def _unknown_launch(kind: str) -> UserError:
    return UserError(
        f"the launch asks for {kind}, which is not used here. Run `accelerate config` again and choose plain processes, or "
        "launch with --multi_gpu, and add --shard_weights: each process then holds a part of the weights."
    )


def keep_freed_memory() -> None:
    """Let the C library keep blocks of up to 32 MiB that are freed, rather than give them back to the system.

    The next activation of that size would otherwise be new pages again, each zeroed by the system: encoding eight pictures
    of 256x256 took 207,000 page faults, and takes 18,000. glibc raises its limits to the size of the largest block it has
    seen freed (mallopt(3), "dynamic mmap threshold"), at most to 32 MiB; elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # never written to, so it takes no memory


def _unusable(precision: str, device: torch.device) -> UserError:
    other = "bf16" if precision == "fp16" else "fp16"
    return UserError(f"--mixed_precision {precision} does not work on this device ({device.type}). Use {other}, or no.")


def with_seed(options: OptionsT, seed: int | None) -> OptionsT:
    """`options` with a seed that all processes share: `seed` (a resumed run's), else --seed, else a fresh one, logged."""
    chosen = [seed if seed is not None else options.training.seed]
    if chosen[0] is None:
        chosen = [secrets.randbelow(2**32)]
        if PartialState().num_processes > 1:
            broadcast_object_list(chosen)
        logger.info("no --seed given: using %d", chosen[0])
    return replace(options, training=replace(options.training, seed=chosen[0]))


def seed_default_generators(seed: int, device: torch.device) -> None:
    """Key the generators that only foreign code uses (dropout of adapters and models), once per micro-step.

    `torch.manual_seed` reaches every kind of device there could be, which takes 0.2 ms; these two are all that a step uses.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@dataclass(frozen=True)
class RunLength:
    """How long a run is, in micro-batches of one process and in updates of the weights."""

    batches_per_epoch: int
    accumulation: int
    total_updates: int

    @property
    def updates_per_epoch(self) -> int:
        """The last update of an epoch takes what is left, however few."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_updates / self.updates_per_epoch)

    @classmethod
    def of(cls, training: TrainingOptions, batches_per_epoch: int) -> RunLength:
        """--max_train_epochs wins over --max_train_steps, as in sd-scripts."""
        accumulation = training.gradient_accumulation_steps
        total = training.max_train_steps
        if training.max_train_epochs is not None:
            total = training.max_train_epochs * math.ceil(batches_per_epoch / accumulation)
        return cls(batches_per_epoch, accumulation, total)


@dataclass
class TrainState:
    """Where a run is. With the seed this is all that has to be known to continue it exactly."""

    step: int = 0
    """Updates made."""
    epoch: int = 0
    """Epochs completed."""
    position: int = 0
    """This process's micro-batches already trained in the current epoch."""
    micro_step: int = 0
    """This process's micro-batches since the run began; with the process's number, the key of its random numbers."""

    def advance(self, micro_batches: int, length: RunLength) -> bool:
        """Count one update of `micro_batches`; True when it completed an epoch."""
        self.step += 1
        self.position += micro_batches
        self.micro_step += micro_batches
        if self.position < length.batches_per_epoch:
            return False
        self.epoch, self.position = self.epoch + 1, 0
        return True
