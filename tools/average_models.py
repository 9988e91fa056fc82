"""The mean of several saves of one run: post-hoc averaging, which often draws cleaner than any one of them.

python tools/average_models.py SAVE SAVE ... --output FILE [--power 3]

SAVE: adapter or checkpoint files, or diffusers folders, from the oldest to the newest; all of one layout. One tensor of each is
in memory at a time, and sums are float64. What is no weight (configurations, tokenizers, metadata) is the newest one's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.checkpoint import atomic_write  # noqa: E402
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.model_io import TensorSource, open_checkpoint  # noqa: E402
from library.streamed_safetensors import LazyTensor, write_streamed  # noqa: E402


def shares(count: int, power: float) -> list[float]:
    """Each save's share of the mean, oldest first: proportional to (its number / count) ** power.

    Power 0 is the plain mean; larger ones favour what was saved last, as the power-function averages of Karras et al. 2024
    (https://arxiv.org/abs/2312.02696, equation 127) do.
    """
    raw = [((index + 1) / count) ** power for index in range(count)]
    return [value / sum(raw) for value in raw]


def _mean(sources: Sequence[TensorSource], weights: Sequence[float], name: str) -> Tensor:
    newest = sources[-1].get(name)
    if not newest.is_floating_point():
        return newest
    total = torch.zeros(newest.shape, dtype=torch.float64)
    for source, weight in zip(sources, weights, strict=True):
        total.add_(source.get(name, torch.float64), alpha=weight)
    return total


def average_files(paths: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Write the mean of the safetensors files `paths` to `target`, in the newest one's dtypes and with its metadata."""
    sources = [open_checkpoint(path) for path in paths]
    newest = sources[-1]
    for path, source in zip(paths, sources, strict=True):
        if source.shapes() != newest.shapes():
            different = {*source.shapes().items()} ^ {*newest.shapes().items()}
            raise UserError(f"{path} and {paths[-1]} are not saves of one run: '{min(different)[0]}' differs in name or shape.")
    planned = {
        name: LazyTensor(newest.dtype(name), newest.shape(name), partial(_mean, sources, weights, name)) for name in newest
    }
    write_streamed(target, planned, {key: str(value) for key, value in newest.metadata.items()})


def average_folders(paths: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """The same of diffusers folders: every safetensors file in them, the other files as the newest folder has them."""
    newest = paths[-1]
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        inside = file.relative_to(newest)
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".safetensors":
            shutil.copy2(file, target / inside)
            continue
        missing = [path for path in paths if not (path / inside).is_file()]
        if missing:
            raise UserError(f"{missing[0]} has no {inside}, and {newest} has.")
        average_files([path / inside for path in paths], weights, target / inside)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("saves", type=Path, nargs="+", help="saves of one run, oldest first: .safetensors files, or folders")
    parser.add_argument("--output", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--power", type=float, default=0.0, help="0: all count alike; larger: later ones count more")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    saves: list[Path] = given.saves
    for path in saves:
        if not path.exists() or path.is_dir() != saves[0].is_dir():
            raise UserError(f"{path} {'is not of the kind of the first' if path.exists() else 'does not exist'}.")
        if path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{path}: only safetensors files can be averaged, and this is '{path.suffix}'.")
    if given.output in saves:
        raise UserError(f"--output {given.output} is one of the saves. Give another name.")
    average = average_folders if saves[0].is_dir() else average_files
    atomic_write(given.output, lambda temporary: average(saves, shares(len(saves), given.power), temporary))
    print(f"{given.output}: the mean of {len(saves)} saves")


if __name__ == "__main__":
    run_script(main)
