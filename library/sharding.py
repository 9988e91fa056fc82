"""Weights written as one file, or as several of limited size with an index, as diffusers and transformers have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_weights(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str], max_shard_size: int | None = None
) -> None:
    """Write `path`, or `{stem}-00001-of-0000N{suffix}` and `{name}.index.json` beside it where one file would hold more than
    `max_shard_size` bytes of tensors.

    A tensor is never divided. The suffix is the format: `.safetensors` (every file with `metadata`), or a torch file.
    """
    made = {key: tensor.contiguous() for key, tensor in tensors.items()}
    shards = _portions(made, max_shard_size)
    if len(shards) == 1:
        _write(made, path, metadata)
        return
    places: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        _write({key: made[key] for key in keys}, path.with_name(name), metadata)
        places |= dict.fromkeys(keys, name)
    total = sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _portions(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """Names in their order, in portions of at most `limit` bytes; a larger tensor is one of its own."""
    portions: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if limit is not None and portions[-1] and size + tensor.nbytes > limit:
            portions.append([])
            size = 0
        portions[-1].append(key)
        size += tensor.nbytes
    return portions


def _write(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=dict(metadata))
    else:
        torch.save(tensors, path)


def write_whole(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str], max_shard_size: int | None = None
) -> None:
    """A model that is one safetensors file at `path`; with a limit, a folder of `model.safetensors` or its shards."""
    if max_shard_size is not None:
        path.mkdir(parents=True, exist_ok=True)
        path = path / "model.safetensors"
    write_weights(tensors, path, metadata=metadata, max_shard_size=max_shard_size)
