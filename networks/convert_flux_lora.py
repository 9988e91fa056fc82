"""sd-scripts' place for `tools/convert_lora.py`, with its flags: --src_path, --dst_path, --dst."""

import argparse
import runpy
import sys
from pathlib import Path

FORMATS = {"sd-scripts": "kohya", "ai-toolkit": "diffusers"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Convert a FLUX.1 LoRA between sd-scripts' and ai-toolkit's (diffusers') names."
    )
    parser.add_argument("--src", choices=FORMATS, default="ai-toolkit", help="whose names the file has; told from the file")
    parser.add_argument("--dst", choices=FORMATS, default="sd-scripts", help="whose names to write")
    parser.add_argument("--src_path", required=True, help="the file to read")
    parser.add_argument("--dst_path", required=True, help="the file to write")
    given = parser.parse_args()
    sys.argv[1:] = [given.src_path, given.dst_path, "--to", FORMATS[given.dst], "--family", "flux"]
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "convert_lora.py"), run_name="__main__")
