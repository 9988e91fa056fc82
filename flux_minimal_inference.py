"""Make pictures with FLUX.1 or Chroma: gen_img.py under another name of sd-scripts'.

python flux_minimal_inference.py --ckpt_path MODEL --clip_l clip_l.safetensors --t5xxl t5xxl.safetensors --ae ae.safetensors \\
    --prompt "a red fox" --guidance 3.5 --bf16 --output_dir pictures --lora_weights "style.safetensors;0.8"
"""

from __future__ import annotations

import argparse

from library.cli import run_script
from library.generation_options import GenerateOptions, build_picture_parser, read_picture_options


def setup_parser() -> argparse.ArgumentParser:
    return build_picture_parser("flux", description=__doc__)


def parse_options(argv: list[str] | None = None) -> tuple[str, GenerateOptions]:
    return read_picture_options(argv, description=__doc__, family="flux")


def main(argv: list[str] | None = None) -> None:
    family, options = parse_options(argv)

    from library.generation import generate

    generate(family, options)


if __name__ == "__main__":
    run_script(main)
