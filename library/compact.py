"""Many texts or paths in a few blocks of memory.

A Python object for each of 100,000 pictures takes a kilobyte, and takes it again in every data loader worker: a forked one
copies each page on which it counts a reference, a spawned one is sent everything. An array has one reference count, and torch
sends memory to spawned processes without a copy. (Arrays, not tensors: `--plan` asks for texts while tensors are simulated.)
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class ReadOnlySequence(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for, by `_item`; slices are lists."""

    def _item(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._item(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._item(index % len(self))

    def __iter__(self) -> Iterator[T]:
        return (self._item(number) for number in range(len(self)))


class Chained(ReadOnlySequence[T]):
    """Several sequences as one."""

    def __init__(self, *sequences: Sequence[T]) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return sum(map(len, self._sequences))

    def _item(self, index: int) -> T:
        for sequence in self._sequences:
            if index < len(sequence):
                return sequence[index]
            index -= len(sequence)
        raise IndexError(index)

    def __iter__(self) -> Iterator[T]:
        for sequence in self._sequences:
            yield from sequence


class SharedArray:
    """An array that is sent to a spawned process as a handle of shared memory, however many of them there are."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._sent: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._sent is None:
            self._sent = torch.from_numpy(np.ascontiguousarray(self.values).reshape(-1).view(np.uint8))
        return _received, (self._sent, self.values.dtype, self.values.shape)


def _received(sent: Tensor, dtype: np.dtype, shape: tuple[int, ...]) -> SharedArray:
    return SharedArray(sent.numpy().view(dtype).reshape(shape))


class TextBuilder:
    """Collects texts one behind the other, as UTF-8. File names need not be valid Unicode."""

    def __init__(self) -> None:
        self._data, self._starts = bytearray(), array("q", [0])

    def add(self, text: str) -> None:
        self._data += text.encode("utf-8", "surrogatepass")
        self._starts.append(len(self._data))

    def done(self) -> Texts:
        return Texts.of_arrays(np.frombuffer(self._data, np.uint8), np.frombuffer(self._starts, np.int64))


@dataclass(frozen=True, eq=False)
class Texts(ReadOnlySequence[str]):
    """Texts that do not change."""

    data: SharedArray  # uint8
    starts: SharedArray  # int64 [N + 1]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        builder = TextBuilder()
        for text in texts:
            builder.add(text)
        return builder.done()

    @classmethod
    def of_arrays(cls, data: np.ndarray, starts: np.ndarray) -> Texts:
        """From what `arrays` gives."""
        return cls(SharedArray(data), SharedArray(starts))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all texts, uint8, and where each begins, int64 [N + 1]."""
        return self.data.values, self.starts.values

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _item(self, index: int) -> str:
        start, stop = self.starts.values[index : index + 2].tolist()
        return self.data.values[start:stop].tobytes().decode("utf-8", "surrogatepass")


class PathBuilder:
    """Collects paths, each folder once."""

    def __init__(self) -> None:
        self._folders: dict[str, int] = {}
        self._folder_of = array("i")
        self._names = TextBuilder()

    def add(self, path: str) -> None:
        folder, name = os.path.split(path)
        self._folder_of.append(self._folders.setdefault(folder, len(self._folders)))
        self._names.add(name)

    def done(self) -> Paths:
        return Paths(tuple(self._folders), SharedArray(np.frombuffer(self._folder_of, np.int32)), self._names.done())


@dataclass(frozen=True, eq=False)
class Paths(ReadOnlySequence[Path]):
    """Paths, of which many lie in the same folders."""

    folders: tuple[str, ...]
    folder_of: SharedArray  # int32 [N]
    names: Texts

    def __len__(self) -> int:
        return len(self.names)

    def _item(self, index: int) -> Path:
        return Path(self.folders[int(self.folder_of.values[index])], self.names[index])


@dataclass(frozen=True, eq=False)
class Lookup:
    """Which of many texts a text is, without the texts: by a hash of 64 bits."""

    hashes: SharedArray  # uint64 [N], ascending
    numbers: SharedArray  # int32 [N]: which text has the hash

    @classmethod
    def of(cls, texts: Iterable[str]) -> Lookup:
        """Raises `ValueError` where two texts have one hash, which chance alone does not bring about."""
        hashes = np.fromiter(map(_hash, texts), np.uint64)
        numbers = np.argsort(hashes, kind="stable")
        ascending = hashes[numbers]
        if (ascending[1:] == ascending[:-1]).any():
            raise ValueError("two of the texts are the same, or have the same hash")
        return cls(SharedArray(ascending), SharedArray(numbers.astype(np.int32)))

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, text: str) -> int | None:
        """The number of `text`; None where it is not one of them."""
        wanted = np.uint64(_hash(text))
        place = int(np.searchsorted(self.hashes.values, wanted))
        if place == len(self) or self.hashes.values[place] != wanted:
            return None
        return int(self.numbers.values[place])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
