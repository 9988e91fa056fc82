"""Pictures of one coloured shape on a plain background, and a checker that says what a picture shows.

Both are deterministic: a drawing depends on its key only, the checker on the pixels only. The example model and the demo's
LoRA are trained on the drawings and judged by the checker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from library.rng import keyed_random

SIZE = 128
"""Sides of every picture, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "yellow": (245, 215, 50),
    "green": (45, 160, 70),
    "cyan": (60, 200, 215),
    "blue": (45, 80, 205),
    "purple": (150, 60, 185),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
RADII: dict[str, tuple[float, float]] = {"small": (28, 33), "large": (41, 47)}
"""Size word -> range of the radius of the circle around the shape, in pixels."""
BASE_SHAPES = ("circle", "square", "triangle", "star", "ring")
NEW_SHAPE = "heart"
"""The shape the base model never sees; the demo's LoRA teaches it under `NEW_TOKEN`."""
NEW_TOKEN = "zorb"

Point = tuple[float, float]
Outline = list[Point]


def _polygon(corners: int, *, inner: float | None = None, turn: float = 0.0) -> Outline:
    """A regular polygon in the unit circle, the first corner on top; with `inner`, a star whose dents have that radius."""
    count = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [turn - math.pi / 2 + 2 * math.pi * i / count for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> Outline:
    """The heart curve x = 16 sin³a, y = 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a, scaled into the unit circle."""
    angles = [2 * math.pi * i / 90 for i in range(90)]
    xs = [16 * math.sin(a) ** 3 for a in angles]
    ys = [-(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) for a in angles]
    return [(x / 17, (y - 2.5) / 17) for x, y in zip(xs, ys, strict=True)]


OUTLINES: dict[str, Callable[[], list[Outline]]] = {
    "circle": lambda: [_polygon(90)],
    "square": lambda: [_polygon(4, turn=math.pi / 4)],
    "triangle": lambda: [_polygon(3)],
    "star": lambda: [_polygon(5, inner=0.42)],
    "ring": lambda: [_polygon(90), [(0.55 * x, 0.55 * y) for x, y in _polygon(90)]],
    NEW_SHAPE: lambda: [_heart()],
}
"""Shape -> its outline in the unit circle, y down; a second outline is a hole."""
SHAPES = tuple(OUTLINES)


@dataclass(frozen=True, order=True)
class Scene:
    """What a picture is meant to show."""

    shape: str
    colour: str
    background: str
    size: str = "large"

    @property
    def combination(self) -> tuple[str, str, str]:
        """What the checker can tell: shape, colour, background."""
        return self.shape, self.colour, self.background

    def prompt(self, noun: str | None = None) -> str:
        """The caption; `noun` replaces the name of the shape."""
        return f"a {self.size} {self.colour} {noun or self.shape} on a {self.background} background"


def scenes(shapes: tuple[str, ...] = BASE_SHAPES, sizes: tuple[str, ...] = tuple(RADII)) -> Iterator[Scene]:
    """Every combination, in a fixed order; shape and background differ in colour."""
    for shape in shapes:
        for colour in COLOURS:
            for background in COLOURS:
                if colour != background:
                    yield from (Scene(shape, colour, background, size) for size in sizes)


def _held_out(count: int) -> frozenset[tuple[str, str, str]]:
    combinations = sorted({scene.combination for scene in scenes()})
    return frozenset(keyed_random("held out").sample(combinations, count))


HELD_OUT = _held_out(100)
"""Combinations that the base model is never trained on, in no size: with both sizes, 200 prompts to judge it by."""


def _jittered(colour: str, rng: Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in COLOURS[colour])
    return red, green, blue


def draw(scene: Scene, *key: object) -> Image.Image:
    """One anti-aliased drawing; `key` chooses place, exact size, tilt and shades."""
    rng = keyed_random("shapes", scene, *key)
    radius = rng.uniform(*RADII[scene.size])
    room = SIZE / 2 - radius - 4
    reach = min(room, 16)
    centre = (SIZE / 2 + rng.uniform(-reach, reach), SIZE / 2 + rng.uniform(-reach, reach))
    tilt = math.radians(rng.uniform(-8, 8))
    background, colour = _jittered(scene.background, rng), _jittered(scene.colour, rng)
    scale = 4  # drawn four times as large and averaged: smooth edges
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale), background)
    pen = ImageDraw.Draw(canvas)
    for outline, fill in zip(OUTLINES[scene.shape](), (colour, background), strict=False):
        pen.polygon([_placed(point, centre, radius, tilt, scale) for point in outline], fill=fill)
    return canvas.reduce(scale)


