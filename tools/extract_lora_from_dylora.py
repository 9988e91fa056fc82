"""Cut a DyLoRA to smaller ranks.

python tools/extract_lora_from_dylora.py --model dylora.safetensors --save_to lora.safetensors --unit 4

Writes a file for every multiple of --unit below the rank: lora-0004.safetensors, lora-0008.safetensors, ...
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.adapter_tools import (  # noqa: E402
    add_family,
    add_saving,
    network_facts,
    precision,
    read_adapter,
    tool_parser,
    write_adapter_file,
)
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from networks.merging import cut  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a file that networks.dylora made")
    parser.add_argument("--save_to", type=Path, required=True, help="name of the files to write, which get their rank in it")
    parser.add_argument("--unit", type=int, required=True, help="ranks that were learned at once")
    add_saving(parser)
    add_family(parser)
    given = parser.parse_args(arguments)
    file = read_adapter(given.model, given.family)
    rank = min(len(layer["lora_down.weight"]) for layer in file.layers.values() if "lora_down.weight" in layer)
    if given.unit < 1 or rank % given.unit:
        raise UserError(f"--unit {given.unit} does not divide the rank {rank} of {given.model}.")
    metadata = file.kept_metadata(given)
    for new in range(given.unit, rank + 1, given.unit):
        made = {key: cut(layer, key, new) for key, layer in file.layers.items()}
        path = given.save_to.with_name(f"{given.save_to.stem}-{new:04d}{given.save_to.suffix}")
        facts = {**metadata, **network_facts("networks.lora", new)}
        facts["ss_network_alpha"] = str(float(next(iter(made.values()))["alpha"]))
        write_adapter_file(path, made, file.arch, facts, dtype=precision(given.save_precision) or file.dtype)
        print(f"{path}: rank {new}")


if __name__ == "__main__":
    run_script(main)
