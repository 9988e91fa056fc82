"""Train a whole Stable Diffusion 1.x or 2.x model on folders of pictures (DreamBooth), with its text encoder.

accelerate launch train_db.py --pretrained_model_name_or_path MODEL --train_data_dir pictures --resolution 512 \\
    --learning_rate 1e-6 --max_train_steps 800 --output_dir out --output_name subject
"""

from __future__ import annotations

import argparse

from library.cli import read_options, run_script
from library.option_groups import DreamBoothOptions
from library.options import build_parser
from library.unet_options import UnetOptions


def setup_parser() -> argparse.ArgumentParser:
    return build_parser(DreamBoothOptions, UnetOptions, description=__doc__)


def parse_options(argv: list[str] | None = None) -> DreamBoothOptions:
    return read_options(DreamBoothOptions, argv, UnetOptions, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)

    from library.sd_train_utils import SdFamily
    from library.train_util import train_full

    train_full(SdFamily(), options)


if __name__ == "__main__":
    run_script(main)
