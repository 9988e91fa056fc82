"""One picture as it is seen once: resized, cut, its colours varied, with its mask."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from library.buckets import Placement
from library.data_sources import Record
from library.face_crop import face_of, face_view
from library.image_io import Crop, choose_crop, decode, fit, vary_color
from library.masks import read_mask
from library.quarantine import BadFile

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class View:
    """What is shown, not yet mirrored."""

    pixels: np.ndarray  # uint8 [bucket height, bucket width, 3]
    mask: np.ndarray | None  # uint8 [bucket height, bucket width]
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
    mask = fitted[..., 3] if subset.alpha_mask else None
    if record.mask is not None:
        mask = read_mask(record.mask, record.size, placement, crop, subset.resize_interpolation)
    pixels = fitted[..., :3]
    return View(pixels if color is None else vary_color(pixels.copy(), color), mask, crop, digest)


def view_mask(record: Record) -> np.ndarray | None:
    """The mask of a picture whose latents are cached, which are those of its middle."""
    placement, crop = record.placement, choose_crop(record.placement)
    if record.mask is not None:
        return read_mask(record.mask, record.size, placement, crop, record.subset.resize_interpolation)
    return load_view(record, placement, crop).mask if record.subset.alpha_mask else None
