"""The weighted sum of models of one layout.

python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output merged.safetensors

Ratios are equal unless given. A tensor that a model lacks counts as the first model's there; what only later models have is
left out. Text encoders of Stable Diffusion 1.x may have either of their two kinds of names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.adapter_tools import (  # noqa: E402
    PRECISIONS,
    add_device,
    add_ignored,
    precision,
    report_ignored,
    strengths,
    tool_parser,
)
from library.checkpoint import atomic_write  # noqa: E402
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.model_io import TensorEntry, open_checkpoint  # noqa: E402
from library.streamed_safetensors import LazyTensor, write_streamed  # noqa: E402

_CLIP = "cond_stage_model.transformer."
_OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders.")


def common_name(name: str) -> str:
    """CLIP's layers with `text_model.` before them, which some files leave out."""
    inner = name.removeprefix(_CLIP)
    known = name.startswith(_CLIP) and inner.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"{_CLIP}text_model.{inner}" if known else name


def weighted_sum(entries: Sequence[TensorEntry], ratios: Sequence[float], device: str) -> Tensor:
    """In float32, of one tensor of every model."""
    if not entries[0].dtype.is_floating_point:
        return entries[0].read()
    total = torch.zeros(entries[0].shape, device=device)
    for entry, ratio in zip(entries, ratios, strict=True):
        total.add_(entry.read(torch.float32).to(device), alpha=ratio)
    return total


def main(arguments: list[str] | None = None) -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="files of one layout")
    parser.add_argument("--ratios", type=float, nargs="+", help="share of each; equal unless given")
    parser.add_argument("--output", type=Path, required=True, help="the file to write, .safetensors")
    parser.add_argument("--unet_only", action="store_true", help="text encoders and autoencoder as the first model has them")
    parser.add_argument("--saving_precision", "--save_precision", choices=PRECISIONS, help="of what is written; the first's")
    parser.add_argument("--show_skipped", action="store_true", help="show tensors that only later models have")
    add_device(parser)
    add_ignored(parser, (), ("precision",))
    given = parser.parse_args(arguments)
    report_ignored(given)
    count = len(given.models)
    ratios = strengths(given.ratios, count, 1 / count)
    output = given.output if given.output.suffix == ".safetensors" else Path(f"{given.output}.safetensors")
    entries = [{common_name(name): entry for name, entry in open_checkpoint(path).entries.items()} for path in given.models]
    dtype = precision(given.saving_precision)
    planned, lacking = {}, 0
    for name, first in entries[0].items():
        own = given.unet_only and name.startswith(_OTHER_PARTS)
        sources, shares = ([first], [1.0]) if own else ([one.get(name, first) for one in entries], ratios)
        lacking += sum(name not in one for one in entries)
        for path, entry in zip(given.models, sources, strict=False):
            if entry.shape != first.shape:
                raise UserError(f"{name} is {first.shape} in {given.models[0]} and {entry.shape} in {path}: different models.")
        kept = dtype if dtype is not None and first.dtype.is_floating_point else first.dtype
        planned[name] = LazyTensor(kept, first.shape, partial(weighted_sum, sources, shares, given.device))
    skipped = sorted({name for one in entries[1:] for name in one} - entries[0].keys())
    for name in skipped if given.show_skipped else ():
        print(f"left out: {name}")
    atomic_write(output, lambda temporary: write_streamed(temporary, planned, {"format": "pt"}))
    told = f"; {lacking} taken from the first, {len(skipped)} left out" if lacking or skipped else ""
    print(f"{output}: {len(planned)} tensors of {count} models{told}")


if __name__ == "__main__":
    run_script(main)
