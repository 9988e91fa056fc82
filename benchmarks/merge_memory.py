"""How much memory merging an adapter into a checkpoint takes, or taking one out of two checkpoints: one JSON row.

    python benchmarks/merge_memory.py [--double 2] [--single 4] [--rank 16] [--save_precision bf16]
    python benchmarks/merge_memory.py --tool extract

A FLUX.1 transformer of the published widths with a few blocks, in bf16, and a LoRA on every layer of them are written;
`tools/merge_lora.py`, or then `tools/extract_lora_from_models.py` on the model and the merged one, runs in a fresh process that
has its libraries imported already. `ratio` is the rise of the process's peak memory over the largest tensor in float32 (of
extraction: two of them, before and after) plus the adapter; `share` is the rise over the model file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import facts  # noqa: E402
from load_memory import clear_peak, peak_bytes  # noqa: E402

LIMIT = 2.0
FLOAT32_WEIGHTS = {"merge": 1, "extract": 2}
"""Of the largest layer at the same time."""


def write_files(folder: Path, double: int, single: int, rank: int) -> None:
    """Random numbers, a tensor at a time."""
    import torch
    from safetensors.torch import save_file

    from library.flux_models import Flux, FluxParams
    from library.streamed_safetensors import LazyTensor, write_streamed

    params = FluxParams(
        in_channels=64,
        out_channels=64,
        context_width=4096,
        pooled_width=768,
        num_double_blocks=double,
        num_single_blocks=single,
    )
    with torch.device("meta"):
        model = Flux(params)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        few = torch.randn(65537, generator=generator).bfloat16()
        count = torch.Size(shape).numel()
        return few.repeat(count // len(few) + 1)[:count].view(shape)

    planned = {
        name: LazyTensor(torch.bfloat16, tuple(value.shape), lambda shape=tuple(value.shape): noise(*shape))
        for name, value in model.state_dict().items()
    }
    write_streamed(folder / "model.safetensors", planned, {})
    adapter = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks" in name:
            key = f"lora_unet_{name}".replace(".", "_")
            adapter[f"{key}.lora_down.weight"] = noise(rank, layer.in_features).clone()
            adapter[f"{key}.lora_up.weight"] = noise(layer.out_features, rank).clone()
            adapter[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(adapter, folder / "lora.safetensors")


def measure(folder: Path, tool: str, rank: int, save_precision: str | None) -> None:
    """In the fresh process: prints bytes and seconds."""
    from library.model_layers import open_model
    from tools import extract_lora_from_models, merge_lora

    model, merged, lora = (str(folder / f"{name}.safetensors") for name in ("model", "merged", "lora"))
    open_model(Path(model))  # what it imports
    clear_peak()
    before, start = peak_bytes(), time.perf_counter()
    flags = ["--save_precision", save_precision] if save_precision else []
    if tool == "merge":
        merge_lora.main(["--model", model, "--models", lora, "--save_to", merged, *flags])
    else:
        files = ["--model_org", model, "--model_tuned", merged, "--save_to", str(folder / "again.safetensors")]
        extract_lora_from_models.main([*files, "--dim", str(rank), *flags])
    print(json.dumps({"rise": peak_bytes() - before, "seconds": round(time.perf_counter() - start, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--double", type=int, default=2, help="double blocks")
    parser.add_argument("--single", type=int, default=4, help="single blocks")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--save_precision")
    parser.add_argument("--tool", choices=FLOAT32_WEIGHTS, default="merge")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        measure(given.inside, given.tool, given.rank, given.save_precision)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, given.double, given.single, given.rank)
        for tool in ("merge", "extract")[: 1 + (given.tool == "extract")]:  # what is taken out has to be merged first
            command = [sys.executable, __file__, "--inside", name, "--tool", tool, "--rank", str(given.rank)]
            command += ["--save_precision", given.save_precision] if given.save_precision else []
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(printed.splitlines()[-1])
        from library.model_io import open_checkpoint

        entries = open_checkpoint(folder / "model.safetensors").entries.values()
        largest = max(entry.num_elements for entry in entries) * 4
        model, adapter = ((folder / f"{file}.safetensors").stat().st_size for file in ("model", "lora"))
    row = {
        "commit": facts.commit(),
        "machine": facts.machine(),
        "scenario": f"{given.tool}_memory",
        "model": f"flux, {given.double}+{given.single} blocks, rank {given.rank}, written in {given.save_precision or 'bf16'}",
        "ratio": round(found["rise"] / (largest * FLOAT32_WEIGHTS[given.tool] + adapter), 3),
        "limit": LIMIT,
        "share": round(found["rise"] / model, 3),
        "rise_mb": round(found["rise"] / 1e6),
        "largest_tensor_mb": round(largest / 1e6),
        "adapter_mb": round(adapter / 1e6),
        "model_mb": round(model / 1e6),
        "seconds": found["seconds"],
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
