"""The loss on pictures that are not trained on: every round with the same noise and times, so that rounds can be compared.

Nothing of a round reaches the training: its random numbers are keyed apart, and weights and modes are put back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch

from library.batch import TrainBatch
from library.errors import UserError
from library.rng import StepRng, key_to_seed

if TYPE_CHECKING:
    from library.dataset import ImageDataset, TrainData
    from library.option_groups import TrainOptions, ValidationOptions
    from library.train_util import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationLoss:
    """Mean loss over all pictures at each quantile of the time density, the earliest (least noise) first."""

    by_quantile: tuple[float, ...]
    by_set: Mapping[str, float] = field(default_factory=dict)
    """The mean of each validated [[datasets]], by the name of its folders, where there are several."""

    @property
    def mean(self) -> float:
        return sum(self.by_quantile) / len(self.by_quantile)

    def logs(self, unit: str, training: float) -> dict[str, float]:
        """Under sd-scripts' names, and one for each quantile. unit: `step` or `epoch`; training: the running loss."""
        own = {f"{unit}_average": self.mean, f"{unit}_divergence": self.mean - training}
        quantiles = quantiles_of(len(self.by_quantile))
        own |= {f"{name}_average": loss for name, loss in self.by_set.items()}
        own |= {f"quantile_{100 * q:02.0f}": loss for q, loss in zip(quantiles, self.by_quantile, strict=True)}
        return {f"loss/validation/{name}": value for name, value in own.items()}


def quantiles_of(count: int) -> list[float]:
    """The middles of `count` equal parts of [0, 1]: their mean loss estimates that of times drawn at random."""
    return [(index + 0.5) / count for index in range(count)]


def evenly(total: int, most: int | None) -> list[int]:
    """At most `most` of the numbers below `total`, spread over all of them: batches are in order of their buckets."""
    count = total if most is None else min(most, total)
    return [index * total // count for index in range(count)]


def check_validation(options: TrainOptions, data: TrainData) -> None:
    """Raise `UserError` where a validation is asked for and no pictures are held out."""
    if data.validation is None and options.validation.validation_seed is not None:
        logger.warning("--validation_seed has no effect: no pictures are held out (--validation_split)")
    asked = sorted(f.name for f in fields(options.validation) if f.name in options.explicit and f.name != "validation_seed")
    if data.validation is None and any(getattr(options.validation, name) for name in asked):
        raise UserError(
            f"--{', --'.join(asked)}: no pictures are held out to validate with. Give --validation_split, such as 0.1 (or "
            "validation_split in the dataset configuration), or remove them."
        )


class Validation:
    """The validation of one run. On several processes each measures a share, and all know the result."""

    def __init__(self, trainer: Trainer, dataset: ImageDataset, options: ValidationOptions) -> None:
        self.trainer = trainer
        self.dataset = dataset
        self.options = options
        self.names = _set_names(dataset)

    @classmethod
    def of(cls, trainer: Trainer) -> Validation | None:
        """None where no pictures are held out."""
        dataset = trainer.data.validation
        return None if dataset is None else cls(trainer, dataset, trainer.options.validation)

    def due(self, step: int, epoch: int | None) -> str | None:
        """What a round is due for after update `step`, which completed `epoch` (None: no epoch): `epoch`, `step`, or nothing.

        As in sd-scripts every epoch, unless `--validate_every_n_epochs` says otherwise, and every `--validate_every_n_steps`.
        """
        every_steps, every_epochs = self.options.validate_every_n_steps, self.options.validate_every_n_epochs
        if epoch is not None and epoch % (every_epochs or 1) == 0 and (every_epochs or not every_steps):
            return "epoch"
        return "step" if every_steps and step % every_steps == 0 else None

    def measure(self) -> ValidationLoss:
        """One round, with the weights as they are. To be called on every process, in evaluation mode."""
        trainer, quantiles = self.trainer, quantiles_of(self.options.validation_quantiles)
        # a row for each set; the last column counts pictures
        sums = torch.zeros(len(self.dataset.parts), len(quantiles) + 1, device=trainer.device)
        seed = key_to_seed(trainer.options.training.seed or 0, "validation")
        training_rng = trainer.rng
        try:
            with torch.no_grad():
                for index, batch, counts in self._batches():
                    trainer.rng = StepRng(seed, step=index)
                    encoded = self._encoded(batch.to(trainer.device))
                    losses = [trainer.loss(replace(encoded, quantile=quantile)) for quantile in quantiles]
                    if counts:
                        images = torch.stack([*losses, torch.ones_like(losses[0])]) * len(batch)
                        sums[self.dataset.plan(0)[index][0]] += images
        finally:
            trainer.rng = training_rng
        trainer.processes.add_up(sums)
        *totals, pictures = sums.sum(0).tolist()
        by_set = {
            name: sum(losses) / len(losses) / count
            for name, (*losses, count) in zip(self.names, sums.tolist(), strict=True)
            if count and len(sums) > 1
        }
        return ValidationLoss(tuple(total / pictures for total in totals), by_set)

    def _encoded(self, batch: TrainBatch) -> TrainBatch:
        """The batch with latents and conditioning made once for all its times."""
        trainer = self.trainer
        return replace(
            batch, latents=trainer.latents(batch), images=None, conditioning=trainer.conditioning(batch), tokens=None
        )

    def _batches(self) -> Iterator[tuple[int, TrainBatch, bool]]:
        """This process's batches with their numbers; the next one is read while one is worked on. One that does not count is
        for the others, who cannot compute theirs alone."""
        mine, counted = self._numbers()
        with ThreadPoolExecutor(1, "validation") as reader:
            waiting = [reader.submit(self.dataset.__getitem__, (0, index)) for index in mine[:1]]
            for number, index in enumerate(mine):
                batch = waiting.pop().result()
                if number + 1 < len(mine):
                    waiting.append(reader.submit(self.dataset.__getitem__, (0, mine[number + 1])))
                yield index, batch, number < counted

    def _numbers(self) -> tuple[Sequence[int], int]:
        """Numbers of this process's batches, and how many of them count."""
        processes = self.trainer.processes
        every = evenly(self.dataset.num_batches, self.options.max_validation_steps)
        mine = every[processes.rank :: processes.count]
        counted = len(mine)
        if self.trainer.memory.shards is not None and counted < len(every[:: processes.count]):
            mine = [*mine, every[0]]
        return mine, counted


def _set_names(dataset: ImageDataset) -> list[str]:
    """A name for each part: those of its folders."""
    names: list[str] = []
    for part in dataset.parts:
        name = "+".join(dict.fromkeys(record.subset.name for record in part.records))
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


@dataclass
class BestLoss:
    """The lowest validation loss so far, and for how many rounds there was none lower. Saved and restored with a run."""

    loss: float | None = None
    step: int = 0
    rounds_since: int = 0

    def take(self, loss: float, step: int) -> bool:
        """Whether `loss`, of update `step`, is the lowest."""
        if self.loss is not None and not loss < self.loss:
            self.rounds_since += 1
            return False
        self.loss, self.step, self.rounds_since = loss, step, 0
        return True
