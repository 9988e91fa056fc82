"""What an adapter adds to a layer's forward and backward pass, ours against peft's LoRA, in one process, in turn.

    python benchmarks/adapter_overhead.py [--width 3072] [--tokens 512] [--rank 16] [--rounds 30] [--threads 1] [--all]

The layer is a frozen Linear whose input needs a gradient, as inside a model. Every round times each side once, in an order that
turns; `added` is the fastest time of a side less that of the bare layer, as a share of the bare layer's. The row's `ratio` is
our LoRA's over peft's. --all: every algorithm of ours as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import facts  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("networks.lora", {}),
    "dora": ("networks.lora", {"dora_wd": True}),
    "lora_fa": ("networks.lora_fa", {}),
    "loha": ("networks.loha", {}),
    "lokr": ("networks.lokr", {}),
    "glora": ("networks.glora", {}),
    "ia3": ("networks.ia3", {}),
    "oft": ("networks.oft", {"enable_all_linear": True}),
    "boft": ("networks.boft", {}),
    "oft_v2": ("networks.oft_v2", {}),
}


def frozen(width: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(width, width).requires_grad_(False)


def ours(name: str, layer: nn.Linear, rank: int) -> nn.Module:
    from networks.external import load_network_module
    from networks.network_base import Layer, LayerSize, NetworkFactory

    module, arguments = OURS[name]
    factory = load_network_module(module)
    assert isinstance(factory, NetworkFactory)
    algorithm = factory.algorithm
    adapter = algorithm(
        Layer("x", "denoiser", layer), LayerSize(rank, rank), algorithm.arguments(**arguments), torch.Generator()
    )
    for parameter_name, parameter in adapter.named_parameters():
        parameter.requires_grad_(parameter_name not in adapter.frozen_parameters)
    adapter.attach()
    return layer


def peft_lora(layer: nn.Linear, rank: int) -> nn.Module:
    import peft

    shell = nn.Sequential(layer)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), shell)
    return shell[0]


def seconds(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, gradient: torch.Tensor) -> float:
    start = time.perf_counter()
    run(x).backward(gradient)
    x.grad = None
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    sides: dict[str, nn.Module] = {"bare": frozen(args.width), "peft": peft_lora(frozen(args.width), args.rank)}
    names = OURS if args.all else ("lora",)
    sides |= {name: ours(name, frozen(args.width), args.rank) for name in names}
    x = torch.randn(1, args.tokens, args.width, requires_grad=True)
    gradient = torch.randn(1, args.tokens, args.width)
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(args.rounds + 1):
        for name in order:
            times[name].append(seconds(sides[name], x, gradient))
        order = order[1:] + order[:1]
    fastest = {name: min(values[1:]) for name, values in times.items()}
    added = {name: round(value / fastest["bare"] - 1, 4) for name, value in fastest.items() if name != "bare"}
    return {
        "benchmark": "adapter_overhead",
        **{name: getattr(args, name) for name in ("width", "tokens", "rank", "rounds", "threads")},
        "bare_ms": round(fastest["bare"] * 1000, 3),
        "added": added,
        "ratio": round(added["lora"] / added["peft"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("width", 3072), ("tokens", 512), ("rank", 16), ("rounds", 30), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps({**measure(args), "commit": facts.commit(), "device": facts.machine()}))


if __name__ == "__main__":
    main()
