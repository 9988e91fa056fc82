"""What `--plan` says of memory, against what training takes on this machine.

    python benchmarks/plan_accuracy.py [--model flux_mid|sd_wide|sd_tiny] [--mode network full] [--only 0 1 ...]

Every configuration trains three updates in a process of its own, which prints two measurements of an update after the first:
the peak of all allocations according to torch's profiler, and the rise of the process's peak resident memory (Linux), with the
C library told to give freed memory back at once. A row is added to `results.jsonl` for each; `ratio` is planned / profiled, and
`ratio_resident` the same of what lies above the weights and optimizer state in the resident memory.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import step_speed  # noqa: E402
from step_speed import Model, make_inputs, write_sd  # noqa: E402

MODELS = {
    **step_speed.MODELS,
    "sd_wide": Model(lambda folder: write_sd(folder, [192, 384, 768, 768]), "train_network", "PlainSd", batch=1),
}
"""`sd_wide`: a UNet of about 300 million parameters."""
RESULTS = ROOT / "benchmarks" / "results.jsonl"
MODES = ("network", "full")
CONFIGURATIONS = tuple(itertools.product((False, True), ("no", "bf16"), (1, 2)))
"""(checkpointing, mixed precision, batch size)."""
FULL_SCRIPTS = {"train_network": "train_db", "flux_train_network": "flux_train"}


def script_of(name: str, mode: str) -> str:
    script = MODELS[name].script
    return script if mode == "network" else FULL_SCRIPTS[script]


def flags(name: str, mode: str, folder: Path, configuration: tuple[bool, str, int]) -> list[str]:
    recomputes, precision, batch = configuration
    model = MODELS[name]
    found = [
        f"--pretrained_model_name_or_path={folder / 'model'}",
        f"--train_data_dir={folder / 'images'}",
        f"--resolution={model.resolution}",
        f"--train_batch_size={batch}",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--learning_rate=1e-4",
        "--max_train_steps=3",
        "--max_data_loader_n_workers=0",
        "--seed=1",
        f"--mixed_precision={precision}",
        f"--output_dir={folder / 'out'}",
        *(["--gradient_checkpointing"] if recomputes else []),
    ]
    if mode == "network":
        return [*found, "--network_module=networks.lora", "--network_dim=16", "--network_train_unet_only", *model.arguments]
    plain = itertools.takewhile(lambda word: word != "--network_args", model.arguments)
    return [*found, "--stop_text_encoder_training=-1", *plain]


def prepare(name: str, mode: str, arguments: list[str]) -> Any:
    from library.family_base import family_class
    from library.train_util import prepare_run

    script = script_of(name, mode)
    options = importlib.import_module(script).parse_options(arguments)
    family = family_class("flux" if script.startswith("flux") else "sd")()
    return prepare_run(family, options, "network" if mode == "network" else "full")


def plan(name: str, mode: str, arguments: list[str]) -> dict[str, Any]:
    import time

    from library.memory_plan import forecast

    start = time.process_time()
    found = forecast(prepare(name, mode, arguments))
    return {"planned": found.training.device.total, "plan_cpu_seconds": round(time.process_time() - start, 1)}


def measure(name: str, mode: str, arguments: list[str]) -> dict[str, Any]:
    import memory_measure
    from load_memory import clear_peak, peak_bytes

    from library.train_util import finish_building

    before = memory_measure.bytes_of_all_tensors()
    trainer = finish_building(prepare(name, mode, arguments))
    batch = trainer.data.train[(0, 0)]
    trainer.trainable.train()
    trainer.trainable.before_step(0)
    trainer.update([batch])
    resting = memory_measure.bytes_of_all_tensors() - before
    clear_peak()
    start = peak_bytes()
    trainer.update([batch])
    risen = peak_bytes() - start
    return {
        "resting": resting,
        "resident_rise": risen,
        "profiled": resting + memory_measure.rise_while(lambda: trainer.update([batch])),
    }


def in_process(task: str, name: str, mode: str, arguments: list[str]) -> dict[str, Any]:
    """One task in a process of its own, whose last line is JSON."""
    command = [sys.executable, __file__, "--task", task, "--model", name, "--mode", mode, "--", *arguments]
    # freed memory above 64 KiB goes back to the system, so that resident memory is memory in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    found: dict[str, Any] = json.loads(next(line for line in reversed(result.stdout.splitlines()) if line.startswith("{")))
    return found


def row(name: str, mode: str, folder: Path, configuration: tuple[bool, str, int]) -> dict[str, Any]:
    import facts

    arguments = flags(name, mode, folder, configuration)
    found = in_process("plan", name, mode, arguments) | in_process("measure", name, mode, arguments)
    recomputes, precision, batch = configuration
    return {
        "commit": facts.commit(),
        "machine": facts.machine(),
        "scenario": f"plan_{name}_{mode}",
        "gradient_checkpointing": recomputes,
        "mixed_precision": precision,
        "batch": batch,
        **found,
        "ratio": round(found["planned"] / found["profiled"], 3),
        "ratio_resident": round((found["planned"] - found["resting"]) / max(found["resident_rise"], 1), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="flux_mid")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="*", type=int, help="numbers of configurations, 0 to 7; all unless given")
    parser.add_argument("--task", choices=("plan", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task = plan if arguments.task == "plan" else measure
        print(json.dumps(task(arguments.model, arguments.mode[0], arguments.rest)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, MODELS[arguments.model])
        numbers = range(len(CONFIGURATIONS)) if arguments.only is None else arguments.only
        for mode, number in itertools.product(arguments.mode, numbers):
            found = json.dumps(row(arguments.model, mode, folder, CONFIGURATIONS[number]))
            print(found, flush=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(found + "\n")


if __name__ == "__main__":
    main()
