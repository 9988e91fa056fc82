"""Where pictures and captions come from: image folders and metadata files, as one kind of record."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.buckets import Placement, Size
from library.captions import read_lines
from library.config_util import DataConfig, DatasetConfig, SubsetConfig
from library.errors import UserError
from library.image_io import (
    broken_links,
    choose_crop,
    content_hashes,
    image_extensions,
    list_images,
    listed,
    read_sizes,
    resolve_interpolation,
    walk_images,
)
from library.masks import paired_files
from library.metadata_file import read_caption_text, read_folder_captions, read_metadata, size_of
from library.quarantine import BadFile, Quarantine
from library.validation_split import held_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """One picture as its source names it. `size` and `preferred` (a bucket) where the source knows them."""

    path: Path
    caption: str
    counted: str | None = None
    """The text whose tags are counted for `ss_tag_frequency`."""
    size: Size | None = None
    preferred: Size | None = None
    paired: Path | None = None


@dataclass(frozen=True)
class Record:
    """One picture of a dataset, and everything about it that does not change between epochs."""

    key: str
    """Names the record in random draws: where it stands in the configuration, not where its folder lies."""
    path: Path
    size: Size
    caption: str
    placement: Placement
    subset: SubsetConfig
    repeats: int
    loss_weight: float
    paired: Path | None = None
    """Its mask, or (`subset.conditioned`) what a ControlNet is given with it."""

    @property
    def recipe(self) -> str:
        """What the pixels given to the VAE depend on, beyond the file: equal recipes share a cache entry."""
        left_top = choose_crop(self.placement)
        how = resolve_interpolation(self.size, self.placement.resized, self.subset.resize_interpolation)
        if self.size == self.placement.resized:
            how = "none"
        (width, height), (full_width, full_height) = self.placement.bucket, self.placement.resized
        alpha = " with alpha" if self.subset.alpha_mask else ""  # weighs the pixels when they are resized; is kept with them
        return f"{width}x{height} from {full_width}x{full_height} at {left_top.left},{left_top.top} by {how}{alpha}"


@dataclass(frozen=True)
class SubsetCount:
    """What metadata and the summary say about one subset."""

    config: SubsetConfig
    num_images: int
    tags: Mapping[str, int]


@dataclass(frozen=True)
class DatasetRecords:
    """One [[datasets]] with its pictures found."""

    config: DatasetConfig
    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    counts: tuple[SubsetCount, ...]

    @property
    def num_train_images(self) -> int:
        """Counting repeats, without regularisation images."""
        return sum(record.repeats for record in self.train if not record.subset.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Counting the repeats they were configured with, not those that balance them."""
        return sum(count.num_images * count.config.num_repeats for count in self.counts if count.config.is_reg)


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs, in lower case, by first appearance: sd-scripts' `ss_tag_frequency`."""
    return dict(Counter(tag for caption in captions for part in caption.split(",") if (tag := part.strip().lower())))


# Image folders


def _caption_paths(image: Path, extensions: Sequence[str]) -> list[Path]:
    """Where the caption of `image` may be. `a_1_2_3_4.png` (cut out by face detection) also has that of `a`."""
    stems = [image.stem]
    parts = image.stem.split("_")
    if len(parts) >= 5:
        stems.append("_".join(parts[:-4]))
    return [image.with_name(stem + extension) for stem in stems for extension in extensions]


def folder_source(subset: SubsetConfig, bad: list[BadFile]) -> list[Found]:
    """The pictures of an image folder, with the captions that lie beside them; what cannot be used goes to `bad`."""
    folder = subset.image_dir
    assert folder is not None
    if not folder.is_dir():
        raise UserError(f"image_dir: the folder {folder} does not exist.")
    images = walk_images(folder) if subset.recursive else list_images(folder)
    if not images:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" Its subfolders ({', '.join(below[:3])}, ...) are not searched: set recursive = true." if below else ""
        raise UserError(f"image_dir: {folder} has no image ({', '.join(image_extensions())}).{hint}")
    folders = dict.fromkeys([folder, *(image.parent for image in images)])
    bad += [BadFile(path, "the link leads nowhere") for each in folders for path in broken_links(each)]
    beside = {path for each in folders for path in each.iterdir()}
    reader = _CaptionReader(subset, folder, beside)
    found = []
    for image in images:
        try:
            caption = reader.read(image)
        except BadFile as error:
            bad.append(BadFile(image, error.reason))
            continue
        found.append(Found(image, caption, counted=caption))
    reader.warn(len(images))
    return found


