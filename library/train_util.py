"""The loop: one for every family, for adapters and for full fine-tuning.

`Trainer` composes what the model is (`ModelFamily`), what learns (`Trainable`) and what is predicted (`Objective`); it knows
none of them by name. Everything random in a step is keyed by (seed, number of the batch, stream), so a run continues exactly
from the small `TrainState` it saves.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor

from library.batch import TrainBatch
from library.caching import Share, cache_latents, cache_text_outputs, check_latents
from library.checkpoint import CheckpointPolicy, check_output, settle_leftovers
from library.compiling import ComputePlan
from library.dataset import TrainData, batches_per_rank, build_train_data, make_loader
from library.errors import Interrupted, UserError
from library.family_base import ModelBundle, ModelFamily
from library.folder_claim import claimed
from library.fused_update import check_update, make_update
from library.hub import HubUploads
from library.image_losses import ImageLosses, SeenImages
from library.losses import element_loss, image_means
from library.memory_policy import MemoryPlan
from library.noise import make_noise, perturb
from library.number_check import SCALED_PATIENCE, NotFinite, NumberCheck
from library.objectives import Noised
from library.optimizers import LearningRates, create_optimizer, describe_optimizer, group_rates
from library.processes import Processes
from library.resume import (
    check_resumable,
    find_state,
    place_schedule,
    restore_optimizer,
    restore_schedule,
    resumed_state,
    run_record,
    start_state,
    tell_changed_options,
)
from library.rng import StepRng
from library.run_plan import Mode, RunPlan, plan_of
from library.run_requests import STOP, RunRequests
from library.run_setup import RunLength, TrainState, make_accelerator, seed_default_generators, with_seed
from library.run_writer import RunWriter
from library.sampling import PreviewWriter
from library.saved_state import SavedState
from library.schedulers import create_scheduler
from library.sharded_weights import check_sharding, check_shared_passes
from library.stored_priors import store_priors, with_stored_noise
from library.strategy_base import Conditioning, Strategies
from library.tracking import check_trackers
from library.trainable import DENOISER, Trainable
from library.validation import BestLoss, check_validation
from library.weight_average import WeightAverage, check_average

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.option_groups import FullTrainOptions, NetworkTrainOptions, TrainOptions

logger = logging.getLogger(__name__)


class BatchLoss(NamedTuple):
    """What one micro-batch gives."""

    total: Tensor  # a scalar with gradient
    of_images: Tensor  # [B], without weights and gradient
    times: Tensor  # [B]


class Seen(NamedTuple):
    """What the model is shown of one micro-batch."""

    noised: Noised
    times: Tensor  # [B]
    conditioning: Conditioning


class Trainer:
    """One run. `fit` trains to the end; `loss` is one micro-batch."""

    def __init__(
        self,
        family: ModelFamily,
        trainable: Trainable,
        data: TrainData,
        strategies: Strategies,
        options: TrainOptions,
        accelerator: Accelerator,
        rates: LearningRates,
        previews: PreviewWriter,
    ) -> None:
        self.family = family
        self.trainable = trainable
        self.data = data
        self.strategies = strategies
        self.options = options
        self.accelerator = accelerator
        self.device = accelerator.device
        self.previews = previews
        self.processes = Processes(accelerator)
        self.requests = RunRequests(Path(options.output.output_dir or ".") if accelerator.is_main_process else None)
        self.bundle = trainable.bundle
        self.latent = family.latent(options)
        self.objective = family.objective(options)
        self.image_losses = ImageLosses(self.objective.latest_time) if options.logging.log_image_losses else None
        self.memory = trainable.memory
        self.asks_together = self.memory.shards is not None and data.preserves
        """Whether the frozen model is asked about every batch, as one process cannot ask it alone."""
        self.state = TrainState()
        self.run_id = secrets.token_hex(8)
        """The same in every state of a run, however often it is resumed."""
        self.resumed = False
        self.best = BestLoss()
        self.vae_is_sound = False
        """Whether what it encodes need not be looked at any more."""
        self.recent_losses: list[float] = []
        """Those `loss/average` goes on from, of the state that is resumed."""
        self.rng = StepRng(options.training.seed or 0)
        self.length = RunLength.of(options.training, batches_per_rank(data.train, accelerator.num_processes))
        self.record = run_record(options, self.length, accelerator.num_processes, data.train)

        groups = trainable.param_groups(rates)
        self.parameters = [parameter for group in groups for parameter in group.params]
        optimizer = create_optimizer(options.optimizer, groups)
        self.scheduler = create_scheduler(options.schedule, optimizer, self.length.total_updates)
        self.optimizer = accelerator.prepare(optimizer)
        self.numbers = NumberCheck(self.processes, 1 if accelerator.scaler is None else SCALED_PATIENCE)
        self.update_rule = make_update(options, self.optimizer, accelerator, self.processes, self.numbers)
        if trainable.on_gradients is not None:
            self.update_rule.watch(trainable.on_gradients)
        with self.memory.updating():
            self.average = WeightAverage(options.average, self.parameters) if options.average.ema else None

    # ---- one micro-batch -------------------------------------------------------------------------------------------

    def loss(self, batch: TrainBatch) -> Tensor:
        """The loss of one micro-batch on this device, a scalar with gradient."""
        return self.batch_loss(batch).total

    def batch_loss(self, batch: TrainBatch) -> BatchLoss:
        self.trainable.set_multiplier(batch.multiplier)
        noised, t, cond = self.seen(batch)
        pred = self.predict(noised, t, cond, batch)
        target = self.preserve_prior(noised, t, cond, batch)
        kind = self.options.loss.loss_type
        threshold = self.objective.huber_threshold(t) if kind in ("huber", "smooth_l1") else None
        error = element_loss(pred.float(), target.float(), kind, threshold)
        means = image_means(error, batch.mask, by_mask=self.options.loss.masked_loss_normalize)
        return BatchLoss((means * self.objective.weight(t) * batch.loss_weights).mean(), means.detach(), t)

    def seen(self, batch: TrainBatch) -> Seen:
        x0 = self.latent.normalize(self.latents(batch))
        cond = self.conditioning(batch)
        noised, t = self.corrupted(x0, self.rng, batch.quantile)
        if batch.prior_keys:
            noised, t = with_stored_noise((noised, t), x0, batch.prior_keys, self.corrupted)
        return Seen(noised, t, cond)

    def corrupted(self, x0: Tensor, rng: StepRng, quantile: float | None = None) -> tuple[Noised, Tensor]:
        """x0 [B, C, h, w] at times [B] that `rng` draws."""
        t = self.objective.sample_times(x0, rng("time", x0.device), quantile)
        noise = make_noise(x0, self.options.noise, rng)
        return self.objective.corrupt(x0, noise, t, perturb(noise, self.options.noise, rng)), t

    def predict(self, noised: Noised, t: Tensor, cond: Conditioning, batch: TrainBatch) -> Tensor:
        with self.accelerator.autocast(self.memory.autocast):
            return self.family.predict(self.trainable.denoiser, noised.x_t, t, cond, batch, self.options)

    def preserve_prior(self, noised: Noised, t: Tensor, cond: Conditioning, batch: TrainBatch) -> Tensor:
        """The target; for rows that ask for it, what the frozen model predicts, or predicted before training."""
        if batch.preserve is None and not self.asks_together:
            return noised.target
        if batch.prior is not None and batch.preserve is not None:
            return torch.where(batch.preserve.view(-1, 1, 1, 1), batch.prior.float(), noised.target)
        with torch.no_grad(), self.trainable.reference():
            prior = self.predict(noised, t, cond, batch)
        if batch.preserve is None:
            return noised.target
        return torch.where(batch.preserve.view(-1, 1, 1, 1), prior.float(), noised.target)

    def latents(self, batch: TrainBatch) -> Tensor:
        """Stored latents in float32, cached or encoded now: the same either way."""
        if batch.latents is not None:
            return batch.latents
        assert batch.images is not None
        vae = self.bundle.vae
        with torch.no_grad():
            latents = self.strategies.latents_caching.stored(vae, batch.images, batch.latent_seeds).float()
        if not self.vae_is_sound:
            check_latents(latents, vae, batch.names)
            # fp16 overflows with some pictures and not with others, and its loss scaling waits for the device in any case
            self.vae_is_sound = next(vae.parameters()).dtype != torch.float16
        return latents

    def conditioning(self, batch: TrainBatch) -> Conditioning:
        """Cached fields as they are; the others from their encoders, with gradient where an encoder learns."""
        cached = batch.conditioning
        live = self.strategies.text_caching.conditioning.sources() if cached is None else cached.missing()
        if not live:
            assert cached is not None
            return cached
        assert batch.tokens is not None
        learns = bool(live & self.trainable.parts)
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()), self.accelerator.autocast():
            encoders = {name: self.bundle.part(name) for name in sorted(live)}
            encoded = self.strategies.text_encoding.encode(encoders, batch.tokens, frozenset(live))
        return encoded if cached is None else cached.merged(encoded)

    # ---- one update ------------------------------------------------------------------------------------------------

    def update(self, group: Sequence[TrainBatch]) -> dict[str, Tensor]:
        """One step of the weights over the micro-batches of all processes, `group` here, each weighted by its share of the
        images."""
        images = sum(len(batch) for batch in group)
        total = torch.zeros((), device=self.device)
        shown: list[SeenImages] = []
        self.numbers.begin(self.state.step)
        weight = self.processes.share(images) if self.memory.learns_in_shards else None
        for offset, batch in enumerate(group):
            self.rng = self.rng.at((self.state.micro_step + offset) * self.processes.count + self.processes.rank)
            backward = partial(self._backward, batch, len(batch) / images, weight)
            if offset == len(group) - 1:
                self.update_rule.before_last_batch(self.state.step, images, backward)
            found = backward()
            shown.append(SeenImages(batch.names, found.of_images, found.times))
            total += found.total
        with self.memory.updating():
            left = self.memory.replicated(self.update_rule.after_backward(self.parameters))
            total = self.processes.average(left, total, images, self.requests.poll())
            stepped = self.update_rule.step(self.parameters, total)
            if stepped and self.average is not None:
                self.average.update(self.parameters, self.state.step + 1)
        if stepped:
            self.scheduler.step()
        if self.image_losses is not None:
            self.image_losses.push(shown)
        return {"loss": total, **self.update_rule.logs(), **self.trainable.after_step()}

    def _backward(self, batch: TrainBatch, share: float, weight: Tensor | None = None) -> BatchLoss:
        """Gradients of the micro-batch that `rng` stands at, and its loss, times its share. Asked again, the same again.
        weight: of this process's gradients, where they are summed over all of them on the way."""
        seed_default_generators(self.rng.seed_of("default"), self.device)
        found = self.batch_loss(batch.to(self.device))
        loss = found.total * share
        self.numbers.seen(batch.names, loss)
        self.update_rule.before_backward(loss)
        self.accelerator.backward(loss if weight is None else loss * weight)
        return found._replace(total=loss.detach())

    def groups(self) -> Iterator[list[TrainBatch]]:
        """The micro-batches of each update, from where the run stands to its end."""
        loader = iter(
            make_loader(
                self.data.train,
                epoch=self.state.epoch,
                start=self.state.position,
                epochs=self.length.num_epochs,
                rank=self.accelerator.process_index,
                world=self.accelerator.num_processes,
                options=self.options,
                pin=self.device.type == "cuda",
            )
        )
        while self.state.step < self.length.total_updates:
            left = self.length.batches_per_epoch - self.state.position
            yield [next(loader) for _ in range(min(self.length.accumulation, left))]

    # ---- the run ---------------------------------------------------------------------------------------------------

    def fit(self, writer: RunWriter) -> None:
        """Train from `state` to the end. Ctrl-C saves the state after the running step and raises `Interrupted`."""
        self.trainable.train()
        writer.start()
        with self.requests.heard():
            for group in self.groups():
                rates = group_rates(self.optimizer)
                self.trainable.before_step(self.state.step)
                try:
                    logs = self.update(group)
                except NotFinite as problem:
                    raise UserError(f"{problem} {writer.stopped(problem)}") from problem
                epoch_done = self.state.advance(len(group), self.length)
                writer.after_update(logs, rates, sum(map(len, group)), epoch_done=epoch_done)
                if STOP in self.processes.agreed:
                    raise Interrupted(writer.interrupted())
                if writer.learned_enough:
                    break
        writer.finish()

    @contextmanager
    def evaluating(self, *, averaged: bool = False) -> Iterator[None]:
        """The weights to save and preview with: see `UpdateRule.evaluating`. averaged: those of `--ema`."""
        with self.memory.updating(), ExitStack() as stack:
            stack.enter_context(self.update_rule.evaluating())
            if averaged:
                assert self.average is not None
                stack.enter_context(self.average.applied(self.parameters))
            back = stack.pop_all()
        try:
            yield
        finally:
            with self.memory.updating():
                back.close()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """What learns as it is validated and shown: in evaluation mode, averaged on request. Afterwards all is as before."""
        with self.evaluating(averaged=self.options.average.ema_evaluate):
            self.trainable.train(False)  # an adapter's dropout is not in the denoiser's modules
            try:
                yield
            finally:
                self.trainable.train()

    def train_state(self) -> dict[str, Any]:
        """What `restore` needs beside the tensors, and what has to be the same when it is used."""
        updates = None if self.average is None else self.average.updates
        return {**self.record, "run": self.run_id, **asdict(self.state), "best": asdict(self.best), "ema_updates": updates}

    def restore(self, saved: SavedState) -> None:
        """Continue from `saved`, which `check_resumable` has let pass. Raises `UserError` where its tensors do not fit."""
        self.trainable.load_state_dict(saved.trainable)
        with self.memory.updating():
            restore_optimizer(self.optimizer, saved, self.options)
        restore_schedule(self.scheduler, saved)
        if self.accelerator.scaler is not None and saved.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        self.state = resumed_state(saved.train_state, self.length, self.processes.count)
        self.run_id = saved.train_state.get("run", self.run_id)
        self.resumed = True
        self.best = BestLoss(**saved.train_state["best"])
        self.recent_losses = saved.train_state.get("recent_losses", [])
        if self.image_losses is not None and saved.image_losses:
            self.image_losses.restore(saved.image_losses, self.processes.rank, self.processes.count)
        if self.average is not None:
            self._restore_average(self.average, saved)

    def _restore_average(self, average: WeightAverage, saved: SavedState) -> None:
        if saved.averages:
            average.load_state_dict(saved.averages, saved.train_state["ema_updates"])
            return
        logger.warning("--ema: the state has no averages, so they begin with its weights")
        with self.memory.updating():
            self.average = WeightAverage(self.options.average, self.parameters)


