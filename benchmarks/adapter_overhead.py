"""What an adapter adds to a layer's forward and backward pass, ours against peft's LoRA, in one process, in turn.

    python benchmarks/adapter_overhead.py [--width 3072] [--tokens 512] [--rank 16] [--rounds 30] [--threads 1] [--all]
    python benchmarks/adapter_overhead.py --device cuda --dtype bfloat16 --tokens 4608

The layer is a frozen Linear whose input needs a gradient, as inside a model. Every round times each side once, in an order that
turns; `added` is the fastest time of a side less that of the bare layer, as a share of the bare layer's, and `cpu_added` the
same of the processor's time. `ratio` is our LoRA's over peft's. On a GPU the calls are replayed from a CUDA graph, too, which
leaves the GPU's own time (`gpu_added`). Adapters are in float32, as they are trained everywhere, and the layer computes in
--dtype, under autocast. --all: every algorithm of ours as well. --base: the layer is kept, and with `_8bit` multiplied, in few
bits. `moved_mb`: what operators other than matrix products read and write in a pass, counted without computing: of a CPU or
of a GPU without triton.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

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
UNCAPTURED = {"oft", "boft"}
"""What solves equations, which a CUDA graph does not take."""
BASES = ("fp8", "fp8_raw", "int8", "nf4", "fp8_8bit", "int8_8bit")
PASSES = {"cpu": 1, "cuda": 10}
"""Forward and backward passes that are timed together."""


class Side(NamedTuple):
    """A layer as it is called, and what learns."""

    layer: nn.Module
    learns: Sequence[nn.Parameter] = ()


def frozen(args: argparse.Namespace) -> nn.Linear:
    from library.quantization import LayerTable
    from library.quantized_layers import Quantizer, quantize

    dtype = getattr(torch, args.dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(args.width, args.width).requires_grad_(False).to(args.device, dtype)
    if args.base is None:
        return layer
    shell, weight = nn.Sequential(layer), layer.weight
    quantizer = Quantizer(args.base.removesuffix("_8bit"), LayerTable((r".*",)), eight_bit=args.base.endswith("_8bit"))
    [(made, scheme)] = quantizer.replace_layers(shell, dtype).values()
    made.fill(quantize(weight.detach(), scheme, "weight"), lambda: weight)
    return cast(nn.Linear, made)


def ours(name: str, args: argparse.Namespace) -> Side:
    from networks.external import load_network_module
    from networks.network_base import Layer, LayerSize, NetworkFactory

    layer = frozen(args)
    module, arguments = OURS[name]
    factory = load_network_module(module)
    assert isinstance(factory, NetworkFactory)
    algorithm = factory.algorithm
    size = LayerSize(args.rank, args.rank)
    adapter = algorithm(Layer("x", "denoiser", layer), size, algorithm.arguments(**arguments), torch.Generator())
    adapter.to(args.device)
    for parameter_name, parameter in adapter.named_parameters():
        parameter.requires_grad_(parameter_name not in adapter.frozen_parameters)
    adapter.attach()
    return Side(layer, [parameter for parameter in adapter.parameters() if parameter.requires_grad])


def peft_lora(args: argparse.Namespace, **variant: Any) -> Side:
    import peft

    shell = nn.Sequential(frozen(args))
    config = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["0"], **variant)
    peft.inject_adapter_in_model(config, shell)
    learns = [parameter for parameter in shell.parameters() if parameter.requires_grad]
    for parameter in learns:
        parameter.data = parameter.data.float()
    return Side(shell[0], learns)


class Pass:
    """Forward and backward through one side."""

    def __init__(self, side: Side, x: torch.Tensor, gradient: torch.Tensor) -> None:
        self.side, self.x, self.gradient = side, x, gradient
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        for tensor in (self.x, *self.side.learns):
            tensor.grad = None
        with torch.autocast(self.x.device.type, self.x.dtype, enabled=self.x.dtype != torch.float32):
            out = self.side.layer(self.x)
        out.backward(self.gradient)

    def capture(self) -> None:
        for _ in range(3):
            self.run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def seconds(self, call: Callable[[], None]) -> tuple[float, float]:
        """Of the clock and of the processor."""
        on_gpu = self.x.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(PASSES[self.x.device.type]):
            call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu


def moved_mb(args: argparse.Namespace) -> dict[str, float]:
    """Of a pass through the layer, bare and with our LoRA, from the shapes alone."""
    from library.memory_tracker import MemoryTracker, simulated

    found = {}
    with simulated():
        for name, side in (("bare", Side(frozen(args))), ("lora", ours("lora", args))):
            one = Pass(side, *inputs(args))
            with MemoryTracker() as tracker:
                one.run()
            found[name] = round(tracker.work.moved_bytes / 1e6, 1)
    return found


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """One that needs a gradient, and a gradient of the output."""
    shape, dtype = (1, args.tokens, args.width), getattr(torch, args.dtype)
    x = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)
    return x, torch.randn(shape, device=args.device, dtype=dtype)


Times = dict[str, list[float]]


def added(times: Times) -> dict[str, float]:
    fastest = {name: min(values[1:]) for name, values in times.items() if values}
    return {name: round(value / fastest["bare"] - 1, 4) for name, value in fastest.items() if name != "bare"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    names = OURS if args.all else ("lora",)
    sides = {"bare": Side(frozen(args)), "peft": peft_lora(args), **{name: ours(name, args) for name in names}}
    if args.all:
        sides["peft_dora"] = peft_lora(args, use_dora=True)
    x, gradient = inputs(args)
    passes = {name: Pass(side, x, gradient) for name, side in sides.items()}
    times: dict[str, Times] = {kind: {name: [] for name in sides} for kind in ("", "cpu_", "gpu_")}
    order = list(sides)
    if x.is_cuda:
        for name in passes.keys() - UNCAPTURED:
            passes[name].capture()
    for _ in range(args.rounds + 1):
        for name in order:
            one = passes[name]
            for kind, taken in zip(("", "cpu_"), one.seconds(one.run), strict=True):
                times[kind][name].append(taken)
            if one.graph is not None:
                times["gpu_"][name].append(one.seconds(one.graph.replay)[0])
        order = order[1:] + order[:1]
    found = {kind: added(kept) for kind, kept in times.items() if kept["bare"]}
    return {
        "benchmark": "adapter_overhead",
        **{name: getattr(args, name) for name in ("base", "width", "tokens", "rank", "rounds", "threads", "dtype")},
        "moved_mb": moved_mb(args),
        "bare_ms": round(min(times[""]["bare"][1:]) * 1000 / PASSES[args.device], 3),
        **{f"{kind}added": shares for kind, shares in found.items()},
        **{f"{kind}ratio": round(shares["lora"] / shares["peft"], 3) for kind, shares in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("width", 3072), ("tokens", 512), ("rank", 16), ("rounds", 30), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=PASSES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--base", choices=BASES, help="how the layer is kept")
    parser.add_argument("--count", action="store_true", help="time nothing: moved_mb of every base")
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.count:
        counts = {base or "plain": moved_mb(argparse.Namespace(**{**vars(args), "base": base})) for base in (None, *BASES)}
        sizes = {name: getattr(args, name) for name in ("width", "tokens", "rank", "dtype")}
        print(json.dumps({"benchmark": "adapter_overhead", **sizes, "moved_mb": counts, "commit": facts.commit()}))
        return
    print(json.dumps({**measure(args), "commit": facts.commit(), "device": facts.machine()}))


if __name__ == "__main__":
    main()
