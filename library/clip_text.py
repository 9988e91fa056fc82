"""Text for CLIP, as all its families share it: captions to chunks of ids, and hidden states of chunks to conditioning.

Shapes: B batch, N chunks, 77 tokens of a chunk with BOS and EOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.clip_tokenizer import ClipTokenizer
from library.prompt_weights import parse_weights
from library.strategy_base import Tokens


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
class ClipCaptions:
    """Captions to chunks of ids for one text encoder.

    max_length: most tokens of a caption without BOS and EOS: one, two or three times `size - 2`.
    size: tokens the text encoder takes at once (77 in every published model).
    """

    tokenizer: ClipTokenizer
    max_length: int = 75
    size: int = 77
    weighted: bool = False

    def ids_and_weights(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [B, N, 77] and the tokens' weights [B, N, 77], 1 where captions are not read for weights."""
        rows = [self._row(caption) for caption in captions]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])

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

    @property
    def length(self) -> int:
        """Tokens of the conditioning of a caption."""
        return self.max_length // (self.size - 2) * (self.size - 2) + 2

    def fingerprint(self) -> str:
        return f"clip-{self.tokenizer.fingerprint()}-{self.max_length}-{self.size}-{'weighted' if self.weighted else 'plain'}"


def weights_of(encoder: str) -> str:
    """Where the tokens' weights of a text encoder stand beside its ids."""
    return f"{encoder}.weights"


def tokenize_for(encoders: Mapping[str, ClipCaptions], captions: Sequence[str]) -> Tokens:
    """Ids [B, N, 77] by text encoder, and weights beside them where captions are read for weights."""
    tokens: dict[str, Tensor] = {}
    for name, own in encoders.items():
        tokens[name], weights = own.ids_and_weights(captions)
        if own.weighted:
            tokens[weights_of(name)] = weights
    return tokens


def chunk_ids(tokens: Tokens, name: str, encoder: nn.Module) -> Tensor:
    """The ids for `encoder`, called `name`, chunk by chunk: [B * N, 77] on its device."""
    return tokens[name].to(next(encoder.parameters()).device).flatten(0, 1)


def joined_states(states: Tensor, tokens: Tokens, name: str) -> Tensor:
    """[B * N, 77, D] of the encoder called `name` -> [B, M, D], weighed where captions have weights."""
    joined = join_chunks(states.unflatten(0, tokens[name].shape[:2]))
    return weigh(joined, tokens[weights_of(name)]) if weights_of(name) in tokens else joined


def join_chunks(chunks: Tensor) -> Tensor:
    """[B, N, 77, ...] -> [B, N * 75 + 2, ...]: the first chunk's BOS, all bodies, the last chunk's last."""
    return torch.cat([chunks[:, 0, :1], chunks[:, :, 1:-1].flatten(1, 2), chunks[:, -1, -1:]], dim=1)


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Joined hidden states [B, M, D] times the weights [B, N, 77] of their tokens."""
    return states * join_chunks(weights.to(states.device)).unsqueeze(-1).to(states.dtype)


def pooled_at_eos(last: Tensor, ids: Tensor, eos: int) -> Tensor:
    """Normed last states [B, 77, D] of ids [B, 77] -> the state at each row's first EOS, [B, D]."""
    place = (ids.to(last.device) == eos).int().argmax(dim=-1)  # [B]
    return last.take_along_dim(place.view(-1, 1, 1), dim=1).squeeze(1)