# ---- wiring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed every check for which no weights are needed. Nothing of the model is loaded."""

    family: ModelFamily
    options: TrainOptions
    mode: Mode
    memory: MemoryPlan
    compute: ComputePlan
    saved: SavedState | None
    accelerator: Accelerator
    strategies: Strategies
    data: TrainData

    @property
    def plan(self) -> RunPlan:
        return plan_of(self.options, self.mode)

    @property
    def learning(self) -> frozenset[str]:
        """Parts of the model whose outputs change as training goes on."""
        return self.plan.learning_parts(self.family)

    @property
    def length(self) -> RunLength:
        return RunLength.of(self.options.training, batches_per_rank(self.data.train, self.accelerator.num_processes))

    def with_options(self, options: TrainOptions) -> PreparedRun:
        """The same with other options, of which none concerns the data."""
        device = self.accelerator.device
        plan_of(options, self.mode).quantizers(self.family, device)  # for its errors
        memory, compute = MemoryPlan.of(self.family, options, device), ComputePlan.of(self.family, options, device)
        return replace(self, options=options, memory=memory, compute=compute)

    def claimed(self) -> AbstractContextManager[bool]:
        """The output folder, for the time of the run: `folder_claim.claimed`. Files are the main process's work."""
        output = self.options.output
        name = CheckpointPolicy.of(output, self.options.state, self.length.num_epochs).last_name
        return claimed(Path(output.output_dir or "."), name) if self.accelerator.is_main_process else nullcontext(True)

    def load(self) -> ModelBundle:
        """The model that is trained on; its parts are read when they are first used."""
        plan, device = self.plan, self.accelerator.device
        learning = plan.learning_dtypes(self.family)
        quantizers = plan.quantizers(self.family, device)
        bundle = self.family.load(
            self.options, device=device, dtype=plan.frozen_dtype, learning=learning, quantizers=quantizers
        )
        plan.prepare(bundle, self.family)
        return bundle

    def previews(self) -> PreviewWriter:
        run, processes = (self.family, self.strategies, self.options), self.accelerator
        shared = {"rank": processes.process_index, "world": processes.num_processes, "together": self.memory.shards}
        autocast = partial(processes.autocast, AutocastKwargs(cache_enabled=not self.memory.shards))
        return PreviewWriter.of(*run, processes.device, **shared, autocast=autocast)

    def assemble(self, bundle: ModelBundle, previews: PreviewWriter) -> Trainer:
        """What learns, and the loop, on a model whose caches are filled."""
        plan, family, options = self.plan, self.family, self.options
        release_cached(self.data, bundle, self.learning)
        trainable = plan.build(family, bundle, options)
        self.compute.attach(bundle.denoiser)
        trainable.memory = self.memory.attach(family, bundle, trainable.parts | {DENOISER})
        return Trainer(family, trainable, self.data, self.strategies, options, self.accelerator, plan.rates, previews)


