"""Make pictures with Lumina-Image-2.0: gen_img.py under another name of sd-scripts'.

python lumina_minimal_inference.py --pretrained_model_name_or_path MODEL --gemma2_path gemma-2-2b.safetensors \\
    --ae_path ae.safetensors --prompt "a red fox" --guidance_scale 4 --bf16 --output_dir pictures
"""

from __future__ import annotations

import argparse

from library.cli import run_script
from library.generation_options import GenerateOptions, build_picture_parser, read_picture_options


def setup_parser() -> argparse.ArgumentParser:
    return build_picture_parser("lumina", description=__doc__)


def parse_options(argv: list[str] | None = None) -> tuple[str, GenerateOptions]:
    return read_picture_options(argv, description=__doc__, family="lumina")


def main(argv: list[str] | None = None) -> None:
    family, options = parse_options(argv)

    from library.generation import generate

    generate(family, options)


if __name__ == "__main__":
    run_script(main)
