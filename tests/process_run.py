"""One of several processes of a real run, for test_processes.py: runs each script's own `main` and notes what it saw.

accelerate launch process_run.py FOLDER. FOLDER/jobs.json holds [name, script, arguments, step, what happens there] rows: at
that update the second process is asked to `stop`, or has a loss that is `nan`.
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
from library.errors import Interrupted, UserError  # noqa: E402


class WatchedTrainer(train_util.Trainer):
    """Keeps what this process trained on, and lets `event` happen at the update `event_at`."""

    event, event_at = "", 0
    last: WatchedTrainer

    def fit(self, writer: train_util.RunWriter) -> None:
        WatchedTrainer.last = self
        self.keys_seen: list[tuple[int, ...]] = []
        super().fit(writer)

    def batch_loss(self, batch: TrainBatch) -> train_util.BatchLoss:
        self.keys_seen.append(batch.latent_seeds)
        now = self.state.step + 1 == self.event_at and self.accelerator.process_index == 1
        if now and self.event == "stop":
            os.kill(os.getpid(), signal.SIGINT)
        loss = super().batch_loss(batch)
        return loss._replace(total=loss.total * float("nan")) if now and self.event == "nan" else loss


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    train_util.Trainer = WatchedTrainer  # type: ignore[misc]
    for name, script, arguments, event_at, event in json.loads((folder / "jobs.json").read_text()):
        WatchedTrainer.event_at, WatchedTrainer.event = event_at, event
        said = None
        try:
            importlib.import_module(script).main(arguments)
        except (Interrupted, UserError) as stopped:
            said = str(stopped)
        trainer = WatchedTrainer.last
        weights = {key: value.clone() for key, value in trainer.trainable.state_dict().items()}
        held = sum(getattr(p, "_local_tensor", p).nbytes for p in trainer.bundle.denoiser.parameters())
        facts = {"seen": trainer.keys_seen, "weights": weights, "said": said, "step": trainer.state.step, "held": held}
        torch.save(facts, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
