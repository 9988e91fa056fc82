"""Stable Diffusion 3: captions to ids, ids to conditioning, images to latents, and the caches of both.

Shapes: B batch, M tokens of T5, 77 tokens of a CLIP, D1 and D2 widths of CLIP-L and CLIP-G, D width of T5 and of the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.cache_formats import LATENT_FORMATS, TEXT_FORMATS, LatentFormat, TextFormat
from library.clip_text import ClipCaptions, pooled_at_eos, tokenize_for
from library.strategy_base import (
    Conditioning,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    Tokens,
    tensor_field,
)
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL, ids_for
from library.strategy_latents import UnscaledLatentsCachingStrategy
from library.t5_parts import PAD, T5Tokenizer


class JoinedText(NamedTuple):
    """What the transformer is given."""

    context: Tensor  # [B, 77 + M, D]
    pooled: Tensor  # [B, D1 + D2]


@dataclass(frozen=True)
class Sd3ClipConditioning(Conditioning):
    """What both CLIPs give: hidden states, projected pooled states, and which tokens are text. Of models without T5 all."""

    l_out: Tensor = tensor_field(source=CLIP_L)  # [B, 77, D1]
    l_pooled: Tensor = tensor_field(source=CLIP_L)  # [B, D1]
    l_mask: Tensor = tensor_field(source=CLIP_L)  # [B, 77], 1 = text with BOS and EOS, 0 = padding
    g_out: Tensor = tensor_field(source=CLIP_G)  # [B, 77, D2]
    g_pooled: Tensor = tensor_field(source=CLIP_G)  # [B, D2]
    g_mask: Tensor = tensor_field(source=CLIP_G)  # [B, 77]

    def joined(self, width: int, length: int, *, mask_clip: bool, mask_t5: bool) -> JoinedText:
        """Side by side, then one after the other. width: of the context; length: tokens of T5, which are zeros without it.
        mask_clip, mask_t5: padding is zeros, too."""
        left, right = self.l_out, self.g_out
        if mask_clip:
            left, right = left * self.l_mask[..., None], right * self.g_mask[..., None]
        clips = torch.cat([left, right.to(left.dtype)], dim=-1)  # [B, 77, D1 + D2]
        clips = F.pad(clips, (0, width - clips.shape[-1]))
        t5 = self.t5_states(clips, length, mask_t5)
        return JoinedText(torch.cat([clips, t5], dim=1), torch.cat([self.l_pooled, self.g_pooled.to(left.dtype)], dim=-1))

    def t5_states(self, clips: Tensor, length: int, masked: bool) -> Tensor:
        """[B, M, D], beside those of the CLIPs [B, 77, D]."""
        return clips.new_zeros(len(clips), length, clips.shape[-1])


@dataclass(frozen=True)
class Sd3Conditioning(Sd3ClipConditioning):
    """The same, and T5's hidden states. Names are sd-scripts' cache keys."""

    t5_out: Tensor = tensor_field(source=T5XXL)  # [B, M, D]
    t5_attn_mask: Tensor = tensor_field(source=T5XXL)  # [B, M]

    def t5_states(self, clips: Tensor, length: int, masked: bool) -> Tensor:
        states = self.t5_out.to(clips.dtype)
        return states * self.t5_attn_mask[..., None] if masked else states


@dataclass(frozen=True)
class Sd3TokenizeStrategy(TokenizeStrategy):
    """Captions to ids: [B, 1, 77] for the CLIPs, of which the second pads with id 0, [B, 1, M] for T5. t5: None without it."""

    first: ClipCaptions
    second: ClipCaptions
    t5: T5Tokenizer | None
    t5_length: int

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        tokens = dict(tokenize_for({CLIP_L: self.first, CLIP_G: self.second}, captions))
        if self.t5 is not None:
            tokens[T5XXL] = torch.tensor([[self.t5.ids(caption, self.t5_length)] for caption in captions])
        return tokens

    def fingerprint(self) -> str:
        t5 = "no t5" if self.t5 is None else f"t5-{self.t5.fingerprint()}-{self.t5_length}"
        return f"{self.first.fingerprint()}-{self.second.fingerprint()}-{t5}"


@dataclass(frozen=True)
class Sd3TextEncodingStrategy(TextEncodingStrategy):
    """Ids to the output of either CLIP's last layer but one, their projected states at EOS, and T5's last hidden states.

    CLIP reads from left to right, so padding changes nothing before it. mask_t5: padding is hidden inside T5.
    eos: ids of either CLIP's EOS.
    """

    conditioning: type[Sd3ClipConditioning]
    eos: Mapping[str, int]
    mask_t5: bool

    def encode(
        self, encoders: Mapping[str, nn.Module], tokens: Tokens, only: frozenset[str] | None = None
    ) -> Sd3ClipConditioning:
        wanted = self.conditioning.sources() if only is None else only & self.conditioning.sources()
        fields: dict[str, Tensor] = {}
        for name in sorted(wanted & {CLIP_L, CLIP_G}):
            out, pooled, mask = self._clip(encoders[name], tokens[name], self.eos[name])
            side = name[-1]
            fields |= {f"{side}_out": out, f"{side}_pooled": pooled, f"{side}_mask": mask}
        if T5XXL in wanted:
            t5: Any = encoders[T5XXL]
            ids = ids_for(t5, tokens[T5XXL])
            mask = (ids != PAD).long()
            states = t5(input_ids=ids, attention_mask=mask if self.mask_t5 else None).last_hidden_state
            fields |= {"t5_out": states, "t5_attn_mask": mask}
        return self.conditioning(**fields)

    def _clip(self, encoder: Any, tokens: Tensor, eos: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, pooled states and mask of ids [B, 1, 77]."""
        ids = ids_for(encoder, tokens)
        output = encoder.text_model(input_ids=ids, output_hidden_states=True)
        pooled = encoder.text_projection(pooled_at_eos(output.last_hidden_state, ids, eos))
        before = (ids == eos).long().cumsum(dim=1).roll(1, dims=1)  # EOS that stand before a token
        before[:, 0] = 0
        return output.hidden_states[-2], pooled, (before == 0).long()

    def fingerprint(self) -> str:
        return f"sd3-hidden-2-pooled-at-{self.eos[CLIP_L]}-{self.eos[CLIP_G]}-t5-{'masked' if self.mask_t5 else 'unmasked'}"


