"""A safetensors file written one tensor at a time, for tools whose result would not fit into memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.model_io import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, and freed before the next one is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_streamed(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write `path` with at most one of `tensors` in memory, each cast to its dtype.

    Layout: eight bytes with the length of a JSON table, the table, the data; the wider dtypes first, so that every tensor is
    aligned (https://huggingface.co/docs/safetensors/index#format). Raises `ValueError` where a made tensor has another shape.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    table = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    table += b" " * (-len(table) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(table)) + table)
        for name in names:
            wanted = tensors[name]
            made = wanted.make().detach().to("cpu", wanted.dtype).contiguous()
            if tuple(made.shape) != wanted.shape:
                raise ValueError(f"{name}: made as {tuple(made.shape)}, announced as {wanted.shape}")
            stream.write(memoryview(made.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
