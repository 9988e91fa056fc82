"""Which pictures are trained together, and the order of an epoch's batches: arrays, small enough for every worker to make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from library.buckets import Size
from library.compact import ReadOnlySequence, SharedArray
from library.records import RecordTable

Item = tuple[int, int]
"""(index of a record in its part, which of its repeats)."""

Batch = tuple[int, list[Item]]
"""(which part, its items)."""


@dataclass(frozen=True)
class Part:
    """The pictures of one [[datasets]] that are trained together: one batch size, and batches of one bucket."""

    records: RecordTable
    buckets: Mapping[Size, SharedArray]
    """By size; int32 [N, 2]: an `Item` a row."""
    batch_size: int
    multiplier: float

    @classmethod
    def of(cls, records: RecordTable, batch_size: int, multiplier: float) -> Part:
        buckets, repeats = {}, records.rows["repeats"]
        for size, numbers in records.by_bucket():
            counts = repeats[numbers]
            before = np.repeat(np.cumsum(counts) - counts, counts)  # items of the records in front
            items = np.stack([np.repeat(numbers, counts), np.arange(counts.sum()) - before], axis=1)
            buckets[size] = SharedArray(items.astype(np.int32))
        return cls(records, buckets, batch_size, multiplier)

    def num_batches(self) -> int:
        """The last batch of a bucket may be short; it is trained like the others."""
        return sum(math.ceil(len(items) / self.batch_size) for items in self.buckets.values())


class EpochPlan(ReadOnlySequence[Batch]):
    """The batches of an epoch, in their order."""

    def __init__(self, parts: Sequence[Part], shuffle: Callable[..., list[int]]) -> None:
        """shuffle: the numbers below its first argument in the order that the rest of them names."""
        items: list[np.ndarray] = [np.zeros((0, 2), np.int32)]
        batches: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
        count = 0
        for number, part in enumerate(parts):
            for size, bucket in part.buckets.items():
                items.append(bucket.values[shuffle(len(bucket), "bucket", number, size)])
                starts = np.arange(0, len(bucket), part.batch_size)
                ends = np.minimum(starts + part.batch_size, len(bucket))
                batches.append(np.stack([np.full(len(starts), number), starts + count, ends + count], axis=1))
                count += len(bucket)
        self._items = np.concatenate(items)
        self._batches = np.concatenate(batches).astype(np.int64)[shuffle(sum(map(len, batches)), "batches")]

    def __len__(self) -> int:
        return len(self._batches)

    def _item(self, index: int) -> Batch:
        part, start, end = self._batches[index].tolist()
        return part, [(record, repeat) for record, repeat in self._items[start:end].tolist()]
