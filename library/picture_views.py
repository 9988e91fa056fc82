"""One picture as it is seen once: resized, cut, its colours varied, with what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from library.buckets import Placement
from library.face_crop import face_of, face_view
from library.image_io import Crop, choose_crop, decode, fit, vary_color
from library.masks import read_paired
from library.quarantine import BadFile
from library.records import Record

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Beside:
    """What belongs to a picture, cut as it is."""

    mask: np.ndarray | None = None  # uint8 [bucket height, bucket width]
    condition: np.ndarray | None = None  # uint8 [bucket height, bucket width, 3]


@dataclass(frozen=True)
class View:
    """What is shown, not yet mirrored."""

    pixels: np.ndarray  # uint8 [bucket height, bucket width, 3]
    beside: Beside
    crop: Crop
    digest: str
    """Content hash of the file."""


def choose_view(record: Record, draw: Random) -> tuple[Placement, Crop]:
    """How the picture is resized and cut this time, as its subset asks."""
    subset = record.subset
    face = face_of(record.path) if subset.face_crop_range is not None else None
    if face is not None and subset.face_crop_range is not None:
        zoom = subset.face_crop_range
        return face_view(record.size, record.placement.bucket, face, zoom, random_crop=subset.random_crop, rng=draw)
    return record.placement, choose_crop(record.placement, draw if subset.random_crop else None)


def load_view(record: Record, placement: Placement, crop: Crop, color: Random | None = None) -> View:
    """The picture through `placement` and `crop`; color: what its colours are varied by. Raises `BadFile`."""
    subset = record.subset
    image, digest = decode(record.path, alpha=subset.alpha_mask)
    size = image.shape[1], image.shape[0]
    if size != record.size:
        raise BadFile(
            record.path,
            f"it is {size[0]}x{size[1]}, but its metadata (or the file when training began) says "
            f"{record.size[0]}x{record.size[1]}",
        )
    fitted = fit(image, placement, crop, subset.resize_interpolation)
    beside = _paired(record, placement, crop)
    if subset.alpha_mask:
        beside = replace(beside, mask=fitted[..., 3])
    pixels = fitted[..., :3]
    return View(pixels if color is None else vary_color(pixels.copy(), color), beside, crop, digest)


def _paired(record: Record, placement: Placement, crop: Crop) -> Beside:
    """The file that belongs to the picture, if there is one. A mask is its red channel, as in sd-scripts."""
    if record.paired is None:
        return Beside()
    pixels = read_paired(record.paired, record.size, placement, crop, record.subset.resize_interpolation)
    return Beside(condition=pixels) if record.subset.conditioned else Beside(mask=pixels[..., 0])


def view_beside(record: Record) -> Beside:
    """What belongs to a picture whose latents are cached, which are those of its middle."""
    placement, crop = record.placement, choose_crop(record.placement)
    return load_view(record, placement, crop).beside if record.subset.alpha_mask else _paired(record, placement, crop)