def prepare_run(family: ModelFamily, options: TrainOptions, mode: Mode) -> PreparedRun:
    """Check everything, then look at the data: errors come before anything slow."""
    plan_of(options, mode).check(family)
    describe_optimizer(options.optimizer)
    check_update(options)
    check_average(options)
    settle_leftovers(check_output(options.output.output_dir), options.output.output_name)
    check_trackers(options.logging)
    PreviewWriter.check(options.sampling)
    family.check(options)
    accelerator = make_accelerator(options)
    check_sharding(options, accelerator.num_processes)
    saved = find_state(options, accelerator.process_index, accelerator.num_processes)
    memory = MemoryPlan.of(family, options, accelerator.device)
    compute = ComputePlan.of(family, options, accelerator.device)
    plan_of(options, mode).quantizers(family, accelerator.device)  # for its errors
    options = with_seed(options, saved.train_state["seed"] if saved is not None and options.training.seed is None else None)
    strategies = family.strategies(options)
    data = build_train_data(options, family.latent(options), strategies, mode=mode)
    check_validation(options, data)
    check_shared_passes(options, data)
    prepared = PreparedRun(family, options, mode, memory, compute, saved, accelerator, strategies, data)
    if saved is not None:
        record = run_record(options, prepared.length, accelerator.num_processes, data.train)
        check_resumable(saved, record, prepared.length)
    else:
        start_state(options, prepared.length)  # for its errors
    return prepared


