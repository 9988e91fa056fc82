"""Time per step and time to the first step, against a plain diffusers + peft loop, in one run.

    python benchmarks/step_speed.py [--model sd_tiny|sd_mid|flux_mid] [--steps 20] [--rounds 3] [--in_turn] [--threads 1]

Both sides train a rank-16 LoRA on the same layers of the same model with AdamW in float32, from cached latents and cached text
outputs, on the same device. The two run in turn, round by round, in processes of their own, each first in every other round;
the row printed holds the median of the ratios, so that a machine whose speed drifts does not favour either. Ratios of wall time
mean something on a machine that does nothing else: `busy` is its load at the end, which should be about `threads`. Those of CPU
seconds tell a slow program from a busy machine.

--in_turn: both processes live together and make a step each in turn, so that what else the machine does falls on both. The row
has the ratios of neighbouring steps, and that of the fastest steps, but no first step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import facts  # noqa: E402

RANK = 16


@dataclass(frozen=True)
class Model:
    """One model to train, and how."""

    write: Callable[[Path], None]
    """Makes the model, a diffusers folder."""
    script: str
    plain: str
    """Class of `plain_loops`."""
    batch: int
    arguments: tuple[str, ...] = ()
    resolution: int = 256


def write_sd(folder: Path, channels: list[int]) -> None:
    """channels: of the UNet's levels; SD1's are 320, 640, 1280, 1280. All else is tiny."""
    import tiny
    import torch
    from diffusers import UNet2DConditionModel

    tiny.write_sd_diffusers(folder)
    torch.manual_seed(0)
    config = tiny.sd_configs("v1")["denoiser"] | {"block_out_channels": channels}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


def write_flux(folder: Path, width: int, num_double: int, num_single: int) -> None:
    """FLUX.1's are 3072, 19, 38. All but the transformer is tiny."""
    import tiny_flux
    import torch
    from diffusers import FluxTransformer2DModel

    tiny_flux.write_flux_folder(folder)
    torch.manual_seed(0)
    config = FluxTransformer2DModel.load_config(folder / "transformer") | {
        "num_layers": num_double,
        "num_single_layers": num_single,
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "axes_dims_rope": (16, 56, 56),
    }
    FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")


FLUX_ARGUMENTS = ("--t5xxl_max_token_length=64", "--timestep_sampling=sigmoid", "--network_args", "split_qkv=True")
"""An adapter for each of q, k, v and MLP, as peft makes them on diffusers' layers."""

MODELS = {
    "sd_tiny": Model(lambda folder: write_sd(folder, [32, 64, 64, 64]), "train_network", "PlainSd", batch=2),
    "sd_mid": Model(lambda folder: write_sd(folder, [128, 256, 512, 512]), "train_network", "PlainSd", batch=2),
    "flux_mid": Model(lambda folder: write_flux(folder, 1024, 4, 8), "flux_train_network", "PlainFlux", 1, FLUX_ARGUMENTS),
}


def make_inputs(folder: Path, model: Model) -> None:
    """A base model in diffusers layout and eight captioned pictures."""
    import tiny

    model.write(folder / "model")
    tiny.write_images(folder / "images" / "1_thing", 8, model.resolution)


def training_arguments(folder: Path, model: Model, steps: int) -> list[str]:
    """A command line that trains on what `make_inputs` made, for the model's script."""
    return [
        f"--pretrained_model_name_or_path={folder / 'model'}",
        f"--train_data_dir={folder / 'images'}",
        f"--resolution={model.resolution}",
        f"--train_batch_size={model.batch}",
        "--network_module=networks.lora",
        f"--network_dim={RANK}",
        f"--network_alpha={RANK}",
        "--network_train_unet_only",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--learning_rate=1e-4",
        f"--max_train_steps={steps}",
        "--max_data_loader_n_workers=0",
        "--seed=1",
        f"--output_dir={folder / 'out'}",
        "--output_name=bench",
        *model.arguments,
    ]


def run_ours(folder: Path, model: Model, steps: int) -> None:
    """Train with the script."""
    from library.run_writer import RunWriter

    after_update = RunWriter.after_update

    def after(writer: RunWriter, *arguments: Any, **named: Any) -> None:
        after_update(writer, *arguments, **named)
        facts.step_done()

    RunWriter.after_update = after  # type: ignore[method-assign]
    importlib.import_module(model.script).main(training_arguments(folder, model, steps))


def run_plain(folder: Path, model: Model, steps: int) -> None:
    import plain_loops
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = getattr(plain_loops, model.plain)(folder / "model", folder / "images", device)
    plain_loops.train(plain, RANK, model.batch, steps)


@dataclass(frozen=True)
class Timing:
    """Of one process, in seconds: wall clock, and CPU of all its threads, which other processes disturb less."""

    first: float
    """From its start to the end of the first step."""
    step: float
    """Median of the later ones."""
    first_cpu: float
    step_cpu: float
    learning: int
    """Numbers that learn."""


def command_of(side: str, folder: Path, name: str, steps: int) -> list[str]:
    return [sys.executable, __file__, "--side", side, "--folder", str(folder), "--steps", str(steps), "--model", name]


class Waiting:
    """One side's process, which makes a step when it is told to. Its first one it makes by itself."""

    def __init__(self, command: list[str], errors: Path) -> None:
        self.errors = errors
        with errors.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env={**os.environ, facts.IN_TURN: "1"},
            )  # fmt: skip
        self._find("STEP")

    def _find(self, word: str) -> tuple[float, float]:
        """(time, CPU seconds) of the next line that begins with `word`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = line.split()
            if said[:1] == [word]:
                return float(said[1]), float(said[2])
        raise SystemExit(self.errors.read_text(encoding="utf-8"))

    def step(self) -> tuple[float, float]:
        """(seconds, CPU seconds) of a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        begun, done = self._find("GO"), self._find("STEP")
        return done[0] - begun[0], done[1] - begun[1]

    def finish(self) -> None:
        self.process.communicate()  # the end of its input is as good as a line


def measure_in_turn(name: str, steps: int) -> dict[str, object]:
    """The row of steps made in turn: `steps` of each side, after two that are not counted."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, MODELS[name])
        sides = [Waiting(command_of(side, folder, name, steps + 2), folder / f"{side}.log") for side in ("ours", "plain")]
        found: list[list[tuple[float, float]]] = [[], []]
        for number in range(steps + 1):
            for index in (0, 1) if number % 2 else (1, 0):
                found[index].append(sides[index].step())
        for side in sides:
            side.finish()
    ours, plain = (rows[1:] for rows in found)
    ratios, cpu_ratios = (sorted(one[kind] / other[kind] for one, other in zip(ours, plain, strict=True)) for kind in (0, 1))
    fastest = [min(seconds for seconds, _ in rows) for rows in (ours, plain)]
    return {
        **described(name, steps),
        "in_turn": True,
        "step_seconds_ours": round(fastest[0], 3),
        "step_ratio": round(statistics.median(ratios), 3),
        "step_ratio_least": round(ratios[0], 3),
        "step_ratio_most": round(ratios[-1], 3),
        "step_ratio_of_fastest": round(fastest[0] / fastest[1], 3),
        "step_cpu_ratio": round(statistics.median(cpu_ratios), 3),
    }


def described(name: str, steps: int) -> dict[str, object]:
    import torch

    family, _, size = name.partition("_")
    return {
        "commit": facts.commit(),
        "machine": facts.machine(),
        "scenario": f"{family}_lora_{size}",
        "steps": steps,
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def timed(side: str, folder: Path, name: str, steps: int) -> Timing:
    start = time.time()
    command = command_of(side, folder, name, steps)
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    said = [line.split() for line in result.stdout.splitlines()]
    wall, cpu = zip(*((float(words[1]), float(words[2])) for words in said if words[:1] == ["STEP"]), strict=True)
    learning = next((int(words[1]) for words in said if words[:1] == ["LEARNING"]), None)
    return Timing(
        first=wall[0] - start,
        step=_median_gap(wall),
        first_cpu=cpu[0],
        step_cpu=_median_gap(cpu),
        learning=learning if learning is not None else _learning_in(folder / "out" / "bench.safetensors"),
    )


def _median_gap(stamps: Sequence[float]) -> float:
    return statistics.median(after - before for before, after in zip(stamps, stamps[1:], strict=False))


def _learning_in(file: Path) -> int:
    from safetensors.torch import load_file

    tensors = load_file(file)
    downs = sum(value.numel() for name, value in tensors.items() if name.endswith(".lora_down.weight"))
    # of split layers a file has the parts' matrices side by side, with zeros between them: each row has one rank of numbers
    ups = sum(len(value) * RANK for name, value in tensors.items() if name.endswith(".lora_up.weight"))
    return downs + ups


def measure(name: str, steps: int, rounds: int) -> dict[str, object]:
    """The row. Raises `SystemExit` when the two sides do not train as many numbers."""
    pairs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, MODELS[name])
        for number in range(rounds):
            sides = ("ours", "plain") if number % 2 == 0 else ("plain", "ours")
            found = {side: timed(side, folder, name, steps) for side in sides}
            ours, plain = found["ours"], found["plain"]
            if ours.learning != plain.learning:
                raise SystemExit(f"not the same training: {ours.learning} numbers learn here, {plain.learning} there")
            print(f"round {number + 1}: {found}", file=sys.stderr, flush=True)
            pairs.append((ours, plain))

    def median(value: Callable[[Timing, Timing], float]) -> float:
        return round(statistics.median(value(*pair) for pair in pairs), 3)

    return {
        **described(name, steps),
        "rounds": rounds,
        "step_seconds_ours": median(lambda ours, plain: ours.step),
        "step_ratio": median(lambda ours, plain: ours.step / plain.step),
        "step_cpu_ratio": median(lambda ours, plain: ours.step_cpu / plain.step_cpu),
        "first_step_seconds_ours": median(lambda ours, plain: ours.first),
        "first_step_ratio": median(lambda ours, plain: ours.first / plain.first),
        "first_step_cpu_ratio": median(lambda ours, plain: ours.first_cpu / plain.first_cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd_tiny")
    parser.add_argument("--steps", type=int, default=20, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in_turn", action="store_true", help="a step here, a step there")
    parser.add_argument("--threads", type=int, help="of each side; as many as torch takes unless given")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.side:
        run = run_ours if arguments.side == "ours" else run_plain
        run(arguments.folder, MODELS[arguments.model], arguments.steps)
        return
    if arguments.in_turn:
        print(json.dumps(measure_in_turn(arguments.model, arguments.steps)))
    else:
        print(json.dumps(measure(arguments.model, arguments.steps, arguments.rounds)))


if __name__ == "__main__":
    main()
