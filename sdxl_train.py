"""Train a whole SDXL model: its UNet and, on request, its text encoders.

accelerate launch sdxl_train.py --pretrained_model_name_or_path sd_xl_base.safetensors --dataset_config data.toml \\
    --learning_rate 1e-5 --mixed_precision bf16 --full_bf16 --gradient_checkpointing --optimizer_type Adafactor \\
    --cache_text_encoder_outputs --cache_latents --output_dir out --output_name style
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.option_groups import FullTrainOptions
from library.options import build_parser
from library.sdxl_options import SdxlFullOptions


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(FullTrainOptions, SdxlFullOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> FullTrainOptions:
    return read_options(FullTrainOptions, argv, SdxlFullOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.sdxl_train_utils import SdxlFamily
    from library.train_util import train_full

    train_full(SdxlFamily(), options)


if __name__ == "__main__":
    run_script(main)
