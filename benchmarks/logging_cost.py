"""What logging costs: steps with everything logged against steps with nothing logged, in turn, in one run.

    python benchmarks/logging_cost.py [--model sd_tiny|sd_mid|flux_mid] [--steps 40] [--threads 1] [--out FILE]

Logged are TensorBoard, `metrics.csv`, the progress bar, the picture losses, the pace and the gradient norm, at every step. The
row has the median of the ratios of neighbouring steps, which a busy machine disturbs, and `share`: the CPU seconds spent
inside logging, of those of a step, which it hardly does. Limit: 1 %.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_speed import MODELS, described, make_inputs, training_arguments

LIMIT = 0.01
WARM_UP = 4


@dataclass
class Stopwatch:
    """CPU seconds inside the calls it has wrapped, of this thread: TensorBoard writes in another one, beside the step."""

    seconds: float = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - begun

        return timed


def measure(name: str, steps: int) -> dict[str, object]:
    from library.family_base import family_class
    from library.run_writer import RunWriter
    from library.train_util import build_trainer

    model = MODELS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, model)
        arguments = training_arguments(folder, model, steps + WARM_UP)
        options = importlib.import_module(model.script).parse_options([*arguments, f"--logging_dir={folder / 'logs'}"])
        trainer = build_trainer(family_class(name.split("_")[0])(), options, "network")
        writer, table, watch = RunWriter(trainer), trainer.image_losses, Stopwatch()
        assert table is not None
        table.push = watch.around(table.push)  # type: ignore[method-assign]
        log = watch.around(writer.after_update)
        trainer.trainable.train()
        seconds, cpu, inside = [], [], []
        for number, group in enumerate(trainer.groups()):
            logged = number % 2 == 0
            trainer.image_losses = table if logged else None
            begun, begun_cpu, watch.seconds = time.perf_counter(), time.process_time(), 0.0
            rates = {"lr/unet": 1e-4}
            logs = trainer.update(group)
            epoch_done = trainer.state.advance(len(group), trainer.length)
            if logged:
                log(logs, rates, sum(map(len, group)), epoch_done=epoch_done)
                inside.append(watch.seconds)
            seconds.append(time.perf_counter() - begun)
            cpu.append(time.process_time() - begun_cpu)
        writer.tracker.close()
    ratios = [one / other for one, other in zip(seconds[WARM_UP::2], seconds[WARM_UP + 1 :: 2], strict=True)]
    step, logging = statistics.median(cpu[WARM_UP + 1 :: 2]), statistics.median(inside[WARM_UP // 2 :])
    return {
        **described(name, steps),
        "scenario": f"logging_cost/{name}",
        "step_cpu_seconds": round(step, 4),
        "logging_cpu_ms": round(1000 * logging, 3),
        "share": round(logging / step, 5),
        "ratio": round(statistics.median(ratios), 4),
        "limit": LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd_tiny")
    parser.add_argument("--steps", type=int, default=40, help="an even number, half of them logged")
    parser.add_argument("--threads", type=int, help="as many as torch takes unless given")
    parser.add_argument("--out", type=Path, help="add the row to this file")
    arguments = parser.parse_args()
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    row = json.dumps(measure(arguments.model, arguments.steps))
    sys.stdout.write(row + "\n")
    if arguments.out is not None:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


if __name__ == "__main__":
    main()