def _placed(point: Point, centre: Point, radius: float, tilt: float, scale: int) -> Point:
    x, y = point
    turned = (x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt))
    return (centre[0] + radius * turned[0]) * scale, (centre[1] + radius * turned[1]) * scale


# ---------------------------------------------------------------------------------------------------------------- checker


@dataclass(frozen=True)
class Found:
    """What a picture shows; None where it shows nothing the checker knows."""

    shape: str | None
    colour: str | None
    background: str | None

    def matches(self, scene: Scene) -> bool:
        """Shape, colour and background are all as asked."""
        return (self.shape, self.colour, self.background) == scene.combination


GRID = 64  # cells of the normalised mask, per side
REACH = 1.25  # half its width, in units of the square root of the shape's area
MIN_OVERLAP = 0.82  # below this intersection over union with every template, a blob is no shape
MIN_CONTRAST = 60.0  # RGB distance that separates a shape from its background
MAX_COLOUR_DISTANCE = 70.0  # a colour farther than this from all of the palette has no name
MIN_AREA = 0.02  # of the picture


def check(image: Image.Image) -> Found:
    """What the picture shows. The background's colour is the border's; the shape is what clearly differs from it."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3), pixels[:, :4].reshape(-1, 3)])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    distinct = distance > MIN_CONTRAST
    if distinct.mean() < MIN_AREA:
        return Found(None, None, _colour_name(background))
    colour = np.median(pixels[distinct], axis=0)
    # An edge pixel belongs to the colour it is nearer to, and a pixel unlike both (a second object) to neither: see _overlaps.
    mask = np.linalg.norm(pixels - colour, axis=-1) < distance
    return Found(_shape_name(mask), _colour_name(colour), _colour_name(background))


def _colour_name(colour: np.ndarray) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= MAX_COLOUR_DISTANCE else None


def _normalised(mask: np.ndarray) -> np.ndarray:
    """The mask with its centroid in the middle and its area at a fixed value: [GRID * GRID] bool."""
    ys, xs = np.nonzero(mask)
    steps = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    reach = REACH * math.sqrt(len(xs))
    columns = np.rint(xs.mean() + steps * reach).astype(int)
    rows = np.rint(ys.mean() + steps * reach).astype(int)
    inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))[None]
    picked = mask[rows.clip(0, mask.shape[0] - 1)[:, None], columns.clip(0, mask.shape[1] - 1)[None]]
    return (picked & inside).ravel()


@cache
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    """(names, masks [K, GRID * GRID]): every shape in a few tilts, drawn large."""
    names, masks = [], []
    for shape in SHAPES:
        for degrees in (-8, -4, 0, 4, 8):
            canvas = Image.new("L", (512, 512), 0)
            pen = ImageDraw.Draw(canvas)
            for outline, fill in zip(OUTLINES[shape](), (255, 0), strict=False):
                pen.polygon([_placed(p, (256, 256), 180, math.radians(degrees), 1) for p in outline], fill=fill)
            names.append(shape)
            masks.append(_normalised(np.asarray(canvas) > 127))
    return tuple(names), np.stack(masks)


def overlaps(mask: np.ndarray) -> dict[str, float]:
    """Shape -> best intersection over union of the normalised mask with its templates. Stray blobs lower them all."""
    names, templates = _templates()
    normal = _normalised(mask)
    union = (templates | normal).sum(1)
    scores = (templates & normal).sum(1) / union
    return {shape: max(float(s) for n, s in zip(names, scores, strict=True) if n == shape) for shape in SHAPES}


def _shape_name(mask: np.ndarray) -> str | None:
    if mask.mean() < MIN_AREA:
        return None
    scores = overlaps(mask)
    best = max(scores, key=lambda shape: scores[shape])
    return best if scores[best] >= MIN_OVERLAP else None
