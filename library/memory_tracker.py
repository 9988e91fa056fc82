"""What a piece of torch code needs, found by running it on tensors that have shapes and no memory.

`simulated()` gives torch's fake tensors: every operator is asked for the shape of its result and computes nothing.
`MemoryTracker` watches the operators go by and knows at every moment which memory would be in use. So the numbers come from
the code that will really run, autograd's graph and the optimizer included, and not from formulas about it.

What kernels allocate inside of themselves and free again is not seen: convolution and matrix product workspaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from library.offload_transport import round_up

CUDA_ROUNDING = 512
"""Bytes that torch's CUDA allocator rounds every allocation up to (kMinBlockSize in CUDACachingAllocator)."""
TEMPORARY = "activations"
"""What nobody has given another kind: activations, autograd's graph, and what operators hand to each other."""

_READ_OUT = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_MOVE_NOTHING = (_DEVICE, torch.ops.aten._unsafe_view.default)
"""Beside views."""
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextmanager
def simulated() -> Iterator[None]:
    """In here tensors are made without memory. Tensors from outside may be used; no value can be read."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # its notes of tensors it made are weak references, and a module cannot be moved (`torch.utils.swap_tensors`) while there is
    # one to a parameter
    converter: Any = mode.fake_tensor_converter
    converter.set_tensor_memo = lambda tensor, fake: None
    with mode:
        yield


@dataclass
class Peak:
    """The most memory in use at one time on one device, in bytes, by kind."""

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass
class Work:
    """What was computed. Operators with a known number of floating-point operations count as such, all others by the
    bytes they read and write."""

    flops: int = 0
    moved_bytes: int = 0

    def since(self, before: Work) -> Work:
        return Work(self.flops - before.flops, self.moved_bytes - before.moved_bytes)


@dataclass
class _Storage:
    device: str
    num_bytes: int
    kind: str
    alive: weakref.ref[Any]


def stored_bytes(num_bytes: int, device: str) -> int:
    """What an allocation of `num_bytes` takes on a kind of device ("cuda", "cpu")."""
    return round_up(num_bytes, CUDA_ROUNDING) if device == "cuda" else num_bytes


class MemoryTracker(TorchDispatchMode):
    """While active, knows the memory in use on each kind of device: `live`, and `peaks` since the last `reset_peaks`."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, dict[str, int]] = {}
        self.peaks: dict[str, Peak] = {}
        self.work = Work()
        self._storages: dict[int, _Storage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # torch asks more often than it computes
            return args[0].device
        if func is _READ_OUT:  # a value that only computing would tell: 1, and whatever is decided by it
            return _stand_in(args[0])
        out = func(*args, **kwargs)
        results = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        for tensor in results:
            self._see(tensor)
        self._count(func, args, kwargs, out, results)
        return out

    def reset_peaks(self) -> None:
        """Peaks are counted from what is in use now."""
        self.peaks = {}
        for device in self.live:
            self._rise(device)

    def mark(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """From now on the memory of `tensors` is of this kind."""
        for tensor in tensors:
            if tensor is None:
                continue
            self._see(tensor)
            found = self._storages.get(_key(tensor))
            if found is not None:
                self._add(found, -1)
                found.kind = kind
                self._add(found, 1)

    def in_use(self, device: str) -> int:
        return sum(self.live.get(device, {}).values())

    def peak(self, device: str) -> Peak:
        return self.peaks.get(device, Peak())

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._storages or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        size = stored_bytes(storage.nbytes(), tensor.device.type)

        def gone(reference: Any) -> None:
            known = self._storages.get(key)
            if known is not None and known.alive is reference:
                del self._storages[key]
                self._add(known, -1)

        entry = _Storage(tensor.device.type, size, TEMPORARY, weakref.ref(storage, gone))
        self._storages[key] = entry
        self._add(entry, 1)
        self._rise(entry.device)

    def _add(self, entry: _Storage, sign: int) -> None:
        kinds = self.live.setdefault(entry.device, {})
        kinds[entry.kind] = kinds.get(entry.kind, 0) + sign * entry.num_bytes

    def _rise(self, device: str) -> None:
        total = self.in_use(device)
        if total > self.peak(device).total:
            self.peaks[device] = Peak(total, dict(self.live[device]))

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        packet = func._overloadpacket
        if packet in flop_registry:
            self.work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet in (_CPU_ATTENTION, _CPU_ATTENTION_BACKWARD):
            backward = packet is _CPU_ATTENTION_BACKWARD
            q, k, v = args[1:4] if backward else args[:3]
            self.work.flops += attention_flops(q, k, v, products=5 if backward else 2)
        elif not func.is_view and func not in _MOVE_NOTHING:
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.work.moved_bytes += sum(tensor.nbytes for tensor in (*read, *results))


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *, products: int) -> int:
    """Of softmax attention on q, k, v [B, H, L, K]: 2 matrix products forward; 5 backward, one of which is recomputed."""
    batch, heads, length, width = q.shape
    return int(products * 2 * batch * heads * length * k.shape[2] * max(width, v.shape[3]))


def _stand_in(tensor: Tensor) -> bool | int | float:
    """The value where it is known: of a tensor from outside, or made of a number."""
    known = getattr(tensor, "constant", None) if isinstance(tensor, FakeTensor) else None if tensor.is_meta else tensor
    if known is not None:
        with unset_fake_temporarily():
            value: bool | int | float = known.item()
        return value
    return True if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 1


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
