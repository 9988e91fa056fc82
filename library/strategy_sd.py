"""Stable Diffusion 1.x/2.x: captions to ids, ids to conditioning, images to latents, and the caches of both.

Shapes: B batch, N chunks, 77 tokens of a chunk with BOS and EOS, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from library.cache_formats import LATENT_FORMATS, TEXT_FORMATS, LatentFormat, TextFormat
from library.clip_text import ClipCaptions, chunk_ids, joined_states, tokenize_for
from library.strategy_base import (
    Conditioning,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    Tokens,
    tensor_field,
)
from library.strategy_latents import UnscaledLatentsCachingStrategy

TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class SdConditioning(Conditioning):
    """What the UNet attends to."""

    context: Tensor = tensor_field(source=TEXT_ENCODER)  # [B, M, D]


@dataclass(frozen=True)
class SdTokenizeStrategy(TokenizeStrategy):
    """Captions to chunks of ids, and weights beside them where captions are read for weights."""

    captions: ClipCaptions

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        return tokenize_for({TEXT_ENCODER: self.captions}, captions)

    def fingerprint(self) -> str:
        return self.captions.fingerprint()


def clip_hidden_states(encoder: nn.Module, ids: Tensor, clip_skip: int | None) -> Tensor:
    """[K, 77] ids -> [K, 77, D], after the final layer norm. clip_skip n: the output of the n-th layer from the end."""
    module: Any = encoder
    if clip_skip is None:
        last: Tensor = module(input_ids=ids).last_hidden_state
        return last
    hidden = module(input_ids=ids, output_hidden_states=True).hidden_states[-clip_skip]
    normalized: Tensor = module.final_layer_norm(hidden)
    return normalized


@dataclass(frozen=True)
class SdTextEncodingStrategy(TextEncodingStrategy):
    """Ids to CLIP's hidden states."""

    clip_skip: int | None = None

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens, only: frozenset[str] | None = None) -> SdConditioning:
        if only is not None and TEXT_ENCODER not in only:
            return SdConditioning()
        encoder = encoders[TEXT_ENCODER]
        states = clip_hidden_states(encoder, chunk_ids(tokens, TEXT_ENCODER, encoder), self.clip_skip)
        return SdConditioning(context=joined_states(states, tokens, TEXT_ENCODER))

    def fingerprint(self) -> str:
        return f"clip-skip-{self.clip_skip}"


@dataclass(frozen=True)
class SdLatentsCachingStrategy(UnscaledLatentsCachingStrategy):
    """See `UnscaledLatentsCachingStrategy`."""

    format: ClassVar[LatentFormat] = LATENT_FORMATS["sd"]


@dataclass(frozen=True)
class SdTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """sd-scripts has no such cache for Stable Diffusion 1.x/2.x; the name is ours."""

    format: ClassVar[TextFormat] = TEXT_FORMATS["sd"]
    conditioning: type[Conditioning] = SdConditioning
