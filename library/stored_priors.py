"""What the untrained model predicts, made before training and kept, for training the model itself.

An adapter can be switched off, so its loop asks the frozen model in each step. Where the model itself learns there is none: the
predictions that regularisation pictures are to keep are made before the first step. That fixes what can be asked. Each
picture is seen in a few views (caption, crop, mirroring), `--prior_choices`, each with noise and a time of its own, in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from library.cache_io import Fingerprint, Stamp, cache_path, own_path, short_hash
from library.cache_upkeep import remove_leftovers
from library.caching import Share, needs_making
from library.errors import UserError
from library.objectives import Noised
from library.prior_cache import PriorFile
from library.quarantine import BadFile
from library.rng import StepRng
from library.saved_state import NEUTRAL_OPTIONS, result_options
from library.strategy_base import LATENT_DTYPE, Strategies

if TYPE_CHECKING:
    from pathlib import Path

    from library.dataset import ImageDataset, Row, TrainData
    from library.records import Record
    from library.train_util import Trainer

logger = logging.getLogger(__name__)

Corrupt = Callable[[Tensor, StepRng], tuple[Noised, Tensor]]
"""(x0 [B, C, h, w], generators) -> (what is shown and predicted, times [B])."""


def with_stored_noise(
    drawn: tuple[Noised, Tensor], x0: Tensor, keys: Sequence[int | None], corrupt: Corrupt
) -> tuple[Noised, Tensor]:
    """`drawn`, with the rows that have a key as their key says: alike in whatever batch they stand."""
    noised, times = drawn
    columns = [noised.x_t.clone(), noised.target.clone(), noised.noise.clone(), times.clone()]
    for row, key in enumerate(keys):
        if key is None:
            continue
        own, time = corrupt(x0[row : row + 1], StepRng(key))
        for column, value in zip(columns, (own.x_t, own.target, own.noise, time), strict=True):
            column[row] = value[0]
    x_t, target, noise, times = columns
    return Noised(x_t=x_t, target=target, noise=noise), times


def _preserved(dataset: ImageDataset) -> Iterator[tuple[Record, float]]:
    """Pictures that keep their predictions, each with its data set's multiplier."""
    for part in dataset.parts:
        for record in part.records:
            if record.subset.preserves:
                yield record, part.multiplier


def prior_files(data: TrainData, strategies: Strategies) -> dict[str, PriorFile]:
    """The file of each picture, beside it or in `--cache_dir`, by `Record.key`."""
    dataset, spec = data.train, data.latent
    found: dict[str, PriorFile] = {}
    taken: set[Path] = set()
    for record, _ in _preserved(dataset):
        latents = strategies.latents_caching.format.path_for(record.path, record.size)
        path = cache_path(latents.with_name(f"{latents.stem}_prior{latents.suffix}"), data.options.cache.cache_dir)
        path = own_path(path, record.key) if path in taken else path
        taken.add(path)
        width, height = (side // spec.stride for side in record.placement.bucket)
        found[record.key] = PriorFile(path, (spec.channels, height, width), dataset.num_predictions(record))
    return found


def _fingerprints(trainer: Trainer) -> dict[str, Fingerprint]:
    """What the predictions depend on: the whole untrained model, what it is shown, and at which noise and time."""
    bundle, options, strategies, dataset = trainer.bundle, trainer.options, trainer.strategies, trainer.data.train
    settings = {
        key: value
        for key, value in result_options(options).items()
        if key.split(".")[0] in ("noise", "family") and key not in NEUTRAL_OPTIONS
    }
    denoiser = bundle.facts["model"].parts["denoiser"].identity_as(next(bundle.denoiser.parameters()).dtype)
    shared = {
        **bundle.identity,
        "denoiser": denoiser,
        "tokenizer": strategies.tokenize.fingerprint(),
        "encoding": strategies.text_encoding.fingerprint(),
        "strategy": strategies.latents_caching.fingerprint(),
        "precision": f"{bundle.dtype} under {options.precision.mixed_precision}",
    }
    found = {}
    for record, _ in _preserved(dataset):
        subset, count = record.subset, dataset.num_predictions(record)
        looks = subset.flip_aug, subset.color_aug, subset.random_crop, subset.face_crop_range, subset.captions
        asked = options.training.seed, record.key, record.repeats, count, dataset.caption_variants, looks, settings
        own = {"recipe": record.recipe, "caption": short_hash(record.caption), "prior": short_hash(str(asked))}
        found[record.key] = Fingerprint({**shared, **own}, Stamp(record.path))
    return found


def store_priors(trainer: Trainer) -> None:
    """Have every prediction in its file, and serve them from there. To be called before anything is learned or restored."""
    dataset = trainer.data.train
    if dataset.priors is None:
        return
    share = Share.of_process(trainer.accelerator)
    files, fingerprints = prior_files(trainer.data, trainer.strategies), _fingerprints(trainer)
    if share.rank == 0:
        remove_leftovers({file.path.parent for file in files.values()})
    own = set(share.of(list(files), {key: file.path for key, file in files.items()}))
    what = "predictions of the untrained model"
    missing = set(needs_making({key: files[key] for key in own}, fingerprints, trainer.options, what))
    records = [(record, multiplier) for record, multiplier in _preserved(dataset) if record.key in missing]
    trainer.trainable.train(False)
    bar = tqdm(records, desc="predictions to keep", unit="image", disable=not records or share.rank > 0)
    for record, multiplier in bar:
        try:
            rows = [dataset.prior_row(record, number) for number in range(files[record.key].count)]
        except BadFile as bad:
            dataset.quarantine.add(bad)
            continue
        predictions = torch.cat(list(_predicted(trainer, record, rows, multiplier)))
        if not predictions.isfinite().all():
            raise UserError(
                f"the untrained model's predictions for {record.path} are no numbers, so they cannot be kept. "
                "Use --mixed_precision bf16, or --no_half_vae if latents overflow."
            )
        files[record.key].save(predictions, fingerprints[record.key])
    found = len(own) - len(records)
    logger.info("%s: of %d images made, of %d found on disk%s", what, len(records), found, share.note)
    trainer.accelerator.wait_for_everyone()
    dataset.priors = replace(dataset.priors, files=files)


def _predicted(trainer: Trainer, record: Record, rows: Sequence[Row], multiplier: float) -> Iterator[Tensor]:
    """[n, C, h, w] of so many rows as are trained at a time."""
    size = trainer.options.training.train_batch_size
    for start in range(0, len(rows), size):
        shown = rows[start : start + size]
        batch = trainer.data.train.collate([record] * len(shown), shown, multiplier).to(trainer.device)
        with torch.no_grad():
            noised, times, cond = trainer.seen(batch)
            yield trainer.predict(noised, times, cond, batch).to(LATENT_DTYPE).cpu()
