"""The pictures of a dataset: what is known of each, and all of them in little memory."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from library.buckets import Placement, Size
from library.compact import PathBuilder, Paths, ReadOnlySequence, SharedArray, TextBuilder, Texts
from library.config_util import SubsetConfig
from library.image_io import choose_crop, resolve_interpolation


@dataclass(frozen=True, slots=True)
class Record:
    """One picture of a dataset, and everything about it that does not change between epochs."""

    key: str
    """Names the record in random draws: where it stands in the configuration, not where its folder lies."""
    path: Path
    size: Size
    caption: str
    placement: Placement
    subset: SubsetConfig
    repeats: int
    loss_weight: float
    paired: Path | None = None
    """Its mask, or (`subset.conditioned`) what a ControlNet is given with it."""
    counted: str | None = None
    """The text whose tags are counted for `ss_tag_frequency`."""

    @property
    def recipe(self) -> str:
        """What the pixels given to the VAE depend on, beyond the file: equal recipes share a cache entry."""
        left_top = choose_crop(self.placement)
        how = resolve_interpolation(self.size, self.placement.resized, self.subset.resize_interpolation)
        if self.size == self.placement.resized:
            how = "none"
        (width, height), (full_width, full_height) = self.placement.bucket, self.placement.resized
        alpha = " with alpha" if self.subset.alpha_mask else ""  # weighs the pixels when they are resized; is kept with them
        return f"{width}x{height} from {full_width}x{full_height} at {left_top.left},{left_top.top} by {how}{alpha}"


_ROW = np.dtype(
    [
        ("text", np.int32),  # where its texts stand
        ("subset", np.int32),
        ("size", np.int32, 2),
        ("bucket", np.int32, 2),
        ("resized", np.int32, 2),
        ("repeats", np.int32),
        ("loss_weight", np.float64),
    ]
)
_PACKED = struct.Struct("=9id")


@dataclass(frozen=True, eq=False)
class RecordTable(ReadOnlySequence[Record]):
    """Records that are made when they are asked for, out of about a hundred bytes each beside their texts."""

    subsets: tuple[SubsetConfig, ...]
    numbers: SharedArray  # [N] of _ROW
    keys: Texts
    paths: Paths
    captions: Texts
    paired: Paths | None
    counted: Texts | None
    """None where it is the caption."""

    @classmethod
    def of(cls, records: Iterable[Record]) -> RecordTable:
        """Takes them one by one, so that they need not all be there at the same time."""
        subsets: dict[int, tuple[int, SubsetConfig]] = {}
        keys, captions, counted, paths, paired = TextBuilder(), TextBuilder(), TextBuilder(), PathBuilder(), PathBuilder()
        rows = bytearray()
        is_paired, counts_captions = False, True
        for number, record in enumerate(records):
            subset, _ = subsets.setdefault(id(record.subset), (len(subsets), record.subset))
            place = record.placement
            sides = (*record.size, *place.bucket, *place.resized)
            rows += _PACKED.pack(number, subset, *sides, record.repeats, record.loss_weight)
            keys.add(record.key)
            paths.add(str(record.path))
            captions.add(record.caption)
            paired.add(str(record.paired) if record.paired else "")
            counted.add(record.counted or "")
            is_paired = is_paired or record.paired is not None
            counts_captions = counts_captions and record.counted == record.caption
        return cls(
            tuple(subset for _, subset in subsets.values()),
            SharedArray(np.frombuffer(rows, _ROW)),
            keys.done(),
            paths.done(),
            captions.done(),
            paired.done() if is_paired else None,
            None if counts_captions else counted.done(),
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def rows(self) -> np.ndarray:
        """[N] records of `_ROW`."""
        return self.numbers.values

    def _item(self, index: int) -> Record:
        text, subset, size, bucket, resized, repeats, loss_weight = self.rows[index]
        caption = self.captions[text]
        return Record(
            key=self.keys[text],
            path=self.paths[text],
            size=(int(size[0]), int(size[1])),
            caption=caption,
            placement=Placement((int(bucket[0]), int(bucket[1])), (int(resized[0]), int(resized[1]))),
            subset=self.subsets[subset],
            repeats=int(repeats),
            loss_weight=float(loss_weight),
            paired=self.paired[text] if self.paired is not None and self.paired.names[text] else None,
            counted=caption if self.counted is None else self.counted[text],
        )

    def where(self, test: Callable[[SubsetConfig], bool]) -> np.ndarray:
        """bool [N]: those of whose subset `test` holds."""
        of_subset = np.array([test(subset) for subset in self.subsets], bool)
        return of_subset[self.rows["subset"]] if len(self) else np.zeros(0, bool)

    def used_subsets(self) -> list[SubsetConfig]:
        """Those that have a record."""
        return [self.subsets[number] for number in np.unique(self.rows["subset"])]

    def numbers_of(self, subset: SubsetConfig) -> list[int]:
        """Those of `subset`."""
        return np.flatnonzero(self.where(lambda other: other is subset)).tolist()

    def among(self, paths: Container[Path]) -> np.ndarray:
        """bool [N]: those whose picture is one of `paths`."""
        return np.fromiter((self.paths[text] in paths for text in self.rows["text"].tolist()), bool, len(self))

    def take(self, chosen: np.ndarray, changes: Mapping[str, Any] | None = None) -> RecordTable:
        """Those that `chosen` (bool [N], or numbers) names, in the same memory for texts, with `changes` to their columns."""
        rows = self.rows[chosen]
        for name, value in (changes or {}).items():
            rows[name] = value
        return replace(self, numbers=SharedArray(rows))

    def joined(self, other: RecordTable) -> RecordTable:
        """With those of `other` behind: both taken from one table."""
        return replace(self, numbers=SharedArray(np.concatenate([self.rows, other.rows])))

    def by_bucket(self) -> Iterator[tuple[Size, np.ndarray]]:
        """Each bucket, by size, with the numbers of its records, in their order."""
        rows = self.rows
        buckets, which = np.unique(rows["bucket"].reshape(-1, 2), axis=0, return_inverse=True)
        order = np.argsort(which.reshape(-1), kind="stable")
        ends = np.cumsum(np.bincount(which.reshape(-1), minlength=len(buckets)))
        for (width, height), end, start in zip(buckets.tolist(), ends.tolist(), [0, *ends.tolist()], strict=False):
            yield (width, height), order[start:end]
