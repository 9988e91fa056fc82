"""What has to be the same for a run to go on from a saved state, and what may change."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.bf16_updates import drop_compensation
from library.config_util import SubsetConfig
from library.dataset import ImageDataset
from library.errors import UserError
from library.hub import fetch_state, hub_api
from library.optimizers import find_optimizer, load_exactly
from library.option_groups_output import NEWEST_STATE
from library.rng import key_to_seed
from library.run_setup import RunLength, TrainState
from library.saved_state import SavedState, changed_options, load_state, newest_state, result_options
from library.state_parts import WHOLE, Part

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer

    from library.option_groups import TrainOptions

logger = logging.getLogger(__name__)

REMEDIES = {
    "optimizer": "--optimizer_type",
    "schedule_class": "--lr_scheduler_type",
}
"""What cannot differ -> what the user has to put back."""

WARNED = {
    "pictures": "the pictures are not those of the saved run",
    "captions": "the captions are not those of the saved run",
    "settings": "the settings of the data sets are not those of the saved run",
    "readings": "cached text encoder outputs keep another number of readings of a caption than in the saved run "
    "(--caption_variants)",
    "world": "the number of processes is not that of the saved run",
    "batches_per_epoch": "an epoch has not as many batches as in the saved run, so its place in the data is about the same",
}
"""What makes it another run from here on, where it differs -> how that is said."""

KEPT_OPTIONS = ("optimizer.optimizer_args", "schedule.lr_scheduler_args")
"""Options whose saved values hold, as they are part of the optimizer's or the schedule's own state."""


def find_state(options: TrainOptions, rank: int = 0, processes: int = 1) -> SavedState | None:
    """What `--resume` names, as process `rank` of so many needs it; None where the run starts afresh. Raises `UserError` for a
    state that cannot be used."""
    folder: Path | str | None = options.state.resume
    if folder is not None and options.hub.resume_from_huggingface:
        folder = fetch_state(str(folder), hub_api(options.hub))
    elif folder == NEWEST_STATE:
        folder = newest_state(Path(options.output.output_dir or "."), options.output.output_name)
    return None if folder is None else load_state(folder, Part(rank, processes) if options.learns_in_shards else WHOLE)


def run_record(options: TrainOptions, length: RunLength, world: int, data: ImageDataset) -> dict[str, Any]:
    """What a state says about its run, to be compared when it is continued."""
    pictures = [[(record.key, record.size, record.repeats) for record in part.records] for part in data.parts]
    subsets = [part.records.used_subsets() for part in data.parts]
    settings = [
        (part.batch_size, part.multiplier, [_setting(subset) for subset in used])
        for part, used in zip(data.parts, subsets, strict=True)
    ]
    varies = any(not subset.captions.is_static for used in subsets for subset in used)
    optimizer = find_optimizer(options.optimizer.name)
    return {
        "seed": options.training.seed,
        "world": world,
        "shards": world if options.learns_in_shards else 1,
        "batches_per_epoch": length.batches_per_epoch,
        "accumulation": length.accumulation,
        "optimizer": f"{optimizer.module}.{optimizer.attribute}",
        "schedule_class": options.schedule.lr_scheduler_type,
        "pictures": key_to_seed(pictures),
        "captions": key_to_seed([record.caption for record in data.records]),
        "settings": key_to_seed(settings),
        "readings": data.caption_variants if varies else 0,
        "options": result_options(options),
    }


def _setting(subset: SubsetConfig) -> SubsetConfig:
    """All that tells how its pictures and captions are used, and not where they lie, which may change."""
    return replace(subset, image_dir=None, metadata_file=None, conditioning_data_dir=None)


def check_resumable(saved: SavedState, now: dict[str, Any], length: RunLength) -> None:
    """Raise `UserError`, with both values, where `saved` cannot be continued exactly; warn of other data."""
    then = saved.train_state
    for key, remedy in REMEDIES.items():
        if key in then and now[key] != then[key]:
            raise UserError(
                f"cannot continue exactly from {saved.folder}: {key} was {then[key] or 'not given'} and is now "
                f"{now[key] or 'not given'}. Resume with {remedy} as it was."
            )
    if then["step"] >= length.total_updates:
        raise UserError(
            f"nothing is left to train: {saved.folder} was saved after step {then['step']}, and this run ends at step "
            f"{length.total_updates}. To go on, raise --max_train_steps (or --max_train_epochs)."
        )
    for key, difference in WARNED.items():
        if then.get(key, now[key]) != now[key]:
            logger.warning("%s: from here on it is another run than it would have been", difference)


def tell_changed_options(saved: SavedState, options: TrainOptions) -> None:
    """Warn of each option, as the run will have it, that is not what it was and changes what is learned."""
    for key, change in changed_options(saved.train_state, options).items():
        holds = "as saved, since it is part of the saved state" if key in KEPT_OPTIONS else "with the new value"
        logger.warning("not the run that was saved: %s; it goes on %s", change, holds)


def restore_optimizer(optimizer: AcceleratedOptimizer, saved: SavedState, options: TrainOptions) -> None:
    """The optimizer's state, however its weights were stepped and rounded in the saved run."""
    inner = optimizer.optimizer
    try:
        load_exactly(inner, saved.optimizer)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the optimizer's state in {saved.folder} does not fit this run ({error}). "
            "Resume with the flags about what learns, and at which rates, as they were."
        ) from error
    if options.precision.bf16_update != "kahan":
        drop_compensation(inner)


