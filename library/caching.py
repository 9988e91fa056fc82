"""Filling the caches: every picture through the VAE once, every caption through the text encoders once.

What is already on disk and still true is used; what is not is made again, and the log says why. The VAE and the encoders
are touched (and so read from disk) only when something has to be made. A picture that lies in several folders is encoded once.
Several processes that keep their caches in files make a share each.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.cache_io import (
    CacheDiskFull,
    CachedLatents,
    Fingerprint,
    LatentCache,
    LatentFile,
    LatentFiles,
    Stamp,
    TextCache,
    TextFile,
    TextFiles,
    Verdict,
    cache_path,
    entry_key,
    own_path,
    short_hash,
)
from library.cache_upkeep import prune_readings, remove_leftovers
from library.dataset import TrainData, load_fitted, pixels_to_tensor
from library.errors import UserError
from library.family_base import LatentSpec, ModelBundle
from library.file_index import in_turn
from library.image_io import choose_crop, content_seed, listed
from library.quarantine import BadFile
from library.records import Record
from library.strategy_base import Conditioning, Strategies

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.option_groups import TrainOptions

logger = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS = 4  # decode pictures, beside the encoding
_AHEAD = 2  # batches that are decoded while one is encoded

# What both caches share


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does. All have to be done before any reads what another has made."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_process(cls, accelerator: Accelerator) -> Share:
        """Among the processes of this machine: another machine may have another disk."""
        world = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        return cls(accelerator.local_process_index, world)

    def of(self, items: Sequence[T], file_of: Mapping[T, Path]) -> list[T]:
        """Every `world`-th file's items, in their order: no file is written by two processes."""
        numbers = {path: number for number, path in enumerate(dict.fromkeys(file_of[item] for item in items))}
        return [item for item in items if numbers[file_of[item]] % self.world == self.rank]

    @property
    def note(self) -> str:
        """For the log: what a count is of."""
        return f" (share {self.rank + 1} of {self.world})" if self.world > 1 else ""


def _is_main() -> bool:
    """Whether this process shows progress."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _report(verdicts: Mapping[Path, Verdict], what: str) -> None:
    """One line for each reason why entries are made again, and one for entries that sd-scripts wrote."""
    reasons: dict[str, list[Path]] = defaultdict(list)
    for path, verdict in verdicts.items():
        if verdict.stale:
            reasons[verdict.stale].append(path)
    for reason, paths in reasons.items():
        logger.warning("%d cached %s are made again, because of %s: %s", len(paths), what, reason, _first(paths))
    foreign = [path for path, verdict in verdicts.items() if verdict.foreign]
    if foreign:
        logger.warning(
            "%d cached %s have no fingerprint (made by sd-scripts): used, as their shapes fit, but whether image, caption and "
            "model are still the same is not known. Remove the files to have them made again: %s",
            len(foreign),
            what,
            _first(foreign),
        )


def _first(paths: Sequence[Path]) -> str:
    return str(paths[0]) + (", ..." if len(paths) > 1 else "")


class CacheFile(Protocol):
    """Where an entry is kept."""

    @property
    def path(self) -> Path: ...

    def check(self, fingerprint: Fingerprint) -> Verdict: ...


def needs_making(
    files: Mapping[str, CacheFile],
    fingerprints: Mapping[str, Fingerprint],
    options: TrainOptions,
    what: str,
) -> list[str]:
    """Keys of the entries that are not on disk as they should be."""
    if options.cache.skip_cache_check:
        return [key for key, file in files.items() if not file.path.exists()]
    keys = list(files)
    verdicts = in_turn(lambda key: files[key].check(fingerprints[key]), keys)
    _report({files[key].path: verdict for key, verdict in zip(keys, verdicts, strict=True)}, what)
    return [key for key, verdict in zip(keys, verdicts, strict=True) if not verdict.usable]


class _Room(Generic[T]):
    """Entries for which there is no room on the disk: this process keeps them in memory, and the run goes on.

    Not where another process would read them, and not with --strict_data.
    """

    def __init__(self, share: Share, options: TrainOptions) -> None:
        self.required = share.world > 1 or options.data.strict_data
        self.unwritten: dict[str, T] = {}
        self.reason = ""

    @contextmanager
    def wanted_for(self, key: str, entry: T) -> Iterator[None]:
        try:
            yield
        except CacheDiskFull as error:
            if self.required:
                raise
            self.unwritten[key], self.reason = entry, self.reason or str(error)

    def report(self, what: str) -> None:
        if self.unwritten:
            logger.warning(
                "%d cached %s are kept in memory for this run, and have to be made again by the next: %s",
                len(self.unwritten),
                what,
                self.reason,
            )


# Latents


@dataclass(frozen=True)
class LatentJob:
    """One picture in one bucket, however many subsets use it."""

    key: str
    record: Record
    flipped: bool
    """Whether the latents of the mirror image are needed too."""


def latent_jobs(records: Sequence[Record]) -> list[LatentJob]:
    """One job for each picture and recipe, in the order of the records."""
    jobs: dict[str, LatentJob] = {}
    for record in records:
        key = entry_key(record.path, record.recipe)
        flipped = record.subset.flip_aug or (key in jobs and jobs[key].flipped)
        jobs[key] = LatentJob(key, jobs[key].record if key in jobs else record, flipped)
    return list(jobs.values())


def latent_files(
    jobs: Sequence[LatentJob], strategies: Strategies, latent: LatentSpec, options: TrainOptions
) -> dict[str, LatentFile]:
    """The file of each job. A second resolution of a picture gets its own file, or its own keys where the family has them."""
    strategy = strategies.latents_caching
    files: dict[str, LatentFile] = {}
    taken: dict[tuple[Path, str], str] = {}
    for job in jobs:
        width, height = (side // latent.stride for side in job.record.placement.bucket)
        suffix = strategy.format.key_suffix(height, width)
        path = cache_path(strategy.format.path_for(job.record.path, job.record.size), options.cache.cache_dir)
        if taken.setdefault((path, suffix), job.key) != job.key:
            path = own_path(path, job.record.recipe)
        shape = latent.channels, height, width
        file = LatentFile(path, suffix, shape, job.record.size, job.flipped, strategy.format)
        files[job.key] = _nameless(file, job.record.path) if strategy.format.nameless else file
    return files


def _nameless(file: LatentFile, image: Path) -> LatentFile:
    """sd-scripts' old file `{stem}.npz` instead, where it has this entry and `file` is not there."""
    old = replace(file, path=image.with_suffix(".npz"))
    return old if not file.path.exists() and old.fits() else file


