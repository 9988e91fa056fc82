"""sd-scripts' older place for `tools/merge_lora.py`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "merge_lora.py"), run_name="__main__")
