"""Where pictures and captions come from: image folders and metadata files, as one kind of record."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from library.buckets import Size
from library.captions import read_lines
from library.config_util import DataConfig, DatasetConfig, SubsetConfig
from library.errors import UserError
from library.file_index import KnownFiles, in_threads, in_turn
from library.image_io import PLUGINS, image_extensions, list_folder, list_images, listed
from library.masks import paired_files
from library.metadata_file import as_text, read_folder_captions, read_metadata, size_of
from library.quarantine import BadFile, Quarantine
from library.records import Record, RecordTable
from library.validation_split import held_out

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True, slots=True)
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
class SubsetCount:
    """What metadata and the summary say about one subset."""

    config: SubsetConfig
    num_images: int


@dataclass(frozen=True)
class DatasetRecords:
    """One [[datasets]] with its pictures found."""

    config: DatasetConfig
    found: RecordTable
    """All that can be used; the other two are made of them."""
    train: RecordTable
    validation: RecordTable
    counts: tuple[SubsetCount, ...]

    @property
    def num_train_images(self) -> int:
        """Counting repeats, without regularisation images."""
        return int(self.train.rows["repeats"][self.train.where(lambda subset: not subset.is_reg)].sum())

    @property
    def num_reg_images(self) -> int:
        """Counting the repeats they were configured with, not those that balance them."""
        return sum(count.num_images * count.config.num_repeats for count in self.counts if count.config.is_reg)

    def tags(self, subset: SubsetConfig) -> dict[str, int]:
        """`tag_counts` of one of its subsets. Not kept: where captions are sentences, nearly every part is another."""
        return tag_counts(self.found[number].counted or "" for number in self.found.numbers_of(subset))


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs, in lower case, by first appearance: sd-scripts' `ss_tag_frequency`."""
    return dict(Counter(tag for caption in captions for part in caption.split(",") if (tag := part.strip().lower())))


# Image folders


def _caption_paths(image: Path, extensions: Sequence[str]) -> Iterator[str]:
    """Where the caption of `image` may be. `a_1_2_3_4.png` (cut out by face detection) also has that of `a`."""
    stem = os.path.splitext(str(image))[0]
    yield from (stem + extension for extension in extensions)
    parts = image.stem.split("_")
    if len(parts) >= 5:
        other = os.path.join(image.parent, "_".join(parts[:-4]))
        yield from (other + extension for extension in extensions)


def folder_source(subset: SubsetConfig, bad: list[BadFile], files: KnownFiles) -> list[Found]:
    """The pictures of an image folder, with the captions that lie beside them; what cannot be used goes to `bad`."""
    folder = subset.image_dir
    assert folder is not None
    if not folder.is_dir():
        raise UserError(f"image_dir: the folder {folder} does not exist.")
    listing = list_folder(folder, recursive=subset.recursive)
    if not listing.images:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" Its subfolders ({', '.join(below[:3])}, ...) are not searched: set recursive = true." if below else ""
        raise UserError(f"image_dir: {folder} has no image ({', '.join(image_extensions())}).{hint}")
    bad += [BadFile(path, "the link leads nowhere") for path in listing.broken]
    files.open(folder)
    _warn_unread(folder, listing.others)
    reader = _CaptionReader(subset, folder, listing.others)
    paths = [reader.find(image) for image in listing.images]
    texts = iter(in_turn(partial(_attempt, files.caption), [path for path in paths if path is not None]))
    return reader.read(listing.images, [None if path is None else (path, next(texts)) for path in paths], bad)


def _attempt(function: Callable[[P], T], path: P) -> T | BadFile:
    try:
        return function(path)
    except BadFile as error:
        return error


def _good(items: Sequence[P], results: Iterable[T | BadFile], bad: list[BadFile]) -> dict[P, T]:
    """What was found out of each item; what is wrong with the others goes to `bad`."""
    found: dict[P, T] = {}
    for item, result in zip(items, results, strict=True):
        if isinstance(result, BadFile):
            bad.append(result)
        else:
            found[item] = result
    return found


_NOT_TRAINED = (".gif", ".tif", ".tiff", ".heic", ".heif", ".psd", ".tga")


def _warn_unread(folder: Path, names: Iterable[str]) -> None:
    """One line for pictures that are not used because of their format."""
    formats = {*PLUGINS, *_NOT_TRAINED} - set(image_extensions())
    found = Counter(extension for name in names if (extension := os.path.splitext(name)[1].lower()) in formats)
    if found:
        remedies = [
            f"{extension} needs pip install {PLUGINS[extension][1]}" for extension in sorted(found) if extension in PLUGINS
        ]
        counts = ", ".join(f"{count} {extension}" for extension, count in sorted(found.items()))
        logger.warning("%s: pictures of formats that are not read: %s. %s.", folder, counts,
                       "; ".join(remedies) or "Convert them, to PNG for example")  # fmt: skip


