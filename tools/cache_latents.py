"""Encode the pictures of a training command by its VAE, and keep the latents in files.

python tools/cache_latents.py flux_train_network.py --dataset_config data.toml ... the rest of a training command
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.cli import run_script  # noqa: E402
from tools.cache_commands import USAGE, fill  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n{USAGE.format(tool='cache_latents')}")
        return
    fill("latents", arguments)


if __name__ == "__main__":
    run_script(main)
