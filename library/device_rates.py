"""What the device found can do and has: measured in a second, for plans of runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory_tracker import Work

_SECONDS = 0.4
"""Of each measurement."""
_MATRIX = {"cuda": 4096, "cpu": 1024}
_COPY = {"cuda": 2**29, "cpu": 2**26}
"""Bytes: larger than any cache."""

CUDA_CONTEXT = 600 * 2**20
"""Bytes that a process takes on a GPU before its first tensor (kernels and the driver's own). Assumed, not measured: it differs
between GPUs, drivers and builds of torch."""
CUBLAS_WORKSPACE = 64 * 2**20
"""What torch gives the matrix libraries to work in. Assumed: 32 MiB each for cuBLAS and cuBLASLt, as on Hopper."""
FRAGMENTATION = 0.05
"""Share of its memory that torch's CUDA allocator holds in pieces nobody can use. Assumed, not measured. Blocks of large
allocations are multiples of 2 MiB (kRoundLarge in CUDACachingAllocator)."""


@dataclass(frozen=True)
class DeviceRates:
    """Of one device, as measured now: other programs that use it count."""

    flops: float
    """Per second, in a matrix product of the run's dtype."""
    bytes: float
    """Per second, read or written."""

    def seconds(self, work: Work) -> float:
        """Matrix products and everything else take turns; nothing waits for data."""
        return work.flops / self.flops + work.moved_bytes / self.bytes


def measure_rates(device: torch.device, dtype: torch.dtype) -> DeviceRates:
    size = _MATRIX.get(device.type, 1024)
    left = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(_COPY.get(device.type, 2**26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_time = _time_of(lambda: left @ left, device)
    copy_time = _time_of(lambda: target.copy_(source), device)
    return DeviceRates(2 * size**3 / product_time, 2 * source.nbytes / copy_time)


def _time_of(call: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one call, on average; the first one is not counted."""
    call()
    _wait(device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        call()
        _wait(device)
        count += 1
    return (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_memory(device: torch.device) -> int:
    """Bytes that a process takes on the device beside its tensors; 0 on a CPU, where they are main memory like any other."""
    return CUDA_CONTEXT + CUBLAS_WORKSPACE if device.type == "cuda" else 0


def free_memory(device: torch.device) -> int:
    """Bytes that this run can use, its tensors and `own_memory` together."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # creates the context, which `own_memory` counts
        return min(free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT, total)
    import psutil

    return int(psutil.virtual_memory().available)


def process_memory() -> int:
    """Bytes of main memory that this process has now."""
    import psutil

    return int(psutil.Process().memory_info().rss)
