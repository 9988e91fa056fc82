"""Make pictures with Stable Diffusion 3 or 3.5: gen_img.py under another name of sd-scripts'.

python sd3_minimal_inference.py --ckpt_path MODEL --clip_l clip_l.safetensors --clip_g clip_g.safetensors \\
    --t5xxl t5xxl.safetensors --prompt "a red fox" --cfg_scale 4.5 --bf16 --output_dir pictures \\
    --lora_weights "style.safetensors;0.8"
"""

from __future__ import annotations

import argparse

from library.cli import run_script
from library.generation_options import GenerateOptions, build_picture_parser, read_picture_options


def setup_parser() -> argparse.ArgumentParser:
    return build_picture_parser("sd3", description=__doc__)


def parse_options(argv: list[str] | None = None) -> tuple[str, GenerateOptions]:
    return read_picture_options(argv, description=__doc__, family="sd3")


def main(argv: list[str] | None = None) -> None:
    family, options = parse_options(argv)

    from library.generation import generate

    generate(family, options)


if __name__ == "__main__":
    run_script(main)
