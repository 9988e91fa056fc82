"""Make pictures with SDXL: sdxl_gen_img.py under another name of sd-scripts'.

python sdxl_minimal_inference.py --ckpt_path MODEL --prompt "a red fox" --output_dir pictures \\
    --lora_weights "style.safetensors;0.8"
"""

from library.cli import run_script
from sdxl_gen_img import main

if __name__ == "__main__":
    run_script(main)
