"""LoRA steps of a FLUX.1 transformer at its real size: time, share of what the device multiplies, peak memory.

    python benchmarks/gpu_flux.py [--only lora checkpointing ...] [--steps 5] [--out gpu_flux.jsonl]
    python benchmarks/gpu_flux.py --tiny --device cpu        the very same code at toy size

The weights (12 B, bfloat16) are random and made where they are used: no file is needed. A step is forward, backward, clipping
and AdamW for a rank-16 LoRA on every layer of the blocks, one picture of 1024 px, 512 text tokens. Every configuration runs in
a process of its own and appends one JSON row to --out; one that fails, out of memory say, leaves a row that says so.

share: floating-point operations that the step needs, by the time it took, over the rate of a large bfloat16 matmul measured
just before. What is computed a second time (checkpointing) is not counted as needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import facts  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from library.compiling import ComputePlan  # noqa: E402
from library.eight_bit import check_eight_bit  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.family_base import ModelBundle  # noqa: E402
from library.flux_models import Flux, FluxParams  # noqa: E402
from library.flux_train_utils import FluxFamily, velocity  # noqa: E402
from library.key_layout import IDENTITY  # noqa: E402
from library.memory_policy import MemoryPlan, MemoryPolicy  # noqa: E402
from library.model_io import TensorEntry, TensorSource, empty_module  # noqa: E402
from library.model_parts import Component  # noqa: E402
from library.optimizers import LearningRates  # noqa: E402
from library.quantized_layers import Quantizer  # noqa: E402
from library.rng import keyed_generator  # noqa: E402
from library.strategy_flux import FluxConditioning  # noqa: E402
from library.watchdog import peak_memory  # noqa: E402
from networks import lora_flux  # noqa: E402
from networks.network_interface import AdapterNetwork  # noqa: E402

RANK = 16
WARM_UP = 2
"""Steps before the measured ones: the allocator settles, and blocks are compiled."""


@dataclass(frozen=True)
class Configuration:
    """What is asked of one run."""

    checkpointing: bool = True
    swap: int = 0
    scheme: str | None = None
    eight_bit: bool = False
    compiler: str | None = None


CONFIGURATIONS = {
    "lora": Configuration(checkpointing=False),
    "lora_compile": Configuration(checkpointing=False, compiler="inductor"),
    "checkpointing": Configuration(),
    "checkpointing_compile": Configuration(compiler="inductor"),
    "swap10": Configuration(swap=10),
    "swap20": Configuration(swap=20),
    "swap35": Configuration(swap=35),
    "fp8": Configuration(scheme="fp8"),
    "fp8_8bit": Configuration(scheme="fp8", eight_bit=True),
    "fp8_swap35": Configuration(scheme="fp8", swap=35),
    "int8": Configuration(scheme="int8"),
    "int8_8bit": Configuration(scheme="int8", eight_bit=True),
    "nf4": Configuration(scheme="nf4"),
}
"""`swap` is `--blocks_to_swap`, which 35 makes as large as it can be here. `checkpointing` is what it is compared with."""


@dataclass(frozen=True)
class Size:
    params: FluxParams
    latent_side: int
    """Of a square picture; 1024 px are 128."""
    text_length: int
    matmul: int
    """Side of the matrices whose product gives the device's rate."""


