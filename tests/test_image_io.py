"""Pixels are sd-scripts': each filter is the same library's, and what a file holds is what is trained."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.image_io import INTERPOLATIONS, decode, resize, resolve_interpolation

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)

OPENCV = dict(nearest="NEAREST_EXACT", bilinear="LINEAR", linear="LINEAR", bicubic="CUBIC", cubic="CUBIC", area="AREA")
PILLOW = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}


@pytest.mark.parametrize("size", [(30, 20), (45, 32), (90, 60), (30, 60)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_filter_gives_the_pixels_of_its_library(name: str, size: tuple[int, int]) -> None:
    if name in OPENCV:
        expected = cv2.resize(PIXELS, size, interpolation=getattr(cv2, f"INTER_{OPENCV[name]}"))
    else:
        expected = np.array(Image.fromarray(PIXELS).resize(size, PILLOW[name]))
    assert np.array_equal(resize(PIXELS, size, name), expected)
    assert OPENCV.keys() | PILLOW.keys() == set(INTERPOLATIONS)


@pytest.mark.parametrize(
    ("size", "resized", "filter_used"),
    [
        ((60, 40), (30, 20), "area"),
        ((60, 40), (60, 20), "area"),
        ((60, 40), (61, 20), "lanczos"),
        ((60, 40), (90, 60), "lanczos"),
    ],
)
def test_area_shrinks_and_lanczos_enlarges_unless_one_is_named(
    size: tuple[int, int], resized: tuple[int, int], filter_used: str
) -> None:
    assert resolve_interpolation(size, resized, None) == filter_used
    assert resolve_interpolation(size, resized, "cubic") == "cubic"


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "I;16"])
def test_pixels_and_transparency_are_those_of_the_file(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
    elif mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    image.save(path, quality=95)
    upright = Image.fromarray(PIXELS).convert("L") if mode == "I;16" else Image.open(path)
    rgb, digest = decode(path)
    assert np.array_equal(rgb, np.asarray(upright.convert("RGB"))) and len(digest) == 32
    rgba, again = decode(path, alpha=True)
    assert np.array_equal(rgba[..., :3], rgb) and again == digest
    alpha = PIXELS[..., 1] if mode in ("RGBA", "LA") else np.full((40, 60), 255)
    assert np.array_equal(rgba[..., 3], alpha)


def test_a_palette_may_have_a_colour_that_is_clear(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS).convert("P")
    index = int(np.asarray(image)[0, 0])
    image.save(tmp_path / "p.png", transparency=index)
    rgba, _ = decode(tmp_path / "p.png", alpha=True)
    clear = np.asarray(image) == index
    assert clear.any() and not rgba[clear, 3].any() and (rgba[~clear, 3] == 255).all()
