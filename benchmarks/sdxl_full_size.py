"""One LoRA step of an SDXL of the real size on a CPU: peak memory and seconds, one JSON row.

usage: python benchmarks/sdxl_full_size.py [--size full|tiny] [--precision no|bf16] [--folder DIR] [--file-only]

A checkpoint of random fp16 weights in the published layout (full: 2.6 billion weights in the UNet, 6.9 GB on disk) is written
once to `--folder` and kept there. `sdxl_train_network.py` then makes two steps at 256 pixels from it in a process of its own.
`limit_gb`: what a run has to stay within. `seconds_step` is the second step, without what the first one sets up.
bf16 takes half the memory; on a CPU without instructions for it a convolution takes thirty times as long.
"""

from __future__ import annotations

import argparse
import csv
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import facts  # noqa: E402
import torch  # noqa: E402
from load_memory import clear_peak, peak_bytes  # noqa: E402

LIMIT_GB = 24.0
RESOLUTION = 256
_WRITES = {torch.float16: "F16"}


def full_configs() -> dict[str, dict[str, Any]]:
    """SDXL's own sizes, over the tiny model's topology."""
    import tiny_sdxl

    from library.strategy_sdxl import CLIP_L, OPEN_CLIP

    made = tiny_sdxl.configs()
    words = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    sizes = {
        "denoiser": {
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        CLIP_L: words | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        OPEN_CLIP: words | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    }
    sizes[CLIP_L] |= {"projection_dim": 768}
    sizes[OPEN_CLIP] |= {"projection_dim": 1280}
    return {name: config | sizes[name] for name, config in made.items()}


def layout(size: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the file, and a tensor of its shape without memory."""
    import tiny_sdxl

    from library import clip_parts
    from library.sdxl_utils import CLIP_L_PREFIX, OPEN_CLIP_PREFIX
    from library.strategy_sdxl import CLIP_L, OPEN_CLIP
    from library.unet_names import SDXL_UNET_NAMES
    from library.unet_parts import UNET_PREFIX
    from library.vae_parts import VAE_PREFIX, vae_key_map

    configs = full_configs() if size == "full" else tiny_sdxl.configs()
    tables = {
        "denoiser": (UNET_PREFIX, SDXL_UNET_NAMES),
        "vae": (VAE_PREFIX, vae_key_map(4)),
        CLIP_L: (CLIP_L_PREFIX, clip_parts.CLIP_NAMES),
        OPEN_CLIP: (OPEN_CLIP_PREFIX, clip_parts.PROJECTED_OPEN_CLIP_NAMES),
    }
    for name, (prefix, table) in tables.items():
        own = {key: value.to("meta") for key, value in tiny_sdxl.MAKERS[name](configs[name]).state_dict().items()}
        for key, value in table.to_theirs(own).items():
            yield prefix + key, value


def write_checkpoint(path: Path, size: str) -> None:
    """Written tensor by tensor, so that the model is never in memory."""
    shapes = {name: tuple(value.shape) for name, value in layout(size)}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": _WRITES[torch.float16], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 100
            values = torch.randn(shape, generator=generator) * fan_in**-0.5
            if len(shape) == 1 and name.endswith("weight"):
                values += 1  # a norm
            file.write(values.half().numpy().tobytes())
    partial.replace(path)


def measure(folder: Path, model: Path, precision: str) -> None:
    """In a process of its own: two LoRA steps; prints what they took."""
    import tiny

    from sdxl_train_network import main as train

    tiny.write_clip_tokenizer(folder / "tokenizer")
    tiny.write_images(folder / "images" / "1_thing", 2, RESOLUTION)
    clear_peak()
    start = time.perf_counter()
    train(
        [
            f"--pretrained_model_name_or_path={model}",
            f"--tokenizer={folder / 'tokenizer'}",
            f"--train_data_dir={folder / 'images'}",
            f"--resolution={RESOLUTION}",
            "--network_module=networks.lora",
            "--network_dim=16",
            "--network_train_unet_only",
            "--cache_latents",
            "--cache_text_encoder_outputs",
            "--gradient_checkpointing",
            f"--mixed_precision={precision}",
            "--learning_rate=1e-4",
            "--max_train_steps=2",
            "--max_data_loader_n_workers=0",
            "--seed=1",
            f"--output_dir={folder / 'out'}",
            "--output_name=bench",
        ]
    )
    seconds = time.perf_counter() - start
    with (folder / "out" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    stamps = [float(row["time"]) for row in rows if row.get("time")]
    step = round(stamps[1] - stamps[0], 1) if len(stamps) > 1 else None
    print(json.dumps({"peak_gb": round(peak_bytes() / 1e9, 2), "seconds": round(seconds, 1), "seconds_step": step}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sdxl_full_size")
    parser.add_argument("--file-only", action="store_true", help="write the checkpoint and stop")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = arguments.folder / f"sdxl-{arguments.size}.safetensors"
    if not model.exists():
        write_checkpoint(model, arguments.size)
    if arguments.file_only:
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.measure:
            measure(Path(folder), model, arguments.precision)
            return
        command = [sys.executable, __file__, "--measure", f"--folder={arguments.folder}"]
        command += [f"--size={arguments.size}", f"--precision={arguments.precision}"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    row = {
        "scenario": f"sdxl_full_size/{arguments.size}-{arguments.precision}",
        "unet_weights": sum(value.numel() for name, value in layout(arguments.size) if name.startswith("model.")),
        "file_gb": round(model.stat().st_size / 1e9, 2),
        **found,
        "limit_gb": LIMIT_GB,
        "commit": facts.commit(),
        "machine": facts.machine(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
