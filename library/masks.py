"""Masks: where in a picture the loss counts. From the picture's own transparency, or from a picture beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from library.buckets import Placement, Size
from library.errors import UserError
from library.image_io import Crop, decode, fit, listed, walk_images
from library.quarantine import BadFile

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_SHAPE_TOLERANCE = 0.02  # of the aspect ratio: tools that write masks round sizes


def mask_files(folder: Path, images: Sequence[Path], root: Path | None) -> list[Path]:
    """The mask of each of `images`: the picture in `folder` of the same place below `root`, or of the same name, whatever
    the extensions. Raises `UserError` with those that have none."""
    if not folder.is_dir():
        raise UserError(f"conditioning_data_dir: the folder {folder} does not exist.")
    masks = {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk_images(folder)}
    used, missing = [], []
    for image in images:
        inside = image.relative_to(root) if root is not None and image.is_relative_to(root) else Path(image.name)
        names = (inside.with_suffix("").as_posix(), image.stem)
        name = next((name for name in names if name in masks), None)
        if name is None:
            missing.append(image.name)
        else:
            used.append(masks[name])
    if missing:
        raise UserError(
            f"conditioning_data_dir {folder} has no mask for {len(missing)} of {len(images)} images: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Add masks of the same names."
        )
    unused = sorted(set(masks.values()) - set(used))
    if unused:
        logger.warning("%s: %s", folder, listed([f"{path.name} belongs to no image" for path in unused], "masks are not used"))
    return used


def read_mask(path: Path, size: Size, placement: Placement, crop: Crop, interpolation: str | None) -> np.ndarray:
    """The mask of a picture of `size` as that picture is shown: uint8 [bucket height, bucket width].

    Its red channel is used. It may be larger or smaller than the picture, of the same shape; a `BadFile` says otherwise.
    """
    pixels, _ = decode(path)
    height, width = pixels.shape[:2]
    if abs(width / height / (size[0] / size[1]) - 1) > _SHAPE_TOLERANCE:
        raise BadFile(path, f"the mask is {width}x{height}, its picture {size[0]}x{size[1]}: another shape")
    return fit(pixels, placement, crop, interpolation)[..., 0]


def latent_mask(mask: np.ndarray, stride: int) -> Tensor:
    """uint8 [H, W] -> float32 [H / stride, W / stride] in [0, 1]: the mean over what each latent pixel covers."""
    values = torch.from_numpy(mask.copy()).float() / 255
    return F.avg_pool2d(values[None, None], stride)[0, 0]
