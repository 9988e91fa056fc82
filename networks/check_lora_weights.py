"""sd-scripts' place for `tools/check_lora_weights.py`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "check_lora_weights.py"), run_name="__main__")
