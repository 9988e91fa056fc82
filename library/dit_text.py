"""CLIP and T5 on disk, as the transformer families take them: a file of their own, a part of a whole model's, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.clip_parts import (
    CLIP_FOLDER_NAMES,
    CLIP_OPTIONAL,
    PROJECTED_FOLDER_NAMES,
    clip_config,
    make_clip,
    make_projected_clip,
)
from library.clip_tokenizer import CLIP, SD1_TOKENIZER, find_tokenizer
from library.dit_parts import TEXT, TextPart, text_tensors, what_it_is
from library.errors import UserError
from library.model_io import TensorEntry, TensorSource, open_component, read_json
from library.model_parts import Component
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL
from library.t5_parts import T5, T5_NAMES, T5_OPTIONAL, T5_STACK_NAMES, T5_TOKENIZER, make_t5, t5_config

if TYPE_CHECKING:
    from library.option_groups import TrainOptions

PREFIXES: Mapping[str, str] = {name: f"{TEXT}{name}.transformer." for name in (CLIP_L, CLIP_G, T5XXL)}
"""Where single files that hold everything have their text encoders."""
TITLES = {CLIP_L: "CLIP-L", CLIP_G: "CLIP-G"}
PROJECTION = "text_projection.weight"


def clip_part(name: str, folder: str, *, projected: bool = False) -> TextPart:
    """CLIP-L or CLIP-G, with its projection where the family uses it."""
    return TextPart(partial(open_clip, name=name, projected=projected), folder, PREFIXES[name])


def t5_part(folder: str) -> TextPart:
    return TextPart(open_t5, folder, PREFIXES[T5XXL])


def open_clip(path: Path, flag: str, name: str = CLIP_L, *, projected: bool = False) -> Component:
    """A CLIP's text encoder. Its layers' activation is that of the published model called `name`."""
    names, make = (PROJECTED_FOLDER_NAMES, make_projected_clip) if projected else (CLIP_FOLDER_NAMES, make_clip)
    optional = tuple(pattern for pattern in CLIP_OPTIONAL if not projected or "text_projection" not in pattern)
    if path.is_dir():
        source = open_component(path)
        config = read_json(path / "config.json")
        return Component(_projecting(source, config) if projected else source, names, config, make, optional, folder=path)
    source = text_tensors(path, PREFIXES[name])
    shapes = source.shapes(CLIP_FOLDER_NAMES)
    if "embeddings.token_embedding.weight" not in shapes:
        raise UserError(f"{flag} {path} has no {TITLES[name]} in it{what_it_is(source)}.")
    config = clip_config(shapes, activation="quick_gelu" if name == CLIP_L else "gelu")
    if projected:
        source = _projecting(source, config)
        config["projection_dim"] = source.shape(PROJECTION)[0]
    return Component(source, names, config, make, optional)


def _projecting(source: TensorSource, config: Mapping[str, object]) -> TensorSource:
    """With the identity for a projection where the file has none: as sd-scripts and ComfyUI read such files."""
    if PROJECTION in source:
        return source
    width = config["hidden_size"]
    assert isinstance(width, int)
    identity = torch.eye(width)
    entry = TensorEntry(source.path, 0, identity.dtype, tuple(identity.shape), held=identity)
    return replace(source, entries={**source.entries, PROJECTION: entry})


def open_t5(path: Path, flag: str) -> Component:
    """T5's encoder."""
    source = open_component(path) if path.is_dir() else text_tensors(path, PREFIXES[T5XXL])
    names = T5_NAMES if "shared.weight" in source else T5_STACK_NAMES
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in source:
        raise UserError(f"{flag} {path} has no T5 encoder in it{what_it_is(source)}.")
    config = read_json(path / "config.json") if path.is_dir() else t5_config(source.shapes())
    optional = T5_OPTIONAL if names is T5_NAMES else ()
    return Component(source, names, config, make_t5, optional=optional, folder=path if path.is_dir() else None)


def find_tokenizers(options: TrainOptions, path: Path, parts: Mapping[str, TextPart]) -> dict[str, Path]:
    """Text encoder -> where its tokenizer is; downloads it when that is what is left. Raises `UserError` when there is none.

    path: of the model. CLIP-G's is CLIP-L's where the model has none for it: their words are the same.
    """
    folder = path if path.is_dir() else None
    cache, flag = options.model.tokenizer_cache_dir, options.model.tokenizer
    find = partial(find_tokenizer, model_folder=folder, cache_dir=cache)
    found: dict[str, Path] = {}
    for name, part in parts.items():
        inside = part.tokenizer_folder
        if name == T5XXL:
            found[name] = find(flag=None, hub_id=T5_TOKENIZER, kind=replace(T5, inside=inside))
        elif CLIP_L in found and (flag is not None or folder is None or not CLIP.is_in(folder / inside)):
            found[name] = found[CLIP_L]
        else:
            found[name] = find(flag=flag, hub_id=SD1_TOKENIZER, kind=replace(CLIP, inside=inside))
    return found
