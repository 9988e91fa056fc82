"""Dataset configuration: TOML or JSON files and command lines in sd-scripts' form -> frozen dataclasses.

A key is looked up in the subset, its dataset, [general] and the command line, in this order; then its default holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import voluptuous as vol

from library.buckets import BucketRule, Size, check_rule
from library.captions import CaptionOptions
from library.errors import UserError, suggest
from library.image_io import INTERPOLATIONS, listed
from library.metadata_file import as_text, listed_buckets, read_text

if TYPE_CHECKING:
    from library.option_groups import TrainOptions

Mode = Literal["network", "full"]

PRESERVES = "diff_output_preservation"
"""In `custom_attributes`: these pictures keep the untrained model's predictions. sd-scripts' name."""


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """One [[datasets.subsets]]: an image folder, or a metadata file when `metadata_file` is set.

    loss_weight: of its pictures, beside `prior_loss_weight` for regularisation. face_crop_range: see `library.face_crop`.
    """

    image_dir: Path | None = None
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    """Folder of masks, or of the pictures that a ControlNet is given."""
    conditioned: bool = False
    """Whether they are the latter."""
    recursive: bool = False
    is_reg: bool = False
    class_tokens: str | None = None
    num_repeats: int = 1
    captions: CaptionOptions = CaptionOptions()
    caption_extension: str | None = None
    """None: `.txt`, or `.caption` where there is one."""
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    loss_weight: float = 1.0
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preserves(self) -> bool:
        """Whether these images keep the untrained model's own prediction as their target."""
        return bool(self.custom_attributes.get(PRESERVES, False))

    @property
    def varies_pictures(self) -> bool:
        """Whether its pictures look different each time, mirroring apart, so that one encoding cannot stand for them."""
        return self.color_aug or self.random_crop or self.face_crop_range is not None

    @property
    def name(self) -> str:
        """For people and for metadata: the folder's or the metadata file's name."""
        return (self.metadata_file or self.image_dir or Path("?")).name


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One [[datasets]]."""

    rule: BucketRule
    subsets: tuple[SubsetConfig, ...]
    batch_size: int = 1
    validation_split: float = 0.0
    validation_seed: int | None = None
    network_multiplier: float = 1.0
    resize_interpolation: str | None = None

    @property
    def uses_metadata(self) -> bool:
        return self.subsets[0].metadata_file is not None


@dataclass(frozen=True)
class DataConfig:
    """Every dataset of a run. `source` is the configuration file; None when it came from the command line."""

    datasets: tuple[DatasetConfig, ...]
    source: Path | None


# What may stand where


@dataclass(frozen=True)
class _Key:
    """One key: what it accepts, in code and in words; the levels it may stand at; what it is when nobody sets it."""

    accept: Any
    expected: str
    level: Literal["dataset", "subset", "subset only"]
    default: Any = None
    kinds: str = "folder metadata"  # which subsets take it
    flag: str | None = None  # the command line's name, where that differs


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise vol.Invalid("not a whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise vol.Invalid("not a number")
    return float(value)


def _range(value: object) -> tuple[float, float]:
    """`[2.0, 4.0]`, and the command line's `"2.0,4.0"`."""
    parts = [float(part) for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise vol.Invalid("not a pair")
    low, high = _number(parts[0]), _number(parts[1])
    if not 0 < low <= high:
        raise vol.Invalid("not a range")
    return low, high


def _sizes(value: object) -> tuple[Size, ...]:
    """A list of what `_resolution` takes."""
    if not isinstance(value, list | tuple) or not value:
        raise vol.Invalid("not a list")
    return tuple(dict.fromkeys(_resolution(item) for item in value))


def _resolution(value: object) -> Size:
    """`512`, `[512, 768]`, and the command line's `"512"` and `"512,768"`, as (width, height)."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [int(part) if isinstance(part, str) else _whole(part) for part in parts]
    except ValueError as error:
        raise vol.Invalid("not a size") from error
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise vol.Invalid("not a size")
    return numbers[0], numbers[-1]


_COUNT = vol.All(_whole, vol.Range(min=1))
_FROM_ZERO = vol.All(_whole, vol.Range(min=0))
_RATE = vol.All(_number, vol.Range(min=0, max=1))
_INTERPOLATION = _Key(vol.In(INTERPOLATIONS), "one of " + ", ".join(INTERPOLATIONS), "subset")

_BOOL, _TEXT = "true or false (bool)", "a text"

KEYS: dict[str, _Key] = {
    "batch_size": _Key(_COUNT, "a whole number from 1", "dataset", 1, flag="train_batch_size"),
    "resolution": _Key(_resolution, "a number or [width, height], from 1", "dataset"),
    "resolutions": _Key(_sizes, "a list of numbers or [width, height], from 1", "dataset"),
    "enable_bucket": _Key(bool, _BOOL, "dataset", False),
    "bucket_no_upscale": _Key(bool, _BOOL, "dataset", False),
    "min_bucket_reso": _Key(_COUNT, "a whole number from 1", "dataset", 256),
    "max_bucket_reso": _Key(_COUNT, "a whole number from 1", "dataset", 1024),
    "bucket_reso_steps": _Key(_COUNT, "a whole number from 1", "dataset", 64),
    "buckets": _Key(_sizes, "a list of [width, height], from 1", "dataset"),
    "validation_split": _Key(_RATE, "a number from 0 to 1", "dataset", 0.0),
    "validation_seed": _Key(_whole, "a whole number", "dataset"),
    "network_multiplier": _Key(_number, "a number", "dataset", 1.0),
    "num_repeats": _Key(_FROM_ZERO, "a whole number from 0", "subset", 1, flag="dataset_repeats"),
    "shuffle_caption": _Key(bool, _BOOL, "subset", False),
    "enable_wildcard": _Key(bool, _BOOL, "subset", False),
    "caption_separator": _Key(vol.All(str, vol.Length(min=1)), "a text that is not empty", "subset", ","),
    "keep_tokens": _Key(_FROM_ZERO, "a whole number from 0", "subset", 0),
    "keep_tokens_separator": _Key(str, _TEXT, "subset", ""),
    "secondary_separator": _Key(str, _TEXT, "subset"),
    "caption_prefix": _Key(str, _TEXT, "subset"),
    "caption_suffix": _Key(str, _TEXT, "subset"),
    "token_warmup_min": _Key(_FROM_ZERO, "a whole number from 0", "subset", 1),
    "token_warmup_step": _Key(vol.All(_number, vol.Range(min=0)), "a number from 0", "subset", 0.0),
    "caption_dropout_rate": _Key(_RATE, "a number from 0 to 1", "subset", 0.0),
    "caption_dropout_every_n_epochs": _Key(_FROM_ZERO, "a whole number from 0", "subset", 0),
    "caption_tag_dropout_rate": _Key(_RATE, "a number from 0 to 1", "subset", 0.0),
    "color_aug": _Key(bool, _BOOL, "subset", False),
    "flip_aug": _Key(bool, _BOOL, "subset", False),
    "random_crop": _Key(bool, _BOOL, "subset", False),
    "face_crop_aug_range": _Key(_range, "[least, most], above 0", "subset"),
    "loss_weight": _Key(vol.All(_number, vol.Range(min=0)), "a number from 0", "subset", 1.0),
    "resize_interpolation": _INTERPOLATION,
    "custom_attributes": _Key(dict, "a table", "subset"),
    "recursive": _Key(bool, _BOOL, "subset", False, kinds="folder"),
    "caption_extension": _Key(str, _TEXT, "subset", kinds="folder"),
    "cache_info": _Key(
        bool, _BOOL, "subset", False, kinds="folder"
    ),  # no effect: sizes and captions are read anew in every run
    "class_tokens": _Key(str, _TEXT, "subset", kinds="folder"),
    "image_dir": _Key(vol.All(str, vol.Length(min=1)), "a folder's path", "subset only"),
    "is_reg": _Key(bool, _BOOL, "subset only", False, kinds="folder"),
    "alpha_mask": _Key(bool, _BOOL, "subset only", False),
    "metadata_file": _Key(vol.All(str, vol.Length(min=1)), "a .json or .jsonl file's path", "subset only", kinds="metadata"),
    "conditioning_data_dir": _Key(vol.All(str, vol.Length(min=1)), "a folder's path", "subset only"),
}
_ALIASES = {"caption_extention": "caption_extension"}

_CAPTION_KEYS = {
    "shuffle": "shuffle_caption",
    "separator": "caption_separator",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator",
    "wildcard": "enable_wildcard",
    "prefix": "caption_prefix",
    "suffix": "caption_suffix",
    "token_warmup_min": "token_warmup_min",
    "token_warmup_step": "token_warmup_step",
    "dropout_rate": "caption_dropout_rate",
    "dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "tag_dropout_rate": "caption_tag_dropout_rate",
}
"""Field of `CaptionOptions` -> configuration key."""


def _schema(*levels: str) -> dict[Any, Any]:
    names = {name: key.accept for name, key in KEYS.items() if key.level in levels}
    return {vol.Optional(name): accept for name, accept in names.items()}


_SUBSET_SCHEMA = _schema("subset", "subset only")
_DATASET_SCHEMA = {**_schema("dataset", "subset"), vol.Required("subsets"): [_SUBSET_SCHEMA]}
_FILE_SCHEMA = vol.Schema(
    {vol.Optional("general"): _schema("dataset", "subset"), vol.Required("datasets"): [_DATASET_SCHEMA]},
)


def _section_of(path: list[Any]) -> str:
    """The table a voluptuous error path lies in, in TOML's words."""
    if path[:1] == ["general"]:
        return "[general]"
    indices = [item + 1 for item in path if isinstance(item, int)]
    if not indices:
        return "top level"
    dataset = f"[[datasets]] {indices[0]}"
    return dataset if len(indices) == 1 else f"{dataset}, [[datasets.subsets]] {indices[1]}"


def _known_at(path: list[Any]) -> list[str]:
    indices = [item for item in path if isinstance(item, int)]
    if len(indices) == 2:
        return [name for name, key in KEYS.items() if key.level != "dataset"]
    if indices or path[:1] == ["general"]:
        return [name for name, key in KEYS.items() if key.level != "subset only"] + (["subsets"] if indices else [])
    return ["general", "datasets"]


def _explain(error: vol.Invalid, document: Any) -> str:
    path = [item.schema if isinstance(item, vol.Marker) else item for item in error.path]
    section, key = _section_of(path), str(path[-1]) if path else ""
    if "extra keys" in error.msg:
        known = _known_at(path)
        if key in KEYS and key not in known:
            places = {"dataset": "[general] or [[datasets]]", "subset only": "[[datasets.subsets]]"}
            return f"{section}: '{key}' does not belong here. Put it in {places.get(KEYS[key].level, '[general]')}."
        return f"{section}: unknown key '{key}'.{suggest(key, known)}"
    if "required key" in error.msg:
        return f"{section}: '{key}' is missing." + (" Add at least one [[datasets]] table." if key == "datasets" else "")
    names = [item for item in path if isinstance(item, str)]
    key = names[-1] if names else ""
    value: Any = document
    for item in path[: len(path) - path[::-1].index(key)] if key else path:
        value = value[item]
    expected = KEYS[key].expected if key in KEYS else "a table" if key == "general" else "a list of tables"
    return f"{section}: {key} is {value!r}; expected {expected}."


def _validate(document: Any, source: str) -> dict[str, Any]:
    """`document` with its values in their types. Every problem is reported at once, as one `UserError`."""
    if isinstance(document, dict):
        _rename_aliases(document)
    try:
        validated: dict[str, Any] = _FILE_SCHEMA(document)
    except vol.MultipleInvalid as invalid:
        lines = sorted({_explain(error, document) for error in invalid.errors})
        raise UserError(f"{source}: " + listed(lines, "problems", shown=20)) from invalid
    return validated


def _rename_aliases(node: Any) -> None:
    """The key names that sd-scripts once had, under their present names."""
    if isinstance(node, list):
        for item in node:
            _rename_aliases(item)
    elif isinstance(node, dict):
        for old, new in _ALIASES.items():
            if old in node:
                node.setdefault(new, node.pop(old))
        for name in ("general", "datasets", "subsets"):
            _rename_aliases(node.get(name))


def read_document(path: Path) -> Any:
    """The parsed TOML or JSON file; a `UserError` says what is wrong with it."""
    import toml

    if not path.is_file():
        raise UserError(f"--dataset_config: {path} does not exist.")
    text = read_text(path)
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text)
        if path.suffix.lower() == ".toml":
            return toml.loads(text)
    except (toml.TomlDecodeError, ValueError, IndexError) as error:  # the toml package lets some IndexErrors through
        raise UserError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    raise UserError(f"--dataset_config: {path} is neither .toml nor .json.")


