"""For `--plan`: what a run would find in its caches and have to make, and held-out pictures that look like trained ones."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.caching import (
    distinct_captions,
    latent_files,
    latent_fingerprints,
    latent_jobs,
    needs_making,
    text_files,
    text_fingerprints,
)
from library.near_duplicates import near_duplicates
from library.stored_priors import prior_files
from library.strategy_base import LATENT_DTYPE

if TYPE_CHECKING:
    from library.cache_io import TextFile
    from library.dataset import TrainData
    from library.strategy_base import Conditioning
    from library.train_util import PreparedRun

_HEADERS = 2000  # bytes of names and fingerprint in a cache file


def caches_of_run(prepared: PreparedRun, caption: Conditioning | None) -> dict[str, Any]:
    """For each cache that is asked for: entries, where they are kept, how many are found, and the bytes that it will take.

    caption: one caption's outputs, whose shapes tell what a file takes. Reads files and headers; no weights.
    """
    found: dict[str, Any] = {}
    if prepared.options.cache.latents:
        found["latents"] = _latents(prepared)
    if prepared.options.cache.text_outputs and caption is not None:
        found["text_encoder_outputs"] = _text(prepared, caption)
    if prepared.data.train.priors is not None:
        found["predictions_to_keep"] = _predictions(prepared)
    return found


def disk_of_run(prepared: PreparedRun, caches: Mapping[str, Any]) -> dict[str, int]:
    """What the caches will add to the disk they are kept on, and what is free there. Bytes; empty where none is on disk."""
    if not any(cache["where"] == "disk" for cache in caches.values()):
        return {}
    place = Path(prepared.options.cache.cache_dir or prepared.data.train.records[0].path.parent).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return {"new_bytes": sum(cache["new_bytes"] for cache in caches.values()), "free_bytes": shutil.disk_usage(there).free}


def _on_disk(files: Mapping[str, object], missing: list[str], total: int, new: int) -> dict[str, Any]:
    return {
        "entries": len(files),
        "where": "disk",
        "found": len(files) - len(missing),
        "to_make": len(missing),
        "bytes": total,
        "new_bytes": new,
    }


def _in_memory(count: int, total: int) -> dict[str, Any]:
    return {"entries": count, "where": "memory", "found": 0, "to_make": count, "bytes": total, "new_bytes": 0}


def _latents(prepared: PreparedRun) -> dict[str, Any]:
    data, options, strategies = prepared.data, prepared.options, prepared.strategies
    jobs = latent_jobs(data.records)
    spec, sizes = data.latent, {}
    for job in jobs:
        width, height = (side // spec.stride for side in job.record.placement.bucket)
        sizes[job.key] = LATENT_DTYPE.itemsize * spec.channels * width * height * (2 if job.flipped else 1)
    if not options.cache.cache_latents_to_disk:
        return _in_memory(len(jobs), sum(sizes.values()))
    files = latent_files(jobs, strategies, spec, options)
    fingerprints = latent_fingerprints(jobs, strategies, prepared.load(), options)
    missing = needs_making(files, fingerprints, options, "latents")
    new = sum(sizes[key] + _HEADERS for key in missing)
    return _on_disk(files, missing, sum(sizes.values()) + _HEADERS * len(jobs), new)


def _text(prepared: PreparedRun, caption: Conditioning) -> dict[str, Any]:
    data, options, strategies = prepared.data, prepared.options, prepared.strategies
    captions = distinct_captions(data)
    tensors = caption.tensors().values()
    if not options.cache.cache_text_encoder_outputs_to_disk:
        return _in_memory(len(captions), len(captions) * sum(tensor.nbytes for tensor in tensors))
    sources = strategies.text_caching.conditioning.sources() - prepared.learning
    files = text_files(captions, strategies, sources, options)
    fingerprints = text_fingerprints(captions, strategies, sources, prepared.load(), options)
    missing = needs_making(files, fingerprints, options, "text encoder outputs")

    def size(file: TextFile) -> int:
        widened = (t.numel() * 4 if t.dtype == torch.bfloat16 and not file.compact else t.nbytes for t in tensors)
        return sum(widened) + _HEADERS

    return _on_disk(files, missing, sum(map(size, files.values())), sum(size(files[key]) for key in missing))


def _predictions(prepared: PreparedRun) -> dict[str, Any]:
    """Files that are there count as found: whether they are still true is known once the model is read."""
    files = prior_files(prepared.data, prepared.strategies)
    missing = [key for key, file in files.items() if not file.path.exists()]
    sizes = {key: file.count * LATENT_DTYPE.itemsize * math.prod(file.shape) + _HEADERS for key, file in files.items()}
    return _on_disk(files, missing, sum(sizes.values()), sum(sizes[key] for key in missing))


def leaks(data: TrainData) -> list[dict[str, Any]]:
    """Pictures held out that look like one that is trained. Where there is a validation set, every picture is decoded, once."""
    if data.validation is None:
        return []
    held_out, trained = ([record.path for record in dataset.records] for dataset in (data.validation, data.train))
    pairs = near_duplicates(held_out, trained, data.files)
    return [{"held_out": str(pair.held_out), "trained": str(pair.trained), "distance": pair.distance} for pair in pairs]
