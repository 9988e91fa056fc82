"""How weights travel between main memory and the device: the mechanism half of block swap, which knows nothing about blocks.

`CudaTransport` copies on streams of its own, from pinned memory, and orders everything by events: the host never waits.
`CpuTransport` makes the same moves with real copies. Memory whose contents have not arrived is full of NaN there, and a load
arrives only when it is waited for, so that a missing wait or a use of a block that is not there shows in the results.
"""

from __future__ import annotations

import logging
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Of tensors inside a flat buffer, in bytes: what kernels ask for, and what the device's own allocator gives."""
PAGE = 4096
PINNED_SHARE = 0.5
"""Of physical memory: how much of it all processes of a machine may pin together, unless told otherwise."""


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ---- layout of a flat buffer -------------------------------------------------------------------------------------------


def memory_of(tensor: Tensor) -> tuple[int, int, int]:
    """(address of the storage, first byte, end byte) of what `tensor` can reach; strides may leave gaps."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    reach = 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), start, start + (reach * tensor.element_size() if tensor.numel() else 0)


def overlapping(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that overlap in memory, together; in order of the first index."""
    pieces: list[list[int]] = []
    storage, piece_end = -1, 0
    for own_storage, start, end, index in sorted((*memory_of(tensor), index) for index, tensor in enumerate(tensors)):
        if pieces and own_storage == storage and start < piece_end:
            pieces[-1].append(index)
            piece_end = max(piece_end, end)
        else:
            pieces.append([index])
            storage, piece_end = own_storage, end
    return sorted(sorted(piece) for piece in pieces)


