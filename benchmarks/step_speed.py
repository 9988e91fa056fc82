"""Time per step and time to the first step, against a plain diffusers + peft loop, in one run.

    python benchmarks/step_speed.py [--size tiny|mid] [--steps 20] [--rounds 3]

Both sides train a rank-16 LoRA on the attention of the same UNet with AdamW in float32, from cached latents and cached text
outputs, on the same device. The two run in turn, round by round, in processes of their own; the row printed holds the median
of the ratios, so that a machine whose speed drifts does not favour either.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

SIZES = {"tiny": [32, 64, 64, 64], "mid": [128, 256, 512, 512]}
"""Channels of the UNet's levels; SD1's are 320, 640, 1280, 1280."""
RESOLUTION = 256
BATCH = 2


def make_inputs(folder: Path, size: str) -> None:
    """A base model in diffusers layout and eight captioned pictures."""
    import tiny
    import torch
    from diffusers import UNet2DConditionModel

    tiny.write_sd_diffusers(folder / "model")
    torch.manual_seed(0)
    config = tiny.sd_configs("v1")["denoiser"] | {"block_out_channels": SIZES[size]}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "model" / "unet")
    tiny.write_images(folder / "images" / "1_thing", 8, RESOLUTION)


def run_ours(folder: Path, steps: int) -> None:
    """Train with `train_network.py`, whose metrics carry the wall time of every step."""
    from train_network import main

    main(
        [
            f"--pretrained_model_name_or_path={folder / 'model'}",
            f"--train_data_dir={folder / 'images'}",
            f"--resolution={RESOLUTION}",
            f"--train_batch_size={BATCH}",
            "--network_module=networks.lora",
            "--network_dim=16",
            "--network_alpha=16",
            "--network_train_unet_only",
            "--cache_latents",
            "--cache_text_encoder_outputs",
            "--learning_rate=1e-4",
            f"--max_train_steps={steps}",
            "--max_data_loader_n_workers=0",
            "--seed=1",
            f"--output_dir={folder / 'out'}",
            "--output_name=bench",
        ]
    )


def run_plain(folder: Path, steps: int) -> None:
    """What a person would write with the libraries alone."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = folder / "model"
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device).requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)
    text: Any = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    text.to(device)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    latents, contexts = [], []
    for path in sorted((folder / "images").rglob("*.png")):
        pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
        image = pixels.view(1, RESOLUTION, RESOLUTION, 3).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
        ids = tokenizer(
            path.with_suffix(".txt").read_text(), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            latents.append(vae.encode(image).latent_dist.sample() * vae.config.scaling_factor)
            contexts.append(text(ids.to(device)).last_hidden_state)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    unet.train()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    print(f"LEARNING {sum(p.numel() for p in parameters)}")
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for step in range(steps):
        rows = [(step * BATCH + i) % len(latents) for i in range(BATCH)]
        x0, context = torch.cat([latents[r] for r in rows]), torch.cat([contexts[r] for r in rows])
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (BATCH,), device=device)
        prediction = unet(scheduler.add_noise(x0, noise, t), t, context).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"STEP {time.time()} {loss.item():.4f}", flush=True)


def timed(side: str, folder: Path, steps: int) -> tuple[float, float, int]:
    """Of one process: seconds from its start to the end of the first step, median seconds per step, numbers that learn."""
    start = time.time()
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--steps", str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    if side == "ours":
        import csv

        from safetensors.torch import load_file

        with (folder / "out" / "metrics.csv").open() as file:
            stamps = [float(row["time"]) for row in csv.DictReader(file) if row["loss/current"]]
        tensors = load_file(folder / "out" / "bench.safetensors")
        learning = sum(value.numel() for name, value in tensors.items() if not name.endswith(".alpha"))
    else:
        said = [line.split() for line in result.stdout.splitlines()]
        stamps = [float(words[1]) for words in said if words[:1] == ["STEP"]]
        learning = next(int(words[1]) for words in said if words[:1] == ["LEARNING"])
    gaps = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    return stamps[0] - start, statistics.median(gaps), learning


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        (run_ours if arguments.side == "ours" else run_plain)(arguments.folder, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, arguments.size)
        rounds = []
        for _ in range(arguments.rounds):
            ours = timed("ours", folder, arguments.steps)
            plain = timed("plain", folder, arguments.steps)
            if ours[2] != plain[2]:
                raise SystemExit(f"the two do not train the same: {ours[2]} numbers learn here, {plain[2]} in the plain loop")
            rounds.append((ours, plain))
    row = {
        "scenario": f"sd_lora_{arguments.size}",
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "threads": torch_threads(),
        "step_seconds_ours": round(statistics.median(a[1] for a, _ in rounds), 4),
        "step_ratio": round(statistics.median(a[1] / b[1] for a, b in rounds), 3),
        "first_step_seconds_ours": round(statistics.median(a[0] for a, _ in rounds), 2),
        "first_step_ratio": round(statistics.median(a[0] / b[0] for a, b in rounds), 3),
        "device": device_name(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