def latent_fingerprints(
    jobs: Sequence[LatentJob], strategies: Strategies, bundle: ModelBundle, options: TrainOptions
) -> dict[str, Fingerprint]:
    precision = torch.float32 if options.precision.no_half_vae else bundle.dtype
    shared = {
        "vae": bundle.identity["vae"],
        "precision": str(precision),
        "strategy": strategies.latents_caching.fingerprint(),
    }
    stamps = {job.record.path: Stamp(job.record.path) for job in jobs}
    return {job.key: Fingerprint({**shared, "recipe": job.record.recipe}, stamps[job.record.path]) for job in jobs}


Loaded = tuple[Tensor, Stamp]
"""([3, H, W] as it is trained, the file it was read from)."""


def _load_pixels(job: LatentJob) -> Loaded | UserError:
    """The picture, or why it cannot be read: by then others may have been encoded for hours, which must not be lost."""
    path = job.record.path
    try:
        stamp = Stamp.before_reading(path)
        pixels, digest = load_fitted(job.record, choose_crop(job.record.placement))
    except UserError as error:
        return error
    except OSError as error:
        return BadFile(path, f"not a readable image: {error.strerror or error}")
    return pixels_to_tensor(pixels), replace(stamp, known=digest)


def _same_pictures(jobs: Sequence[LatentJob]) -> list[list[tuple[LatentJob, Stamp]]]:
    """Jobs in groups that one encoding serves: equal files, equal recipes. Only files of equal length are read to compare."""
    groups: dict[tuple[object, ...], list[tuple[LatentJob, Stamp]]] = defaultdict(list)
    for job in jobs:
        try:
            stamp = Stamp.before_reading(job.record.path)
        except OSError:  # decoding it will say so
            stamp = Stamp(job.record.path, seen=(-1, hash(job.key)))
        groups[stamp.stat[0], job.record.recipe, job.flipped].append((job, stamp))
    found: list[list[tuple[LatentJob, Stamp]]] = []
    for (length, *_), group in groups.items():
        if len(group) == 1 or length == -1:
            found += [[member] for member in group]
            continue
        equal: dict[str, list[tuple[LatentJob, Stamp]]] = defaultdict(list)
        for job, stamp in group:
            try:
                equal[stamp.digest].append((job, stamp))
            except UserError:  # decoding it will say so
                found.append([(job, stamp)])
        found += equal.values()
    return found


