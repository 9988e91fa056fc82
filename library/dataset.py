"""The dataset: whole batches by (epoch, index), each a pure function of the seed, the epoch and the index.

Nothing is shared between processes: a data loader worker gets the dataset by pickling, and every random choice (order,
crop, mirroring, caption) is keyed, so batches are the same with any number of workers and after any resume.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from library.batch import TrainBatch
from library.cache_io import CachedLatents, LatentCache, LostEntry, TextCache, entry_key
from library.captions import CaptionMoment, final_caption, is_dropped
from library.compact import Chained
from library.config_util import Mode, check_preservation, load_data_config
from library.data_sources import DatasetRecords, check_not_empty, collect
from library.epoch_plan import EpochPlan, Part
from library.errors import UserError
from library.family_base import LatentSpec
from library.file_index import KnownFiles
from library.image_io import Crop, choose_crop, content_seed, listed
from library.masks import latent_mask
from library.picture_views import choose_view, load_view, view_beside
from library.prior_cache import PriorCache, StoredPrior
from library.quarantine import BadFile, Quarantine
from library.records import Record
from library.rng import keyed_random
from library.strategy_base import Conditioning, Strategies, TokenizeStrategy

if TYPE_CHECKING:
    from library.option_groups import TrainOptions
    from library.picture_views import Beside

logger = logging.getLogger(__name__)


def pixels_to_tensor(pixels: Any) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1], with sd-scripts' operations in their order, so bits agree."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    return (image.float() / 255 - 0.5) / 0.5


def load_fitted(record: Record, crop: Crop) -> tuple[np.ndarray, str]:
    """Pixels as they are trained, uint8 [bucket height, bucket width, 3], and the content hash of the file."""
    view = load_view(record, record.placement, crop)
    return view.pixels, view.digest


class Paired(NamedTuple):
    """What belongs to a picture, as its batch has it."""

    mask: Tensor | None = None  # [h, w] of the latents; None: the loss counts everywhere
    condition: Tensor | None = None  # [3, H, W]

    def mirrored(self) -> Paired:
        return Paired(*(None if tensor is None else tensor.flip(-1) for tensor in self))


@dataclass(frozen=True)
class Row:
    """One picture of a batch, as it is seen this time."""

    pixels: Tensor  # [3, H, W], or [C, h, w] when the latents are cached
    seed: int
    crop: Crop
    caption: str
    paired: Paired = Paired()
    text: Conditioning | None = None
    """What is cached of the caption, unbatched."""
    prior: StoredPrior | None = None
    chances: Mapping[str, float] = field(default_factory=dict)
    """See `ImageDataset.chances`."""


@dataclass(eq=False)
class ImageDataset(Dataset[TrainBatch]):
    """Map-style: `dataset[(epoch, index)]` is a whole batch. `num_batches` is the same in every epoch.

    `evaluating` (validation): no shuffling, augmentation or caption dropout. The caches are filled before the first batch is
    asked for, by `library.caching`.
    """

    parts: tuple[Part, ...]
    seed: int
    tokenizer: TokenizeStrategy
    evaluating: bool = False
    max_steps: int = 0
    max_epochs: int | None = None
    """The length of the run, in steps, or in epochs where that is set: what a share of it is for token warm-up."""
    batches_per_step: int = 1
    """Batches of all processes per optimizer step; `make_loader` knows it. Token warm-up counts in steps."""
    caption_variants: int = 0
    """Readings that there are of one picture's caption, again and again; 0: as many as it is seen. So they can be cached."""
    mask_stride: int = 8
    """Pixels of a mask for one of the latents."""
    chances: tuple[str, ...] = ()
    """What is drawn, evenly from [0, 1), each time a picture is trained: the family decides by it what it shows the model."""
    quarantine: Quarantine = field(default_factory=lambda: Quarantine(strict=True))
    latent_cache: LatentCache | None = None
    text_cache: TextCache | None = None
    priors: PriorCache | None = None
    """Where the model itself learns and pictures keep what it predicted untrained: those predictions."""
    _masks: dict[str, Paired] = field(default_factory=dict, init=False, repr=False)
    """Of pictures whose latents are kept in memory."""
    _unreadable: frozenset[str] | None = field(default=None, init=False, repr=False)
    """Pictures that could not be read when their latents were cached."""
    _planned: tuple[int, EpochPlan] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": None}  # a worker makes its own, which is cheaper than sending it

    @property
    def num_batches(self) -> int:
        return sum(part.num_batches() for part in self.parts)

    @property
    def num_images(self) -> int:
        """Images seen in one epoch, counting repeats."""
        return sum(len(items) for part in self.parts for items in part.buckets.values())

    @property
    def records(self) -> Sequence[Record]:
        return Chained(*(part.records for part in self.parts))

    def __len__(self) -> int:
        return self.num_batches

    # Order

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of an epoch. Pictures are shuffled within buckets, batches over everything."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, EpochPlan(self.parts, partial(self._order, epoch))
        return self._planned[1]

    def _order(self, epoch: int, count: int, *key: object) -> list[int]:
        order = list(range(count))
        if not self.evaluating:
            keyed_random(self.seed, epoch, *key).shuffle(order)
        return order

    def __getitem__(self, key: tuple[int, int]) -> TrainBatch:
        """The batch, without pictures that turn out to be unreadable; the next one, where none of its pictures is left."""
        epoch, index = key
        plan = self.plan(epoch)
        moment = self._moment(epoch, index)
        for offset in range(len(plan)):
            number, items = plan[(index + offset) % len(plan)]
            part = self.parts[number]
            shown = [(part.records[record], self._usable_row(part.records[record], repeat, moment)) for record, repeat in items]
            good = [(record, row) for record, row in shown if row is not None]
            if good:
                return self.collate([record for record, _ in good], [row for _, row in good], part.multiplier)
        bad = next(iter(self.quarantine.found.items()), None)
        raise UserError("no picture can be used any more" + (f"; the first: {bad[0]}: {bad[1]}." if bad else "."))

    def _usable_row(self, record: Record, repeat: int, moment: CaptionMoment) -> Row | None:
        try:
            return self._row(record, repeat, moment)
        except BadFile as bad:
            self.quarantine.add(bad)
            return None

    def _moment(self, epoch: int, index: int) -> CaptionMoment:
        steps_per_epoch = math.ceil(self.num_batches / self.batches_per_step)
        step = sys.maxsize if self.evaluating else epoch * steps_per_epoch + index // self.batches_per_step
        max_steps = self.max_steps if self.max_epochs is None else self.max_epochs * steps_per_epoch
        return CaptionMoment(self.seed, epoch, step, max_steps)

    # One picture

    def _row(self, record: Record, repeat: int, moment: CaptionMoment) -> Row:
        if self.priors is not None and record.subset.preserves:
            return self.prior_row(record, (moment.epoch * record.repeats + repeat) % self.num_predictions(record))
        return self._view(record, repeat, moment)

    def num_predictions(self, record: Record) -> int:
        """Of `record`, made before training: no more than it is seen times."""
        assert self.priors is not None
        seen = self.priors.choices if self.max_epochs is None else max(1, self.max_epochs * record.repeats)
        return min(self.priors.choices, seen)

    def prior_row(self, record: Record, number: int) -> Row:
        """The view that prediction `number` of `record` is of, with that prediction where it is made."""
        assert self.priors is not None
        epoch, repeat = divmod(number, record.repeats)
        row = self._view(record, repeat, CaptionMoment(self.seed, epoch, sys.maxsize, self.max_steps))
        with _still_there(record):
            return replace(row, prior=self.priors.get(record.key, number))

    def _view(self, record: Record, repeat: int, moment: CaptionMoment) -> Row:
        key = f"{record.key}#{repeat}"
        draw = keyed_random(self.seed, moment.epoch, "augment", key)
        flipped = record.subset.flip_aug and draw.random() < 0.5 and not self.evaluating
        if self.latent_cache is not None:
            entry = self._cached(self.latent_cache, record)
            recorded = entry.crop_ltrb
            crop = choose_crop(record.placement) if recorded is None else Crop.of_stored(recorded, record.placement.bucket)
            pixels, seed, paired = _choose(entry, flipped).float(), entry.seed, self._cached_pair(record)
        else:
            placement, crop = record.placement, choose_crop(record.placement)
            if not self.evaluating:
                placement, crop = choose_view(record, draw)
            view = load_view(record, placement, crop, draw if record.subset.color_aug and not self.evaluating else None)
            pixels = pixels_to_tensor(view.pixels[:, ::-1] if flipped else view.pixels)
            seed, paired = content_seed(view.digest), self._pair(view.beside)
        dropped = not self.evaluating and is_dropped(record.subset.captions, moment, key)
        caption = "" if dropped else self._reading(record, repeat, moment)
        if flipped:
            crop, paired = crop.mirrored(), paired.mirrored()
        with _still_there(record):
            text = None if self.text_cache is None else self.text_cache.get(caption)
        drawn = () if self.evaluating else self.chances
        chances = {name: keyed_random(self.seed, moment.epoch, "chance", name, key).random() for name in drawn}
        return Row(pixels, seed, crop, caption, paired, text, chances=chances)

    def _cached(self, cache: LatentCache, record: Record) -> CachedLatents:
        if self._unreadable is None:
            self._unreadable = self.quarantine.known()  # complete, and not only what this process has met
        if str(record.path) in self._unreadable:  # there may be an entry, of what the file once was
            raise BadFile(record.path, "it could not be read when latents were cached")
        with _still_there(record):
            return cache.get(entry_key(record.path, record.recipe))

    def _pair(self, beside: Beside) -> Paired:
        mask = None if beside.mask is None else latent_mask(beside.mask, self.mask_stride)
        return Paired(mask, None if beside.condition is None else pixels_to_tensor(beside.condition))

    def _cached_pair(self, record: Record) -> Paired:
        """What belongs to a picture whose latents are cached. A mask is kept in memory where they are."""
        if record.paired is None and not record.subset.alpha_mask:
            return Paired()
        if self.latent_cache is None or not self.latent_cache.in_memory or record.subset.conditioned:
            return self._pair(view_beside(record))
        if record.key not in self._masks:
            self._masks[record.key] = self._pair(view_beside(record))
        return self._masks[record.key]

    def _reading(self, record: Record, repeat: int, moment: CaptionMoment) -> str:
        """The caption where it is not dropped. Of a few variants it is that of as many readings before."""
        if self.caption_variants:
            epoch, repeat = divmod((moment.epoch * record.repeats + repeat) % self.caption_variants, record.repeats)
            moment = replace(moment, epoch=epoch)
        return final_caption(record.caption, record.subset.captions, moment, f"{record.key}#{repeat}", drop=False)

    def readings(self, record: Record) -> list[str]:
        """Every caption that `record` can have, apart from the empty one; of one that varies, `caption_variants`."""
        count = 1 if record.subset.captions.is_static else max(1, self.caption_variants)
        if self.max_epochs is not None:
            count = min(count, max(1, self.max_epochs * record.repeats))
        moments = [(CaptionMoment(self.seed, number // record.repeats), number % record.repeats) for number in range(count)]
        return list(dict.fromkeys(self._reading(record, repeat, moment) for moment, repeat in moments))

    def collate(self, records: Sequence[Record], rows: Sequence[Row], multiplier: float) -> TrainBatch:
        """The batch of `rows`, which show `records`."""
        stacked = torch.stack([row.pixels for row in rows])
        captions = tuple(row.caption for row in rows)
        cached = None
        if self.text_cache is not None:
            cached = self.text_cache.conditioning.collate([row.text or self.text_cache.get(row.caption) for row in rows])
        needs_tokens = self.text_cache is None or not self.text_cache.complete
        tokens = self.tokenizer.tokenize(captions) if needs_tokens else None
        lengths = self.tokenizer.lengths(captions)
        if lengths is not None:
            cached = None if cached is None else cached.fitted(lengths)
            tokens = None if tokens is None else self.tokenizer.fitted(tokens, lengths)
        preserve = [record.subset.preserves for record in records]
        whole = torch.ones([side // self.mask_stride for side in records[0].placement.bucket[::-1]])
        masks = [whole if row.paired.mask is None else row.paired.mask for row in rows]
        masked = any(row.paired.mask is not None for row in rows)
        conditions = [row.paired.condition for row in rows if row.paired.condition is not None]
        return TrainBatch(
            captions=captions,
            names=tuple(str(record.path) for record in records),
            images=stacked if self.latent_cache is None else None,
            latents=stacked if self.latent_cache is not None else None,
            tokens=None if tokens is None else dict(tokens),
            conditioning=cached,
            loss_weights=torch.tensor([record.loss_weight for record in records], dtype=torch.float32),
            mask=torch.stack(masks)[:, None] if masked else None,
            conditioning_images=torch.stack(conditions) if conditions else None,
            original_sizes=torch.tensor([record.size[::-1] for record in records]),
            crop_top_lefts=torch.tensor([(row.crop.top, row.crop.left) for row in rows]),
            target_sizes=torch.tensor([record.placement.bucket[::-1] for record in records]),
            preserve=torch.tensor(preserve) if any(preserve) else None,
            prior=_stacked_priors(rows),
            prior_keys=tuple(row.prior and row.prior.key for row in rows) if any(row.prior for row in rows) else (),
            latent_seeds=tuple(row.seed for row in rows),
            chances={name: torch.tensor([row.chances[name] for row in rows]) for name in rows[0].chances},
            multiplier=multiplier,
        )


def _stacked_priors(rows: Sequence[Row]) -> Tensor | None:
    """[B, C, h, w] with zeros for rows that have none; None where none has."""
    found = [None if row.prior is None else row.prior.prediction for row in rows]
    known = next((prediction for prediction in found if prediction is not None), None)
    if known is None:
        return None
    return torch.stack([torch.zeros_like(known) if prediction is None else prediction for prediction in found])


@contextmanager
def _still_there(record: Record) -> Iterator[None]:
    """Around reading what was cached when training began: where it is lost, `record` is left out, and the run goes on."""
    try:
        yield
    except LostEntry as error:
        raise BadFile(record.path, str(error)) from error


def _choose(entry: CachedLatents, flipped: bool) -> Tensor:
    if not flipped:
        return entry.latents
    assert entry.flipped is not None, "latents of the mirror image were not cached"
    return entry.flipped


# Loading


class EpochKeys(Sampler[tuple[int, int]]):
    """One process's keys: batches rank, rank + world, ... of each epoch in [epoch, epochs), the first from number `start` on.

    Where the batches do not divide evenly, the first ones of the epoch fill up the end, so that every process has as many.
    """

    def __init__(self, num_batches: int, *, epoch: int, epochs: int, start: int, rank: int, world: int) -> None:
        self.num_batches = num_batches
        self.epoch, self.epochs, self.start = epoch, epochs, start
        self.rank, self.world = rank, world

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.num_batches / self.world)

    def __len__(self) -> int:
        return max(0, (self.epochs - self.epoch) * self.per_epoch - self.start)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for epoch in range(self.epoch, self.epochs):
            for number in range(self.start if epoch == self.epoch else 0, self.per_epoch):
                yield epoch, (number * self.world + self.rank) % self.num_batches


class _Guarded(Dataset[Any]):
    """Gives a `UserError` back instead of raising it: a worker process would wrap it in a traceback."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> TrainBatch | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


class BatchLoader(DataLoader[Any]):
    """A data loader of `TrainBatch`es that raises the `UserError` a worker met."""

    def __iter__(self) -> Iterator[TrainBatch]:  # type: ignore[override]
        for item in super().__iter__():
            if isinstance(item, UserError):
                raise item
            yield item


def _prepare_worker(_: int) -> None:
    """OpenCV's threads would fight over the cores that workers have; Ctrl-C is for the main process, which ends its workers."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches_per_rank(dataset: ImageDataset, world: int) -> int:
    """Batches of one process in an epoch."""
    return math.ceil(dataset.num_batches / world)


def make_loader(
    dataset: ImageDataset,
    *,
    epoch: int,
    start: int,
    rank: int,
    world: int,
    options: TrainOptions,
    pin: bool,
    epochs: int | None = None,
) -> BatchLoader:
    """This process's batches from its own batch `start` of `epoch` to the end of epoch `epochs` - 1 (of `epoch` when None).

    Latents in memory leave nothing for workers to do that is worth sending batches between processes, so none are started,
    unless pictures are read beside them.
    """
    dataset.batches_per_step = options.training.gradient_accumulation_steps * world
    keys = EpochKeys(
        dataset.num_batches, epoch=epoch, epochs=epochs or epoch + 1, start=start, rank=rank, world=world
    )  # fmt: skip
    in_memory = dataset.latent_cache is not None and dataset.latent_cache.in_memory
    conditioned = any(subset.conditioned for part in dataset.parts for subset in part.records.subsets)
    workers = 0 if in_memory and not conditioned else min(options.training.max_data_loader_n_workers, os.cpu_count() or 1)
    return BatchLoader(
        _Guarded(dataset),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_prepare_worker,
        pin_memory=pin,
    )


# Building


@dataclass
class TrainData:
    """The data of a run: every [[datasets]] together, for training and for validation."""

    train: ImageDataset
    validation: ImageDataset | None
    datasets: tuple[DatasetRecords, ...]
    latent: LatentSpec
    options: TrainOptions
    files: KnownFiles
    """What is known of the pictures."""
    from_file: bool
    """Whether the datasets came from a configuration file, which changes the form of the metadata."""

    @property
    def image_datasets(self) -> list[ImageDataset]:
        return [self.train] + ([self.validation] if self.validation else [])

    @property
    def records(self) -> Sequence[Record]:
        """Those of `image_datasets`."""
        return Chained(*(dataset.records for dataset in self.image_datasets))

    @property
    def preserves(self) -> bool:
        """Whether there are pictures whose target is the frozen model's own prediction."""
        parts = (part for dataset in self.image_datasets for part in dataset.parts)
        return any(subset.preserves for part in parts for subset in part.records.used_subsets())

    def metadata(self, world: int = 1) -> dict[str, str]:
        """The `ss_` keys about data, in sd-scripts' form. world: number of processes, for the totals."""
        from library.data_metadata import data_metadata

        return data_metadata(self, world)

    def summary(self) -> str:
        """What was found, for people: pictures, repeats, buckets."""
        from library.data_metadata import data_summary

        return data_summary(self)


def dataset_class(path: str | None) -> type[ImageDataset]:
    """The class of a dotted path, or ours. Raises `UserError` where it is not one that can stand in for ours."""
    if path is None:
        return ImageDataset
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"--dataset_class {path}: {error}. Expected package.module.ClassName, importable from here.") from error
    if not (isinstance(found, type) and issubclass(found, ImageDataset)):
        raise UserError(
            f"--dataset_class {path}: is not a class derived from library.dataset.ImageDataset. sd-scripts' dataset classes "
            "make batches of another form: derive from ours, and change what has to be different."
        )
    return found


def build_train_data(
    options: TrainOptions, latent: LatentSpec, strategies: Strategies, *, mode: Mode, conditioned: bool = False
) -> TrainData:
    """Read the dataset configuration and look at every picture's header. Raises `UserError`; loads no model.

    `options.training.seed` has to be set (`with_seed`); None counts as 0. conditioned: batches carry the pictures that a
    ControlNet is given (`TrainBatch.conditioning_images`).
    """
    kind = dataset_class(options.data.dataset_class)
    config = load_data_config(options, latent.bucket_step, conditioned=conditioned)
    preserved = check_preservation(config, mode)
    seed = options.training.seed or 0
    quarantine = Quarantine(Path(options.output.output_dir) if options.output.output_dir else None, options.data.strict_data)
    files, prior = KnownFiles.of_user(options.cache.cache_dir), options.loss.prior_loss_weight
    datasets = collect(config, prior_loss_weight=prior, seed=seed, quarantine=quarantine, files=files)
    check_not_empty(datasets)
    quarantine.begin()
    _check_cacheable(datasets, options)
    _check_masks(datasets, options)
    train = [Part.of(d.train, d.config.batch_size, d.config.network_multiplier) for d in datasets if d.train]
    held_out = [Part.of(d.validation, d.config.batch_size, d.config.network_multiplier) for d in datasets if d.validation]
    training = options.training
    dataset = kind(
        tuple(train),
        seed,
        strategies.tokenize,
        max_steps=training.max_train_steps,
        max_epochs=training.max_train_epochs,
        batches_per_step=training.gradient_accumulation_steps,
        caption_variants=options.cache.caption_variants if options.cache.text_outputs else 0,
        mask_stride=latent.stride,
        chances=options.family.chances,
        quarantine=quarantine,
    )
    if preserved and mode == "full":
        dataset.priors = PriorCache(seed, options.loss.prior_choices)
    validation = replace(dataset, parts=tuple(held_out), evaluating=True, caption_variants=0) if held_out else None
    if validation is not None and options.cache.text_outputs:
        validation.caption_variants = 1
    data = TrainData(dataset, validation, datasets, latent, options, files, config.source is not None)
    logger.info("%s", data.summary())
    return data


def _check_masks(datasets: Sequence[DatasetRecords], options: TrainOptions) -> None:
    """Raise `UserError` for masks that would not be used; warn where there is none to use."""
    subsets = [count.config for dataset in datasets for count in dataset.counts]
    unasked = [subset.name for subset in subsets if subset.conditioning_data_dir is not None and not subset.conditioned]
    if unasked and not options.loss.masked_loss:
        raise UserError(
            f"conditioning_data_dir ({', '.join(unasked)}) names masks, which --masked_loss uses. Add it, or remove the folder."
        )
    if options.loss.masked_loss and not unasked and not any(subset.alpha_mask for subset in subsets):
        logger.warning("--masked_loss has no effect: no subset has a conditioning_data_dir or alpha_mask.")


def _check_cacheable(datasets: Sequence[DatasetRecords], options: TrainOptions) -> None:
    """Raise `UserError` for subsets whose pictures or captions change between epochs while they are to be cached."""
    subsets = [count.config for dataset in datasets for count in dataset.counts]
    wrong = []
    if options.cache.latents:
        wrong += [
            f"{subset.name}: color_aug, random_crop and face_crop_aug_range change the pictures, which --cache_latents keeps. "
            "Turn them or it off."
            for subset in subsets
            if subset.varies_pictures
        ]
    if options.cache.text_outputs:
        wrong += [
            f"{subset.name}: token_warmup_step changes the captions from step to step, so --cache_text_encoder_outputs "
            "cannot keep their encoding. Turn one off."
            for subset in subsets
            if subset.captions.token_warmup_step
        ]
    if wrong:
        raise UserError(listed(wrong, "subsets that cannot be cached"))
