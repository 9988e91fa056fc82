"""Where pictures and captions come from: image folders and metadata files, as one kind of record."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.buckets import Placement, Size
from library.captions import read_lines
from library.config_util import DataConfig, DatasetConfig, SubsetConfig
from library.errors import UserError
from library.image_io import choose_crop, image_extensions, list_images, listed, read_sizes, resolve_interpolation
from library.metadata_file import read_metadata, read_text, size_of
from library.rng import key_to_seed

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

    @property
    def recipe(self) -> str:
        """What the pixels given to the VAE depend on, beyond the file: equal recipes share a cache entry."""
        left_top = choose_crop(self.placement)
        how = resolve_interpolation(self.size, self.placement.resized, self.subset.resize_interpolation)
        if self.size == self.placement.resized:
            how = "none"
        (width, height), (full_width, full_height) = self.placement.bucket, self.placement.resized
        return f"{width}x{height} from {full_width}x{full_height} at {left_top.left},{left_top.top} by {how}"


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


def folder_source(subset: SubsetConfig) -> list[Found]:
    """The pictures of an image folder, with the captions that lie beside them."""
    folder = subset.image_dir
    assert folder is not None
    if not folder.is_dir():
        raise UserError(f"image_dir: the folder {folder} does not exist.")
    images = list_images(folder)
    if not images:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" Its subfolders ({', '.join(below[:3])}, ...) are not searched: name each as a subset." if below else ""
        raise UserError(f"image_dir: {folder} has no image ({', '.join(image_extensions())}).{hint}")
    extensions = (subset.caption_extension,) if subset.caption_extension else (".txt", ".caption")
    beside = {path.name for path in folder.iterdir()}
    found, missing = [], []
    for image in images:
        files = [path for path in _caption_paths(image, extensions) if path.name in beside]
        if files:
            caption = read_lines(read_text(files[0]), subset.captions)
        else:
            caption = subset.class_tokens or ""
            missing.append(image)
        found.append(Found(image, caption, counted=caption))
    if missing and subset.class_tokens is None:
        _warn_missing_captions(folder, missing, len(images), extensions, beside)
    return found


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


def _text_of(entry: Mapping[str, Any], name: str, subset: SubsetConfig, image: str) -> str | None:
    value = entry.get(name)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"{subset.captions.separator} ".join(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{subset.metadata_file}: {name} of {image} is {value!r}; expected a text.")
    return value


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


def metadata_source(subset: SubsetConfig) -> list[Found]:
    """The pictures a metadata file names. `image_size` saves reading a header; `train_resolution` proposes a bucket."""
    path = subset.metadata_file
    assert path is not None
    if subset.image_dir and not subset.image_dir.is_dir():
        raise UserError(f"image_dir: the folder {subset.image_dir} does not exist.")
    finder = _ImageFinder(subset.image_dir)
    found, missing = [], []
    for image, entry in read_metadata(path):
        file = finder.find(image)
        if file is None:
            missing.append(image)
            continue
        where = f"{path}, {image}"
        tags = _text_of(entry, "tags", subset, image)
        caption, counted = _metadata_caption(_text_of(entry, "caption", subset, image), tags, subset)
        size, preferred = size_of(entry, "image_size", where), size_of(entry, "train_resolution", where)
        found.append(Found(file, caption, counted, size, preferred))
    if missing:
        looked = (
            f"the working folder and {subset.image_dir}" if subset.image_dir else "the working folder (no image_dir is set)"
        )
        raise UserError(
            f"{path} names {len(missing)} images that do not exist in {looked}, of {len(found) + len(missing)}: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Correct image_dir or the file."
        )
    return found


# Records


def _validation_paths(config: DatasetConfig, subset: SubsetConfig, found: Sequence[Found], seed: int) -> set[Path]:
    """The pictures of a subset that are held out: a function of the seed and their names, the same in every dataset."""
    if subset.is_reg or not config.validation_split:
        return set()
    chosen_seed = config.validation_seed if config.validation_seed is not None else seed
    order = sorted(found, key=lambda item: key_to_seed(chosen_seed, "validation", item.path.name))
    count = round(len(order) * config.validation_split)
    if not count:
        logger.warning("%s: validation_split %g of %d images is none", subset.name, config.validation_split, len(order))
    return {item.path.resolve() for item in order[:count]}


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


def _place(found: Found, size: Size, config: DatasetConfig, subset: SubsetConfig) -> Placement:
    try:
        return config.rule.place(size, native_crop=subset.random_crop, preferred=found.preferred)
    except UserError as error:
        raise UserError(f"{found.path}: {error}") from error


def collect(config: DataConfig, *, prior_loss_weight: float, seed: int) -> tuple[DatasetRecords, ...]:
    """Every picture of every dataset, checked: it exists, its header can be read, it has a bucket. Raises `UserError`."""
    used = [[subset for subset in dataset.subsets if _is_used(subset)] for dataset in config.datasets]
    found = [[_find(subset) for subset in subsets] for subsets in used]
    held_out: set[Path] = set()
    for dataset, subsets, lists in zip(config.datasets, used, found, strict=True):
        for subset, items in zip(subsets, lists, strict=True):
            held_out |= _validation_paths(dataset, subset, items, seed)
    unknown = list({item.path: None for lists in found for items in lists for item in items if item.size is None})
    sizes = dict(zip(unknown, read_sizes(unknown), strict=True))
    results = []
    for index, (dataset, subsets, lists) in enumerate(zip(config.datasets, used, found, strict=True)):
        records = [
            Record(
                key=f"{index}/{subset_index}/{item.path.name}",
                path=item.path,
                size=(size := item.size or sizes[item.path]),
                caption=item.caption,
                placement=_place(item, size, dataset, subset),
                subset=subset,
                repeats=subset.num_repeats,
                loss_weight=prior_loss_weight if subset.is_reg else 1.0,
            )
            for subset_index, (subset, items) in enumerate(zip(subsets, lists, strict=True))
            for item in items
        ]
        counts = tuple(
            SubsetCount(subset, len(items), tag_counts(item.counted for item in items if item.counted))
            for subset, items in zip(subsets, lists, strict=True)
        )
        results.append(_split(dataset, records, counts, held_out))
    return tuple(results)


def _is_used(subset: SubsetConfig) -> bool:
    if not subset.num_repeats:
        logger.warning("%s: num_repeats is 0, so the subset is not used", subset.name)
    return subset.num_repeats > 0


def _find(subset: SubsetConfig) -> list[Found]:
    return metadata_source(subset) if subset.metadata_file else folder_source(subset)


def _split(
    config: DatasetConfig, records: list[Record], counts: tuple[SubsetCount, ...], held_out: set[Path]
) -> DatasetRecords:
    """Held-out pictures to validation; regularisation images balanced against the training images that are left."""
    from dataclasses import replace

    train = [record for record in records if not record.subset.is_reg and record.path.resolve() not in held_out]
    validation = [
        replace(record, repeats=1, loss_weight=1.0)
        for record in records
        if config.validation_split and not record.subset.is_reg and record.path.resolve() in held_out
    ]
    regular = [record for record in records if record.subset.is_reg]
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
