"""Pictures on disk: finding them, reading their sizes, and decoding, resizing and cropping one.

A picture is turned as its orientation tag (EXIF) says, and its size is that of the turned picture. Transparency is dropped
unless it is asked for as a mask; what lies beneath it is trained, as in sd-scripts. An animation stands for its first frame.
"""

from __future__ import annotations

import importlib.util
import io
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from library.buckets import Placement, Size
from library.quarantine import BadFile

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
"""Values of `resize_interpolation`."""


PLUGINS = {".avif": ("pillow_avif", "pillow-avif-plugin"), ".jxl": ("pillow_jxl", "pillow-jxl-plugin")}
"""Formats that Pillow may need help with -> the module that helps, and its package."""


@cache
def image_extensions() -> tuple[str, ...]:
    """Lower-case extensions of the formats this installation can read: AVIF and JPEG XL only where Pillow or a plugin can."""
    from PIL import Image

    Image.init()
    for extension, (module, _) in PLUGINS.items():
        if extension not in Image.EXTENSION and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    return _EXTENSIONS + tuple(extension for extension in PLUGINS if extension in Image.EXTENSION)


@dataclass(frozen=True)
class Listing:
    """The files of a folder. Sorted by name, so that the order is the same on every machine."""

    images: list[Path]
    broken: list[Path]
    """Pictures by their names that are links to nothing, or to each other."""
    others: set[str]
    """All other files, as text."""


def _scan(folder: Path, extensions: tuple[str, ...]) -> Listing:
    """What lies directly in `folder`. Only links need asking the system what they are."""
    found = Listing([], [], set())
    with os.scandir(folder) as entries:
        for entry in entries:
            if os.path.splitext(entry.name)[1].lower() not in extensions:
                found.others.add(os.path.join(folder, entry.name))
            elif not entry.is_symlink():
                found.images.extend([folder / entry.name] if entry.is_file() else [])
            elif os.path.isfile(entry.path):
                found.images.append(folder / entry.name)
            elif not os.path.exists(entry.path):
                found.broken.append(folder / entry.name)
    return found


def list_folder(folder: Path, *, recursive: bool = False) -> Listing:
    """What is in `folder`; recursive: and in all folders below it.

    A folder that is met again, as in a loop of links, is not entered twice; hidden folders are not entered.
    """
    extensions = image_extensions()
    listings = [_scan(each, extensions) for each in (_folders(folder) if recursive else [folder])]

    def place(path: Path) -> str:  # not the path: Windows compares those without regard to case
        return path.relative_to(folder).as_posix() if recursive else path.name

    images, links = ([p for one in listings for p in getattr(one, kind)] for kind in ("images", "broken"))
    others = listings[0].others.union(*(one.others for one in listings[1:]))
    return Listing(sorted(images, key=place), sorted(links, key=place), others)


def _folders(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for root, folders, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(root)


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The pictures of `list_folder`."""
    return list_folder(folder, recursive=recursive).images


def broken(path: Path, error: Exception) -> BadFile:
    """What is to be said of a picture that cannot be read because of `error`."""
    detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BadFile(path, f"not a readable image: {detail or type(error).__name__}".replace(f" {str(path)!r}", ""))


def _pillow_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises for damaged files: its formats are parsed by hand, and its plugins raise what they like."""
    from PIL import Image

    parsing = (ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, struct.error)
    return (OSError, RuntimeError, *parsing, Image.DecompressionBombError)


_TURNED = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE"}
_TURNED |= {8: "ROTATE_90"}
"""EXIF orientation -> what makes the picture upright (a member of Pillow's `Transpose`)."""


def _orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8. `image` is just opened: looking for a tag behind the pixels would mean decoding them."""
    from PIL import Image as Pillow

    data = image.info.get("exif")
    if not data:
        return 1
    exif = Pillow.Exif()
    try:
        exif.load(data)
        orientation = exif.get(0x0112)
    except _pillow_errors():  # a damaged tag says nothing; the pixels are another matter
        return 1
    return orientation if orientation in _TURNED else 1


def read_size(path: Path) -> Size:
    """(width, height) from the file's header; the pixels are not decoded. A `BadFile` names an unreadable file."""
    from PIL import Image

    image_extensions()  # for the plugins
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except _pillow_errors() as error:
        raise broken(path, error) from error


def listed(lines: Iterable[str], what: str, shown: int = 5) -> str:
    """The first few of many problems, and how many there are."""
    all_lines = list(lines)
    if len(all_lines) == 1:
        return all_lines[0]
    rest = f"\n  ... and {len(all_lines) - shown} more" if len(all_lines) > shown else ""
    return f"{len(all_lines)} {what}:\n  " + "\n  ".join(all_lines[:shown]) + rest


def content_hash(data: bytes) -> str:
    """32 hexadecimal digits; of the file's bytes, so that re-encoding the same picture changes it."""
    return blake2b(data, digest_size=16).hexdigest()


def content_seed(digest: str) -> int:
    """The key of a picture's posterior sample: the first 56 bits of its content hash."""
    return int(digest[:14], 16)


def _eight_bits(image: Image) -> Image:
    """A grey picture of 16 bits in 8. (Pillow shortens those in colour itself, but would cut bright grey to white.)"""
    import numpy as np
    from PIL import Image as Pillow

    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Pillow.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def decode(path: Path, *, alpha: bool = False, rough: Size | None = None) -> tuple[np.ndarray, str]:
    """RGB pixels, uint8 [H, W, 3] (with alpha: RGBA, 4), and the content hash of the file.

    rough: a size that is enough; a JPEG of much more pixels is decoded to fewer, in a fraction of the time.
    A `BadFile` names a file that cannot be read, and so does one that is no longer there.
    """
    import numpy as np
    from PIL import Image

    image_extensions()  # for the plugins
    mode = "RGBA" if alpha else "RGB"
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image)
            if rough is not None:
                image.draft(image.mode, rough)
            upright = _eight_bits(image)
            if orientation != 1:
                upright = upright.transpose(Image.Transpose[_TURNED[orientation]])
            pixels = np.array(upright if upright.mode == mode else upright.convert(mode))
    except _pillow_errors() as error:
        raise broken(path, error) from error
    return pixels, content_hash(data)


