"""Bucket sizes, and which bucket a picture goes to. Pure functions of numbers; the rules are sd-scripts'.

A size is (width, height) in pixels throughout, as in bucket lists and file names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt, sqrt

from library.errors import UserError

Size = tuple[int, int]


def bucket_sizes(resolution: Size, minimum: int, maximum: int, step: int) -> tuple[Size, ...]:
    """Every bucket, sorted: sides are multiples of `step` in [minimum, maximum], the area is at most that of `resolution`.

    For each width the height is the tallest that fits; each size is there in both orientations, and so is the largest square.
    """
    area = resolution[0] * resolution[1]
    square = isqrt(area) // step * step
    sizes = {(square, square)} if square else set()
    for width in range(minimum, maximum + 1, step):
        height = min(maximum, area // width // step * step)
        if height >= minimum:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest_by_ratio(size: Size, sizes: tuple[Size, ...]) -> Size:
    """`size` itself when it is a bucket, else the bucket whose aspect ratio is nearest (the first of equals)."""
    if size in sizes:
        return size
    ratio = size[0] / size[1]
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def cover(size: Size, bucket: Size) -> Size:
    """`size` scaled until it just covers `bucket`: one side equal, the other cropped."""
    if size[0] / size[1] > bucket[0] / bucket[1]:
        scale = bucket[1] / size[1]
    else:
        scale = bucket[0] / size[0]
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def _rounded(value: float, step: int) -> int:
    whole = int(value + 0.5)
    return whole - whole % step


def _shrunk_to_area(size: Size, area: int, step: int) -> Size:
    """`size` shrunk to about `area`, with that side made a multiple of `step` that leaves the smaller ratio error."""
    ratio = size[0] / size[1]
    width = sqrt(area * ratio)
    by_width = _rounded(width, step)
    by_height = _rounded(area / width, step)
    if not by_width or not by_height:
        return int(width + 0.5), int(area / width + 0.5)
    height_there, width_there = _rounded(by_width / ratio, step), _rounded(by_height * ratio, step)
    error_by_width = abs(by_width / height_there - ratio) if height_there else float("inf")
    error_by_height = abs(width_there / by_height - ratio)
    if error_by_width < error_by_height:
        return by_width, int(by_width / ratio + 0.5)
    return int(by_height * ratio + 0.5), by_height


@dataclass(frozen=True)
class Placement:
    """Where a picture goes: it is resized to `resized`, and `bucket` is cut out of that."""

    bucket: Size
    resized: Size

    @property
    def slack(self) -> Size:
        """Pixels that are cut away, (across, down)."""
        return self.resized[0] - self.bucket[0], self.resized[1] - self.bucket[1]


@dataclass(frozen=True)
class BucketRule:
    """The size settings of one dataset. `step` is bucket_reso_steps when buckets are on, else the model's own step."""

    resolution: Size
    enabled: bool
    minimum: int
    maximum: int
    step: int
    no_upscale: bool
    listed: tuple[Size, ...] = ()
    """Buckets that a metadata file has chosen, instead of those made from the numbers above."""

    @property
    def limits(self) -> tuple[int, int]:
        """Shortest and longest side in whole steps. As in sd-scripts, the minimum rounds down and the maximum up."""
        return max(self.minimum - self.minimum % self.step, self.step), self.maximum + -self.maximum % self.step

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        if self.listed:
            return self.listed
        return bucket_sizes(self.resolution, *self.limits, self.step) if self.enabled else (self.resolution,)

    def place(self, size: Size, *, native_crop: bool = False, preferred: Size | None = None) -> Placement:
        """The bucket for a picture of `size`, and the size it is resized to first.

        native_crop: random crops without buckets are cut from the unscaled picture where it is large enough.
        preferred: a bucket chosen elsewhere (`train_resolution` of a metadata file), used if it is one of ours.
        """
        if not self.enabled:
            if native_crop and size[0] >= self.resolution[0] and size[1] >= self.resolution[1]:
                return Placement(self.resolution, size)
            return Placement(self.resolution, cover(size, self.resolution))
        if preferred in self.sizes:
            assert preferred is not None
            return Placement(preferred, cover(size, preferred))
        if not self.no_upscale:
            bucket = nearest_by_ratio(size, self.sizes)
            return Placement(bucket, cover(size, bucket))
        area = self.resolution[0] * self.resolution[1]
        resized = _shrunk_to_area(size, area, self.step) if size[0] * size[1] > area else size
        bucket = resized[0] - resized[0] % self.step, resized[1] - resized[1] % self.step
        if not bucket[0] or not bucket[1]:
            raise UserError(
                f"{size[0]}x{size[1]} is smaller than one bucket step ({self.step}) on a side. "
                "Turn bucket_no_upscale off, lower bucket_reso_steps or remove the image."
            )
        return Placement(bucket, resized)


def check_rule(rule: BucketRule, model_step: int, where: str) -> list[str]:
    """What is wrong with the size settings of the dataset called `where`, one message each."""
    wrong = []
    width, height = rule.resolution
    if rule.listed:
        wrong += [
            f"{where}: train_resolution {across}x{down} in the metadata file: this model needs multiples of {model_step}."
            for across, down in rule.listed
            if across % model_step or down % model_step
        ]
    elif rule.enabled:
        if rule.step % model_step:
            wrong.append(f"{where}: bucket_reso_steps is {rule.step}, but this model needs a multiple of {model_step}.")
        shortest, longest = rule.limits
        if shortest > min(width, height):
            wrong.append(f"{where}: min_bucket_reso {rule.minimum} is larger than the resolution {width}x{height}.")
        if longest < max(width, height):
            wrong.append(f"{where}: max_bucket_reso {rule.maximum} is smaller than the resolution {width}x{height}.")
        if not wrong and not rule.sizes:
            wrong.append(f"{where}: no bucket fits resolution {width}x{height} with bucket_reso_steps {rule.step}.")
    elif width % model_step or height % model_step:
        wrong.append(
            f"{where}: resolution {width}x{height} is not a multiple of {model_step}, which this model needs. "
            f"Use {width // model_step * model_step}x{height // model_step * model_step} or set enable_bucket."
        )
    return wrong