# From the command line


def _command_line_document(options: TrainOptions, conditioned: bool) -> dict[str, Any]:
    """The datasets that --train_data_dir, --reg_data_dir and --in_json describe, as a configuration file would.

    conditioned: --train_data_dir is one folder of pictures then, as sd-scripts' ControlNet scripts have it.
    """
    data = options.data
    folder = {"image_dir": data.train_data_dir} if data.train_data_dir else {}
    beside = {"conditioning_data_dir": options.loss.conditioning_data_dir} if options.loss.conditioning_data_dir else {}
    if data.in_json:
        return {"datasets": [{"subsets": [{"metadata_file": data.in_json, **folder, **beside}]}]}
    if not data.train_data_dir:
        raise UserError("no training images: give --train_data_dir or --dataset_config.")
    if conditioned:
        return {"datasets": [{"subsets": [{**folder, **beside}]}]}
    subsets = _folder_subsets(Path(data.train_data_dir), "--train_data_dir", is_reg=False)
    if data.reg_data_dir:
        regular = _folder_subsets(Path(data.reg_data_dir), "--reg_data_dir", is_reg=True)
        kept = {"custom_attributes": {PRESERVES: True}} if options.loss.preserve_prior else {}
        subsets += [{**subset, **kept} for subset in regular]
    masks = options.loss.conditioning_data_dir
    for subset in subsets:
        if masks and not subset["is_reg"]:
            inner = Path(masks) / Path(subset["image_dir"]).name  # arranged like the pictures, or all in one folder
            subset["conditioning_data_dir"] = str(inner if inner.is_dir() else masks)
    return {"datasets": [{"subsets": subsets}]}


