"""`--show_batches`: an HTML page with the first batches exactly as they would be trained, and nothing trained."""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from library.checkpoint import atomic_write
from library.dataset import EpochKeys, ImageDataset

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.train_util import PreparedRun

PAGE_FILE = "batches.html"

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Batches as they are trained</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; background: #fafafa; color: #222; }
h2 { font-size: 1em; margin: 1.5em 0 .5em; border-top: 1px solid #ccc; padding-top: 1em; }
.batch { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
figure { margin: 0; width: 20em; background: #fff; border: 1px solid #ddd; padding: .5em; box-sizing: border-box; }
img { max-width: 100%; display: block; margin-bottom: .4em; image-rendering: auto; }
figcaption { white-space: pre-wrap; overflow-wrap: anywhere; }
.empty { color: #a00; } .facts { color: #666; font-size: .85em; }
</style></head><body>
"""


def _data_url(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] or [H, W] -> the picture inside an address, without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> uint8 [H, W, 3]; gives back the very pixels that `pixels_to_tensor` was given."""
    return ((image.float() * 0.5 + 0.5) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _figure(batch: TrainBatch, row: int) -> str:
    assert batch.images is not None
    height, width = batch.original_sizes[row].tolist()
    top, left = batch.crop_top_lefts[row].tolist()
    caption = batch.captions[row]
    parts = [f'<img alt="picture" src="{_data_url(picture(batch.images[row]))}">']
    if batch.mask is not None:
        mask = (batch.mask[row, 0] * 255).round().byte().numpy()
        parts.append(f'<img alt="mask" src="{_data_url(mask)}">')
    if batch.conditioning_images is not None:
        parts.append(f'<img alt="conditioning picture" src="{_data_url(picture(batch.conditioning_images[row]))}">')
    text = html.escape(caption) if caption else '<span class="empty">(empty caption)</span>'
    facts = [f"file {width}x{height}", f"cut at {left},{top}", f"loss weight {batch.loss_weights[row].item():g}"]
    if batch.preserve is not None and batch.preserve[row]:
        facts.append("keeps the untrained model's prediction")
    return f'<figure>{"".join(parts)}<figcaption>{text}</figcaption><div class="facts">{"; ".join(facts)}</div></figure>'


def page(dataset: ImageDataset, count: int, world: int = 1) -> Iterator[str]:
    """The page in pieces: the first `count` batches of the first of `world` processes, in the order of training."""
    yield _HEAD
    epochs = -(-count * world // max(dataset.num_batches, 1)) + 1
    keys = EpochKeys(dataset.num_batches, epoch=0, epochs=epochs, start=0, rank=0, world=world)
    for number, key in zip(range(1, count + 1), keys, strict=False):
        batch = dataset[key]
        height, width = batch.target_sizes[0].tolist()
        title = f"Batch {number} (epoch {key[0] + 1}): {len(batch)} of {width}x{height}"
        if batch.multiplier != 1.0:
            title += f", network multiplier {batch.multiplier:g}"
        yield f'<h2>{title}</h2>\n<div class="batch">'
        yield from (_figure(batch, row) for row in range(len(batch)))
        yield "</div>\n"
    yield "</body></html>\n"


def write_page(prepared: PreparedRun, count: int) -> None:
    """Write the page of `prepared` to the output folder. Loads no model: pictures are shown before the VAE."""
    accelerator, options = prepared.accelerator, prepared.options
    if not accelerator.is_main_process:
        return
    path = Path(options.output.output_dir or ".") / PAGE_FILE
    dataset, world = prepared.data.train, accelerator.num_processes
    dataset.batches_per_step = options.training.gradient_accumulation_steps * world

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(page(dataset, count, world))

    atomic_write(path, write)
    sys.stdout.write(f"wrote {path}\n")
