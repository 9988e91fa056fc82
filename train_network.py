"""Train a LoRA, or another adapter network, for Stable Diffusion 1.x or 2.x.

accelerate launch train_network.py --pretrained_model_name_or_path MODEL --dataset_config data.toml \\
    --network_module networks.lora --network_dim 16 --learning_rate 1e-4 --output_dir out --output_name style
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.option_groups import NetworkTrainOptions
from library.options import build_parser
from library.unet_options import UnetOptions


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(NetworkTrainOptions, UnetOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> NetworkTrainOptions:
    return read_options(NetworkTrainOptions, argv, UnetOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.sd_train_utils import SdFamily
    from library.train_util import train_network

    train_network(SdFamily(), options)


if __name__ == "__main__":
    run_script(main)