def _batches(jobs: Sequence[LatentJob], size: int) -> Iterator[list[LatentJob]]:
    """Batches of one bucket and one need for mirror images."""
    groups: dict[tuple[tuple[int, int], bool], list[LatentJob]] = defaultdict(list)
    for job in jobs:
        groups[job.record.placement.bucket, job.flipped].append(job)
    for _, group in sorted(groups.items()):
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _decoded(batches: Iterator[list[LatentJob]]) -> Iterator[tuple[list[LatentJob], list[Loaded | UserError]]]:
    """Batches with their pixels; the next ones are decoded while the caller works on one."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[list[LatentJob], list[Future[Loaded | UserError]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(_load_pixels, job) for job in batch]))
                if len(waiting) > _AHEAD:
                    ready, futures = waiting.popleft()
                    yield ready, [future.result() for future in futures]
            while waiting:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def check_latents(latents: Tensor, vae: nn.Module, files: Sequence[str]) -> None:
    """Raise `UserError` for pictures whose latents [B, C, h, w] are not finite. Waits for the device."""
    finite = latents.flatten(1).isfinite().all(1)
    if finite.all():
        return
    names = [name for name, is_finite in zip(files, finite.tolist(), strict=True) if not is_finite]
    half = next(vae.parameters()).dtype.itemsize < 4
    advice = "Use --no_half_vae (the VAE overflows in half precision), or" if half else "The VAE is damaged. Give"
    raise UserError(
        listed([f"the VAE gives NaN or infinite latents for {name}" for name in names], "images with NaN latents")
        + f"\n{advice} another --vae."
    )


def _encode_batch(
    jobs: Sequence[LatentJob], loaded: Sequence[Loaded], strategies: Strategies, bundle: ModelBundle, device: torch.device
) -> list[CachedLatents]:
    images = torch.stack([pixels for pixels, _ in loaded]).to(device)
    seeds = [content_seed(stamp.digest) for _, stamp in loaded]
    stored = strategies.latents_caching.stored
    files = [str(job.record.path) for job in jobs]
    latents = stored(bundle.vae, images, seeds).cpu()
    check_latents(latents, bundle.vae, files)
    flipped = stored(bundle.vae, images.flip(-1), seeds).cpu() if jobs[0].flipped else None
    if flipped is not None:
        check_latents(flipped, bundle.vae, files)
    mirrored = [None] * len(jobs) if flipped is None else [row.clone() for row in flipped]
    return [CachedLatents(row.clone(), other, seed) for row, other, seed in zip(latents, mirrored, seeds, strict=True)]


def _encode(
    jobs: Sequence[LatentJob],
    data: TrainData,
    strategies: Strategies,
    bundle: ModelBundle,
    options: TrainOptions,
    device: torch.device,
) -> Iterator[tuple[LatentJob, CachedLatents, Stamp]]:
    """Entries of `jobs` with the files they are of, in batches of --vae_batch_size.

    Pictures that cannot be read go to quarantine; strict, they are told when all others are done, in one `UserError`. What
    the others contain is noted in the index of files.
    """
    quarantine = data.train.quarantine
    groups = {group[0][0].key: group for group in _same_pictures(jobs)}
    bar = tqdm(total=len(jobs), desc="caching latents", unit="image", disable=not _is_main())
    unreadable: list[str] = []
    with bar, torch.no_grad():
        for batch, loaded in _decoded(_batches([group[0][0] for group in groups.values()], options.memory.vae_batch_size)):
            for job, found in zip(batch, loaded, strict=True):
                if isinstance(found, BadFile) and not quarantine.strict:
                    for alike, _ in groups[job.key]:
                        quarantine.add(BadFile(alike.record.path, found.reason))
                elif isinstance(found, UserError):
                    unreadable.append(str(found))
            good = [(job, found) for job, found in zip(batch, loaded, strict=True) if not isinstance(found, UserError)]
            if not good:
                continue
            entries = _encode_batch([job for job, _ in good], [found for _, found in good], strategies, bundle, device)
            for (job, (_, stamp)), entry in zip(good, entries, strict=True):
                for alike, own in [(job, stamp), *groups[job.key][1:]]:
                    data.files.note_digest(alike.record.path, own.digest, *own.stat)
                    yield alike, entry, own
                bar.update(len(groups[job.key]))
    data.files.save()
    if unreadable:
        kept = " All others are in the cache." if options.cache.cache_latents_to_disk else ""
        raise UserError(listed(unreadable, "unreadable images") + kept)


def cache_latents(
    data: TrainData,
    strategies: Strategies,
    bundle: ModelBundle,
    options: TrainOptions,
    device: torch.device,
    share: Share = Share(),
) -> None:
    """Encode every picture of `data`, to memory or (--cache_latents_to_disk) to files, and serve it from there.

    Does nothing when neither is asked for. share: of the files only; what is kept in memory every process makes for itself.
    """
    if not options.cache.latents:
        return
    jobs = latent_jobs(data.records)
    if not options.cache.cache_latents_to_disk:
        entries = _encode(jobs, data, strategies, bundle, options, device)
        cache = LatentCache(memory={job.key: entry for job, entry, _ in entries})
    else:
        files = latent_files(jobs, strategies, data.latent, options)
        unwritten = _fill_latent_files(jobs, files, data, strategies, bundle, options, device, share)
        cache = LatentCache(unwritten, LatentFiles.of(files, strategies.latents_caching.format))
    for dataset in data.image_datasets:
        dataset.latent_cache = cache


def _fill_latent_files(
    jobs: Sequence[LatentJob],
    files: Mapping[str, LatentFile],
    data: TrainData,
    strategies: Strategies,
    bundle: ModelBundle,
    options: TrainOptions,
    device: torch.device,
    share: Share,
) -> dict[str, CachedLatents]:
    """Make what is missing; gives the entries for which there was no room."""
    if share.rank == 0:
        remove_leftovers({file.path.parent for file in files.values()})
    of_share = set(share.of(list(files), {key: file.path for key, file in files.items()}))
    own = [job for job in jobs if job.key in of_share]
    fingerprints = latent_fingerprints(own, strategies, bundle, options)
    missing = set(needs_making({job.key: files[job.key] for job in own}, fingerprints, options, "latents"))
    todo = [job for job in own if job.key in missing]
    room = _Room[CachedLatents](share, options)
    for job, entry, stamp in _encode(todo, data, strategies, bundle, options, device) if todo else ():
        crop = choose_crop(job.record.placement).stored_ltrb(job.record.placement.bucket)
        with room.wanted_for(job.key, entry):
            files[job.key].save(entry.latents, entry.flipped, crop, replace(fingerprints[job.key], image=stamp))
    logger.info("latents: %d made, %d found on disk%s", len(todo), len(own) - len(todo), share.note)
    room.report("latents")
    return room.unwritten


# Text encoder outputs


def distinct_captions(data: TrainData) -> dict[str, Record | None]:
    """Every caption that can be trained, with the first picture that has it; the empty one (dropped) is always there."""
    captions: dict[str, Record | None] = {}
    for dataset in data.image_datasets:
        for record in dataset.records:
            for caption in dataset.readings(record):
                captions.setdefault(caption, record)
    captions.setdefault("", None)
    return captions


def text_files(
    captions: Mapping[str, Record | None], strategies: Strategies, sources: frozenset[str], options: TrainOptions
) -> dict[str, TextFile]:
    """The file of each caption: that of its first picture; the empty caption's lies beside the first picture of all.

    One of several readings of a caption has its text's hash in its name, so that another run finds those it shares.
    """
    first = next(record for record in captions.values() if record is not None)
    taken: set[Path] = set()
    files = {}
    for caption, record in captions.items():
        wanted = cache_path(strategies.text_caching.format.path_for((record or first).path), options.cache.cache_dir)
        plain = record is not None and record.subset.captions.is_static and wanted not in taken
        path = wanted if plain else own_path(wanted, caption)
        taken.add(path)
        files[caption] = TextFile(path, strategies.text_caching, sources, compact=not plain or bool(options.cache.cache_dir))
    return files


def text_fingerprints(
    captions: Mapping[str, Record | None],
    strategies: Strategies,
    sources: frozenset[str],
    bundle: ModelBundle,
    options: TrainOptions,
) -> dict[str, Fingerprint]:
    shared = {
        "tokenizer": strategies.tokenize.fingerprint(),
        "encoding": strategies.text_encoding.fingerprint(),
        "precision": f"{bundle.dtype} under {options.precision.mixed_precision}",
        **{name: bundle.identity[name] for name in sorted(sources)},
    }
    return {caption: Fingerprint({**shared, "caption": short_hash(caption, 32)}) for caption in captions}


def encoder_autocast(options: TrainOptions, device: torch.device) -> AbstractContextManager[object]:
    """The precision that encoders run in when they run live, so that cached and live outputs are the same."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(options.precision.mixed_precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def text_batch_size(options: TrainOptions) -> int:
    """Captions encoded at a time."""
    return options.cache.text_encoder_batch_size or options.training.train_batch_size


