"""Write an adapter file under another program's names.

python tools/convert_lora.py lora.safetensors lora_diffusers.safetensors --to diffusers

Whose names the file has is seen from its content: sd-scripts' (kohya), ComfyUI's (comfy), diffusers', or peft's, which is a
folder. Before anything is written every key is looked up in tables of what those programs read.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.adapter_tools import PRECISIONS, add_family, precision, read_adapter, tool_parser  # noqa: E402
from library.cli import run_script  # noqa: E402
from networks.file_formats import DIFFUSERS, FORMATS, mended, weak_layers  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("source", type=Path, help="an adapter file, or peft's folder")
    parser.add_argument("output", type=Path, help="the file to write, .safetensors; a folder for peft")
    parser.add_argument("--to", choices=FORMATS, default=DIFFUSERS, help="whose names")
    parser.add_argument("--save_precision", choices=PRECISIONS, help="of what is written; as in the file unless given")
    parser.add_argument(
        "--mend_split_alpha",
        action="store_true",
        help="give the fused layers of a file that sd-scripts trained with split_qkv the strength they were trained with",
    )
    add_family(parser)
    given = parser.parse_args(arguments)
    file = read_adapter(given.source, given.family)
    layers = file.layers
    if given.mend_split_alpha:
        weak = weak_layers(layers, file.arch)
        print(f"{len(weak)} fused layers mended")
        layers = mended(layers, weak)
    file.write(given.output, layers, format=given.to, dtype=precision(given.save_precision))
    print(f"{given.output}: {len(layers)} layers of {file.arch.name} in {given.to}'s names")


if __name__ == "__main__":
    run_script(main)
