"""What is Stable Diffusion 1.x/2.x's own in the checkpoints it is written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from library import clip_parts
from library.key_layout import KeyMap
from library.sd_utils import CLIP_PREFIX, OPEN_CLIP_PREFIX, SdModel
from library.unet_saving import UnetCheckpoint


@dataclass(frozen=True)
class SdCheckpoint(UnetCheckpoint):
    """A Stable Diffusion 1.x/2.x checkpoint."""

    model: SdModel
    index: ClassVar[Mapping[str, Any]] = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }

    def text_layout(self, name: str) -> tuple[str, KeyMap]:
        if self.model.version == "v2":
            return OPEN_CLIP_PREFIX, clip_parts.OPEN_CLIP_NAMES
        return CLIP_PREFIX, clip_parts.CLIP_NAMES

    def folder_text(self, name: str) -> tuple[str, KeyMap]:
        return name, clip_parts.CLIP_NAMES

    def unused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _unused_open_clip(tensors) if self.model.version == "v2" else {}


def _unused_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What other programs expect in an SD2 file beyond the layers SD2 runs: the tower's last layer and its projection.

    Nobody reads their values (SD2 takes the last layer but one): the layer repeats the one before, the projection is 1.
    """
    start = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
    last = max(int(key[len(start) :].split(".")[0]) for key in tensors if key.startswith(start))
    layer = {key: value for key, value in tensors.items() if key.startswith(f"{start}{last}.")}
    added = {key.replace(f"{start}{last}.", f"{start}{last + 1}."): value.clone() for key, value in layer.items()}
    embedding = tensors[f"{OPEN_CLIP_PREFIX}positional_embedding"]
    added[f"{OPEN_CLIP_PREFIX}text_projection"] = torch.eye(embedding.shape[1], dtype=embedding.dtype)
    added[f"{OPEN_CLIP_PREFIX}logit_scale"] = torch.tensor(1.0, dtype=embedding.dtype)
    return added
