"""The pace of a run, and what slows it down without a word: memory that spills, programs beside it, code compiled again."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

WINDOW = 50
"""Updates whose median is compared."""
SLOWER = 1.5
"""A median so many times the best one is told."""
SETTLED = 100
"""Updates after which nothing should be compiled any more."""
FIRST_LOOK = 2
"""The update after which memory is first looked at, and again after every `WINDOW`: then everything has its place."""
SPILL = 2**28
"""Bytes beyond the GPU's own that are told: the figures compared are not of the same moment."""
_REMEDY = "Lower --train_batch_size, or add --gradient_checkpointing or --blocks_to_swap"


class DeviceMemory(NamedTuple):
    """Bytes of a GPU, and of what torch has there."""

    reserved: int
    """What torch's allocator holds, wherever the driver has put it."""
    free: int
    total: int
    retries: int
    """Allocations that worked only after torch had given memory back."""

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        return cls(torch.cuda.memory_reserved(device), *torch.cuda.mem_get_info(device), retries)

    @property
    def spilled(self) -> int:
        """What torch holds and the GPU does not have in use: a driver has put it into main memory. The least there can be, as
        other programs' share of what is in use is not known."""
        return max(0, self.reserved - (self.total - self.free))

    @property
    def is_full(self) -> bool:
        return self.retries > 0 or self.free < self.total / 50


def spill_message(memory: DeviceMemory) -> str | None:
    """What is to be told of memory that has spilled; None where it has not."""
    if memory.spilled < SPILL:
        return None
    used = memory.total - memory.free
    spilled, reserved, used_gib, total = (f"{n / 2**30:.1f} GiB" for n in (memory.spilled, memory.reserved, used, memory.total))
    return (
        f"the GPU's memory has spilled into main memory, {spilled} at least: this run holds {reserved}, and of the GPU's "
        f"{total} only {used_gib} are in use. Updates take many times as long. {_REMEDY}; or have the driver fail instead "
        '(Windows: "CUDA - Sysmem Fallback Policy" in the NVIDIA control panel)'
    )


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that torch had on a GPU, or that the process had in main memory; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Watchdog:
    """Times every update. A thing that is wrong is told once, with its likely cause."""

    def __init__(self, device: torch.device, memory: Callable[[], DeviceMemory] | None = None) -> None:
        """memory: how the device's is looked at; unless given, a GPU is asked."""
        self.device = device
        self.memory = partial(DeviceMemory.of, device) if memory is None and device.type == "cuda" else memory
        self.laps: list[float] = []
        self.num_laps = 0
        self.best: float | None = None
        self._told: set[str] = set()
        self._graphs = 0
        self._last: float | None = None

    def pause(self) -> None:
        """What came since the last lap (a save, previews) is not part of the next one."""
        self._last = time.monotonic()

    def lap(self, images: int) -> dict[str, float]:
        """Called after each update of so many images; returns what is logged. On a GPU a lap is when the update was asked for:
        single ones say little, their median is right."""
        now = time.monotonic()
        seconds, self._last = None if self._last is None else now - self._last, now
        self.num_laps += 1
        self._watch_compiler()
        if self.memory is not None and self.num_laps % WINDOW == FIRST_LOOK and (spilled := spill_message(self.memory())):
            self._tell("spilled", spilled)
        if not seconds:
            return {}
        self.laps.append(seconds)
        if len(self.laps) == WINDOW:
            self._compare(statistics.median(self.laps))
            self.laps = []
        logs = {"speed/steps_per_second": 1 / seconds, "speed/images_per_second": images / seconds}
        if (peak := peak_memory(self.device)) is not None:
            logs["memory/peak_gib"] = peak / 2**30
        return logs

    def _compare(self, median: float) -> None:
        if self.best is not None and median > SLOWER * self.best:
            self._tell(
                "slower", f"updates take {median:.2f} s now and took {self.best:.2f} s before. Likely: {self._why_slower()}."
            )
        self.best = median if self.best is None else min(self.best, median)

    def _why_slower(self) -> str:
        if self.memory is None:
            return "another program uses the processor or the memory, or the disk the pictures are on is slow"
        memory = self.memory()
        if memory.is_full:
            return f"the GPU's memory is full ({memory.free / 2**30:.1f} GiB free, {memory.retries} retries). {_REMEDY}"
        return "another program uses the GPU, it is too hot, or pictures are read too slowly (--cache_latents)"

    def _watch_compiler(self) -> None:
        compiler = sys.modules.get("torch._dynamo.utils")
        if compiler is None:
            return
        graphs = compiler.counters["stats"]["unique_graphs"]
        if self.num_laps > SETTLED and graphs > self._graphs:
            self._tell(
                "compiled",
                f"code was compiled again after {self.num_laps} updates: a size that had not come before. Fewer buckets "
                "(--bucket_reso_steps) or no --torch_compile avoid the wait",
            )
        self._graphs = graphs

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("%s", message)
