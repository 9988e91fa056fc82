"""Real runs at tiny size, for the contract, golden, resume and hostile tests: options, a tiny model and a few pictures."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tiny
import tiny_flux
import tiny_lumina
import tiny_sd3
import tiny_sdxl
import torch
from torch import Tensor

from library.family_base import family_class
from library.unet_parts import make_unet

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
    memory: tuple[str, ...] = ("swap", "recomputing", "bf16", "offloading", "fused")
    """What swapping is tested with: the code is shared, and a family's own part is the order of its blocks."""


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
        memory=("offloading", "fused"),
    ),
    "sd3": FamilyCase(
        family="sd3",
        write_model=tiny_sd3.write_files,
        scripts={"network": "sd3_train_network", "full": "sd3_train"},
        arguments=tiny_sd3.arguments,
        full_extra=("--train_text_encoder",),
        write_swappable=lambda folder: tiny_sd3.write_files(folder, blocks=tiny_sd3.SWAPPABLE),
        memory=("fused",),
    ),
    "lumina": FamilyCase(
        family="lumina",
        write_model=tiny_lumina.write_files,
        scripts={"network": "lumina_train_network", "full": "lumina_train"},
        arguments=tiny_lumina.arguments,
        write_swappable=lambda folder: tiny_lumina.write_files(folder, layers=tiny_lumina.SWAPPABLE),
        memory=("offloading", "fused"),
    ),
}
MODES: tuple[Mode, ...] = ("network", "full")

SHALLOW_SD = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SHALLOW_SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 1],
}


def write_shallow(folder: Path, write_folder: Callable[[Path], Path], config: dict[str, Any]) -> Path:
    """A diffusers folder whose UNet has two levels, one of them with attention: few layers, of every kind."""
    write_folder(folder / "model")
    unet: Any = tiny.randomised(make_unet(config | {"block_out_channels": [32, 64], "layers_per_block": 1}), "shallow")
    unet.save_pretrained(folder / "model" / "unet")
    return folder / "model"


SHALLOW_CASES: dict[str, FamilyCase] = CASES | {
    "sd": replace(
        CASES["sd"],
        full_extra=("--save_model_as=safetensors",),
        write_model=lambda folder: write_shallow(folder, tiny.write_sd_diffusers, tiny.sd_configs()["denoiser"] | SHALLOW_SD),
    ),
    "sdxl": replace(
        CASES["sdxl"],
        full_extra=("--train_text_encoder", "--save_model_as=safetensors"),
        write_model=lambda folder: write_shallow(
            folder, tiny_sdxl.write_folder, tiny_sdxl.configs()["denoiser"] | SHALLOW_SDXL
        ),
    ),
}
"""For what the depth of a UNet does not change: a step takes a third of the time."""


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


class Workspaces(dict[str, Workspace]):
    """By case, each made when it is first asked for."""

    def __init__(self, cases: Mapping[str, FamilyCase], folder: Callable[[str], Path]) -> None:
        super().__init__()
        self._cases, self._folder = cases, folder

    def __missing__(self, name: str) -> Workspace:
        self[name] = make_workspace(self._cases[name], self._folder(name))
        return self[name]


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