def _folder_subsets(root: Path, flag: str, *, is_reg: bool) -> list[dict[str, Any]]:
    """One subset for each `N_class tokens` folder in `root`; N is the number of repeats, and folders with 0 are left out."""
    import logging

    from library.image_io import list_images

    if not root.is_dir():
        raise UserError(f"{flag}: the folder {root} does not exist.")
    subsets, skipped = [], []
    for folder in sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.name):
        repeats, _, tokens = folder.name.partition("_")
        if not repeats.isdecimal():
            skipped.append(folder.name)
        elif int(repeats):
            subset = {"image_dir": str(folder), "num_repeats": int(repeats), "is_reg": is_reg}
            subset["class_tokens"] = as_text(tokens)
            subsets.append(subset)
    if not subsets:
        loose = f" The {len(list_images(root))} images in {root} itself are not used." if list_images(root) else ""
        raise UserError(
            f"{flag}: {root} has no folder named <repeats>_<class tokens>, for example 10_sks dog.{loose} "
            "Move the images into such a folder, or describe them in a --dataset_config file."
        )
    if skipped:
        logging.getLogger(__name__).warning(
            "%s: folders without a repeat count in their name are not used: %s", flag, ", ".join(skipped)
        )
    return subsets


# Values in effect


def _flag_values(options: TrainOptions) -> dict[str, Any]:
    """Configuration key -> the command line's value, where it has one. Keys of subsets only have no flag of that meaning."""
    groups = [getattr(options, f.name) for f in fields(options)]
    flags = {name: value for group in groups for name, value in getattr(group, "__dict__", {}).items()}
    values = {}
    for name, key in KEYS.items():
        value = flags.get(key.flag or name)
        if value is not None and (key.level != "subset only" or name == "alpha_mask"):
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _lookup(name: str, *levels: Mapping[str, Any]) -> Any:
    for level in levels:
        if level.get(name) is not None:
            return level[name]
    return KEYS[name].default


