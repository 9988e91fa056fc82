"""The picture of a run's `metrics.csv`: losses over steps, and validation losses over the times of noising."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.checkpoint import atomic_write
from library.errors import UserError
from library.tracking import CURRENT, MovingAverage, read_metrics

PICTURE_FILE = "loss.png"
LEAST_STEPS = 50
"""Losses of fewer show nothing but noise, unless there was a validation."""
_MEAN = re.compile(r"loss/validation/(?:step|epoch)_average")
_QUANTILE = re.compile(r"loss/validation/quantile_(\d+)")
MAX_ROUNDS = 8
"""Rounds of validation whose losses by time are drawn, spread over all."""


def draw_curves(csv_path: Path, png_path: Path) -> None:
    """Every step's loss, a running mean over about a twentieth of the run, and the validations, where there are any.

    Raises `UserError` for a `metrics.csv` without losses.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(csv_path)
    trained = [row for row in rows if CURRENT in row]
    validated = [row for row in rows if any(map(_MEAN.fullmatch, row))]
    if not trained:
        raise UserError(f"{csv_path} has no losses to draw yet.")
    figure = Figure(figsize=(12 if validated else 8, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    _draw_steps(axes[0], trained, validated)
    if validated:
        _draw_quantiles(axes[1], validated)
    atomic_write(png_path, lambda path: figure.savefig(path, format="png", dpi=120))


def _draw_steps(axes: Any, trained: Sequence[Mapping[str, str]], validated: Sequence[Mapping[str, str]]) -> None:
    steps, losses = [int(row["step"]) for row in trained], [float(row[CURRENT]) for row in trained]
    window = MovingAverage(max(5, len(losses) // 20))
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, [window.add(loss) for loss in losses], color="tab:blue", linewidth=1.8, label="running mean")
    if validated:
        means = [next(float(value) for name, value in row.items() if _MEAN.fullmatch(name)) for row in validated]
        axes.plot([int(row["step"]) for row in validated], means, "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="loss", title=f"{len(steps)} steps")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_quantiles(axes: Any, validated: Sequence[Mapping[str, str]]) -> None:
    count = min(MAX_ROUNDS, len(validated))
    for place in range(count):
        row = validated[round(place * (len(validated) - 1) / max(count - 1, 1))]
        found = sorted((int(match[1]), float(value)) for name, value in row.items() if (match := _QUANTILE.fullmatch(name)))
        shade = 0.25 + 0.75 * (place + 1) / count
        axes.plot(*zip(*found, strict=True), "o-", color="tab:orange", alpha=shade, label=f"after step {row['step']}")
    axes.set(xlabel="quantile of the times, in %: little noise to much", ylabel="validation loss", title="by time")
    axes.grid(alpha=0.3)
    axes.legend()
