"""Flags about pictures, captions and their caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.options import opt


def _comma_list(value: Any, element: type, count: tuple[int, ...], expected: str) -> str:
    """`value` (text, a number or a list from a file) as sd-scripts writes it: numbers with commas between."""
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        numbers = [element(item) for item in items if not isinstance(item, bool)]
    except (TypeError, ValueError):
        numbers = []
    if isinstance(value, bool) or len(numbers) not in count or any(number <= 0 for number in numbers):
        raise ValueError(f"expected {expected}, got {value!r}")
    return ",".join(str(number) for number in numbers)


def size_text(value: Any) -> str:
    """`512` or `512,768` from the text, a number or a list of two."""
    return _comma_list(value, int, (1, 2), "a size such as 512, or width,height such as 512,768")


def range_text(value: Any) -> str:
    """`2.0,4.0` from the text or a list of two."""
    return _comma_list(value, float, (2,), "two numbers such as 2.0,4.0")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Pictures and captions. A dataset file sets all of these per dataset and per folder."""

    dataset_config: str | None = opt(None, "dataset file (.toml or .json); takes the place of the folder flags")
    train_data_dir: str | None = opt(None, "folder of folders named 'repeats_class', or the pictures of --in_json")
    reg_data_dir: str | None = opt(None, "the same for regularization pictures")
    in_json: str | None = opt(None, "metadata file with captions and sizes, for training without folder names")
    dataset_repeats: int = opt(1, "how often each picture of --in_json counts in an epoch", minimum=1)
    dataset_class: str | None = opt(None, "dotted path to a class of yours derived from library.dataset.ImageDataset")
    debug_dataset: bool = opt(False, "the same as --show_batches 10")
    cache_info: bool = opt(
        False,
        "keep captions and sizes in a file beside the pictures",
        inert="captions and sizes are read anew in every run, so they cannot be stale",
    )
    resolution: str | None = opt(None, "size trained at: 512, or width,height", type=size_text)
    enable_bucket: bool = opt(False, "keep each picture's shape, in batches of one shape")
    min_bucket_reso: int = opt(256, "shortest side of a bucket", minimum=1)
    max_bucket_reso: int = opt(1024, "longest side of a bucket", minimum=1)
    bucket_reso_steps: int = opt(64, "bucket sides are multiples of this", minimum=1)
    bucket_no_upscale: bool = opt(False, "never enlarge a picture to fit a bucket")
    resize_interpolation: str | None = opt(
        None,
        "how pictures are resized; area when shrinking, else lanczos, unless given",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    caption_extension: str | None = opt(
        None, "extension of caption files; .txt, then .caption, unless given", aliases=("caption_extention",)
    )
    shuffle_caption: bool = opt(False, "shuffle a caption's tags in every step")
    caption_separator: str = opt(",", "what stands between a caption's tags")
    keep_tokens: int = opt(0, "tags at the start that are neither shuffled nor dropped", minimum=0)
    keep_tokens_separator: str = opt("", "tags before this are neither shuffled nor dropped, instead of --keep_tokens")
    secondary_separator: str | None = opt(None, "separator within a tag, turned into --caption_separator at the end")
    enable_wildcard: bool = opt(False, "choose one of {a|b} and one of a caption file's lines in every step")
    caption_prefix: str | None = opt(None, "put before every caption")
    caption_suffix: str | None = opt(None, "put after every caption")
    token_warmup_min: int = opt(1, "tags at the start of the run, growing to all", minimum=1)
    token_warmup_step: float = opt(0.0, "steps until all tags are used; below 1 a ratio of all steps", minimum=0)
    caption_dropout_rate: float = opt(0.0, "share of steps without caption", minimum=0, maximum=1)
    caption_dropout_every_n_epochs: int = opt(0, "leave all captions out every so many epochs", minimum=0)
    caption_tag_dropout_rate: float = opt(0.0, "share of tags left out", minimum=0, maximum=1)
    color_aug: bool = opt(False, "change colours a little at random")
    flip_aug: bool = opt(False, "mirror pictures at random")
    face_crop_aug_range: str | None = opt(None, "crop around a face, zoomed by this range", type=range_text)
    random_crop: bool = opt(False, "cut pictures at random instead of in the middle")
    recursive: bool = opt(False, "take the pictures of folders below a picture folder, too")
    strict_data: bool = opt(False, "end with an error where a file cannot be used; by default it is left out and listed")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What is computed once and kept."""

    cache_latents: bool = opt(False, "encode every picture once and keep the latents in memory")
    cache_latents_to_disk: bool = opt(False, "keep the latents in files")
    cache_text_encoder_outputs: bool = opt(False, "encode every caption once and keep the outputs in memory")
    cache_text_encoder_outputs_to_disk: bool = opt(False, "keep the text encoders' outputs in files")
    text_encoder_batch_size: int | None = opt(None, "captions per batch while caching; as trained unless given", minimum=1)
    caption_variants: int = opt(
        8, "readings that cached text encoder outputs keep of a caption that is shuffled or otherwise varied", minimum=1
    )
    skip_cache_check: bool = opt(False, "use cache files unread; by default each is checked against its picture and model")
    cache_dir: str | None = opt(None, "folder for cache files; beside the pictures unless given")

    @property
    def latents(self) -> bool:
        """Whether latents are cached, in memory or in files."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text_outputs(self) -> bool:
        """Whether text encoder outputs are cached, in memory or in files."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk
