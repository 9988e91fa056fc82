"""Show what a safetensors file says about itself, and what is in it.

python tools/show_metadata.py --model lora.safetensors
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.adapter_tools import tool_parser  # noqa: E402
from library.cli import run_script  # noqa: E402
from library.model_io import open_checkpoint  # noqa: E402
from library.model_signatures import detect_family  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="a model or an adapter")
    parser.add_argument("--model", type=Path, help="the same")
    given = parser.parse_args(arguments)
    path = given.model or given.file
    if path is None:
        parser.error("which file?")
    source = open_checkpoint(path)
    found = {}
    for name, value in source.metadata.items():
        try:
            found[name] = json.loads(value) if str(value)[:1] in "{[" else value
        except ValueError:
            found[name] = value
    print(json.dumps(found, indent=2, ensure_ascii=False))
    detected = detect_family(source)
    dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in source.entries.values())
    numbers = sum(entry.num_elements for entry in source.entries.values())
    told = "of no kind that is known here" if detected is None else detected.title
    held = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    print(f"{path}: {told}; {len(source.entries)} tensors ({held}), {numbers:,} numbers", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
