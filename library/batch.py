"""What one step of training is given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from library.strategy_base import Conditioning


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One batch of one bucket. Exactly one of `images` and `latents` is present.

    Sizes are (height, width) in pixels; `crop_top_lefts` is what was really cut from the resized picture.
    """

    captions: tuple[str, ...]
    names: tuple[str, ...] = ()  # of the picture files
    images: Tensor | None = None  # [B, 3, H, W] in [-1, 1]
    latents: Tensor | None = None  # [B, C, h, w] as stored, see LatentSpec.normalize
    tokens: dict[str, Tensor] | None = None  # ids by encoder [B, N, M]; None when every encoder's outputs are cached
    conditioning: Conditioning | None = None  # cached fields; those of encoders that run live are None
    loss_weights: Tensor  # [B] float32; prior_loss_weight is already in it for regularisation images
    mask: Tensor | None = None  # [B, 1, h, w] in [0, 1]
    conditioning_images: Tensor | None = None  # [B, 3, H, W] in [-1, 1]: what a ControlNet is given, cut as the pictures are
    original_sizes: Tensor  # [B, 2] int64
    crop_top_lefts: Tensor  # [B, 2] int64
    target_sizes: Tensor  # [B, 2] int64
    preserve: Tensor | None = None  # [B] bool: rows whose target is the frozen model's own prediction; None: no row
    prior: Tensor | None = None  # [B, C, h, w] float16: that prediction, where it was made before training; other rows: 0
    prior_keys: tuple[int | None, ...] = ()  # of the noise and time of rows that have one
    latent_seeds: tuple[int, ...]  # one per row, from the picture's content: the key of its posterior sample
    chances: dict[str, Tensor] = field(default_factory=dict)  # [B] each: see `ImageDataset.chances`
    multiplier: float = 1.0  # network_multiplier of the dataset
    quantile: float | None = None  # validation: this quantile of the time density instead of a draw

    def __len__(self) -> int:
        return len(self.captions)

    def _map_tensors(self, change: Any) -> TrainBatch:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = change(value)
        if self.tokens is not None:
            changed["tokens"] = {name: change(value) for name, value in self.tokens.items()}
        changed["chances"] = {name: change(value) for name, value in self.chances.items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> TrainBatch:
        """Every tensor on `device`, without waiting for the copies (sizes and weights too: a step must not sync)."""
        batch = self._map_tensors(lambda value: value.to(device, non_blocking=True))
        return replace(batch, conditioning=self.conditioning and self.conditioning.to(device))

    def pin_memory(self) -> TrainBatch:
        """Called by the data loader: page-locked tensors, so that `to` can overlap with the step."""
        batch = self._map_tensors(lambda value: value.pin_memory())
        return replace(batch, conditioning=self.conditioning and self.conditioning._map(lambda value: value.pin_memory()))
