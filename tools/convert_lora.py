"""Write a LoRA file under the names that diffusers and peft read.

python tools/convert_lora.py lora.safetensors lora_diffusers.safetensors --to diffusers

For FLUX.1 and Chroma. sd-scripts' names stay the ones to share: ComfyUI and A1111-style interfaces read all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from library.checkpoint import atomic_write  # noqa: E402
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from networks.diffusers_files import in_diffusers_names  # noqa: E402
from networks.lora_flux import ARCH  # noqa: E402
from networks.network_files import read_weights  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a LoRA file in sd-scripts' names")
    parser.add_argument("output", type=Path, help="the file to write, .safetensors")
    parser.add_argument("--to", choices=("diffusers",), default="diffusers", help="whose names")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    if given.output.suffix != ".safetensors":
        raise UserError(f"{given.output}: only .safetensors files are written.")
    converted = in_diffusers_names(read_weights(given.source), ARCH, str(given.source))
    metadata = _metadata(given.source)
    atomic_write(given.output, lambda path: save_file(converted, path, metadata))
    print(f"{given.output}: {len(converted) // 2} layers")


def _metadata(path: Path) -> dict[str, str]:
    """What `path` says about itself, but for hashes of its tensors."""
    if path.suffix != ".safetensors":
        return {"format": "pt"}
    with safe_open(path, "pt") as file:
        found = dict(file.metadata() or {})
    return {"format": "pt"} | {name: value for name, value in found.items() if not name.endswith(("_hash", "hash_sha256"))}


if __name__ == "__main__":
    run_script(main)
