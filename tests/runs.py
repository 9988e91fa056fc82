"""Real runs at tiny size, for the contract, golden, resume and hostile tests: options, a tiny model and a few pictures."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tiny
import tiny_flux
import tiny_sdxl
import torch
from torch import Tensor

from library.family_base import family_class

if TYPE_CHECKING:
    from library.train_util import PreparedRun, Trainer

Mode = Literal["network", "full"]


@dataclass(frozen=True)
class FamilyCase:
    """One row per family: everything the contract tests need to know about it."""

    family: str
    write_model: Callable[[Path], Path]
    scripts: dict[Mode, str]
    resolution: int = 64
    arguments: Callable[[Path], list[str]] = lambda folder: []
    """Further arguments, which name files in the folder that `write_model` wrote to."""
    full_extra: tuple[str, ...] = field(default=())
    write_swappable: Callable[[Path], Path] | None = None
    """Like `write_model`, with enough blocks for `--blocks_to_swap=2`; None where the family has no such flag."""


CASES: dict[str, FamilyCase] = {
    "sd": FamilyCase(
        family="sd",
        write_model=lambda folder: tiny.write_sd_checkpoint(folder / "sd.safetensors", version="v1"),
        scripts={"network": "train_network", "full": "train_db"},
    ),
    "sdxl": FamilyCase(
        family="sdxl",
        write_model=lambda folder: tiny_sdxl.write_checkpoint(folder / "sdxl.safetensors"),
        scripts={"network": "sdxl_train_network", "full": "sdxl_train"},
        full_extra=("--train_text_encoder",),
    ),
    "flux": FamilyCase(
        family="flux",
        write_model=tiny_flux.write_flux_files,
        scripts={"network": "flux_train_network", "full": "flux_train"},
        arguments=tiny_flux.arguments,
        write_swappable=lambda folder: tiny_flux.write_flux_files(folder, blocks=tiny_flux.SWAPPABLE),
    ),
    "chroma": FamilyCase(
        family="flux",
        write_model=lambda folder: tiny_flux.write_flux_files(folder, "chroma"),
        scripts={"network": "flux_train_network", "full": "flux_train"},
        arguments=tiny_flux.arguments,
        write_swappable=lambda folder: tiny_flux.write_flux_files(folder, "chroma", blocks=tiny_flux.SWAPPABLE),
    ),
}
MODES: tuple[Mode, ...] = ("network", "full")


@dataclass(frozen=True)
class Workspace:
    """A tiny model and seven captioned pictures of two sizes: with repeats, seven batches of two an epoch.

    Made once for many runs, each of which has its own output folder.
    """

    case: FamilyCase
    model: Path
    tokenizer: Path
    images: Path

    def arguments(self, mode: Mode, output: Path, *extra: str) -> list[str]:
        """A command line that trains; later flags win, so `extra` can override any of it."""
        arguments = [
            f"--pretrained_model_name_or_path={self.model}",
            f"--tokenizer={self.tokenizer}",
            f"--train_data_dir={self.images}",
            f"--resolution={self.case.resolution}",
            "--enable_bucket",
            "--min_bucket_reso=32",
            "--max_bucket_reso=128",
            "--bucket_reso_steps=32",
            "--train_batch_size=2",
            "--learning_rate=1e-3",
            "--max_train_steps=4",
            "--max_data_loader_n_workers=0",
            "--seed=7",
            f"--output_dir={output}",
            "--output_name=tiny",
            *self.case.arguments(self.model.parent),
        ]
        if mode == "network":
            arguments += ["--network_module=networks.lora", "--network_dim=4", "--network_alpha=2"]
        else:
            arguments += list(self.case.full_extra)
        return [*arguments, *extra]

    def script(self, mode: Mode) -> str:
        return self.case.scripts[mode]

    def train(self, mode: Mode, output: Path, *extra: str) -> Path:
        """Run the script's own `main` to its end; gives the output folder."""
        importlib.import_module(self.script(mode)).main(self.arguments(mode, output, *extra))
        return output

    def prepared(self, mode: Mode, output: Path, *extra: str) -> PreparedRun:
        """Everything checked and nothing loaded."""
        from library.train_util import prepare_run

        parse = importlib.import_module(self.script(mode)).parse_options
        return prepare_run(family_class(self.case.family)(), parse(self.arguments(mode, output, *extra)), mode)

    def trainer(self, mode: Mode, output: Path, *extra: str) -> Trainer:
        """Everything built and nothing trained."""
        from library.train_util import finish_building

        return finish_building(self.prepared(mode, output, *extra))


def make_workspace(case: FamilyCase, folder: Path) -> Workspace:
    images = folder / "images"
    tiny.write_images(images / "2_thing", 5, (64, 64))
    tiny.write_images(images / "2_wide", 2, (96, 32))
    return Workspace(case, case.write_model(folder), tiny.write_clip_tokenizer(folder / "tokenizer"), images)


def rows(output: Path, column: str) -> list[float]:
    """One column of the metrics file, a value for every update."""
    with (output / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def losses(output: Path) -> list[float]:
    return rows(output, "loss/current")


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, first: {different[:3]}"


def first_batches(trainer: Trainer, count: int) -> Sequence:
    return [trainer.data.train[(0, index)] for index in range(count)]
