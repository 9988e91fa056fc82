"""Files with what the untrained model predicts of a picture, and the views, noises and times that it was asked about.

Numbers of a picture's predictions count as its readings do: number n is the view of epoch n // repeats, repeat n % repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.cache_io import Fingerprint, LostEntry, Verdict, describe_npz, read_array, stored_fingerprint, write_npz
from library.rng import key_to_seed


class StoredPrior(NamedTuple):
    """One prediction."""

    key: int
    """Of its noise and its time."""
    prediction: Tensor | None
    """[C, h, w] float16; None where it is still to be made."""


@dataclass(frozen=True)
class PriorFile:
    """Where the predictions of one picture are kept, each in an array of its own."""

    path: Path
    shape: tuple[int, int, int]
    count: int

    def check(self, fingerprint: Fingerprint) -> Verdict:
        """Whether the file has what the untrained model would predict now."""
        if not self.path.exists():
            return Verdict(False)
        arrays = describe_npz(self.path)
        stored = None if arrays is None else stored_fingerprint(arrays)
        if arrays is None or stored is None:
            return Verdict(False, "unreadable file")
        differing = fingerprint.differences(stored)
        fits = all(name in arrays and arrays[name].shape == self.shape for name in map(_name, range(self.count)))
        return Verdict(fits and not differing, " and ".join(differing) or ("" if fits else "predictions of another shape"))

    def save(self, predictions: Tensor, fingerprint: Fingerprint) -> None:
        """predictions: [count, C, h, w] float16."""
        arrays = {_name(number): prediction for number, prediction in enumerate(predictions.cpu().numpy())}
        write_npz(self.path, arrays | {"fingerprint": fingerprint.to_array()})

    def load(self, number: int) -> Tensor:
        """[C, h, w]. Raises `LostEntry`."""
        array = read_array(self.path, _name(number))
        if array is None or array.shape != self.shape:
            raise LostEntry(self.path)
        return torch.from_numpy(array.astype(np.float16, copy=False))


def _name(number: int) -> str:
    return f"prediction_{number}"


@dataclass(frozen=True)
class PriorCache:
    """The predictions of a data set's pictures. Without files it only says what they would be asked for."""

    seed: int
    choices: int
    """Most predictions of a picture."""
    files: Mapping[str, PriorFile] = field(default_factory=dict)
    """By `Record.key`."""

    def get(self, record: str, number: int) -> StoredPrior:
        """record: its key. Raises `LostEntry`."""
        key = key_to_seed(self.seed, "prior", record, number)
        return StoredPrior(key, self.files[record].load(number) if record in self.files else None)
