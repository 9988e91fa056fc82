"""Make pictures, with LoRAs or without, from a model of any family.

python gen_img.py --ckpt MODEL --prompt "a red fox --w 768 --d 1" --outdir pictures \\
    --network_weights style.safetensors --network_mul 0.8

The family is told from the model's files; --family NAME --help shows its options, too.
"""

from __future__ import annotations

import argparse

from library.cli import run_script
from library.generation_options import GenerateOptions, build_picture_parser, read_picture_options


def setup_parser() -> argparse.ArgumentParser:
    return build_picture_parser(description=__doc__)


def parse_options(argv: list[str] | None = None) -> tuple[str, GenerateOptions]:
    return read_picture_options(argv, description=__doc__)


def main(argv: list[str] | None = None) -> None:
    family, options = parse_options(argv)

    from library.generation import generate

    generate(family, options)


if __name__ == "__main__":
    run_script(main)
