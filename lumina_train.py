"""Train a whole Lumina-Image-2.0 transformer; the text encoder stays as it is.

accelerate launch lumina_train.py --pretrained_model_name_or_path lumina-image-2.safetensors \\
    --gemma2 gemma-2-2b.safetensors --ae ae.safetensors --dataset_config data.toml --timestep_sampling nextdit_shift \\
    --learning_rate 1e-5 --mixed_precision bf16 --full_bf16 --gradient_checkpointing --output_dir out
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.lumina_options import LuminaFullOptions
from library.option_groups import FullTrainOptions
from library.options import build_parser


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(FullTrainOptions, LuminaFullOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> FullTrainOptions:
    return read_options(FullTrainOptions, argv, LuminaFullOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.lumina_train_utils import LuminaFamily
    from library.train_util import train_full

    train_full(LuminaFamily(), options)


if __name__ == "__main__":
    run_script(main)