def _check_subset(written: Mapping[str, Any], kind: str, where: str, conditioned: bool) -> list[str]:
    wrong = [
        f"{where}: '{name}' is only for {'image folders' if KEYS[name].kinds == 'folder' else 'metadata files'}."
        for name in written
        if kind not in KEYS[name].kinds
    ]
    if conditioned and not written.get("conditioning_data_dir"):
        wrong.append(f"{where}: 'conditioning_data_dir' is missing: the pictures that the ControlNet is given.")
    if written.get("conditioning_data_dir") and written.get("alpha_mask") and not conditioned:
        wrong.append(f"{where}: 'conditioning_data_dir' and 'alpha_mask' are two masks for one image: remove one.")
    if kind == "folder" and not written.get("image_dir"):
        wrong.append(f"{where}: 'image_dir' is missing.")
    return wrong


def _make_subset(written: Mapping[str, Any], levels: tuple[Mapping[str, Any], ...], conditioned: bool) -> SubsetConfig:
    def get(name: str) -> Any:
        return _lookup(name, written, *levels)

    extension = get("caption_extension")
    return SubsetConfig(
        image_dir=Path(written["image_dir"]) if written.get("image_dir") else None,
        metadata_file=Path(written["metadata_file"]) if written.get("metadata_file") else None,
        conditioning_data_dir=Path(written["conditioning_data_dir"]) if written.get("conditioning_data_dir") else None,
        conditioned=conditioned,
        recursive=get("recursive"),
        is_reg=get("is_reg"),
        class_tokens=get("class_tokens"),
        num_repeats=get("num_repeats"),
        captions=CaptionOptions(**{ours: get(key) for ours, key in _CAPTION_KEYS.items()}),
        caption_extension=extension if not extension or extension.startswith(".") else f".{extension}",
        color_aug=get("color_aug"),
        flip_aug=get("flip_aug"),
        random_crop=get("random_crop"),
        face_crop_range=get("face_crop_aug_range"),
        alpha_mask=get("alpha_mask") and (conditioned or not written.get("conditioning_data_dir")),
        loss_weight=get("loss_weight"),
        resize_interpolation=get("resize_interpolation"),
        custom_attributes=get("custom_attributes") or {},
    )