def prepare_fitted(family: ModelFamily, options: TrainOptions, mode: Mode) -> PreparedRun:
    """`prepare_run`, and with --auto_fit the options that fit the device: those that the run will have."""
    prepared = prepare_run(family, options, mode)
    if options.run.auto_fit:
        from library.auto_fit import fit_to_memory

        prepared = prepared.with_options(fit_to_memory(prepared))
    if prepared.saved is not None:
        tell_changed_options(prepared.saved, prepared.options)
    return prepared


def build_trainer(family: ModelFamily, options: TrainOptions, mode: Mode) -> Trainer:
    """Everything checked, then data, model, caches and what learns, in this order."""
    return finish_building(prepare_fitted(family, options, mode))


def finish_building(prepared: PreparedRun) -> Trainer:
    """Model, caches and what learns."""
    bundle = prepared.load()
    fill_caches(prepared.data, prepared.strategies, bundle, prepared.options, prepared.accelerator, prepared.learning)
    previews = prepared.previews()
    previews.encode_frozen(bundle, prepared.learning)
    trainer = prepared.assemble(bundle, previews)
    store_priors(trainer)
    if prepared.saved is not None:
        trainer.restore(prepared.saved)
    else:
        trainer.state = start_state(prepared.options, prepared.length)
        place_schedule(trainer.scheduler, trainer.state.step)
    return trainer


