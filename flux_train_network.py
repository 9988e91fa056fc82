"""Train a LoRA, or another adapter network, for FLUX.1 or Chroma.

accelerate launch flux_train_network.py --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors \\
    --t5xxl t5xxl.safetensors --ae ae.safetensors --dataset_config data.toml \\
    --network_module networks.lora_flux --network_dim 16 --learning_rate 1e-4 --timestep_sampling shift --output_dir out
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.flux_options import FluxOptions
from library.option_groups import NetworkTrainOptions
from library.options import build_parser


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(NetworkTrainOptions, FluxOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> NetworkTrainOptions:
    return read_options(NetworkTrainOptions, argv, FluxOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.flux_train_utils import FluxFamily
    from library.train_util import train_network

    train_network(FluxFamily(), options)


if __name__ == "__main__":
    run_script(main)
