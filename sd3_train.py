"""Train a whole Stable Diffusion 3 or 3.5 transformer, and its text encoders on request.

accelerate launch sd3_train.py --pretrained_model_name_or_path sd3.5_medium.safetensors --clip_l clip_l.safetensors \\
    --clip_g clip_g.safetensors --t5xxl t5xxl.safetensors --dataset_config data.toml \\
    --learning_rate 1e-5 --mixed_precision bf16 --full_bf16 --gradient_checkpointing --output_dir out
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.option_groups import FullTrainOptions
from library.options import build_parser
from library.sd3_options import Sd3FullOptions


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(FullTrainOptions, Sd3FullOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> FullTrainOptions:
    return read_options(FullTrainOptions, argv, Sd3FullOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.sd3_train_utils import Sd3Family
    from library.train_util import train_full

    train_full(Sd3Family(), options)


if __name__ == "__main__":
    run_script(main)