def fill_caches(
    data: TrainData,
    strategies: Strategies,
    bundle: ModelBundle,
    options: TrainOptions,
    accelerator: Accelerator,
    learning: frozenset[str],
) -> None:
    """Caches that were asked for, of the parts that do not learn. Where they are files, each process of a machine makes a share
    of them, and none reads what another writes."""
    frozen = strategies.text_caching.conditioning.sources() - learning
    if options.cache.text_outputs and not frozen:
        raise UserError("--cache_text_encoder_outputs: every text encoder learns, so there is nothing to keep. Remove it.")
    share = Share.of_process(accelerator)
    if options.cache.latents:
        cache_latents(data, strategies, bundle, options, accelerator.device, share)
    if options.cache.text_outputs:
        cache_text_outputs(data, strategies, bundle, options, accelerator.device, frozen, share)
    accelerator.wait_for_everyone()


def release_cached(data: TrainData, bundle: ModelBundle, learning: frozenset[str]) -> None:
    """Free the device of the frozen parts all of whose outputs are cached. What needs one later reads it again."""
    if all(dataset.latent_cache is not None for dataset in data.image_datasets):
        bundle.release("vae")
    if all(dataset.text_cache is not None for dataset in data.image_datasets):
        for name in set(bundle.text_encoder_names) - learning:
            bundle.release(name)


def run(family: ModelFamily, options: TrainOptions, mode: Mode) -> None:
    """One training run from its options to its last file; with --plan, what it would take; with --show_batches, its data."""
    prepared = prepare_fitted(family, options, mode)
    if options.run.plan:
        from library.plan_report import write_plan

        write_plan(prepared)
        return
    if options.batches_shown is not None:
        from library.batch_page import write_page

        write_page(prepared, options.batches_shown)
        return
    uploads = HubUploads.of(prepared.options.hub) if prepared.accelerator.is_main_process else None
    with prepared.claimed() as alone:
        trainer = finish_building(prepared)
        if not alone:
            trainer.requests.folder = None  # what is asked for there is for the other run
        trainer.fit(RunWriter(trainer, uploads, alone=alone))
    trainer.data.train.quarantine.report()


def train_network(family: ModelFamily, options: NetworkTrainOptions) -> None:
    """Train an adapter network on a frozen model."""
    run(family, options, "network")


def train_full(family: ModelFamily, options: FullTrainOptions) -> None:
    """Train the model itself."""
    run(family, options, "full")
