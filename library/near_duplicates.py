"""Pictures that look the same, for finding training pictures among those held out for validation.

The hash is a difference hash: of the picture, grey and 9x8 pixels large, whether each of 8x8 pixels is darker than its right
neighbour. It hardly changes when a picture is resized, recompressed or a little recoloured.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.errors import UserError
from library.image_io import decode, resize

MAX_DISTANCE = 4
"""Bits of 64 in which two pictures that count as the same may differ; unrelated ones differ in 32 on average."""
_THREADS = 4
_ROWS = 512  # compared at a time


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


def _hash_of(path: Path) -> int | None:
    """None for a file that cannot be read: others report it."""
    try:
        return difference_hash(decode(path)[0])
    except UserError:
        return None


def _hashes(paths: Sequence[Path]) -> tuple[list[Path], np.ndarray]:
    """Those that can be read, with their hashes [N, 8] uint8."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [(path, value) for path, value in zip(paths, pool.map(_hash_of, paths), strict=True) if value is not None]
    hashes = np.array([list(value.to_bytes(8, "big")) for _, value in found], np.uint8).reshape(-1, 8)
    return [path for path, _ in found], hashes


def near_duplicates(held_out: Sequence[Path], trained: Sequence[Path]) -> list[Pair]:
    """For each picture held out that has one among those trained, the most similar. Every picture is decoded once."""
    own, own_hashes = _hashes(list(dict.fromkeys(held_out)))
    others, other_hashes = _hashes(list(dict.fromkeys(trained)))
    if not own or not others:
        return []
    ones = np.array([value.bit_count() for value in range(256)], np.uint8)
    pairs = []
    for start in range(0, len(own), _ROWS):
        distances = np.zeros((len(own_hashes[start : start + _ROWS]), len(others)), np.uint8)
        for byte in range(8):
            distances += ones[own_hashes[start : start + _ROWS, None, byte] ^ other_hashes[None, :, byte]]
        nearest = distances.argmin(1)
        for row, column in enumerate(nearest.tolist()):
            distance = int(distances[row, column])
            if distance <= MAX_DISTANCE:
                pairs.append(Pair(own[start + row], others[column], distance))
    return pairs
