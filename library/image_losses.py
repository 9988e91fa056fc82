"""Which pictures are learned badly: a running loss for each, from which bad captions and broken files come to light.

A picture's loss depends on the time it was seen at far more than on the picture, so each is divided by the running mean of all
losses at about that time. What is left is 1 for a picture like all others.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.checkpoint import atomic_write_text
from library.late_copy import LateCopy

FILE = "image_losses.csv"
NUM_BINS = 20
MEMORY = 0.98
"""Share of a time's mean that one more loss leaves."""


@dataclass
class ImageLoss:
    """Of one picture, over the times it was seen."""

    count: int = 0
    ratios: float = 0.0
    """Sum of its losses, each over the mean at its time."""
    losses: float = 0.0

    @property
    def ratio(self) -> float:
        return self.ratios / self.count


class SeenImages(NamedTuple):
    """A micro-batch of B pictures."""

    names: tuple[str, ...]
    losses: Tensor  # [B], without weights
    times: Tensor  # [B]


class ImageLosses:
    """The table of one process."""

    def __init__(self, latest_time: float) -> None:
        """latest_time: what times are counted up to, `Objective.latest_time`."""
        self.latest_time = latest_time
        self.images: dict[str, ImageLoss] = {}
        self.means: list[float | None] = [None] * NUM_BINS
        self._late: LateCopy[tuple[str, ...]] = LateCopy()

    def push(self, batches: Sequence[SeenImages]) -> None:
        """The micro-batches of one update."""
        names = tuple(name for batch in batches for name in batch.names)
        values = torch.cat([torch.stack([batch.losses.detach().float(), batch.times.float()]) for batch in batches], dim=1)
        for seen, (losses, times) in self._late.push(names, values):
            self._take(seen, losses, times)

    def flush(self) -> None:
        for seen, values in self._late.flush():
            self._take(seen, *values)

    def _take(self, names: Sequence[str], losses: Sequence[float], times: Sequence[float]) -> None:
        for name, loss, time in zip(names, losses, times, strict=True):
            if not math.isfinite(loss):  # of a step that fp16's loss scaling skipped
                continue
            place = min(int(time / self.latest_time * NUM_BINS), NUM_BINS - 1)
            mean = self.means[place]
            image = self.images.setdefault(name, ImageLoss())
            image.count += 1
            image.losses += loss
            image.ratios += loss / mean if mean else 1.0
            self.means[place] = loss if mean is None else MEMORY * mean + (1 - MEMORY) * loss

    def state(self) -> dict[str, Any]:
        """What `restore` takes: JSON values."""
        self.flush()
        return {"means": self.means, "images": {name: [i.count, i.ratios, i.losses] for name, i in self.images.items()}}

    def restore(self, states: Sequence[Mapping[str, Any]], rank: int = 0, count: int = 1) -> None:
        """Go on from the tables of all processes: this one's own, or where they were not `count`, all of them on the first."""
        own = [states[rank]] if len(states) == count else states
        self.means = list(own[0]["means"])
        self.images = merged(state["images"] for state in own) if len(own) == 1 or rank == 0 else {}


def merged(tables: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, ImageLoss]:
    """The `images` of several processes' states as one table."""
    total: dict[str, ImageLoss] = {}
    for table in tables:
        for name, (count, ratios, losses) in table.items():
            image = total.setdefault(name, ImageLoss())
            image.count, image.ratios, image.losses = image.count + int(count), image.ratios + ratios, image.losses + losses
    return total


def worst(images: Mapping[str, ImageLoss], count: int) -> list[tuple[str, ImageLoss]]:
    """Those with the highest ratio, of pictures that were seen at least half as often as is usual."""
    usual = sum(image.count for image in images.values()) / max(1, len(images))
    seen = [(name, image) for name, image in images.items() if image.count >= usual / 2]
    return sorted(seen, key=lambda entry: (-entry[1].ratio, entry[0]))[:count]


def write_table(images: Mapping[str, ImageLoss], path: Path) -> None:
    """A CSV file, the highest ratio first."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", "ratio", "loss", "seen"])
    for name, image in sorted(images.items(), key=lambda entry: (-entry[1].ratio, entry[0])):
        writer.writerow([name, f"{image.ratio:.4f}", f"{image.losses / image.count:.6f}", image.count])
    atomic_write_text(path, text.getvalue())
