"""Train a LoRA, or another adapter network, for Stable Diffusion 3 or 3.5.

accelerate launch sd3_train_network.py --pretrained_model_name_or_path sd3.5_large.safetensors --clip_l clip_l.safetensors \\
    --clip_g clip_g.safetensors --t5xxl t5xxl.safetensors --dataset_config data.toml \\
    --network_module networks.lora_sd3 --network_dim 16 --learning_rate 1e-4 --output_dir out
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.option_groups import NetworkTrainOptions
from library.options import build_parser
from library.sd3_options import Sd3Options


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(NetworkTrainOptions, Sd3Options, description=__doc__)


def parse_options(argv: list[str] | None = None) -> NetworkTrainOptions:
    return read_options(NetworkTrainOptions, argv, Sd3Options, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.sd3_train_utils import Sd3Family
    from library.train_util import train_network

    train_network(Sd3Family(), options)


if __name__ == "__main__":
    run_script(main)
