"""The text half of the example model: a CLIP tokenizer with a vocabulary of its own, and a CLIP text encoder trained on it.

The encoder learns to name what a caption describes (size, colour, noun, background) from the hidden state at its end, much as
CLIP learns to match captions with pictures. Nouns that the base model never sees a picture of get codes of their own, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from examples.shapes import BASE_SHAPES, COLOURS, NEW_SHAPE, NEW_TOKEN, RADII
from library.rng import keyed_random

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

MAX_LENGTH = 77
WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"
SPARE_NOUNS = (NEW_SHAPE, NEW_TOKEN, "blick", "dax", "fep", "moon", "cross", "diamond", "arrow", "house")
NOUNS = (*BASE_SHAPES, *SPARE_NOUNS)
OTHER_WORDS = (
    "a", "an", "the", "on", "in", "of", "and", "with", "background", "picture", "drawing", "photo", "shape", "style", "big",
    "tiny", "orange", "pink", "brown", "grey",
)  # fmt: skip
WORDS = (*NOUNS, *COLOURS, *RADII, *OTHER_WORDS)


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]


def _merge(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: the earliest known pair first, until none is left."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]
        if not pairs:
            return pieces
        best = min(pairs, key=lambda pair: ranks[pair])
        at = list(zip(pieces, pieces[1:], strict=False)).index(best)
        pieces = [*pieces[:at], best[0] + best[1], *pieces[at + 2 :]]


def _merges_for(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges under which every word becomes one token. A word only adds merges after all earlier ones, so it breaks none."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _merge([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return merges


def write_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and their configuration, in CLIP's format. Unknown words fall back to their bytes."""
    characters = _byte_characters()
    merges = _merges_for(WORDS)
    names = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), START, END]
    files: dict[str, object] = {
        "vocab.json": {name: index for index, name in enumerate(dict.fromkeys(names))},
        "special_tokens_map.json": {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END},
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_LENGTH,
            "do_lower_case": True,
            "bos_token": START,
            "eos_token": END,
            "pad_token": END,
            "unk_token": END,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text encoder, untrained. Embeddings are as large as what the layers add, so words stay apart."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return encoder


ATTRIBUTES: tuple[tuple[str | None, ...], ...] = ((*RADII, None), tuple(COLOURS), NOUNS, (*COLOURS, None))
"""What the encoder learns to tell: size, colour, noun, background; None where the caption does not say."""


def _caption(rng: Random) -> tuple[str, list[int]]:
    """A caption in one of several wordings, and the index of each attribute."""
    size = rng.choice([*RADII, None])
    colour, noun = rng.choice(list(COLOURS)), rng.choice(NOUNS)
    background = rng.choice([*(c for c in COLOURS if c != colour), None])
    article = rng.choice(["a ", "a ", "the ", ""])
    ending = rng.choice([" on a {} background", " on a {} background", ", {} background", " on {}"])
    text = article + (f"{size} " if size else "") + f"{colour} {noun}" + (ending.format(background) if background else "")
    values = (size, colour, noun, background)
    return text, [names.index(value) for names, value in zip(ATTRIBUTES, values, strict=True)]


def _batches(tokenizer: CLIPTokenizer, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [B, 77], attributes [B, 4])."""
    import torch

    for index in range(count):
        rng = keyed_random("tiny-text", index)
        captions, values = zip(*(_caption(rng) for _ in range(size)), strict=True)
        ids = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids
        yield ids, torch.tensor(values)


def train_text_encoder(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, *, steps: int = 400, batch_size: int = 64) -> float:
    """Train `encoder` in place; gives the share of the last captions that were named wholly right at their end token."""
    import torch
    from torch.nn import functional as F

    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, len(names)) for names in ATTRIBUTES)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    right: list[float] = []
    for ids, values in _batches(tokenizer, steps, batch_size):
        hidden = encoder(ids).last_hidden_state  # [B, 77, WIDTH]
        ended = (ids == tokenizer.eos_token_id).float()  # the end token and the padding after it
        scores = [head(hidden) for head in heads]
        losses = [
            (F.cross_entropy(score.transpose(1, 2), values[:, i, None].expand(-1, MAX_LENGTH), reduction="none") * ended).sum()
            for i, score in enumerate(scores)
        ]
        optimizer.zero_grad()
        (sum(losses) / ended.sum()).backward()
        optimizer.step()
        schedule.step()
        guesses = torch.stack([score[:, -1].argmax(-1) for score in scores], dim=1)
        right.append((guesses == values).all(1).float().mean().item())
    return sum(right[-20:]) / 20
