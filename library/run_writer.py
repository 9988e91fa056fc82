"""What a run leaves behind: logs, saved models, states to resume from, previews. The loop says when, this knows where."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from library.checkpoint import (
    CheckpointPolicy,
    CheckpointWriter,
    average_name,
    state_name,
)
from library.curves import LEAST_STEPS, PICTURE_FILE, draw_curves
from library.image_losses import FILE as IMAGE_LOSSES
from library.image_losses import merged, worst, write_table
from library.metadata import BaseHashes, RunFacts, at_save, average_metadata, modelspec_metadata, network_metadata
from library.number_check import NotFinite
from library.optimizers import describe_optimizer
from library.run_requests import SAMPLE, SAVE
from library.run_setup import save_dtype
from library.saved_state import AVERAGES_FILE, OPTIMIZER_TENSORS, TENSORS_FILE, result_options, save_state
from library.state_parts import split_optimizer, write_parts
from library.tracking import METRICS_FILE, Tracker
from library.trainable import split_pairs
from library.validation import Validation, ValidationLoss
from library.watchdog import Watchdog

if TYPE_CHECKING:
    from library.hub import HubUploads
    from library.option_groups import NetworkTrainOptions
    from library.train_util import Trainer

logger = logging.getLogger(__name__)

SHOWN_IMAGES = 20
"""Pictures that are named at the end of a run, those that are learned worst."""


class FileMetadata:
    """What every saved file of a run says about itself. The base model is hashed in the background until the first save."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        options, family = trainer.options, trainer.family
        self.network = getattr(options, "network", None)
        arguments: dict[str, Any] = split_pairs(self.network.network_args or (), "--network_args") if self.network else {}
        if self.network and arguments:
            arguments.setdefault("dropout", self.network.network_dropout)  # sd-scripts lists it among the arguments
        self.facts = RunFacts(
            base_model_version=family.base_model_version(options),
            architecture=family.modelspec_architecture(options),
            v2=options.model.v2,
            prediction_type=family.prediction_type(options),
            family=family.metadata(options),
            resolution=trainer.data.datasets[0].config.rule.resolution,
            optimizer=describe_optimizer(options.optimizer),
            num_epochs=trainer.length.num_epochs,
            max_train_steps=trainer.length.total_updates,
            started_at=time.time(),
            session_id=secrets.randbelow(2**32),
            network_args=arguments,
        )
        self.base = BaseHashes(
            options.model.pretrained_model_name_or_path,
            options.model.vae,
            skip=options.output.no_metadata or self.network is None or not trainer.accelerator.is_main_process,
        )

    def of_file(self, *, averaged: bool = False) -> dict[str, str]:
        """For a file saved now: `modelspec.*`, when it was saved, and for an adapter all `ss_*` keys; averaged: of `--ema`."""
        trainer, options = self.trainer, self.trainer.options
        own: dict[str, str] = {}
        if self.network is not None:
            data = trainer.data.metadata(trainer.accelerator.num_processes)
            own = network_metadata(cast("NetworkTrainOptions", options), self.facts, data, self.base)
        epoch = trainer.state.epoch + (trainer.state.position > 0)
        own = at_save(options, own, step=trainer.state.step, epoch=epoch)
        if averaged:
            own |= average_metadata(options)
        return own | modelspec_metadata(options, self.facts, "Checkpoint" if self.network is None else "LoRA")


