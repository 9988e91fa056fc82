"""Lumina-Image-2.0: captions to ids, ids to conditioning, images to latents, and the caches of both.

Shapes: B batch, M text tokens (all padded to one length), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from library.cache_formats import LATENT_FORMATS, TEXT_FORMATS, LatentFormat, TextFormat
from library.gemma2_parts import PAD, Gemma2Tokenizer
from library.lumina_options import PROMPT_MARK
from library.strategy_base import (
    Conditioning,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    Tokens,
    tensor_field,
)
from library.strategy_dit import PaddedText, ScaledLatentsCachingStrategy, ids_for

GEMMA2 = "gemma2"


@dataclass(frozen=True)
class LuminaConditioning(PaddedText):
    """Gemma-2's hidden states, and which of them are text."""

    context: Tensor = tensor_field(source=GEMMA2, pad=True)  # [B, M, D]
    mask: Tensor = tensor_field(source=GEMMA2, pad=True)  # [B, M], 1 = text, 0 = padding


@dataclass(frozen=True)
class LuminaTokenizeStrategy(TokenizeStrategy):
    """`{system prompt} <Prompt Start> {caption}` to ids. An empty caption stays empty: that is what the model was trained with
    where captions were dropped, and what it is guided away from."""

    tokenizer: Gemma2Tokenizer
    length: int
    system_prompt: str = ""

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        return {GEMMA2: torch.tensor([[self.tokenizer.ids(self._told(caption), self.length)] for caption in captions])}

    def lengths(self, captions: Sequence[str]) -> Sequence[int]:
        return [self.tokenizer.count(self._told(caption), self.length) for caption in captions]

    def fitted(self, tokens: Tokens, lengths: Sequence[int]) -> Tokens:
        return {GEMMA2: tokens[GEMMA2][..., : max(lengths)]}

    def for_negatives(self) -> LuminaTokenizeStrategy:
        """Without the system prompt, as the model's own pipeline has them."""
        return replace(self, system_prompt="")

    def _told(self, caption: str) -> str:
        return f"{self.system_prompt} {PROMPT_MARK} {caption}" if caption and self.system_prompt else caption

    def fingerprint(self) -> str:
        return f"gemma2-{self.tokenizer.fingerprint()}-{self.length}-{self.system_prompt}"


@dataclass(frozen=True)
class LuminaTextEncodingStrategy(TextEncodingStrategy):
    """Ids to the output of Gemma-2's last layer but one, without a norm."""

    def encode(
        self, encoders: Mapping[str, nn.Module], tokens: Tokens, only: frozenset[str] | None = None
    ) -> LuminaConditioning:
        if only is not None and GEMMA2 not in only:
            return LuminaConditioning()
        encoder: Any = encoders[GEMMA2]
        ids = ids_for(encoder, tokens[GEMMA2])
        mask = (ids != PAD).long()
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return LuminaConditioning(context=output.hidden_states[-2], mask=mask)

    def fingerprint(self) -> str:
        return "gemma2-hidden-2"


@dataclass(frozen=True)
class LuminaLatentsCachingStrategy(ScaledLatentsCachingStrategy):
    """See `ScaledLatentsCachingStrategy`."""

    format: ClassVar[LatentFormat] = LATENT_FORMATS["lumina"]


@dataclass(frozen=True)
class LuminaTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """sd-scripts' files do not tell which system prompt they were made with."""

    format: ClassVar[TextFormat] = TEXT_FORMATS["lumina"]
    legacy_keys: ClassVar[Mapping[str, str]] = {"context": "hidden_state", "mask": "attention_mask"}
    conditioning: type[Conditioning] = LuminaConditioning

    def in_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """sd-scripts wants the ids to be there, and does nothing with them."""
        stand_in = {"input_ids": arrays["attention_mask"].astype(np.int64)} if "attention_mask" in arrays else {}
        return {**arrays, **stand_in}
