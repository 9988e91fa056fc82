"""`--show_batches`: an HTML page with the first batches exactly as they would be trained, and nothing trained."""

from __future__ import annotations

import base64
import html
import io
import os
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
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Batches as they are trained</title>
<style>
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --line: #d8dbe0; --text: #1d2126; --soft: #5d6670;
  --mark: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --card: #1f242a; --line: #343b44; --text: #e4e7eb; --soft: #9aa4af; --mark: #ff8a80; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 110rem; background: var(--page);
  color: var(--text); }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 0; }
header p { color: var(--soft); margin: .2rem 0; max-width: 60rem; }
section { margin-top: 1.8rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.title { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; margin-bottom: .8rem; }
.batch { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem;
  align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; }
.small { image-rendering: pixelated; }
.shown { position: relative; }
.mask { position: absolute; inset: 0; height: 100% !important; image-rendering: pixelated; }
body:has(#masks:not(:checked)) .mask, .shown:hover .mask { display: none; }
figcaption { padding: .7rem .8rem .3rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { padding: 0 .8rem .7rem; color: var(--soft); font-size: .85em; overflow-wrap: anywhere; }
.name { font-weight: 600; } .empty { color: var(--mark); font-style: italic; } .soft { color: var(--soft); }
</style></head><body>
"""

_SHADE = (255, 0, 200)
"""What is laid over a picture where its mask leaves the loss out."""
_SMALL = 256  # pixels: narrower pictures are shown enlarged, with their pixels to be seen


def _data_url(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] or [H, W] -> the picture inside an address, without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> uint8 [H, W, 3]; gives back the very pixels that `pixels_to_tensor` was given."""
    return ((image.float() * 0.5 + 0.5) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def shade(mask: Tensor) -> np.ndarray:
    """[h, w] in [0, 1] -> uint8 [h, w, 4]: nothing where the loss counts in full, `_SHADE` where it does not."""
    hidden = (1 - mask.float()).clamp(0, 1).numpy()
    return np.dstack([np.full(hidden.shape, value, np.uint8) for value in _SHADE] + [(hidden * 170).round().astype(np.uint8)])


def _img(kind: str, pixels: np.ndarray, css: str = "") -> str:
    return f'<img class="{css}" alt="{kind}" src="{_data_url(pixels)}">'


def _figure(batch: TrainBatch, row: int) -> str:
    assert batch.images is not None
    height, width = batch.original_sizes[row].tolist()
    top, left = batch.crop_top_lefts[row].tolist()
    caption = batch.captions[row]
    small = "small" if batch.images.shape[-1] < _SMALL else ""
    parts = ['<div class="shown">', _img("picture", picture(batch.images[row]), small)]
    if batch.mask is not None:
        parts.append(_img("mask", shade(batch.mask[row, 0]), "mask"))
    parts.append("</div>")
    if batch.conditioning_images is not None:
        parts.append(_img("conditioning picture", picture(batch.conditioning_images[row]), small))
    text = html.escape(caption) if caption else '<span class="empty">(empty caption)</span>'
    facts = [f"file {width}x{height}", f"cut at {left},{top}", f"loss weight {batch.loss_weights[row].item():g}"]
    if batch.mask is not None:
        facts.append(f"loss counts in {batch.mask[row].mean().item():.0%}")
    if batch.preserve is not None and batch.preserve[row]:
        facts.append("keeps the untrained model's prediction")
    name = html.escape(batch.names[row]) if batch.names else ""
    shown_name = html.escape(os.path.basename(batch.names[row])) if batch.names else ""
    facts_line = f'<div class="facts"><div class="name" title="{name}">{shown_name}</div>{"; ".join(facts)}</div>'
    return f"<figure>{''.join(parts)}<figcaption>{text}</figcaption>{facts_line}</figure>\n"


def _header(dataset: ImageDataset, count: int) -> str:
    masked = any(subset.alpha_mask or subset.conditioning_data_dir for part in dataset.parts for subset in part.records.subsets)
    switch = (
        '<p><label><input type="checkbox" id="masks" checked> shade what masks leave out of the loss</label> '
        "(point at a picture to see it bare)</p>"
        if masked
        else ""
    )
    return (
        f"<header><h1>The first {count} batches as they are trained</h1>"
        f"<p>{dataset.num_images} pictures an epoch, counting repeats, in {dataset.num_batches} batches. Pictures are cut, "
        "mirrored and coloured as the model is given them; captions are as they are encoded.</p>"
        f"{switch}</header>\n"
    )


def page(dataset: ImageDataset, count: int, world: int = 1) -> Iterator[str]:
    """The page in pieces: the first `count` batches of the first of `world` processes, in the order of training."""
    yield _HEAD + _header(dataset, count)
    epochs = -(-count * world // max(dataset.num_batches, 1)) + 1
    keys = EpochKeys(dataset.num_batches, epoch=0, epochs=epochs, start=0, rank=0, world=world)
    for number, key in zip(range(1, count + 1), keys, strict=False):
        batch = dataset[key]
        height, width = batch.target_sizes[0].tolist()
        facts = f"bucket {width}x{height}, {len(batch)} picture{'s' if len(batch) > 1 else ''}, epoch {key[0] + 1}"
        if batch.multiplier != 1.0:
            facts += f", network multiplier {batch.multiplier:g}"
        yield f'<section><div class="title"><h2>Batch {number}</h2><span class="soft">{facts}</span></div><div class="batch">\n'
        yield from (_figure(batch, row) for row in range(len(batch)))
        yield "</div></section>\n"
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
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(page(dataset, count, world))

    atomic_write(path, write)
    sys.stdout.write(f"wrote {path}\n")
