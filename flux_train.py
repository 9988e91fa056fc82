"""Train a whole FLUX.1 or Chroma transformer; the text encoders stay as they are.

accelerate launch flux_train.py --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors \\
    --t5xxl t5xxl.safetensors --ae ae.safetensors --dataset_config data.toml \\
    --learning_rate 1e-5 --mixed_precision bf16 --full_bf16 --gradient_checkpointing --output_dir out
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.flux_options import FluxFullOptions
from library.option_groups import FullTrainOptions
from library.options import build_parser


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(FullTrainOptions, FluxFullOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> FullTrainOptions:
    return read_options(FullTrainOptions, argv, FluxFullOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.flux_train_utils import FluxFamily
    from library.train_util import train_full

    train_full(FluxFamily(), options)


if __name__ == "__main__":
    run_script(main)