def _check_kind(subsets: list[dict[str, Any]], where: str) -> list[str]:
    with_metadata = sum(bool(subset.get("metadata_file")) for subset in subsets)
    if not subsets:
        return [f"{where}: has no subset. Add [[datasets.subsets]] with an image_dir."]
    if with_metadata not in (0, len(subsets)):
        return [
            f"{where}: {with_metadata} of {len(subsets)} subsets have a metadata_file. "
            "Image folders and metadata files cannot be mixed in one dataset: make two [[datasets]]."
        ]
    return []


def _make_dataset(
    written: Mapping[str, Any], outer: tuple[Mapping[str, Any], ...], model_step: int, where: str, conditioned: bool
) -> tuple[DatasetConfig | None, list[str]]:
    """The dataset, or None with what is wrong with it."""
    levels = (written, *outer)
    wrong = _check_kind(written["subsets"], where)
    if wrong:
        return None, wrong
    kind = "metadata" if written["subsets"][0].get("metadata_file") else "folder"
    for index, subset in enumerate(written["subsets"], start=1):
        wrong += _check_subset(subset, kind, f"{where}, [[datasets.subsets]] {index}", conditioned)
    named = _lookup("buckets", *levels) or ()
    wrong += [
        f"{where}: buckets has {width}x{height}: this model needs multiples of {model_step}."
        for width, height in named
        if width % model_step or height % model_step
    ]
    buckets = named
    if kind == "metadata" and not named:
        buckets = listed_buckets(Path(subset["metadata_file"]) for subset in written["subsets"])
    resolution = _lookup("resolution", *levels)
    if resolution is None and not buckets:
        return None, [*wrong, f"{where}: no resolution. Set resolution = 512 (or [width, height]) there, or --resolution."]
    enabled = _lookup("enable_bucket", *levels) or bool(buckets)
    rule = BucketRule(
        listed=buckets,
        resolution=resolution or max(buckets, key=lambda size: size[0] * size[1]),
        enabled=enabled,
        minimum=_lookup("min_bucket_reso", *levels),
        maximum=_lookup("max_bucket_reso", *levels),
        step=_lookup("bucket_reso_steps", *levels) if enabled else model_step,
        no_upscale=_lookup("bucket_no_upscale", *levels) and not buckets,
    )
    wrong += [] if named else check_rule(rule, model_step, where)
    if wrong:
        return None, wrong
    config = DatasetConfig(
        rule=rule,
        subsets=tuple(_make_subset(subset, levels, conditioned) for subset in written["subsets"]),
        batch_size=_lookup("batch_size", *levels),
        validation_split=_lookup("validation_split", *levels),
        validation_seed=_lookup("validation_seed", *levels),
        network_multiplier=_lookup("network_multiplier", *levels),
        resize_interpolation=_lookup("resize_interpolation", *levels),
    )
    return config, []


