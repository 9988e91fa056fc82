"""sd-scripts' place for `tools/merge_lora.py`, with its defaults: --method=svd."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--method=svd"]
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "merge_lora.py"), run_name="__main__")