def resumed_state(then: Mapping[str, Any], length: RunLength, world: int) -> TrainState:
    """Where a run stands that goes on from a state's record `then`.

    With other data, batches or processes: as far into the epoch, and past every batch whose random numbers were used.
    """
    state = TrainState(**{field.name: then[field.name] for field in fields(TrainState)})
    if (length.batches_per_epoch, world) == (then["batches_per_epoch"], then["world"]):
        return state
    position = state.position * length.batches_per_epoch // then["batches_per_epoch"]
    return replace(state, position=position, micro_step=math.ceil(state.micro_step * then["world"] / world))


def start_state(options: TrainOptions, length: RunLength) -> TrainState:
    """Where a run that is not resumed begins: at `--initial_step` or `--initial_epoch`, else at 0.

    The epoch is that of the step, begun anew unless `--skip_until_initial_step`. Raises `UserError` past the end.
    """
    flags = options.state
    step = flags.initial_step
    if step is None:
        step = ((flags.initial_epoch or 1) - 1) * length.updates_per_epoch
    if step and step >= length.total_updates:
        raise UserError(
            f"nothing is left to train: the run is to begin at step {step} (--initial_step, --initial_epoch) and ends at step "
            f"{length.total_updates}. Raise --max_train_steps (or --max_train_epochs)."
        )
    epoch, inside = divmod(step, length.updates_per_epoch)
    position = inside * length.accumulation if flags.skip_until_initial_step else 0
    return TrainState(step, epoch, position, epoch * length.batches_per_epoch + position)


def place_schedule(scheduler: LRScheduler, step: int) -> None:
    """The schedule as after `step` updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no update was made before
        for _ in range(step):
            scheduler.step()


def restore_schedule(scheduler: LRScheduler, saved: SavedState) -> None:
    """The schedule at its saved position. Call it after `restore_optimizer`.

    The named schedules are functions of the position alone: with the rates, the shape and the length this run asks for, they
    go on from there. With nothing changed these are the saved rates, bit for bit. Other classes keep a state of their own.
    """
    rates = list(scheduler.base_lrs)
    scheduler.load_state_dict(dict(saved.scheduler))
    if type(scheduler) is not LambdaLR:
        return
    scheduler.base_lrs = rates
    for group, rate, factor in zip(scheduler.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