class _CaptionReader:
    """Captions of the pictures of one folder, and what is to be said about them when all are read."""

    def __init__(self, subset: SubsetConfig, folder: Path, beside: set[Path]) -> None:
        self.subset, self.folder, self.beside = subset, folder, beside
        self.extensions = (subset.caption_extension,) if subset.caption_extension else (".txt", ".caption")
        self.listed = read_folder_captions(folder)
        self.missing: list[Path] = []
        self.guessed: list[Path] = []

    def read(self, image: Path) -> str:
        inside = image.relative_to(self.folder)
        for name in (inside.as_posix(), inside.with_suffix("").as_posix()):
            if name in self.listed:
                return "\n".join(line for text in self.listed[name] for line in text.split("\n") if line.strip())
        for path in _caption_paths(image, self.extensions):
            if path in self.beside:
                text, guessed = read_caption_text(path)
                self.guessed += [path] if guessed else []
                return read_lines(text, self.subset.captions)
        self.missing.append(image)
        return self.subset.class_tokens or ""

    def warn(self, total: int) -> None:
        if self.guessed:
            logger.warning(
                "%s: %d caption files are not UTF-8 and were read as Latin-1. First: %s. Save them as UTF-8.",
                self.folder,
                len(self.guessed),
                self.guessed[0].name,
            )
        if self.missing and self.subset.class_tokens is None:
            beside = {path.name for path in self.beside}
            _warn_missing_captions(self.folder, self.missing, total, self.extensions, beside)


def _warn_missing_captions(folder: Path, missing: list[Path], total: int, extensions: Sequence[str], beside: set[str]) -> None:
    """One line for a folder: captions that are not there are trained as empty ones, which is seldom what was meant."""
    others = [ext for ext in (".txt", ".caption") if ext not in extensions and missing[0].stem + ext in beside]
    hint = f" There are {others[0]} files: set caption_extension = '{others[0]}'." if others else ""
    which = "no image has" if len(missing) == total else f"{len(missing)} of {total} images have no"
    logger.warning(
        "%s: %s caption file (%s) and class_tokens is not set, so their caption is empty. First: %s.%s",
        folder,
        which + (" a" if len(missing) == total else ""),
        " or ".join(extensions),
        missing[0].name,
        hint,
    )


# Metadata files