def encode_captions(
    captions: Sequence[str], strategies: Strategies, sources: frozenset[str], bundle: ModelBundle, device: torch.device
) -> Conditioning:
    """One batch, on the CPU. The caller sets precision and gradients."""
    tokens = {name: ids.to(device) for name, ids in strategies.tokenize.tokenize(captions).items()}
    encoders = {name: bundle.part(name) for name in sorted(sources)}
    return strategies.text_encoding.encode(encoders, tokens, sources).only(sources).to("cpu")


def _encode_text(
    captions: Sequence[str],
    strategies: Strategies,
    sources: frozenset[str],
    bundle: ModelBundle,
    options: TrainOptions,
    device: torch.device,
) -> Iterator[tuple[str, Conditioning]]:
    """Unbatched entries, on the CPU."""
    size = text_batch_size(options)
    bar = tqdm(total=len(captions), desc="caching text encoder outputs", unit="caption", disable=not _is_main())
    with bar, torch.no_grad(), encoder_autocast(options, device):
        for start in range(0, len(captions), size):
            batch = captions[start : start + size]
            encoded = encode_captions(batch, strategies, sources, bundle, device)
            for row, caption in enumerate(batch):
                entry = encoded.rows(row)
                _check_finite_text(entry, caption)
                yield caption, entry._map(lambda value: value.clone())
            bar.update(len(batch))


