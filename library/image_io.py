"""Pictures on disk: finding them, reading their sizes, and decoding, resizing and cropping one.

A picture is used as it is stored: an orientation tag (EXIF) does not turn it, and transparency is dropped, both as in
sd-scripts, so that existing caches and crops stay true.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from library.buckets import Placement, Size
from library.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_HEADER_THREADS = 16

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
"""Values of `resize_interpolation`."""


def image_extensions() -> tuple[str, ...]:
    """Lower-case extensions of the formats this installation can read: AVIF and JPEG XL only where Pillow can."""
    from PIL import Image

    Image.init()
    return _EXTENSIONS + tuple(ext for ext in (".avif", ".jxl") if ext in Image.EXTENSION)


def list_images(folder: Path) -> list[Path]:
    """The pictures that lie directly in `folder`, sorted by name, so that the order is the same on every machine."""
    extensions = image_extensions()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in extensions and path.is_file())


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read the image {path}: {error or type(error).__name__}. Replace or remove the file.")


def _pillow_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises for damaged files (its formats are parsed by hand, so several kinds)."""
    from PIL import Image

    return (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def read_size(path: Path) -> Size:
    """(width, height) from the file's header; the pixels are not decoded. A `UserError` names an unreadable file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except _pillow_errors() as error:
        raise _broken(path, error) from error


def read_sizes(paths: Sequence[Path]) -> list[Size]:
    """`read_size` of many files, in threads. Every unreadable file is reported, not only the first."""

    def attempt(path: Path) -> Size | UserError:
        try:
            return read_size(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        results = list(pool.map(attempt, paths))
    failed = [result for result in results if isinstance(result, UserError)]
    if failed:
        raise UserError(listed([str(error) for error in failed], "unreadable images"))
    return [result for result in results if not isinstance(result, UserError)]


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


def decode(path: Path) -> tuple[np.ndarray, str]:
    """RGB pixels, uint8 [H, W, 3], and the content hash of the file. A `UserError` names an unreadable file."""
    import numpy as np
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except _pillow_errors() as error:
        raise _broken(path, error) from error
    return pixels, content_hash(data)


def resolve_interpolation(size: Size, resized: Size, chosen: str | None) -> str:
    """The filter that is used: `chosen`, else area when both sides shrink (or stay), Lanczos when one grows."""
    if chosen is not None:
        return chosen
    return "area" if size[0] >= resized[0] and size[1] >= resized[1] else "lanczos"


def resize(pixels: np.ndarray, resized: Size, interpolation: str) -> np.ndarray:
    """uint8 [H, W, 3] -> [resized height, resized width, 3].

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
    """Resize to `placement.resized` and cut `crop`: uint8 [bucket height, bucket width, 3]."""
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