def resolve_interpolation(size: Size, resized: Size, chosen: str | None) -> str:
    """The filter that is used: `chosen`, else area when both sides shrink (or stay), Lanczos when one grows."""
    if chosen is not None:
        return chosen
    return "area" if size[0] >= resized[0] and size[1] >= resized[1] else "lanczos"


def resize(pixels: np.ndarray, resized: Size, interpolation: str) -> np.ndarray:
    """uint8 [H, W, C] -> [resized height, resized width, C]; of C = 4, alpha is the last.

    Lanczos and box are Pillow's, the others OpenCV's, exactly as sd-scripts mixes them: a picture resized by the other
    library gives latents that differ by more than the VAE's own noise.
    """
    import cv2
    import numpy as np
    from PIL import Image

    if (pixels.shape[1], pixels.shape[0]) == resized:
        return pixels
    if interpolation in ("lanczos", "box"):
        resample = Image.Resampling.LANCZOS if interpolation == "lanczos" else Image.Resampling.BOX
        return np.array(Image.fromarray(pixels).resize(resized, resample))
    flags: dict[str, Any] = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    return np.asarray(cv2.resize(pixels, resized, interpolation=flags[interpolation]))


@dataclass(frozen=True)
class Crop:
    """What is cut out of the resized picture: its top left corner, and what lies to the other sides of the cut."""

    left: int
    top: int
    slack: Size

    def mirrored(self) -> Crop:
        """The same cut, seen in the mirrored picture."""
        return Crop(self.slack[0] - self.left, self.top, self.slack)

    def stored_ltrb(self, bucket: Size) -> tuple[int, int, int, int]:
        """As in cache files: sd-scripts takes the left edge of the mirrored picture to be bucket width - right."""
        return self.left, self.top, bucket[0] - (self.slack[0] - self.left), bucket[1] - (self.slack[1] - self.top)

    @classmethod
    def of_stored(cls, ltrb: Sequence[float], bucket: Size) -> Crop:
        """What a cache file records, read the same way, whatever wrote it."""
        left, top, right, bottom = (round(side) for side in ltrb)
        return cls(left, top, (left + bucket[0] - right, top + bucket[1] - bottom))


def choose_crop(placement: Placement, rng: Random | None = None) -> Crop:
    """The centre, or a place drawn from `rng`."""
    across, down = placement.slack
    if rng is None:
        return Crop(across // 2, down // 2, placement.slack)
    return Crop(rng.randint(0, across), rng.randint(0, down), placement.slack)


def fit(pixels: np.ndarray, placement: Placement, crop: Crop, interpolation: str | None) -> np.ndarray:
    """Resize to `placement.resized` and cut `crop`: uint8 [bucket height, bucket width, C]."""
    size = pixels.shape[1], pixels.shape[0]
    pixels = resize(pixels, placement.resized, resolve_interpolation(size, placement.resized, interpolation))
    width, height = placement.bucket
    return pixels[crop.top : crop.top + height, crop.left : crop.left + width]


def vary_color(pixels: np.ndarray, rng: Random) -> np.ndarray:
    """One time in three: the hue turned by up to 8 of OpenCV's 180 steps, or a gamma of 0.95 to 1.05; uint8 in and out."""
    import cv2
    import numpy as np

    if rng.random() > 0.33:
        return pixels
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        turned = (hsv[..., 0].astype(np.int16) + round(rng.uniform(-8, 8))) % 180
        hsv[..., 0] = turned.astype(np.uint8)
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    table = np.round((np.arange(256) / 255) ** rng.uniform(0.95, 1.05) * 255).astype(np.uint8)
    return table[pixels]
