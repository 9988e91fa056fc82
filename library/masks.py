"""Pictures that belong to a picture: masks, which tell where the loss counts, and those that a ControlNet is given."""

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
from library.image_io import Crop, decode, fit, list_images, listed
from library.quarantine import BadFile

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_SHAPE_TOLERANCE = 0.02  # of the aspect ratio: tools that write masks round sizes


def paired_files(folder: Path, images: Sequence[Path], root: Path | None, what: str) -> list[Path]:
    """What belongs to each of `images`: the picture in `folder` of the same place below `root`, or of the same name, whatever
    the extensions. Raises `UserError` with those that have none. what: `mask`, or another word for messages."""
    if not folder.is_dir():
        raise UserError(f"conditioning_data_dir: the folder {folder} does not exist.")
    there = {path.relative_to(folder).with_suffix("").as_posix(): path for path in list_images(folder, recursive=True)}
    used, missing = [], []
    for image in images:
        inside = image.relative_to(root) if root is not None and image.is_relative_to(root) else Path(image.name)
        names = (inside.with_suffix("").as_posix(), image.stem)
        name = next((name for name in names if name in there), None)
        if name is None:
            missing.append(image.name)
        else:
            used.append(there[name])
    if missing:
        raise UserError(
            f"conditioning_data_dir {folder} has no {what} for {len(missing)} of {len(images)} images: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Add pictures of the same names."
        )
    unused = sorted(set(there.values()) - set(used))
    if unused:
        lines = [f"{path.name} belongs to no image" for path in unused]
        logger.warning("%s: %s", folder, listed(lines, f"{what}s are not used"))
    return used


def read_paired(path: Path, size: Size, placement: Placement, crop: Crop, interpolation: str | None) -> np.ndarray:
    """What belongs to a picture of `size`, as that picture is shown: uint8 [bucket height, bucket width, 3].

    It may be larger or smaller than the picture, of the same shape; a `BadFile` says otherwise.
    """
    pixels, _ = decode(path)
    height, width = pixels.shape[:2]
    if abs(width / height / (size[0] / size[1]) - 1) > _SHAPE_TOLERANCE:
        raise BadFile(path, f"it is {width}x{height}, and the picture it belongs to {size[0]}x{size[1]}: another shape")
    return fit(pixels, placement, crop, interpolation)


def latent_mask(mask: np.ndarray, stride: int) -> Tensor:
    """uint8 [H, W] -> float32 [H / stride, W / stride] in [0, 1]: the mean over what each latent pixel covers."""
    values = torch.from_numpy(mask.copy()).float() / 255
    return F.avg_pool2d(values[None, None], stride)[0, 0]