@dataclass(frozen=True)
class Sd3LatentsCachingStrategy(UnscaledLatentsCachingStrategy):
    """See `UnscaledLatentsCachingStrategy`."""

    format: ClassVar[LatentFormat] = LATENT_FORMATS["sd3"]


@dataclass(frozen=True)
class Sd3TextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """sd-scripts' file, which has what both CLIPs give side by side. mask_clip, mask_t5: what is written of the flags."""

    format: ClassVar[TextFormat] = TEXT_FORMATS["sd3"]
    legacy_keys: ClassVar[Mapping[str, str]] = {"l_mask": "clip_l_attn_mask", "g_mask": "clip_g_attn_mask"}
    mask_clip: bool
    mask_t5: bool

    def in_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Where one of the CLIPs learns, the other's stand under their own names: sd-scripts caches both or none."""
        found = dict(arrays)
        for joined, (left, right) in _JOINED.items():
            if left in found and right in found and found[left].dtype == found[right].dtype:
                found[joined] = np.concatenate([found.pop(left), found.pop(right)], axis=-1)
        return found | {"apply_lg_attn_mask": np.array(self.mask_clip), "apply_t5_attn_mask": np.array(self.mask_t5)}

    def from_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = dict(arrays)
        for joined, (left, right) in _JOINED.items():
            if joined in found:
                width = self.shapes[left][-1]
                found[left], found[right] = found[joined][..., :width], found[joined][..., width:]
        return found

    def foreign_problem(self, arrays: Mapping[str, np.ndarray]) -> str:
        masked = bool(arrays.get("apply_t5_attn_mask", self.mask_t5))
        if T5XXL in self.conditioning.sources() and masked != self.mask_t5:
            return f"--apply_t5_attn_mask, which was {'on' if masked else 'off'}"
        return ""


_JOINED = {"lg_out": ("l_out", "g_out"), "lg_pooled": ("l_pooled", "g_pooled")}
"""sd-scripts' arrays -> ours, side by side."""