class _CaptionReader:
    """Captions of the pictures of one folder, and what is to be said about them when all are read."""

    def __init__(self, subset: SubsetConfig, folder: Path, beside: set[str]) -> None:
        self.subset, self.folder, self.beside = subset, folder, beside
        self.extensions = (subset.caption_extension,) if subset.caption_extension else (".txt", ".caption")
        self.listed = read_folder_captions(folder)
        self.used: set[str] = set()
        """Entries of `listed` that belong to a picture."""

    def _listed(self, image: Path) -> str | None:
        if not self.listed:
            return None
        inside = image.relative_to(self.folder)
        for name in (inside.as_posix(), inside.with_suffix("").as_posix()):
            if name in self.listed:
                self.used.add(name)
                return "\n".join(line for text in self.listed[name] for line in text.split("\n") if line.strip())
        return None

    def find(self, image: Path) -> str | None:
        """The file that has the caption of `image`, if there is one and it is needed."""
        if self._listed(image) is not None:
            return None
        return next((path for path in _caption_paths(image, self.extensions) if path in self.beside), None)

    def read(
        self, images: Sequence[Path], files: Sequence[tuple[str, tuple[str, bool] | BadFile] | None], bad: list[BadFile]
    ) -> list[Found]:
        """The pictures with their captions. files: for each, what `find` names and what is in it."""
        found, missing, guessed, cut = [], [], [], []
        for image, file in zip(images, files, strict=True):
            caption = self._listed(image)
            if file is not None:
                path, text = file
                if isinstance(text, BadFile):
                    bad.append(BadFile(image, text.reason))
                    continue
                caption = read_lines(text[0], self.subset.captions)
                guessed += [path] if text[1] else []
                cut += [path] if not self.subset.captions.wildcard and "\n" in text[0].strip() else []
            elif caption is None:
                missing.append(image)
                caption = self.subset.class_tokens or ""
            found.append(Found(image, caption, counted=caption))
        self._tell("caption files are not UTF-8 and were read as Latin-1. First: %s. Save them as UTF-8.", guessed)
        self._tell("caption files have further lines, which only enable_wildcard uses. First: %s.", cut)
        self._tell("entries of captions.json belong to no image. First: %s.", sorted(self.listed.keys() - self.used))
        self._warn_missing(len(images), missing)
        return found

    def _tell(self, what: str, names: Sequence[str]) -> None:
        """One line, if there are any. Several pictures may have one file."""
        if names:
            logger.warning(f"%s: %d {what}", self.folder, len(set(names)), os.path.basename(names[0]))

    def _warn_missing(self, total: int, missing: list[Path]) -> None:
        if missing and self.subset.class_tokens is None:
            beside = {os.path.basename(path) for path in self.beside}
            _warn_missing_captions(self.folder, missing, total, self.extensions, beside)


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
            if not base.name:
                continue
            for candidate in (base, *(base.with_name(base.name + extension) for extension in self.extensions)):
                if candidate.suffix.lower() in self.extensions and os.path.isfile(candidate):  # whatever the key says
                    return candidate
        return None


def _texts_of(entry: Mapping[str, Any], name: str, subset: SubsetConfig, image: str) -> list[str]:
    """The text or the list of texts that stands there; none where there is nothing."""
    value = entry.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{subset.metadata_file}: {name} of {image} is {value!r}; expected a text.")
    return [as_text(text) for text in texts]


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


def metadata_source(subset: SubsetConfig, bad: list[BadFile], files: KnownFiles) -> list[Found]:
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
    files.open_common(list(found))
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


Source = tuple[SubsetConfig, list[Found]]


def collect(
    config: DataConfig,
    *,
    prior_loss_weight: float,
    seed: int,
    quarantine: Quarantine | None = None,
    files: KnownFiles | None = None,
) -> tuple[DatasetRecords, ...]:
    """Every picture of every dataset that can be used: it exists, its header can be read, it has a bucket.

    The others go to `quarantine`. files: what is known of them. Raises `UserError` where a configuration is wrong.
    """
    quarantine, files = quarantine or Quarantine(strict=True), files or KnownFiles()
    bad: list[BadFile] = []
    sources = [[_find(subset, bad, files) for subset in dataset.subsets if _is_used(subset)] for dataset in config.datasets]
    sizes = _sizes(sources, bad, files)
    apart = _held_out(config, sources, seed, bad, files)
    files.save(complete=True)
    for one in bad:
        sizes.pop(one.path, None)
    results = []
    for index, (dataset, subsets) in enumerate(zip(config.datasets, sources, strict=True)):
        table = RecordTable.of(_records(f"{index}", dataset, subsets, sizes, bad, prior_loss_weight))
        results.append(_split(dataset, table, [subset for subset, _ in subsets], apart))
    quarantine.collect(list({one.path: one for one in bad}.values()))
    return tuple(results)


