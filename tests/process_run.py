"""One of several processes of a real run, for test_processes.py: runs each script's own `main` and notes what it saw.

accelerate launch process_run.py FOLDER. FOLDER/jobs.json holds [name, script, arguments, step to stop at] rows.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

from library import train_util  # noqa: E402
from library.batch import TrainBatch  # noqa: E402
from library.errors import Interrupted  # noqa: E402


class WatchedTrainer(train_util.Trainer):
    """Keeps what this process trained on, and asks its own process to stop after the update `stop_at`."""

    stop_at = 0
    last: WatchedTrainer

    def fit(self, writer: train_util.RunWriter) -> None:
        WatchedTrainer.last = self
        self.keys_seen: list[tuple[int, ...]] = []
        super().fit(writer)

    def batch_loss(self, batch: TrainBatch) -> train_util.BatchLoss:
        self.keys_seen.append(batch.latent_seeds)
        if self.stop_at and self.state.step + 1 == self.stop_at and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch_loss(batch)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    train_util.Trainer = WatchedTrainer  # type: ignore[misc]
    for name, script, arguments, stop_at in json.loads((folder / "jobs.json").read_text()):
        WatchedTrainer.stop_at = stop_at
        said = None
        try:
            importlib.import_module(script).main(arguments)
        except Interrupted as stopped:
            said = str(stopped)
        trainer = WatchedTrainer.last
        weights = {key: value.clone() for key, value in trainer.trainable.state_dict().items()}
        facts = {"seen": trainer.keys_seen, "weights": weights, "said": said, "step": trainer.state.step}
        torch.save(facts, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