class _ImageFinder:
    """Image keys of a metadata file -> files: a path, or a path or name without its extension."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.extensions = image_extensions()
        listing = list_images(folder) if folder else []
        self.by_name = {path.name: path for path in listing} | {path.stem: path for path in reversed(listing)}

    def find(self, key: str) -> Path | None:
        if key in self.by_name:
            return self.by_name[key]
        for base in [Path(key)] + ([self.folder / key] if self.folder else []):
            for candidate in (base, *(base.with_name(base.name + extension) for extension in self.extensions)):
                if candidate.suffix.lower() in self.extensions and candidate.is_file():
                    return candidate
        return None


def _texts_of(entry: Mapping[str, Any], name: str, subset: SubsetConfig, image: str) -> list[str]:
    """The text or the list of texts that stands there; none where there is nothing."""
    value = entry.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{subset.metadata_file}: {name} of {image} is {value!r}; expected a text.")
    return texts


def _metadata_captions(entry: Mapping[str, Any], subset: SubsetConfig, image: str) -> tuple[str, str | None]:
    """(the captions of one entry, a line each; the tags that are counted). A list of captions is several, of tags one."""
    tags = f"{subset.captions.separator} ".join(_texts_of(entry, "tags", subset, image)) or None
    captions = _texts_of(entry, "caption", subset, image)
    both = [_metadata_caption(caption, tags, subset) for caption in captions] or [_metadata_caption(None, tags, subset)]
    return "\n".join(caption for caption, _ in both), both[0][1]


def _metadata_caption(caption: str | None, tags: str | None, subset: SubsetConfig) -> tuple[str, str | None]:
    """(caption with its tags behind it, the tags that are counted). Without a caption the tags are the caption."""
    options = subset.captions
    if caption is None:
        return read_lines(tags or "", options), tags
    if not tags:
        return read_lines(caption, options), None
    lines = [line for line in read_lines(caption, options).split("\n") if line]
    tags = options.separator.join(tags.split("\n"))
    return "\n".join(f"{line}{options.separator}{tags}" for line in lines) or tags, tags


def metadata_source(subset: SubsetConfig, bad: list[BadFile]) -> list[Found]:
    """The pictures a metadata file names. `image_size` saves reading a header; `train_resolution` proposes a bucket.

    A picture that is named again has several captions. Those that do not exist go to `bad`, unless none does: then the folder
    is wrong.
    """
    path = subset.metadata_file
    assert path is not None
    if subset.image_dir and not subset.image_dir.is_dir():
        raise UserError(f"image_dir: the folder {subset.image_dir} does not exist.")
    finder = _ImageFinder(subset.image_dir)
    found: dict[Path, Found] = {}
    missing = []
    for image, entry in read_metadata(path):
        file = finder.find(image)
        if file is None:
            missing.append(image)
            continue
        where = f"{path}, {image}"
        caption, counted = _metadata_captions(entry, subset, image)
        if file in found:
            found[file] = replace(found[file], caption=f"{found[file].caption}\n{caption}")
            continue
        size, preferred = size_of(entry, "image_size", where), size_of(entry, "train_resolution", where)
        found[file] = Found(file, caption, counted, size, preferred)
    bad += [BadFile((subset.image_dir or Path()) / image, f"{path} names it, but it does not exist") for image in missing]
    if missing and not found:
        looked = (
            f"the working folder and {subset.image_dir}" if subset.image_dir else "the working folder (no image_dir is set)"
        )
        raise UserError(
            f"{path} names {len(missing)} images that do not exist in {looked}, of {len(found) + len(missing)}: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Correct image_dir or the file."
        )
    return list(found.values())


# Records


def _balanced_repeats(configured: Sequence[int], wanted: int) -> list[int]:
    """Repeats of regularisation images whose sum is that of the training images (`wanted`), as sd-scripts counts them.

    Each keeps its own repeats as long as the sum is short; then each in turn gets one more. What comes too late gets none.
    """
    repeats = [0] * len(configured)
    total = 0
    for index, count in enumerate(configured):
        if total >= wanted:
            break
        repeats[index] = count
        total += count
    missing = wanted - total
    if missing > 0 and repeats:
        each, rest = divmod(missing, len(repeats))
        repeats = [count + each + (index < rest) for index, count in enumerate(repeats)]
    return repeats


def _place(found: Found, size: Size, config: DatasetConfig, subset: SubsetConfig) -> Placement | BadFile:
    try:
        return config.rule.place(size, native_crop=subset.random_crop, preferred=found.preferred)
    except UserError as error:
        return BadFile(found.path, str(error).removesuffix("."))


Source = tuple[SubsetConfig, list[Found]]


def collect(
    config: DataConfig, *, prior_loss_weight: float, seed: int, quarantine: Quarantine | None = None
) -> tuple[DatasetRecords, ...]:
    """Every picture of every dataset that can be used: it exists, its header can be read, it has a bucket.

    The others go to `quarantine`. Raises `UserError` where a configuration is wrong.
    """
    quarantine = quarantine or Quarantine(strict=True)
    bad: list[BadFile] = []
    sources = [[_find(subset, bad) for subset in dataset.subsets if _is_used(subset)] for dataset in config.datasets]
    sizes = _sizes(sources, bad)
    apart = _held_out(config, sources, seed, bad)
    unusable = {one.path for one in bad}
    results = []
    for index, (dataset, subsets) in enumerate(zip(config.datasets, sources, strict=True)):
        records, counts = [], []
        for number, (subset, items) in enumerate(subsets):
            usable = [item for item in items if item.path not in unusable]
            placements = [_place(item, sizes[item.path], dataset, subset) for item in usable]
            bad += [placement for placement in placements if isinstance(placement, BadFile)]
            both = zip(usable, placements, strict=True)
            placed = [(item, placement) for item, placement in both if isinstance(placement, Placement)]
            counted = tag_counts(item.counted for item, _ in placed if item.counted)
            counts.append(SubsetCount(subset, len(placed), counted))
            records += [
                Record(
                    key=f"{index}/{number}/{_place_in_folder(item, subset)}",
                    path=item.path,
                    size=sizes[item.path],
                    caption=item.caption,
                    placement=placement,
                    subset=subset,
                    repeats=subset.num_repeats,
                    loss_weight=subset.loss_weight * (prior_loss_weight if subset.is_reg else 1.0),
                    paired=item.paired,
                )
                for item, placement in placed
            ]
        results.append(_split(dataset, records, tuple(counts), apart))
    quarantine.collect(list({one.path: one for one in bad}.values()))
    return tuple(results)


def _place_in_folder(item: Found, subset: SubsetConfig) -> str:
    """What tells a picture from the others of its subset, wherever the folder lies."""
    if subset.recursive and subset.image_dir is not None:
        return item.path.relative_to(subset.image_dir).as_posix()
    return item.path.name


def _is_used(subset: SubsetConfig) -> bool:
    if not subset.num_repeats:
        logger.warning("%s: num_repeats is 0, so the subset is not used", subset.name)
    return subset.num_repeats > 0


def _find(subset: SubsetConfig, bad: list[BadFile]) -> Source:
    """The subset with its pictures, their captions and what belongs to them."""
    found = metadata_source(subset, bad) if subset.metadata_file else folder_source(subset, bad)
    if subset.conditioning_data_dir is not None:
        what = "conditioning picture" if subset.conditioned else "mask"
        paired = paired_files(subset.conditioning_data_dir, [item.path for item in found], subset.image_dir, what)
        found = [replace(item, paired=other) for item, other in zip(found, paired, strict=True)]
    several = any("\n" in item.caption for item in found) and not subset.captions.wildcard
    return replace(subset, captions=replace(subset.captions, several=True)) if several else subset, found


def _sizes(sources: Sequence[Sequence[Source]], bad: list[BadFile]) -> dict[Path, Size]:
    """Sizes of all pictures; those whose header cannot be read go to `bad`."""
    items = [item for subsets in sources for _, found in subsets for item in found]
    unknown = list(dict.fromkeys(item.path for item in items if item.size is None))
    sizes: dict[Path, Size] = {}
    for path, size in zip(unknown, read_sizes(unknown), strict=True):
        if isinstance(size, BadFile):
            bad.append(size)
        else:
            sizes[path] = size
    return sizes | {item.path: item.size for item in items if item.size is not None}


def _held_out(config: DataConfig, sources: Sequence[Sequence[Source]], seed: int, bad: list[BadFile]) -> frozenset[Path]:
    """Every path whose picture some dataset holds out for validation. Reads all files, if any dataset does."""
    if not any(dataset.validation_split for dataset in config.datasets):
        return frozenset()
    unusable = {one.path for one in bad}
    everything = dict.fromkeys(item.path for subsets in sources for _, found in subsets for item in found)
    paths = [path for path in everything if path not in unusable]
    digests: dict[Path, str] = {}
    for path, digest in zip(paths, content_hashes(paths), strict=True):
        if isinstance(digest, BadFile):
            bad.append(digest)
        else:
            digests[path] = digest
    subsets_of = [
        (subset.name, dataset.validation_split, seed if dataset.validation_seed is None else dataset.validation_seed,
         [item.path for item in found if item.path in digests])
        for dataset, subsets in zip(config.datasets, sources, strict=True)
        for subset, found in subsets
        if not subset.is_reg
    ]  # fmt: skip
    return held_out(subsets_of, digests)


def _split(
    config: DatasetConfig, records: list[Record], counts: tuple[SubsetCount, ...], apart: frozenset[Path]
) -> DatasetRecords:
    """Held-out pictures to validation; regularisation images balanced against the training images that are left."""
    train = [record for record in records if not record.subset.is_reg and record.path not in apart]
    validation = [
        replace(record, repeats=1, loss_weight=1.0)
        for record in records
        if config.validation_split and not record.subset.is_reg and record.path in apart
    ]
    regular = [record for record in records if record.subset.is_reg and record.path not in apart]
    wanted = sum(record.repeats for record in train)
    repeats = _balanced_repeats([record.repeats for record in regular], wanted)
    if 0 in repeats:
        logger.warning("%d of %d regularisation images are not used: there are more than training images, counting repeats",
                       repeats.count(0), len(repeats))  # fmt: skip
    balanced = [replace(record, repeats=count) for record, count in zip(regular, repeats, strict=True) if count]
    return DatasetRecords(config, tuple(train + balanced), tuple(validation), counts)


def check_not_empty(datasets: Sequence[DatasetRecords]) -> None:
    """Raise `UserError` when there is nothing to train on."""
    if not any(dataset.num_train_images for dataset in datasets):
        names = [count.config.name for dataset in datasets for count in dataset.counts]
        raise UserError(
            "there is no training image: "
            + listed([f"{name} has only regularisation or held-out images" for name in names] or ["no subset"], "subsets")
        )
