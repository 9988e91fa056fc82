"""sd-scripts' place for `tools/extract_lora_from_dylora.py`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "extract_lora_from_dylora.py"), run_name="__main__")
