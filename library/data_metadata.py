"""What files and logs say about the data: sd-scripts' `ss_` keys, and a summary for people."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from library.buckets import Size
from library.data_sources import DatasetRecords, SubsetCount

if TYPE_CHECKING:
    from library.dataset import TrainData


def _bucket_counts(dataset: DatasetRecords) -> dict[Size, int]:
    """Images by bucket, counting repeats."""
    repeats = dataset.train.rows["repeats"]
    return {bucket: int(repeats[numbers].sum()) for bucket, numbers in dataset.train.by_bucket()}


def bucket_info(dataset: DatasetRecords) -> dict[str, Any] | None:
    """`ss_bucket_info`: counts by bucket, and how far the buckets' aspect ratios are from the images'; None without buckets."""
    if not dataset.config.rule.enabled:
        return None
    ratios = [dataset.train.rows[name][:, 0] / dataset.train.rows[name][:, 1] for name in ("bucket", "size")]
    errors = np.abs(ratios[0] - ratios[1]).tolist()
    buckets = {
        str(index): {"resolution": list(size), "count": count}
        for index, (size, count) in enumerate(_bucket_counts(dataset).items())
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors) if errors else 0}


def _tag_frequency(datasets: tuple[DatasetRecords, ...]) -> dict[str, dict[str, int]]:
    """Tags by folder or metadata file. A folder that several datasets use counts once, as repeats do not count either."""
    frequency: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        of_dataset: dict[str, Counter[str]] = {}
        for count in dataset.counts:
            of_dataset.setdefault(count.config.name, Counter()).update(dataset.tags(count.config))
        for name, tags in of_dataset.items():
            frequency.setdefault(name, dict(tags))
    return frequency


def _subset_entry(count: SubsetCount) -> dict[str, Any]:
    subset = count.config
    entry: dict[str, Any] = {
        "img_count": count.num_images,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.captions.shuffle,
        "keep_tokens": subset.captions.keep_tokens,
        "keep_tokens_separator": subset.captions.keep_tokens_separator,
        "secondary_separator": subset.captions.secondary_separator,
        "enable_wildcard": subset.captions.wildcard,
        "caption_prefix": subset.captions.prefix,
        "caption_suffix": subset.captions.suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir:
        entry["image_dir"] = subset.image_dir.name
    if subset.metadata_file:
        entry["metadata_file"] = subset.metadata_file.name
    else:
        entry |= {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
    return entry


def _dataset_entry(dataset: DatasetRecords) -> dict[str, Any]:
    config = dataset.config
    return {
        "is_dreambooth": not config.uses_metadata,
        "batch_size_per_device": config.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": list(config.rule.resolution),
        "enable_bucket": config.rule.enabled,
        "min_bucket_reso": config.rule.minimum,
        "max_bucket_reso": config.rule.maximum,
        "tag_frequency": _tag_frequency((dataset,)),
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": config.resize_interpolation,
        "subsets": [_subset_entry(count) for count in dataset.counts],
    }


def _folders(counts: list[SubsetCount]) -> dict[str, dict[str, int]]:
    """Images and repeats by folder name; the second folder of the same name is `name (2)`."""
    folders: dict[str, dict[str, int]] = {}
    for count in counts:
        name, number = count.config.name, 2
        while name in folders:
            name, number = f"{count.config.name} ({number})", number + 1
        folders[name] = {"n_repeats": count.config.num_repeats, "img_count": count.num_images}
    return folders


def _flat_entries(data: TrainData, folders: str, reg_folders: str, world: int) -> dict[str, Any]:
    """The keys that a single dataset from the command line has at the top level."""
    dataset, flags = data.datasets[0], data.options.data
    rule, batch_size = dataset.config.rule, dataset.config.batch_size
    return {
        "ss_batch_size_per_device": batch_size,
        "ss_total_batch_size": batch_size * world * data.options.training.gradient_accumulation_steps,
        "ss_resolution": rule.resolution,
        "ss_color_aug": flags.color_aug,
        "ss_flip_aug": flags.flip_aug,
        "ss_random_crop": flags.random_crop,
        "ss_shuffle_caption": flags.shuffle_caption,
        "ss_enable_bucket": rule.enabled,
        "ss_bucket_no_upscale": rule.no_upscale,
        "ss_min_bucket_reso": rule.minimum,
        "ss_max_bucket_reso": rule.maximum,
        "ss_keep_tokens": flags.keep_tokens,
        "ss_resize_interpolation": flags.resize_interpolation,
        "ss_dataset_dirs": folders,
        "ss_reg_dataset_dirs": reg_folders,
        "ss_bucket_info": json.dumps(bucket_info(dataset)),
    }


def data_metadata(data: TrainData, world: int) -> dict[str, str]:
    """The `ss_` keys about data. From a configuration file the datasets' own settings stand inside `ss_datasets`, as a list."""
    counts = [count for dataset in data.datasets for count in dataset.counts]
    folders = json.dumps(_folders([count for count in counts if not count.config.is_reg]))
    metadata: dict[str, Any] = {
        "ss_num_train_images": sum(dataset.num_train_images for dataset in data.datasets),
        "ss_num_reg_images": sum(dataset.num_reg_images for dataset in data.datasets),
        "ss_num_validation_images": data.validation.num_images if data.validation else 0,
        "ss_num_batches_per_epoch": -(-data.train.num_batches // world),
        "ss_tag_frequency": json.dumps(_tag_frequency(data.datasets)),
    }
    if data.from_file:
        entries = [_dataset_entry(dataset) for dataset in data.datasets]
        metadata |= {"ss_datasets": json.dumps(entries), "ss_dataset_dirs": folders}
    else:
        reg_folders = json.dumps(_folders([count for count in counts if count.config.is_reg]))
        metadata |= _flat_entries(data, folders, reg_folders, world)
    return {name: str(value) for name, value in metadata.items()}


def data_summary(data: TrainData) -> str:
    """A few lines for the log."""
    lines = []
    for number, dataset in enumerate(data.datasets, start=1):
        rule, title = dataset.config.rule, f"dataset {number}" if len(data.datasets) > 1 else "dataset"
        lines.append(
            f"{title}: {dataset.num_train_images} training images counting repeats"
            + (f", {dataset.num_reg_images} regularisation images" if dataset.num_reg_images else "")
            + (f", {len(dataset.validation)} held out for validation" if dataset.validation else "")
            + f"; resolution {rule.resolution[0]}x{rule.resolution[1]}, batch size {dataset.config.batch_size}"
        )
        for count in dataset.counts:
            kind = "regularisation " if count.config.is_reg else ""
            lines.append(f"  {count.config.name}: {count.num_images} {kind}images, repeated {count.config.num_repeats} times")
        buckets = [f"{width}x{height}: {count}" for (width, height), count in _bucket_counts(dataset).items()]
        lines.append(f"  {'buckets' if rule.enabled else 'one size'}: " + ", ".join(buckets))
    lines.append(f"{data.train.num_batches} batches per epoch")
    return "\n".join(lines)