def _validated_flags(options: TrainOptions) -> dict[str, Any]:
    """The command line's values through the same checks as the file's, so that both are held to one rule."""
    values = {}
    for name, value in _flag_values(options).items():
        try:
            values[name] = vol.Schema(KEYS[name].accept)(value)
        except vol.Invalid as invalid:
            flag = KEYS[name].flag or name
            raise UserError(f"--{flag} is {value!r}; expected {KEYS[name].expected}.") from invalid
    return values


def _per_resolution(written: dict[str, Any], outer: tuple[Mapping[str, Any], ...]) -> list[dict[str, Any]]:
    """`resolutions` makes as many datasets of one: each picture is seen in every size."""
    sizes = _lookup("resolutions", written, *outer)
    return [{**written, "resolution": size} for size in sizes] if sizes else [written]


def load_data_config(options: TrainOptions, model_step: int, *, conditioned: bool = False) -> DataConfig:
    """Every dataset `options` asks for. model_step: bucket sides have to be multiples of it (`LatentSpec.bucket_step`).

    conditioned: every picture has one beside it that the model is given (a ControlNet learns), and conditioning_data_dir has
    those; else it has masks.
    Raises `UserError` listing everything that is wrong; looks at no image yet.
    """
    config_path = options.data.dataset_config
    source = Path(config_path) if config_path else None
    document = read_document(source) if source else _command_line_document(options, conditioned)
    name = str(source) if source else "command line"
    validated = _validate(document, name)
    outer = (validated.get("general", {}), _validated_flags(options))
    datasets, wrong = [], []
    for index, written in enumerate(validated["datasets"], start=1):
        for one in _per_resolution(written, outer):
            where = f"[[datasets]] {index}" if source else "dataset"
            dataset, problems = _make_dataset(one, outer, model_step, where, conditioned)
            wrong += [problem for problem in problems if problem not in wrong]
            datasets += [dataset] if dataset else []
    if not validated["datasets"]:
        wrong.append("no [[datasets]].")
    if wrong:
        raise UserError(f"{name}: " + listed(wrong, "problems", shown=20))
    return DataConfig(tuple(datasets), source)


def check_preservation(config: DataConfig, mode: Mode) -> bool:
    """Whether pictures keep the untrained model's predictions. Raises `UserError` where some of them would validate a model
    that has no frozen one beside it."""
    named = [(dataset, subset) for dataset in config.datasets for subset in dataset.subsets if subset.preserves]
    wrong = [subset.name for dataset, subset in named if dataset.validation_split and not subset.is_reg]
    if mode == "full" and wrong:
        raise UserError(
            f"diff_output_preservation ({', '.join(wrong)}): pictures that keep the untrained model's predictions cannot "
            "validate the model that is trained. Add is_reg = true to them, as none of those is held out, or move them to "
            "[[datasets]] without validation_split."
        )
    return bool(named)
