"""Stable Diffusion 1.x/2.x: captions to ids, ids to conditioning, images to latents, and the caches of both.

Shapes: B batch, N chunks, 77 tokens of a chunk with BOS and EOS, M text tokens, D width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.clip_tokenizer import ClipTokenizer
from library.prompt_weights import parse_weights
from library.strategy_base import (
    Conditioning,
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
    Tokens,
    tensor_field,
)
from library.vae_parts import encode_images

TEXT_ENCODER = "text_encoder"
WEIGHTS = f"{TEXT_ENCODER}.weights"


@dataclass(frozen=True)
class SdConditioning(Conditioning):
    """What the UNet attends to."""

    context: Tensor = tensor_field(source=TEXT_ENCODER)  # [B, M, D]


def clip_chunks(ids: Sequence[int], bos: int, eos: int, pad: int, *, body: int, num_chunks: int) -> list[list[int]]:
    """`ids` without BOS and EOS, as `num_chunks` rows of `body` + 2 ids, cut or padded as sd-scripts does.

    One chunk is `BOS ids EOS PAD...`. A longer text is `BOS ids EOS PAD...` as a whole, cut into bodies. Where PAD is EOS
    (SD1), each body stands between BOS and EOS. Otherwise (SD2) a chunk's last id is EOS only where its body is full, and a
    chunk without text begins with EOS.
    """
    ids = list(ids[: body * num_chunks])
    if num_chunks == 1:
        return [[bos, *ids, eos, *[pad] * (body - len(ids))]]
    line = [*ids, eos, *[pad] * (body * num_chunks - len(ids))]
    last = line[-1]
    chunks = []
    for start in range(0, body * num_chunks, body):
        chunk = [bos, *line[start : start + body], last]
        if pad != eos:
            if chunk[-2] not in (eos, pad):
                chunk[-1] = eos
            if chunk[1] == pad:
                chunk[1] = eos
        chunks.append(chunk)
    return chunks


@dataclass(frozen=True)
class SdTokenizeStrategy(TokenizeStrategy):
    """Captions to chunks of ids.

    max_length: most tokens of a caption without BOS and EOS: one, two or three times `size - 2`.
    size: tokens the text encoder takes at once (77 in every published model).
    """

    tokenizer: ClipTokenizer
    max_length: int = 75
    size: int = 77
    weighted: bool = False

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        rows = [self._row(caption) for caption in captions]
        tokens = {TEXT_ENCODER: torch.tensor([ids for ids, _ in rows])}  # [B, N, 77]
        if self.weighted:
            tokens[WEIGHTS] = torch.tensor([weights for _, weights in rows])  # [B, N, 77]
        return tokens

    def _row(self, caption: str) -> tuple[list[list[int]], list[list[float]]]:
        """[N, 77] ids, [N, 77] weights."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parse_weights(caption) if self.weighted else [(caption, 1.0)]:
            found = self.tokenizer.ids(text)
            ids += found
            weights += [weight] * len(found)
        body = self.size - 2
        num_chunks = self.max_length // body
        clip = self.tokenizer
        chunks = clip_chunks(ids, clip.bos, clip.eos, clip.pad, body=body, num_chunks=num_chunks)
        line = (weights + [1.0] * (body * num_chunks))[: body * num_chunks]
        return chunks, [[1.0, *line[start : start + body], 1.0] for start in range(0, body * num_chunks, body)]

    def fingerprint(self) -> str:
        return f"clip-{self.tokenizer.fingerprint()}-{self.max_length}-{self.size}-{'weighted' if self.weighted else 'plain'}"


def join_chunks(chunks: Tensor) -> Tensor:
    """[B, N, 77, ...] -> [B, N * 75 + 2, ...]: the first chunk's BOS, all bodies, the last chunk's last."""
    return torch.cat([chunks[:, 0, :1], chunks[:, :, 1:-1].flatten(1, 2), chunks[:, -1, -1:]], dim=1)


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
        device = next(encoder.parameters()).device
        ids = tokens[TEXT_ENCODER].to(device)  # [B, N, 77]
        states = clip_hidden_states(encoder, ids.flatten(0, 1), self.clip_skip)  # [B * N, 77, D]
        context = join_chunks(states.unflatten(0, ids.shape[:2]))  # [B, M, D]
        if WEIGHTS in tokens:
            context = context * join_chunks(tokens[WEIGHTS].to(device)).unsqueeze(-1).to(context.dtype)
        return SdConditioning(context=context)

    def fingerprint(self) -> str:
        return f"clip-skip-{self.clip_skip}"


@dataclass(frozen=True)
class SdLatentsCachingStrategy(LatentsCachingStrategy):
    """A sample of the VAE's posterior, not yet scaled."""

    suffix: ClassVar[str] = "sd"
    multi_resolution: ClassVar[bool] = False

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return encode_images(vae, images, seeds)

    def fingerprint(self) -> str:
        return "posterior-sample-1"


@dataclass(frozen=True)
class SdTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """sd-scripts has no such cache for Stable Diffusion 1.x/2.x; the name is ours."""

    suffix: ClassVar[str] = "_sd_te.npz"
    conditioning: type[Conditioning] = SdConditioning