@dataclass(frozen=True)
class FlatLayout:
    """Where tensors lie in one flat buffer of bytes. Strides are kept, and tensors that share memory still do."""

    starts: tuple[int, ...]
    """Of each tensor, in bytes."""
    num_bytes: int
    _copies: tuple[tuple[int, int, int, int], ...]
    """(index of a tensor on the storage, first byte there, number of bytes, byte in the buffer) of each piece of memory."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> FlatLayout:
        starts, copies, size = [0] * len(tensors), [], 0
        for piece in overlapping(tensors):
            spans = {index: memory_of(tensors[index])[1:] for index in piece}
            begin, end = min(start for start, _ in spans.values()), max(end for _, end in spans.values())
            if any((start - begin) % tensors[index].element_size() for index, (start, _) in spans.items()):
                begin -= begin % 16  # views of several dtypes on one memory
            for index, (start, _) in spans.items():
                starts[index] = size + start - begin
            copies.append((piece[0], begin, end - begin, size))
            size = round_up(size + end - begin, ALIGNMENT)
        return cls(tuple(starts), size, tuple(copies))

    def fill(self, buffer: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy what the tensors of `of` hold into `buffer` (uint8)."""
        for index, begin, length, at in self._copies:
            storage = tensors[index].untyped_storage()
            piece = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, begin, (length,), (1,))
            buffer[at : at + length].copy_(piece)

    def views(self, buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors inside `buffer` with the shapes, strides and dtypes of `like`."""
        found = []
        for start, tensor in zip(self.starts, like, strict=True):
            offset = (buffer.storage_offset() + start) // tensor.element_size()
            found.append(torch.as_strided(buffer.view(tensor.dtype), tensor.shape, tensor.stride(), offset))
        return found


def absent(like: Tensor, device: torch.device) -> Tensor:
    """What stands for a weight that is not on the device: its shape and dtype, NaN everywhere (-1 for integers), and a few
    bytes of memory. Writing into it is an error."""
    ones = torch.full((16,), 255, dtype=torch.uint8, device=device)
    return ones.view(like.dtype)[0].expand(like.shape)


# ---- memory ------------------------------------------------------------------------------------------------------------


def physical_memory() -> int:
    """Bytes of main memory this process can use: the machine's, or its container's limit."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        total = min(total, int(text))
    return total


def local_processes() -> int:
    """Of this run, on this machine."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


class PinnedBudget:
    """How much memory this process may pin: None for its share of half the physical memory."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = int(physical_memory() * PINNED_SHARE) // local_processes() if limit is None else limit
        self.used = 0
        self.refused = 0
        """Bytes that were not pinned, because of the limit or because the system would not."""
        self._warned = False

    def reserve(self, num_bytes: int) -> bool:
        if self.used + num_bytes > self.limit:
            self.refused += num_bytes
            return False
        self.used += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        self.used -= num_bytes

    def warn(self, what: str) -> None:
        """If anything was refused: one line, once, that says what it costs."""
        if self.refused and not self._warned:
            self._warned = True
            logger.warning(
                "%.1f GiB of %s are in pageable memory (%.1f GiB are pinned; the limit is %.1f GiB): their copies run at about "
                "half the speed and hold up the computing. Swap fewer blocks, or raise --pinned_memory_limit",
                self.refused / 2**30,
                what,
                self.used / 2**30,
                self.limit / 2**30,
            )


@dataclass(eq=False)
class HostBuffer:
    """Flat main memory (uint8) of one block."""

    flat: Tensor


@dataclass(eq=False)
class Slot:
    """Flat device memory (uint8) that blocks take turns in."""

    flat: Tensor
    ready: Any = None
    """Event: the last load has arrived."""
    arriving: HostBuffer | None = None
    """`CpuTransport`: a load nobody has waited for."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """A tensor that is on its way to the device."""

    tensor: Tensor
    event: Any = None

    def get(self) -> Tensor:
        """It, for what is queued from now on."""
        if self.event is not None:
            current = torch.cuda.current_stream(self.tensor.device)
            current.wait_event(self.event)
            self.tensor.record_stream(current)
        return self.tensor


class Transport(ABC):
    """Moves of flat buffers. All methods return at once; order between them, and with computing, is kept by the device."""

    def __init__(self, device: torch.device, budget: PinnedBudget) -> None:
        self.device = device
        self.budget = budget

    @abstractmethod
    def host_buffer(self, num_bytes: int) -> HostBuffer: ...

    def slot(self, num_bytes: int) -> Slot:
        return Slot(torch.empty(num_bytes, dtype=torch.uint8, device=self.device))

    @abstractmethod
    def load(self, host: HostBuffer, slot: Slot) -> None:
        """Begin host → slot, after everything queued so far that uses the slot, and after copies into `host`."""

    @abstractmethod
    def wait(self, slot: Slot) -> None:
        """What is queued from now on sees the slot's last load."""

    @abstractmethod
    def store(self, slot: Slot, host: HostBuffer) -> None:
        """Begin slot → host, after everything queued so far; a later load into the slot comes after it."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> Tensor:
        """Begin a copy into main memory; readable there after `finish`."""

    @abstractmethod
    def to_device(self, tensor: Tensor) -> Arrival:
        """Begin a copy on the device, after copies into `tensor`."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything begun has arrived."""


class CpuTransport(Transport):
    """Simulates a device in main memory, at its least obliging: see the module's text."""

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        return HostBuffer(torch.zeros(num_bytes, dtype=torch.uint8))

    def slot(self, num_bytes: int) -> Slot:
        slot = super().slot(num_bytes)
        slot.flat.fill_(255)
        return slot

    def load(self, host: HostBuffer, slot: Slot) -> None:
        slot.flat.fill_(255)  # NaN in every floating-point format
        slot.arriving = host

    def wait(self, slot: Slot) -> None:
        if slot.arriving is not None:
            slot.flat[: slot.arriving.flat.numel()].copy_(slot.arriving.flat)
            slot.arriving = None

    def store(self, slot: Slot, host: HostBuffer) -> None:
        host.flat.copy_(slot.flat[: host.flat.numel()])

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_device(self, tensor: Tensor) -> Arrival:
        return Arrival(tensor.clone())

    def finish(self) -> None:
        return


def _pin(memory: Tensor, device: torch.device) -> bool:
    """Pin memory that exists: the caching allocator of pinned memory would round its size up to a power of two."""
    cudart: Any = torch.cuda.cudart()
    with torch.cuda.device(device):
        if int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
            return True
        try:  # the runtime reports the refusal once more with the next kernel: here, where nobody is hurt
            torch.zeros(1, device=device)
        except RuntimeError as error:
            logger.debug("main memory was not pinned: %s", error)
    return False


def _unpin(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(memory.data_ptr())


def pinned_like(tensor: Tensor, budget: PinnedBudget) -> Tensor:
    """Main memory for a copy of `tensor`: pinned while the budget lasts, given back to it when the memory is no longer used.

    torch's allocator of pinned memory takes whole powers of two, and has them for the next copies of that size.
    """
    num_bytes = 1 << max(tensor.nbytes - 1, 0).bit_length()
    if budget.reserve(num_bytes):
        try:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:  # the system would not
            logger.debug("main memory was not pinned: %s", error)
            budget.release(num_bytes)
            budget.refused += num_bytes
        else:
            weakref.finalize(host, budget.release, num_bytes).atexit = False
            return host
    return torch.empty_like(tensor, device="cpu")


class CudaTransport(Transport):
    """One stream each way. Host buffers are pinned as far as the budget goes."""

    def __init__(self, device: torch.device, budget: PinnedBudget) -> None:
        super().__init__(device, budget)
        self.incoming = torch.cuda.Stream(device)
        self.outgoing = torch.cuda.Stream(device)

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        size = round_up(num_bytes, PAGE)
        memory = torch.empty(size + PAGE, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % PAGE :][:size]  # whole pages: two buffers on one page cannot both be pinned
        host = HostBuffer(memory[:num_bytes])
        if self.budget.reserve(size):
            if _pin(memory, self.device):
                weakref.finalize(host, _unpin, memory, self.device).atexit = False
                weakref.finalize(host, self.budget.release, size).atexit = False
            else:
                self.budget.release(size)
                self.budget.refused += size
        return host

    def load(self, host: HostBuffer, slot: Slot) -> None:
        self.incoming.wait_stream(torch.cuda.current_stream(self.device))
        self.incoming.wait_stream(self.outgoing)
        with torch.cuda.stream(self.incoming):
            slot.flat[: host.flat.numel()].copy_(host.flat, non_blocking=True)
        slot.ready = self.incoming.record_event()

    def wait(self, slot: Slot) -> None:
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def store(self, slot: Slot, host: HostBuffer) -> None:
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outgoing):
            host.flat.copy_(slot.flat[: host.flat.numel()], non_blocking=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = pinned_like(tensor, self.budget)
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outgoing):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.outgoing)
        return host

    def to_device(self, tensor: Tensor) -> Arrival:
        self.incoming.wait_stream(self.outgoing)
        with torch.cuda.stream(self.incoming):
            arriving = tensor.to(self.device, non_blocking=True)
        return Arrival(arriving, self.incoming.record_event())

    def finish(self) -> None:
        self.outgoing.synchronize()
        self.incoming.synchronize()


def make_transport(device: torch.device, pinned_limit: int | None = None) -> Transport:
    """pinned_limit: bytes this process may pin; None: its share of half the physical memory."""
    if device.type == "cpu":
        return CpuTransport(device, PinnedBudget(pinned_limit))
    if device.type == "cuda":
        return CudaTransport(device, PinnedBudget(pinned_limit))
    raise UserError(
        f"--blocks_to_swap: blocks are swapped between main memory and a CUDA device, and this run uses '{device.type}'. "
        "Leave --blocks_to_swap out."
    )
