"""Metadata files: captions, tags and sizes by picture, as sd-scripts' tools and taggers write them. Imports no torch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from library.buckets import Size
from library.errors import UserError
from library.quarantine import BadFile


def read_text(path: Path) -> str:
    """The text, without its byte order mark: UTF-8, or UTF-16 by its mark or its zeros. Raises `UserError` for any other."""
    data = path.read_bytes()
    try:
        return _decoded(data)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


def _decoded(data: bytes) -> str:
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if marked else _unmarked_encoding(data))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unmarked_encoding(data: bytes) -> str:
    """UTF-8, unless every other byte is mostly zero, as in UTF-16 of European texts: no text has zeros in UTF-8."""
    for encoding, halves in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        if halves and 2 * halves.count(0) > len(halves):
            return encoding
    return "utf-8-sig"


def as_text(value: str) -> str:
    """`value` without halves of characters, which JSON can spell and names of files can have: no tokenizer takes them."""
    return value.encode(errors="replace").decode()


def read_caption_text(path: Path) -> tuple[str, bool]:
    """(the text of a caption file, whether its encoding had to be guessed). What is not UTF-8 or UTF-16 is taken for
    Latin-1 as Windows writes it. Raises `BadFile` where the file cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadFile(path, f"the caption cannot be read: {error.strerror or error}") from error
    try:
        return _decoded(data), False
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), True


def read_folder_captions(folder: Path) -> dict[str, list[str]]:
    """What `captions.json` in an image folder says: the caption or the captions of each picture, named by its place in the
    folder, with or without extension. Empty where there is no such file."""
    path = folder / "captions.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object of captions by image.")
    captions = {}
    for image, texts in content.items():
        captions[image] = [texts] if isinstance(texts, str) else texts
        if not isinstance(captions[image], list) or not all(isinstance(text, str) for text in captions[image]):
            raise UserError(f"{path}: the entry of {image!r} is {texts!r}; expected a text or a list of texts.")
        captions[image] = [as_text(text) for text in captions[image]]
    return captions


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