REAL = Size(FluxParams(), latent_side=128, text_length=512, matmul=8192)
TINY = Size(
    FluxParams(
        in_channels=64, width=64, num_heads=2, mlp_width=256, context_width=32, pooled_width=32
    ),
    latent_side=8,
    text_length=16,
    matmul=256,
)  # fmt: skip
"""With as many blocks as the real one, so that the same numbers of them can be swapped."""


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomEntry(TensorEntry):
    """A tensor that is drawn when it is read, on the device, which is faster by far than on the host."""

    device: str = "cpu"
    key: str = ""

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Norm scales are 1, everything else is normal with standard deviation 0.02."""
        made = torch.ones(self.shape, dtype=dtype or self.dtype, device=self.device)
        if self.key.endswith("scale"):
            return made
        return made.normal_(0, 0.02, generator=keyed_generator("gpu_flux", self.key, device=self.device))


def make_flux(config: Mapping[str, Any]) -> nn.Module:
    return empty_module(lambda: Flux(config["params"]))


def transformer(params: FluxParams, device: torch.device) -> Component:
    """The very loader that files go through, without a file."""
    shapes = {name: tuple(value.shape) for name, value in make_flux({"params": params}).state_dict().items()}
    entries: dict[str, TensorEntry] = {
        name: RandomEntry(Path("random"), 0, torch.bfloat16, shape, device=str(device), key=name)
        for name, shape in shapes.items()
    }
    return Component(TensorSource(Path("random"), entries), IDENTITY, {"params": params}, make_flux)


def build(config: Configuration, size: Size, device: torch.device) -> tuple[ModelBundle, AdapterNetwork, MemoryPolicy]:
    """As a training run does: read, adapt, compile, then recompute and swap."""
    family = FluxFamily()
    quantizer = None
    if config.scheme is not None:
        quantizer = Quantizer(config.scheme, family.quantized_layers, eight_bit=config.eight_bit)
    if config.scheme is not None and config.eight_bit:
        check_eight_bit(config.scheme, device)
    rings = size.params.swap_division.plans(config.swap) if config.swap else ()
    part = transformer(size.params, device)
    place = torch.device("cpu") if rings else device
    bundle = ModelBundle(
        loaders={"denoiser": lambda: part.load(dtype=torch.bfloat16, device=place, quantizer=quantizer)},
        text_encoder_names=(),
        device=device,
        dtype=torch.bfloat16,
    )
    network = lora_flux.factory.create_network(1.0, RANK, RANK, None, [], bundle.denoiser)
    network.to(device, torch.float32)
    network.attach()
    network.train()
    bundle.denoiser.train()
    ComputePlan(compiler=config.compiler).attach(bundle.denoiser)
    policy = MemoryPlan(recomputes=config.checkpointing, rings=rings).attach(family, bundle, ("denoiser",))
    return bundle, network, policy


def make_loss(denoiser: nn.Module, size: Size, device: torch.device) -> Callable[[], Tensor]:
    """The loss of one picture, the same every time."""
    params = size.params

    def draw(key: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=keyed_generator("gpu_flux", key)).to(device)

    latents = draw("latents", 1, params.in_channels // 4, size.latent_side, size.latent_side)
    context, pooled = draw("context", 1, size.text_length, params.context_width), draw("pooled", 1, params.pooled_width)
    cond = FluxConditioning(context=context, mask=torch.ones(1, size.text_length, device=device), pooled=pooled)
    t = torch.full((1,), 0.5, device=device)

    def loss() -> Tensor:
        # nothing is computed on the meta device, so it has no autocast
        with nullcontext() if device.type == "meta" else torch.autocast(device.type, torch.bfloat16):
            found = velocity(denoiser, latents, t, cond, guidance=1.0, masked=False)
        return found.float().square().mean()

    return loss


# ---- what is measured ------------------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Of one of `count` calls, which nothing waits between."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        work()
    wait_for(device)
    return (time.perf_counter() - start) / count


def matmul_rate(side: int, device: torch.device) -> float:
    """Floating-point operations a second of a bfloat16 matmul, the best of five times ten: what the device can do."""
    a, b = (torch.randn(side, side, generator=keyed_generator(name)).to(device, torch.bfloat16) for name in "ab")
    return 2 * side**3 / min(seconds_of(lambda: a @ b, 10, device) for _ in range(5))


def operations(size: Size) -> int:
    """Of one step, counted while it runs on the meta device, without checkpointing: no formula of our own."""
    from torch.utils.flop_counter import FlopCounterMode

    meta = torch.device("meta")
    model = make_flux({"params": size.params}).requires_grad_(False)
    network = lora_flux.factory.create_network(1.0, RANK, RANK, None, [], model)
    network.to(meta)
    network.attach()
    with FlopCounterMode(display=False) as counter:
        make_loss(model, size, meta)().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def peak_bytes(device: torch.device) -> int:
    """Of the device since `clear_peak`; on a CPU, of the process since it began."""
    return peak_memory(device) or 0


def clear_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def digits(value: float) -> float:
    """Four of them, from the first that is not 0."""
    return float(f"{value:.4g}")


def kernels(work: Callable[[], object], device: torch.device) -> str:
    """A table of what one call of `work` spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as found:
        work()
        wait_for(device)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90))


