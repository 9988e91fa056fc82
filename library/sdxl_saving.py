"""What is SDXL's own in the checkpoints it is written to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from library import clip_parts
from library.clip_tokenizer import FIRST_WORD, set_padding
from library.key_layout import IDENTITY, KeyMap
from library.sdxl_utils import CLIP_L_PREFIX, FOLDERS, OPEN_CLIP_PREFIX
from library.strategy_sdxl import CLIP_L
from library.unet_parts import V_MARKER, ZERO_SNR_MARKER
from library.unet_saving import UnetCheckpoint

SECOND_TOKENIZER = "tokenizer_2"


@dataclass(frozen=True)
class SdxlCheckpoint(UnetCheckpoint):
    """An SDXL checkpoint. The marker keys of v prediction and zero terminal SNR say what was trained."""

    index: ClassVar[Mapping[str, Any]] = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }

    def text_layout(self, name: str) -> tuple[str, KeyMap]:
        if name == CLIP_L:
            return CLIP_L_PREFIX, clip_parts.CLIP_NAMES
        return OPEN_CLIP_PREFIX, clip_parts.PROJECTED_OPEN_CLIP_NAMES

    def folder_text(self, name: str) -> tuple[str, KeyMap]:
        return FOLDERS[name], clip_parts.CLIP_NAMES if name == CLIP_L else IDENTITY

    def markers(self) -> dict[str, bool]:
        return {V_MARKER: self.v_prediction, ZERO_SNR_MARKER: self.zero_terminal_snr}

    def unused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """OpenCLIP's temperature, which no image depends on; 4.6055 is the logarithm of 100, its largest."""
        return {f"{OPEN_CLIP_PREFIX}logit_scale": torch.tensor(4.6055)}

    def write_tokenizer(self, source: Path, target: Path) -> None:
        super().write_tokenizer(source, target)
        if target.name == SECOND_TOKENIZER:
            set_padding(target, FIRST_WORD)
