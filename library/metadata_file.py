"""Metadata files: captions, tags and sizes by picture, as sd-scripts' tools and taggers write them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from library.buckets import Size
from library.errors import UserError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


def read_metadata(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(image, entry) pairs of a .json or .jsonl metadata file."""
    if not path.is_file():
        raise UserError(f"metadata_file: {path} does not exist.")
    text = read_text(path)
    pairs: list[tuple[Any, Any]] = []
    line_number = 0
    try:
        if path.suffix.lower() == ".jsonl":
            for line in text.splitlines():
                line_number += 1
                if line.strip():
                    entry = json.loads(line)
                    pairs.append((entry["image_path"], entry))
        else:
            pairs = list(json.loads(text).items())
    except (ValueError, AttributeError, TypeError) as error:
        where = f"{path}, line {line_number}" if line_number else str(path)
        raise UserError(f"{where}: not a metadata file: {error}. Expected an object of entries by image.") from error
    except KeyError as error:
        raise UserError(f"{path}, line {line_number}: the entry has no {error}.") from error
    for image, entry in pairs:
        if not isinstance(image, str) or not isinstance(entry, dict):
            raise UserError(f"{path}: the entry of {image!r} is {entry!r}; expected an object with caption or tags.")
    if not pairs:
        raise UserError(f"{path}: has no entry.")
    return pairs


def size_of(entry: Mapping[str, Any], name: str, where: str) -> Size | None:
    value = entry.get(name)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)):
        raise UserError(f"{where}: {name} is {value!r}; expected [width, height].")
    return value[0], value[1]


def listed_buckets(paths: Iterable[Path]) -> tuple[Size, ...]:
    """The `train_resolution`s of the files' entries, sorted, where every entry has one; else nothing.

    They come from a tool that has made the buckets (sd-scripts' prepare_buckets_latents), and stand in for a resolution.
    A file that is not there is reported where its pictures are asked for.
    """
    sizes = set()
    for path in paths:
        for image, entry in read_metadata(path) if path.is_file() else []:
            size = size_of(entry, "train_resolution", f"{path}, {image}")
            if size is None:
                return ()
            sizes.add(size)
    return tuple(sorted(sizes))
