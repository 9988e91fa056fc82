"""How much memory a training step really takes on a CPU, from what torch's profiler says of every allocation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.train_util import Trainer


def bytes_of_all_tensors() -> int:
    """In this process, each piece of memory once."""
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and item.device.type == "cpu" and item.layout is torch.strided:
            storage = item.untyped_storage()
            if storage.device.type == "cpu":  # not so for the stand-ins that a compiler leaves behind
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def rise_while(work: Callable[[], object]) -> int:
    """The most bytes allocated at one time by `work`, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(changes, key=lambda found: found[0]):
        now += change
        most = max(most, now)
    return most


def peak_of_update(trainer: Trainer, group: Sequence[TrainBatch], before: int) -> int:
    """Bytes of one update after the first; `before`: of the tensors that are not this run's."""
    trainer.trainable.train()
    trainer.trainable.before_step(0)
    trainer.update(group)
    resting = bytes_of_all_tensors() - before
    return resting + rise_while(lambda: trainer.update(group))
