"""Train a LoRA, or another adapter network, for Lumina-Image-2.0.

accelerate launch lumina_train_network.py --pretrained_model_name_or_path lumina-image-2.safetensors \\
    --gemma2 gemma-2-2b.safetensors --ae ae.safetensors --dataset_config data.toml \\
    --network_module networks.lora_lumina --network_dim 8 --learning_rate 1e-4 --output_dir out
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.lumina_options import LuminaOptions
from library.option_groups import NetworkTrainOptions
from library.options import build_parser


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(NetworkTrainOptions, LuminaOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> NetworkTrainOptions:
    return read_options(NetworkTrainOptions, argv, LuminaOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.lumina_train_utils import LuminaFamily
    from library.train_util import train_network

    train_network(LuminaFamily(), options)


if __name__ == "__main__":
    run_script(main)