def _check_finite_text(entry: Conditioning, caption: str) -> None:
    for tensor in entry.tensors().values():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"a text encoder gives NaN or infinite outputs for the caption {caption!r}. Use --mixed_precision bf16."
            )


def cache_text_outputs(
    data: TrainData,
    strategies: Strategies,
    bundle: ModelBundle,
    options: TrainOptions,
    device: torch.device,
    sources: frozenset[str] | None = None,
    share: Share = Share(),
) -> None:
    """Encode every caption of `data`, and the empty one, to memory or to files, and serve them from there.

    sources: the encoders whose outputs are kept, for runs in which others learn; None: all of them. share: as for latents.
    Does nothing when neither --cache_text_encoder_outputs nor its _to_disk form is set.
    """
    if not options.cache.text_outputs:
        return
    conditioning = strategies.text_caching.conditioning
    sources = conditioning.sources() if sources is None else sources
    complete = sources == conditioning.sources()
    captions = distinct_captions(data)
    _tell_variants(data, captions, options)
    if not options.cache.cache_text_encoder_outputs_to_disk:
        encoded = _encode_text(list(captions), strategies, sources, bundle, options, device)
        cache = TextCache(conditioning, complete, memory=dict(encoded))
    else:
        files = text_files(captions, strategies, sources, options)
        own = {caption: files[caption] for caption in share.of(list(files), {c: file.path for c, file in files.items()})}
        fingerprints = text_fingerprints(captions, strategies, sources, bundle, options)
        missing = needs_making(own, fingerprints, options, "text encoder outputs")
        room = _Room[Conditioning](share, options)
        for caption, entry in _encode_text(missing, strategies, sources, bundle, options, device) if missing else ():
            with room.wanted_for(caption, entry):
                files[caption].save(entry, fingerprints[caption])
        logger.info("text encoder outputs: %d made, %d found on disk%s", len(missing), len(own) - len(missing), share.note)
        room.report("text encoder outputs")
        if share.rank == 0:
            paths = [file.path for file in files.values()]
            remove_leftovers({path.parent for path in paths})
            prune_readings(paths, strategies.text_caching.format, options.cache.caption_variants)
        kept = TextFiles.of(files, strategies.text_caching, sources)
        cache = TextCache(conditioning, complete, room.unwritten, kept)
    for dataset in data.image_datasets:
        dataset.text_cache = cache


def _tell_variants(data: TrainData, captions: Mapping[str, Record | None], options: TrainOptions) -> None:
    """That captions vary within bounds, which they would not do without the cache."""
    varying = [record for dataset in data.image_datasets for record in dataset.records if not record.subset.captions.is_static]
    if varying:
        logger.info(
            "captions of %d images vary: up to %d readings of each are encoded (--caption_variants), %d captions in all",
            len(varying),
            options.cache.caption_variants,
            len(captions),
        )