class RunWriter:
    """Everything written during one run of `trainer`. Files are the main process's work; previews are shared."""

    def __init__(self, trainer: Trainer, uploads: HubUploads | None = None, *, alone: bool = True) -> None:
        """uploads: what is saved goes there, too. alone: no other run writes to the output folder now."""
        self.trainer = trainer
        self.uploads = uploads
        options, accelerator = trainer.options, trainer.accelerator
        self.is_main = accelerator.is_main_process
        self.folder = Path(options.output.output_dir or ".")
        self.policy = CheckpointPolicy.of(options.output, options.state, trainer.length.num_epochs)
        self.files = CheckpointWriter(self.folder, self.policy, trainer.trainable.suffix)
        self.metadata = FileMetadata(trainer)
        self.first_step = trainer.state.step
        self.previews = trainer.previews
        self.validation = Validation.of(trainer)
        self.watchdog = Watchdog(trainer.device)
        prefix = f"{Path(self.policy.last_name).name}-"
        beside = not alone or (self.folder / (prefix + METRICS_FILE)).is_file()
        self.prefix = prefix if beside else ""
        """Of logs that are not for this run alone to write, or were not when it began."""
        self.tracker = Tracker(
            options.logging,
            self.folder,
            total_steps=trainer.length.total_updates,
            steps_per_epoch=trainer.length.updates_per_epoch,
            resume_step=trainer.state.step if trainer.resumed else None,
            recent_losses=trainer.recent_losses,
            name=options.log_name,
            config=result_options(options),
            enabled=self.is_main,
            file_name=self.prefix + METRICS_FILE,
        )

    # ---- when ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        trainer = self.trainer
        logger.info(
            "training: %d images an epoch, %d updates in %d epochs, seed %s",
            trainer.data.train.num_images,
            trainer.length.total_updates,
            trainer.length.num_epochs,
            trainer.options.training.seed,
        )
        trainer.trainable.check_savable()
        if trainer.state.step == 0:
            self._preview(epoch=None)

    def after_update(
        self, logs: Mapping[str, Tensor | float], rates: Mapping[str, float], images: int, *, epoch_done: bool
    ) -> None:
        """images: of the update, on this process."""
        state = self.trainer.state
        pace = self.watchdog.lap(images * self.trainer.processes.count)
        self.tracker.push(state.step, state.epoch, {**logs, **pace}, rates)
        epoch = state.epoch if epoch_done else None
        if epoch is not None:
            self.tracker.end_epoch(state.step, epoch)
        self._validate(epoch=epoch)
        agreed = self.trainer.processes.agreed
        if self.policy.due_at_step(state.step) or SAVE in agreed:
            self._save(self.policy.step_name(state.step), with_state=self.policy.save_state or SAVE in agreed)
        if self.policy.due_at_step(state.step):
            self._prune(step=state.step)
        if epoch is not None and self.policy.due_at_epoch(epoch):
            self._save(self.policy.epoch_name(epoch), with_state=self.policy.save_state)
            self._prune(epoch=epoch)
        self._preview(epoch=epoch)
        self.watchdog.pause()

    @property
    def learned_enough(self) -> bool:
        """Whether the validation loss has not fallen for `--early_stopping_patience` rounds."""
        patience = self.trainer.options.validation.early_stopping_patience
        return patience is not None and self.trainer.best.rounds_since >= patience

    def finish(self) -> None:
        best = self.trainer.best
        if self.learned_enough:
            logger.info("stopped early: the validation loss was lowest after step %d, %.5f", best.step, best.loss)
        losses = self._image_loss_states()
        self._save(self.policy.last_name, with_state=False)
        if self.policy.save_state_at_end:
            self._save_state(self.policy.last_name, losses)
        self._end_logs(losses)

    def interrupted(self) -> str:
        """Save the state, whatever was asked for, and say how to go on."""
        folder = self._leave(with_state=True)
        return (
            f"stopped after step {self.trainer.state.step}. Its state is saved. To go on, run the same command with "
            f"--resume {folder}"
        )

    def stopped(self, problem: NotFinite) -> str:
        """Save the state before the step that `problem` was found in, and say how to go on."""
        made = self.trainer.state.step - self.first_step
        folder = self._leave(with_state=problem.untouched and made > 0)
        if not problem.untouched:
            return "Go on from what was saved before."
        if not made:
            return "No step of this run came before it, so nothing is saved."
        return f"The state after step {self.trainer.state.step} is saved; to go on from it, --resume {folder}"

    def _leave(self, *, with_state: bool) -> Path:
        """The end of a run that is not complete; gives the folder of its state."""
        stem, losses = self.policy.step_name(self.trainer.state.step), self._image_loss_states()
        if with_state:
            self._save_state(stem, losses)
        self._end_logs(losses)
        return self.folder / state_name(stem)

    def _end_logs(self, image_losses: Sequence[Mapping[str, Any]]) -> None:
        self._write_image_losses(image_losses)
        self.tracker.close()
        if self.trainer.state.step - self.first_step >= LEAST_STEPS:
            self._draw_curves()
        self._settle_uploads()

    # ---- what ------------------------------------------------------------------------------------------------------

    def _save(self, stem: str, *, with_state: bool) -> None:
        if self.is_main or self.trainer.memory.learns_in_shards:
            self._save_model(stem)
        if with_state:
            self._save_state(stem, self._image_loss_states())

    def _save_model(self, stem: str) -> None:
        trainer = self.trainer
        self._settle_uploads()
        self.tracker.flush()
        dtype = save_dtype(trainer.options.precision)
        for averaged in (False, True) if trainer.average is not None else (False,):
            metadata = self.metadata.of_file(averaged=averaged)
            with trainer.evaluating(averaged=averaged), trainer.memory.gathered(dtype, keep=self.is_main):
                if not self.is_main:
                    continue
                saved = self.files.save_model(
                    average_name(stem) if averaged else stem,
                    partial(trainer.trainable.save, dtype=dtype, metadata=metadata),
                )
            if self.uploads is not None:
                self.uploads.send_model(saved)

    def _settle_uploads(self) -> None:
        if self.uploads is not None:
            self.uploads.settle()

    def _image_loss_states(self) -> list[dict[str, Any]]:
        """The tables of all processes; empty without. All have to ask."""
        table = self.trainer.image_losses
        return [] if table is None else self.trainer.processes.everybody(table.state())

    def _save_state(self, stem: str, image_losses: Sequence[Mapping[str, Any]]) -> Path:
        trainer = self.trainer
        folder = self.folder / state_name(stem)
        together = trainer.memory.learns_in_shards
        if not self.is_main and not together:
            return folder
        learned: Mapping[str, Tensor] = trainer.trainable.state_dict()
        averages: Mapping[str, Tensor] = {} if trainer.average is None else trainer.average.state_dict()
        optimizer, parts = trainer.optimizer.state_dict(), None
        if together:
            optimizer, tensors = split_optimizer(optimizer)
            files = {TENSORS_FILE: learned, OPTIMIZER_TENSORS: tensors, AVERAGES_FILE: averages}
            parts = write_parts(folder, {name: one for name, one in files.items() if one}, trainer.processes)
        if self.is_main:
            if folder.exists():
                self._settle_uploads()
            self.tracker.flush()
            scaler = trainer.accelerator.scaler
            save_state(
                folder,
                trainable=learned,
                averages=averages,
                optimizer=optimizer,
                scheduler=trainer.scheduler.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
                train_state={**trainer.train_state(), "recent_losses": self.tracker.losses()},
                image_losses=image_losses,
                parts=parts,
            )
            if self.uploads is not None:
                self.uploads.send_state(folder)
        if together:
            trainer.accelerator.wait_for_everyone()  # until the state is there
        return folder

    def _write_image_losses(self, states: Sequence[Mapping[str, Any]]) -> None:
        images = merged(state["images"] for state in states)
        if not self.is_main or not images:
            return
        path = self.folder / (self.prefix + IMAGE_LOSSES)
        write_table(images, path)
        logger.info("loss of each picture, over what is usual at the times it was seen: %s. The highest:", path)
        for name, image in worst(images, SHOWN_IMAGES):
            logger.info("  %5.2f  %s (seen %d times)", image.ratio, name, image.count)

    def _prune(self, *, step: int | None = None, epoch: int | None = None) -> None:
        if self.is_main:
            self._settle_uploads()
            for state in (False, True) if self.policy.save_state else (False,):
                self.files.prune(step=step, epoch=epoch, state=state)

    def _preview(self, *, epoch: int | None) -> None:
        trainer = self.trainer
        if not self.previews.due(trainer.state.step, epoch) and SAMPLE not in trainer.processes.agreed:
            return
        with trainer.looking():
            own = self.previews.write(trainer.bundle, trainer.trainable.denoiser, step=trainer.state.step, epoch=epoch)
        paths = {index: path for process in trainer.processes.everybody(own) for index, path in process.items()}
        self.tracker.show_pictures(trainer.state.step, {f"sample_{index}": paths[index] for index in sorted(paths)})

    def _validate(self, *, epoch: int | None) -> None:
        trainer = self.trainer
        unit = self.validation.due(trainer.state.step, epoch) if self.validation is not None else None
        if self.validation is None or unit is None:
            return
        with trainer.looking():
            found = self.validation.measure()
        lowest = trainer.best.take(found.mean, trainer.state.step)
        if self.is_main:
            self._tell_validation(found, unit, lowest)
        if lowest and trainer.options.validation.save_best:
            self._save(self.policy.best_name, with_state=False)

    def _tell_validation(self, found: ValidationLoss, unit: str, lowest: bool) -> None:
        trainer = self.trainer
        self.tracker.flush()
        training = self.tracker.average.mean
        self.tracker.add(trainer.state.step, trainer.state.epoch, found.logs(unit, training))
        logger.info(
            "validation after step %d: %.5f (training: %.5f), %s",
            trainer.state.step,
            found.mean,
            training,
            "the lowest so far" if lowest else f"lowest {trainer.best.loss:.5f} after step {trainer.best.step}",
        )
        if (picture := self._draw_curves()) is not None:
            self.tracker.show_pictures(trainer.state.step, {"validation": picture})

    def _draw_curves(self) -> Path | None:
        """The picture of the losses so far; None on other processes, and where it could not be written."""
        if not self.is_main:
            return None
        picture = self.folder / (self.prefix + PICTURE_FILE)
        try:
            draw_curves(self.folder / (self.prefix + METRICS_FILE), picture)
        except OSError as error:  # a run does not end for want of a picture
            logger.warning("%s cannot be written: %s", picture, error.strerror or error)
            return None
        return picture
