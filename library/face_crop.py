"""Crops around a face (`face_crop_aug_range`), whose place stands in the file's name.

Pure functions; the rules are sd-scripts', except that they hold with buckets too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

from library.buckets import Placement, Size
from library.image_io import Crop

_SMALL_FACE = 40  # pixels: faces below this are not moved


@dataclass(frozen=True)
class Face:
    """Centre and size of a face, in pixels of the stored picture."""

    center: Size
    size: Size

    @property
    def side(self) -> int:
        """The longer one."""
        return max(self.size)


def face_of(path: Path) -> Face | None:
    """The face that the name tells, `name_<centre x>_<centre y>_<width>_<height>`, as tools/detect_face_rotate.py writes it."""
    parts = path.stem.split("_")
    if len(parts) < 5 or not all(part.isdecimal() for part in parts[-4:]):
        return None
    x, y, width, height = (int(part) for part in parts[-4:])
    return Face((x, y), (width, height)) if width and height else None


def face_view(
    size: Size, bucket: Size, face: Face, zoom: tuple[float, float], *, random_crop: bool, rng: Random
) -> tuple[Placement, Crop]:
    """How a picture of `size` is resized and cut to `bucket` this time.

    zoom: the bucket's shorter side over the face's longer one, least and most. The picture always covers the bucket, and is
    not enlarged for the face's sake. random_crop: the face may lie anywhere, in the middle most often.
    """
    covering = max(bucket[0] / size[0], bucket[1] / size[1])
    shorter = min(bucket)
    most = max(1.0, covering)
    least = min(most, max(covering, shorter / (face.side * zoom[1])))
    scale = rng.uniform(least, min(most, max(least, shorter / (face.side * zoom[0]))))
    resized = max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5))
    placement = Placement(bucket, resized)
    moves = zoom[0] != zoom[1] and face.side > shorter // 10 and face.side >= _SMALL_FACE
    corner = []
    for side, length, middle in zip(bucket, resized, face.center, strict=True):
        place = int(middle * scale + 0.5)
        start = place - side // 2
        if random_crop:
            reach = max(length - place, place)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif moves:
            start += rng.randint(-(face.side // 20), face.side // 20)
        corner.append(max(0, min(start, length - side)))
    return placement, Crop(corner[0], corner[1], placement.slack)
