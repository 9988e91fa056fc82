"""sd-scripts' place for `tools/extract_lora_from_models.py`, with its defaults: --clamp_quantile=0.99."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--clamp_quantile=0.99"]
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "extract_lora_from_models.py"), run_name="__main__")