def measure(name: str, size: Size, device: torch.device, steps: int, profile: Path | None = None) -> dict[str, object]:
    """The row of one configuration. Raises whatever makes it impossible."""
    config = CONFIGURATIONS[name]
    needed, rate = operations(size), matmul_rate(size.matmul, device)
    clear_peak(device)
    bundle, network, policy = build(config, size, device)
    loading_peak = peak_bytes(device)
    clear_peak(device)
    groups = network.param_groups(LearningRates(1e-4, None, ()))
    parameters = [parameter for group in groups for parameter in group.params]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    loss = make_loss(bundle.denoiser, size, device)
    last = torch.zeros(())

    def step() -> None:
        nonlocal last
        last = loss()
        last.backward()  # type: ignore[no-untyped-call]
        with policy.updating():
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds_of(step, WARM_UP, device)
    misses = policy.swap.misses if policy.swap else 0
    seconds = seconds_of(step, steps, device)
    if not torch.isfinite(last):
        raise RuntimeError("the loss is not finite")
    row: dict[str, object] = {
        "seconds_per_step": digits(seconds),
        "tflop_per_step": digits(needed / 1e12),
        "tflops": digits(needed / seconds / 1e12),
        "matmul_tflops": digits(rate / 1e12),
        "share": digits(needed / seconds / rate),
        "peak_gb": round(peak_bytes(device) / 1e9, 2),
        "loading_peak_gb": round(loading_peak / 1e9, 2),
        "learning": sum(parameter.numel() for parameter in parameters),
        "steps": steps,
    }
    if policy.swap is not None:
        row["late_loads"] = policy.swap.misses - misses
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
        (profile / f"{name}.txt").write_text(kernels(step, device), encoding="utf-8")
    return row


# ---- one process for each --------------------------------------------------------------------------------------------


def run_apart(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """The row of one configuration, measured in a process of its own; on failure one with `error`."""
    command = [sys.executable, __file__, "--measure", name, "--device", arguments.device, "--steps", str(arguments.steps)]
    command += ["--tiny"] * arguments.tiny
    command += ["--profile", str(arguments.profile)] if arguments.profile else []
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {arguments.timeout} s"}
    if result.returncode == 0:
        found: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
        return found
    said = result.stderr.strip().splitlines() or [f"ended with {result.returncode}"]
    return {"error": said[-1][:300]}


def describe(arguments: argparse.Namespace) -> dict[str, object]:
    device = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name()
    return {
        "commit": facts.commit(),
        "machine": facts.machine(),
        "device": device,
        "torch": torch.__version__,
        "size": "tiny" if arguments.tiny else "FLUX.1",
        "date": time.strftime("%Y-%m-%d"),
    }


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the rows say about the goals, where they have what it takes."""
    good = {name: row for name, row in rows.items() if "error" not in row}
    lines = []
    best = max((row["share"] for name, row in good.items() if not CONFIGURATIONS[name].swap), default=None)
    if best is not None:
        lines.append(f"share of the matmul rate without swap: {best:.2f} (goal: at least 0.55)")
    if {"swap20", "checkpointing"} <= good.keys():
        ratio = good["swap20"]["seconds_per_step"] / good["checkpointing"]["seconds_per_step"]
        lines.append(f"20 blocks swapped take {ratio:.2f} times as long as none (goal: at most 1.10)")
    if "fp8_swap35" in good:
        lines.append(f"fp8 with all blocks swapped peaks at {good['fp8_swap35']['peak_gb']:.1f} GB (goal: under 10)")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--steps", type=int, default=5, help="measured ones")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy widths; as many blocks as FLUX.1 has")
    parser.add_argument("--timeout", type=int, default=1200, help="seconds for one configuration")
    parser.add_argument("--out", type=Path, default=Path("gpu_flux.jsonl"), help="rows are appended")
    parser.add_argument("--profile", type=Path, help="folder for a table of each configuration's kernels, of one step more")
    parser.add_argument("--measure", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here. --tiny --device cpu runs the same code at toy size.")
    if arguments.measure:
        size = TINY if arguments.tiny else REAL
        try:
            device = torch.device(arguments.device)
            print(json.dumps(measure(arguments.measure, size, device, arguments.steps, arguments.profile)))
        except (UserError, torch.OutOfMemoryError) as error:
            raise SystemExit(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        return
    where, rows = describe(arguments), {}
    for name in arguments.only:
        rows[name] = run_apart(name, arguments)
        row = {**where, "scenario": f"gpu_flux/{name}", **asdict(CONFIGURATIONS[name]), **rows[name]}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    if not arguments.tiny:
        print("\n".join(verdicts(rows)))


if __name__ == "__main__":
    main()
