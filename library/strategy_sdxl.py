"""SDXL: captions to ids, ids to conditioning, images to latents, and the caches of both.

Shapes: B batch, N chunks, 77 tokens of a chunk with BOS and EOS, M text tokens, D1 and D2 widths of the two text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from library.cache_formats import LATENT_FORMATS, TEXT_FORMATS, LatentFormat, TextFormat
from library.clip_text import ClipCaptions, chunk_ids, joined_states, pooled_at_eos, tokenize_for
from library.strategy_base import (
    Conditioning,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    Tokens,
    tensor_field,
)
from library.strategy_latents import UnscaledLatentsCachingStrategy

CLIP_L, OPEN_CLIP = "text_encoder1", "text_encoder2"


@dataclass(frozen=True)
class SdxlConditioning(Conditioning):
    """What the UNet attends to, side by side, and what is added to its time embedding. Names are sd-scripts' cache keys."""

    hidden_state1: Tensor = tensor_field(source=CLIP_L)  # [B, M, D1]
    hidden_state2: Tensor = tensor_field(source=OPEN_CLIP)  # [B, M, D2]
    pool2: Tensor = tensor_field(source=OPEN_CLIP)  # [B, P]


@dataclass(frozen=True)
class SdxlTokenizeStrategy(TokenizeStrategy):
    """Captions to chunks of ids for either encoder; they differ in padding: the first's is EOS, the second's is id 0."""

    first: ClipCaptions
    second: ClipCaptions

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        return tokenize_for({CLIP_L: self.first, OPEN_CLIP: self.second}, captions)

    def fingerprint(self) -> str:
        return f"{self.first.fingerprint()}-{self.second.fingerprint()}"


@dataclass(frozen=True)
class SdxlTextEncodingStrategy(TextEncodingStrategy):
    """Ids to the output of either encoder's last layer but one, without a norm, and to the second's projected EOS state.

    eos: the second tokenizer's EOS id; the first of the first chunk is what is pooled.
    """

    eos: int

    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens, only: frozenset[str] | None = None) -> SdxlConditioning:
        wanted = SdxlConditioning.sources() if only is None else only
        found: dict[str, Tensor] = {}
        if CLIP_L in wanted:
            output = _run(encoders[CLIP_L], tokens, CLIP_L)
            found["hidden_state1"] = joined_states(output.hidden_states[-2], tokens, CLIP_L)
        if OPEN_CLIP in wanted:
            encoder: Any = encoders[OPEN_CLIP]
            output = _run(encoder.text_model, tokens, OPEN_CLIP)
            found["hidden_state2"] = joined_states(output.hidden_states[-2], tokens, OPEN_CLIP)
            ids = tokens[OPEN_CLIP]
            first = output.last_hidden_state.unflatten(0, ids.shape[:2])[:, 0]  # [B, 77, D]: chunks after it are not pooled
            found["pool2"] = encoder.text_projection(pooled_at_eos(first, ids[:, 0], self.eos))
        return SdxlConditioning(**found)

    def fingerprint(self) -> str:
        return f"sdxl-hidden-2-pooled-at-{self.eos}"


def _run(encoder: nn.Module, tokens: Tokens, name: str) -> Any:
    """What a CLIPTextModel gives for all chunks."""
    return encoder(input_ids=chunk_ids(tokens, name, encoder), output_hidden_states=True)


@dataclass(frozen=True)
class SdxlLatentsCachingStrategy(UnscaledLatentsCachingStrategy):
    """See `UnscaledLatentsCachingStrategy`."""

    format: ClassVar[LatentFormat] = LATENT_FORMATS["sdxl"]


@dataclass(frozen=True)
class SdxlTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """sd-scripts' file."""

    format: ClassVar[TextFormat] = TEXT_FORMATS["sdxl"]
    conditioning: type[Conditioning] = SdxlConditioning
