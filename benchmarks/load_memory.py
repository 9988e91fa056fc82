"""How much memory loading a Stable Diffusion checkpoint takes: peak over the model's own size, one JSON row per scenario.

usage: python benchmarks/load_memory.py [--size-mb 1000] [--scenario safetensors-fp16 ...]

A file of random weights in SD1's layout is written, and read in a fresh process that has its libraries imported already.
`ratio` is the rise of the process's peak memory while every part is loaded, over the bytes of the loaded tensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

SCENARIOS = {
    "safetensors-fp16": (".safetensors", torch.float16, "float16"),
    "safetensors-fp32-to-fp16": (".safetensors", torch.float32, "float16"),
    "safetensors-fp16-to-fp32": (".safetensors", torch.float16, "float32"),
    "ckpt-fp16": (".ckpt", torch.float16, "float16"),
    "ckpt-fp32-to-fp16": (".ckpt", torch.float32, "float16"),
}
"""Name -> suffix, dtype of the file, dtype asked for."""

LIMIT = 1.15
_SD1_UNET_CHANNELS = 320
_SD1_MB_FP16 = 2030  # all parts at SD1's own width


def write_checkpoint(path: Path, dtype: torch.dtype, size_mb: float) -> None:
    """An SD1 file whose UNet is as wide as makes the whole about `size_mb` in fp16; VAE and CLIP at their real size."""
    from library import clip_parts, unet_names, unet_parts, vae_parts
    from library.sd_utils import CLIP_PREFIX
    from library.unet_parts import UNET_PREFIX
    from library.vae_parts import VAE_PREFIX

    rest = 2 * (83.7 + 123.1)  # MB of the VAE and CLIP in fp16
    share = max(0.04, (size_mb - rest) / (_SD1_MB_FP16 - rest))
    width = max(64, round(_SD1_UNET_CHANNELS * share**0.5 / 32) * 32)
    unet = {"block_out_channels": [width, width * 2, width * 4, width * 4], "cross_attention_dim": 768, "attention_head_dim": 8}
    vae = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
    }
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    unet_module = unet_parts.make_unet(unet)
    parts = (
        (UNET_PREFIX, unet_module, unet_names.unet_key_map([True, True, True, False], 2)),
        (VAE_PREFIX, vae_parts.make_vae(vae), vae_parts.vae_key_map(4)),
        (CLIP_PREFIX, clip_parts.make_clip(clip), clip_parts.CLIP_NAMES),
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for prefix, module, key_map in parts:
        weights = {name: torch.rand(value.shape, generator=generator).to(dtype) for name, value in module.state_dict().items()}
        tensors.update({prefix + key: value.contiguous() for key, value in key_map.to_theirs(weights).items()})
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)


def peak_bytes() -> int:
    """The largest memory this process has held since the mark was last cleared (Linux), or since it began."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clear_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def measure(path: Path, dtype: torch.dtype) -> None:
    """In a process of its own: load every part and print what it took."""
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401  imported before the mark is cleared
    from transformers import CLIPTextModel  # noqa: F401

    from library.option_groups import ModelOptions
    from library.sd_utils import describe

    torch.set_num_threads(1)
    clear_peak()
    before, start = peak_bytes(), time.perf_counter()
    model = describe(ModelOptions(pretrained_model_name_or_path=str(path)))
    modules = [part.load(dtype=dtype, device="cpu") for part in model.parts.values()]
    seconds = time.perf_counter() - start
    rise = peak_bytes() - before
    size = sum(value.nbytes for module in modules for value in module.state_dict().values())
    print(json.dumps({"model_mb": round(size / 1e6, 1), "peak_mb": round(rise / 1e6, 1), "seconds": round(seconds, 2)}))


def run(name: str, size_mb: float) -> dict[str, object]:
    suffix, file_dtype, target = SCENARIOS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        write_checkpoint(path, file_dtype, size_mb)
        command = [sys.executable, __file__, "--measure", str(path), "--dtype", target]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        file_mb = round(path.stat().st_size / 1e6, 1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "scenario": f"load_memory/{name}",
        "file_mb": file_mb,
        **found,
        "ratio": round(found["peak_mb"] / found["model_mb"], 3),
        "limit": LIMIT,
        "commit": commit,
        "device": f"cpu {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mb", type=float, default=1000, help="size of the model in fp16")
    parser.add_argument("--scenario", nargs="*", choices=sorted(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float16", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, getattr(torch, arguments.dtype))
        return
    for name in arguments.scenario:
        print(json.dumps(run(name, arguments.size_mb)), flush=True)


if __name__ == "__main__":
    main()
