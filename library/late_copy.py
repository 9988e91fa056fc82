"""Numbers from the device, one step late: they are copied while the next step runs, so that no step waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Tag = TypeVar("Tag")


@dataclass
class _Pending(Generic[Tag]):
    tag: Tag
    host: Tensor
    copied: Any


class LateCopy(Generic[Tag]):
    """One tensor at a time on its way to the host. On the CPU there is nothing to wait for, and it comes back at once."""

    def __init__(self) -> None:
        self._pending: _Pending[Tag] | None = None

    def push(self, tag: Tag, values: Tensor) -> list[tuple[Tag, Sequence[Any]]]:
        """Ask for `values`, float32; returns what is ready, oldest first, with the tags it was pushed with."""
        ready = self.flush()
        if not values.is_cuda:
            return [*ready, (tag, values.detach().float().tolist())]
        host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()  # type: ignore[no-untyped-call]
        self._pending = _Pending(tag, host, copied)
        return ready

    def flush(self) -> list[tuple[Tag, Sequence[Any]]]:
        """What is still on its way, if anything."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        pending.copied.synchronize()  # asked for a whole step ago: done, unless the run ends here
        return [(pending.tag, pending.host.tolist())]
