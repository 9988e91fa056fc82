"""Activations kept in main memory between forward and backward (`--cpu_offload_checkpointing`).

With gradient checkpointing, what autograd keeps of a block is its input; here it waits in main memory. Copies run on streams of
their own, and backward begins to bring a tensor back while it works on those that were saved after it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from library.offload_transport import Arrival, PinnedBudget, Transport, make_transport

MIN_BYTES = 1 << 20
"""Smaller tensors stay: their copies cost more than their memory is worth."""
PREFETCH = 2
"""Tensors on their way back at a time; a FLUX block saves two."""


@dataclass(eq=False)
class _Offloaded:
    """A tensor in main memory."""

    host: Tensor
    source: StorageWeakRef
    """Of the memory it was copied from; keeps the address from being used again while this exists."""
    order: list[weakref.ref[_Offloaded]]
    """All of its forward pass, as they were saved."""
    position: int
    arrival: Arrival | None = None
    used: bool = False


class ActivationOffload:
    """While `model` computes with a graph, what autograd saves goes to main memory. Together with block swap, attach either
    first: weights in its slots are never copied.

    budget: of pinned memory, where it is shared with block swap; when it is spent, copies go to pageable memory.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        budget: PinnedBudget | None = None,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        self.model = model
        self.min_bytes = min_bytes
        self.transport: Transport = make_transport(device)
        if budget is not None:
            self.transport.budget = budget
        self.offloaded_bytes = 0
        """In this forward pass, each tensor counted once."""
        self._known: weakref.WeakValueDictionary[Any, _Offloaded] = weakref.WeakValueDictionary()
        self._order: list[weakref.ref[_Offloaded]] = []
        self._weights: set[int] = set()
        self._active: list[saved_tensors_hooks | None] = []
        self._handles = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, args: object) -> None:
        hooks = None
        if torch.is_grad_enabled():
            self._weights = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
            self._order, self.offloaded_bytes = [], 0
            hooks = saved_tensors_hooks(self._pack, self._unpack)
            hooks.__enter__()
        self._active.append(hooks)

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        hooks = self._active.pop() if self._active else None
        if hooks is not None:
            hooks.__exit__(None, None, None)
        self.transport.budget.warn("the weights and activations in main memory")

    def _stays(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type != self.transport.device.type
            or tensor.layout is not torch.strided
            or is_traceable_wrapper_subclass(tensor)
            or tensor.numel() * tensor.element_size() < self.min_bytes
            or tensor.untyped_storage().data_ptr() in self._weights
        )

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if self._stays(tensor):
            return tensor
        source = StorageWeakRef(tensor.untyped_storage())
        key = (source.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = self._known.get(key)  # every block takes the same rotation and text mask
        if known is not None and not known.source.expired():
            return known
        packed = _Offloaded(self.transport.to_host(tensor), source, self._order, len(self._order))
        self.offloaded_bytes += tensor.numel() * tensor.element_size()
        self._known[key] = packed
        self._order.append(weakref.ref(packed))
        return packed

    def _unpack(self, packed: Tensor | _Offloaded) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        arrival = packed.arrival or self.transport.to_device(packed.host)
        packed.arrival, packed.used = None, True
        self._prefetch(packed)
        return arrival.get()

    def _prefetch(self, current: _Offloaded) -> None:
        """Begin to bring back what was saved before: backward needs it next."""
        coming = 0
        for reference in reversed(current.order[: current.position]):
            earlier = reference()
            if earlier is None or earlier.used:
                continue
            earlier.arrival = earlier.arrival or self.transport.to_device(earlier.host)
            coming += 1
            if coming == PREFETCH:
                return
