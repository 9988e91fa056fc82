"""Train a LoRA, or another adapter network, for SDXL.

accelerate launch sdxl_train_network.py --pretrained_model_name_or_path sd_xl_base.safetensors --dataset_config data.toml \\
    --network_module networks.lora --network_dim 16 --learning_rate 1e-4 --network_train_unet_only \\
    --cache_text_encoder_outputs --mixed_precision bf16 --output_dir out --output_name style
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.option_groups import NetworkTrainOptions
from library.options import build_parser
from library.sdxl_options import SdxlOptions


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(NetworkTrainOptions, SdxlOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> NetworkTrainOptions:
    return read_options(NetworkTrainOptions, argv, SdxlOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.sdxl_train_utils import SdxlFamily
    from library.train_util import train_network

    train_network(SdxlFamily(), options)


if __name__ == "__main__":
    run_script(main)
