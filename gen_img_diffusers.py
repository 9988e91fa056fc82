"""Make pictures with Stable Diffusion 1.x or 2.x: gen_img.py under its old name.

python gen_img_diffusers.py --ckpt MODEL --prompt "a red fox" --outdir pictures
"""

from __future__ import annotations

import argparse

from library.cli import run_script
from library.generation_options import GenerateOptions, build_picture_parser, read_picture_options


def setup_parser() -> argparse.ArgumentParser:
    return build_picture_parser("sd", description=__doc__)


def parse_options(argv: list[str] | None = None) -> tuple[str, GenerateOptions]:
    return read_picture_options(argv, description=__doc__, family="sd")


def main(argv: list[str] | None = None) -> None:
    family, options = parse_options(argv)

    from library.generation import generate

    generate(family, options)


if __name__ == "__main__":
    run_script(main)
