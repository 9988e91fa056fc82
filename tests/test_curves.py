"""The picture of a run's losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from library.curves import draw_curves
from library.errors import UserError
from library.tracking import CURRENT, MetricsFile, Row
from library.validation import ValidationLoss


def picture_of(folder: Path, rows: Mapping[int, Mapping[str, float]]) -> Image.Image:
    metrics = MetricsFile(folder / "metrics.csv", resume_step=None)
    for step, values in rows.items():
        metrics.add(Row(step, 1, values))
    draw_curves(folder / "metrics.csv", folder / "loss.png")
    with Image.open(folder / "loss.png") as picture:
        return picture.convert("RGB")


def has_orange(picture: Image.Image) -> bool:
    return any(red > 240 and 100 < green < 150 and blue < 60 for _, (red, green, blue) in picture.getcolors(1 << 20) or ())  # type: ignore[misc]


def test_validations_stand_beside_the_losses(tmp_path: Path) -> None:
    trained = {step: {CURRENT: 1 / step} for step in range(1, 40)}
    alone = picture_of(tmp_path, trained)
    rounds = {100 + step: ValidationLoss((1 / step, 2 / step, 0.5)).logs("epoch", training=0.1) for step in (3, 6, 9)}
    both = picture_of(tmp_path, {**trained, **rounds})
    assert both.width > alone.width > 300
    assert has_orange(both) and not has_orange(alone)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no losses to draw"):
        picture_of(tmp_path, {})
