"""Pictures that look the same, for finding training pictures among those held out for validation.

The hash is a difference hash: of the picture, grey and 9x8 pixels large, whether each of 8x8 pixels is darker than its right
neighbour. It hardly changes when a picture is resized, recompressed or a little recoloured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.errors import UserError
from library.file_index import KnownFiles, in_threads
from library.image_io import decode, resize

MAX_DISTANCE = 4
"""Bits of 64 in which two pictures that count as the same may differ; unrelated ones differ in 32 on average."""
_ROWS = 256  # compared at a time


class Pair(NamedTuple):
    """A picture held out, and the training picture most like it."""

    held_out: Path
    trained: Path
    distance: int
    """Bits that differ; 0 for a copy."""


def difference_hash(pixels: np.ndarray) -> int:
    """uint8 [H, W, 3] -> 64 bits."""
    grey = resize(pixels, (9, 8), "area").astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # [8, 9]
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def _look(path: Path) -> int:
    return difference_hash(decode(path, rough=(72, 64))[0])


def _hashes(paths: Sequence[Path], files: KnownFiles) -> tuple[list[Path], np.ndarray]:
    """Those that can be read (others report the rest), with their hashes [N] uint64."""

    def attempt(path: Path) -> int | None:
        try:
            return files.look(path, _look)
        except UserError:
            return None

    values = in_threads(attempt, list(paths))
    readable = [(path, value) for path, value in zip(paths, values, strict=True) if value is not None]
    return [path for path, _ in readable], np.array([value for _, value in readable], np.uint64)


def near_duplicates(held_out: Sequence[Path], trained: Sequence[Path], files: KnownFiles | None = None) -> list[Pair]:
    """For each picture held out that has one among those trained, the most similar.

    Every picture is decoded once, and never again where `files` knows it.
    """
    files = files or KnownFiles()
    own, own_hashes = _hashes(list(dict.fromkeys(held_out)), files)
    others, other_hashes = _hashes(list(dict.fromkeys(trained)), files)
    files.save()
    if not own or not others:
        return []
    pairs = []
    for start in range(0, len(own), _ROWS):
        distances = np.bitwise_count(own_hashes[start : start + _ROWS, None] ^ other_hashes[None])
        nearest = distances.argmin(1)
        for row, column in enumerate(nearest.tolist()):
            distance = int(distances[row, column])
            if distance <= MAX_DISTANCE:
                pairs.append(Pair(own[start + row], others[column], distance))
    return pairs