def _records(
    index: str,
    dataset: DatasetConfig,
    subsets: Sequence[Source],
    sizes: Mapping[Path, Size],
    bad: list[BadFile],
    prior_loss_weight: float,
) -> Iterator[Record]:
    """Those that are in `sizes`, one by one; those that have no bucket go to `bad`."""
    for number, (subset, items) in enumerate(subsets):
        place = lru_cache(1000)(partial(dataset.rule.place, native_crop=subset.random_crop))
        for item in items:
            size = sizes.get(item.path)
            if size is None:
                continue
            try:
                placement = place(size, preferred=item.preferred)
            except UserError as error:
                bad.append(BadFile(item.path, str(error).removesuffix(".")))
                continue
            yield Record(
                key=f"{index}/{number}/{_place_in_folder(item, subset)}",
                path=item.path,
                size=size,
                caption=item.caption,
                placement=placement,
                subset=subset,
                repeats=subset.num_repeats,
                loss_weight=subset.loss_weight * (prior_loss_weight if subset.is_reg else 1.0),
                paired=item.paired,
                counted=item.counted,
            )


def _place_in_folder(item: Found, subset: SubsetConfig) -> str:
    """What tells a picture from the others of its subset, wherever the folder lies."""
    if subset.recursive and subset.image_dir is not None:
        return item.path.relative_to(subset.image_dir).as_posix()
    return item.path.name


def _is_used(subset: SubsetConfig) -> bool:
    if not subset.num_repeats:
        logger.warning("%s: num_repeats is 0, so the subset is not used", subset.name)
    return subset.num_repeats > 0


def _find(subset: SubsetConfig, bad: list[BadFile], files: KnownFiles) -> Source:
    """The subset with its pictures, their captions and what belongs to them."""
    found = metadata_source(subset, bad, files) if subset.metadata_file else folder_source(subset, bad, files)
    if subset.conditioning_data_dir is not None:
        what = "conditioning picture" if subset.conditioned else "mask"
        paired = paired_files(subset.conditioning_data_dir, [item.path for item in found], subset.image_dir, what)
        found = [replace(item, paired=other) for item, other in zip(found, paired, strict=True)]
    several = any("\n" in item.caption for item in found) and not subset.captions.wildcard
    return replace(subset, captions=replace(subset.captions, several=True)) if several else subset, found


def _sizes(sources: Sequence[Sequence[Source]], bad: list[BadFile], files: KnownFiles) -> dict[Path, Size]:
    """Sizes of all pictures; those whose header cannot be read go to `bad`."""
    items = [item for subsets in sources for _, found in subsets for item in found]
    unknown = list(dict.fromkeys(item.path for item in items if item.size is None))
    sizes = _good(unknown, in_turn(partial(_attempt, files.size), unknown), bad)
    return sizes | {item.path: item.size for item in items if item.size is not None}


def _held_out(
    config: DataConfig, sources: Sequence[Sequence[Source]], seed: int, bad: list[BadFile], files: KnownFiles
) -> frozenset[Path]:
    """Every path whose picture some dataset holds out for validation. If any does, every file is read once and remembered."""
    if not any(dataset.validation_split for dataset in config.datasets):
        return frozenset()
    unusable = {one.path for one in bad}
    everything = dict.fromkeys(item.path for subsets in sources for _, found in subsets for item in found)
    paths = [path for path in everything if path not in unusable]
    digests = _good(paths, in_threads(partial(_attempt, files.digest), paths), bad)
    subsets_of = [
        (subset.name, dataset.validation_split, seed if dataset.validation_seed is None else dataset.validation_seed,
         [item.path for item in found if item.path in digests])
        for dataset, subsets in zip(config.datasets, sources, strict=True)
        for subset, found in subsets
        if not subset.is_reg
    ]  # fmt: skip
    return held_out(subsets_of, digests)


def _split(
    config: DatasetConfig, found: RecordTable, subsets: Sequence[SubsetConfig], apart: frozenset[Path]
) -> DatasetRecords:
    """Held-out pictures to validation; regularisation images balanced against the training images that are left."""
    none = np.zeros(len(found), bool)
    is_reg, held = found.where(lambda subset: subset.is_reg), found.among(apart) if apart else none
    train, regular = found.take(~is_reg & ~held), found.take(is_reg & ~held)
    validated = ~is_reg & held if config.validation_split else none
    repeats = np.array(_balanced_repeats(regular.rows["repeats"].tolist(), int(train.rows["repeats"].sum())), np.int32)
    unused = int((repeats == 0).sum())
    if unused:
        logger.warning("%d of %d regularisation images are not used: there are more than training images, counting repeats",
                       unused, len(repeats))  # fmt: skip
    balanced = regular.take(repeats > 0, {"repeats": repeats[repeats > 0]})
    return DatasetRecords(
        config,
        found,
        train.joined(balanced),
        found.take(validated, {"repeats": 1, "loss_weight": 1.0}),
        tuple(SubsetCount(subset, len(found.numbers_of(subset))) for subset in subsets),
    )


def check_not_empty(datasets: Sequence[DatasetRecords]) -> None:
    """Raise `UserError` when there is nothing to train on."""
    if not any(dataset.num_train_images for dataset in datasets):
        names = [count.config.name for dataset in datasets for count in dataset.counts]
        raise UserError(
            "there is no training image: "
            + listed([f"{name} has only regularisation or held-out images" for name in names] or ["no subset"], "subsets")
        )
