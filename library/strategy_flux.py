"""FLUX.1 and Chroma: captions to ids, ids to conditioning, images to latents, and the caches of both.

Shapes: B batch, M text tokens (all padded to one length), D width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from library.cache_formats import LATENT_FORMATS, TEXT_FORMATS, LatentFormat, TextFormat
from library.clip_tokenizer import ClipTokenizer
from library.strategy_base import (
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    Tokens,
    tensor_field,
)
from library.strategy_dit import CLIP_L, T5XXL, PaddedText, ScaledLatentsCachingStrategy, ids_for
from library.t5_parts import PAD, T5Tokenizer

CLIP_LENGTH = 77
_NO_CLIP = np.zeros((CLIP_LENGTH, 1), np.float32)  # what sd-scripts' stand-in for CLIP-L gives: Chroma has none


@dataclass(frozen=True)
class ChromaConditioning(PaddedText):
    """T5's hidden states, and which of them are text (before Chroma's one token of padding is added)."""

    context: Tensor = tensor_field(source=T5XXL, pad=True)  # [B, M, D]
    mask: Tensor = tensor_field(source=T5XXL, pad=True)  # [B, M], 1 = text, 0 = padding


@dataclass(frozen=True)
class FluxConditioning(ChromaConditioning):
    """The same, and CLIP-L's pooled output."""

    pooled: Tensor = tensor_field(source=CLIP_L)  # [B, D]


def with_one_padding(mask: Tensor) -> Tensor:
    """mask [B, M] bool with the first token of padding let through, as Chroma was trained."""
    shifted = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=True)
    return mask | shifted


@dataclass(frozen=True)
class FluxTokenizeStrategy(TokenizeStrategy):
    """Captions to ids. clip: None for Chroma."""

    t5: T5Tokenizer
    t5_length: int
    clip: ClipTokenizer | None = None
    spare: int | None = None
    """Where padding is hidden from the transformer, how many tokens of it are not. None: none is hidden."""

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        tokens = {T5XXL: torch.tensor([[self.t5.ids(caption, self.t5_length)] for caption in captions])}  # [B, 1, M]
        if self.clip is not None:
            tokens[CLIP_L] = torch.tensor([[self._clip_row(self.clip, caption)] for caption in captions])  # [B, 1, 77]
        return tokens

    def lengths(self, captions: Sequence[str]) -> Sequence[int] | None:
        if self.spare is None:
            return None
        return [min(self.t5.count(caption, self.t5_length) + self.spare, self.t5_length) for caption in captions]

    def fitted(self, tokens: Tokens, lengths: Sequence[int]) -> Tokens:
        return {**tokens, T5XXL: tokens[T5XXL][..., : max(lengths)]}

    def _clip_row(self, clip: ClipTokenizer, caption: str) -> list[int]:
        ids = clip.ids(caption)[: CLIP_LENGTH - 2]
        return [clip.bos, *ids, clip.eos, *[clip.pad] * (CLIP_LENGTH - 2 - len(ids))]

    def fingerprint(self) -> str:
        clip = self.clip.fingerprint() if self.clip is not None else "no clip"
        return f"t5-{self.t5.fingerprint()}-{self.t5_length}-{clip}"


@dataclass(frozen=True)
class FluxTextEncodingStrategy(TextEncodingStrategy):
    """Ids to T5's last hidden states and CLIP-L's pooled output. mask_t5: padding is hidden inside T5, too."""

    conditioning: type[ChromaConditioning]
    mask_t5: bool

    def encode(
        self, encoders: Mapping[str, nn.Module], tokens: Tokens, only: frozenset[str] | None = None
    ) -> ChromaConditioning:
        wanted = self.conditioning.sources() if only is None else only & self.conditioning.sources()
        fields: dict[str, Any] = {}
        if T5XXL in wanted:
            ids = ids_for(encoders[T5XXL], tokens[T5XXL])
            fields["mask"] = (ids != PAD).long()
            t5: Any = encoders[T5XXL]
            attended = fields["mask"] if self.mask_t5 else None
            fields["context"] = t5(input_ids=ids, attention_mask=attended).last_hidden_state
        if CLIP_L in wanted:
            clip: Any = encoders[CLIP_L]
            fields["pooled"] = clip(input_ids=ids_for(clip, tokens[CLIP_L])).pooler_output
        return self.conditioning(**fields)

    def fingerprint(self) -> str:
        return f"t5-{'masked' if self.mask_t5 else 'unmasked'}"


@dataclass(frozen=True)
class FluxLatentsCachingStrategy(ScaledLatentsCachingStrategy):
    """See `ScaledLatentsCachingStrategy`."""

    format: ClassVar[LatentFormat] = LATENT_FORMATS["flux"]


@dataclass(frozen=True)
class FluxTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """mask_t5: what sd-scripts' files have to agree with."""

    format: ClassVar[TextFormat] = TEXT_FORMATS["flux"]
    legacy_keys: ClassVar[Mapping[str, str]] = {"pooled": "l_pooled", "context": "t5_out", "mask": "t5_attn_mask"}
    mask_t5: bool

    def in_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        stand_in = {} if "pooled" in {f.name for f in self.conditioning.tensor_fields()} else {"l_pooled": _NO_CLIP}
        if "t5_out" not in arrays:
            return {**arrays, **stand_in}
        txt_ids = np.zeros((len(arrays["t5_out"]), 3), np.float32)
        return {**arrays, "txt_ids": txt_ids, "apply_t5_attn_mask": np.array(self.mask_t5), **stand_in}

    def foreign_problem(self, arrays: Mapping[str, np.ndarray]) -> str:
        masked = bool(arrays.get("apply_t5_attn_mask", self.mask_t5))
        if masked != self.mask_t5:
            return f"--apply_t5_attn_mask, which was {'on' if masked else 'off'}"
        return ""
