"""Laws of buckets, captions and the fallback order, tried on cases that nobody would think of. The same cases in every run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import toml
from data_tools import make_options, write_toml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from library.buckets import BucketRule, bucket_sizes, nearest_by_ratio
from library.captions import CaptionMoment, CaptionOptions, final_caption, is_dropped
from library.config_util import KEYS, DatasetConfig, SubsetConfig, load_data_config
from library.dataset import EpochKeys, ImageDataset, Part
from library.errors import UserError
from library.records import Record, RecordTable

laws = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ---- buckets ---------------------------------------------------------------------------------------------------------


@st.composite
def rules(draw: st.DrawFn, **fixed: Any) -> BucketRule:
    step = draw(st.sampled_from([8, 16, 32, 64]))
    sides = st.integers(step, 1024)
    settings_of = {
        "resolution": (draw(sides), draw(sides)),
        "enabled": True,
        "minimum": draw(st.integers(1, 512)),
        "maximum": draw(st.integers(512, 2048)),
        "step": step,
        "no_upscale": draw(st.booleans()),
    }
    rule = BucketRule(**{**settings_of, **fixed})
    assume(rule.sizes)
    return rule


pictures = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@laws
@given(rules())
def test_buckets_are_all_that_fit_and_nothing_else(rule: BucketRule) -> None:
    area = rule.resolution[0] * rule.resolution[1]
    shortest, longest = rule.limits
    found = bucket_sizes(rule.resolution, shortest, longest, rule.step)
    assert len(set(found)) == len(found) and {size[::-1] for size in found} == set(found)
    for width, height in found:
        assert width % rule.step == height % rule.step == 0 and width * height <= area
    squares = [size for size in found if size[0] == size[1]]
    between = [size for size in found if size not in squares]
    assert all(shortest <= min(size) and max(size) <= longest for size in between)
    for width, height in between:  # the shorter side given, the longer could not be a step longer, or the other way round
        assert any(other + rule.step > longest or (other + rule.step) * side > area
                   for side, other in ((width, height), (height, width)))  # fmt: skip


@laws
@given(rules(no_upscale=False), pictures)
def test_a_picture_just_covers_the_bucket_of_its_shape(rule: BucketRule, size: tuple[int, int]) -> None:
    placement = rule.place(size)
    assert placement.bucket in rule.sizes
    assert min(placement.slack) == 0, "more is cut away than the shapes differ by"
    ratio = size[0] / size[1]
    error = abs(placement.bucket[0] / placement.bucket[1] - ratio)
    if size not in rule.sizes:
        assert error == min(abs(bucket[0] / bucket[1] - ratio) for bucket in rule.sizes)
    assert nearest_by_ratio(placement.bucket, rule.sizes) == placement.bucket


@laws
@given(rules(no_upscale=True), pictures)
def test_nothing_is_enlarged_where_that_is_not_wanted(rule: BucketRule, size: tuple[int, int]) -> None:
    try:
        placement = rule.place(size)
    except UserError:
        area = rule.resolution[0] * rule.resolution[1]
        assert min(size) < rule.step or size[0] * size[1] > area, "only what is thinner than a step has no bucket"
        return
    for side, resized, bucket in zip(size, placement.resized, placement.bucket, strict=True):
        assert bucket % rule.step == 0 and 0 < bucket <= resized
        assert resized <= side


def record_of(number: int, bucket: tuple[int, int], repeats: int) -> Record:
    rule = BucketRule(bucket, enabled=False, minimum=1, maximum=9999, step=8, no_upscale=False)
    return Record(str(number), Path(f"{number}.png"), bucket, "", rule.place(bucket), SubsetConfig(), repeats, 1.0)


@laws
@given(
    parts=st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from([(64, 64), (96, 32), (32, 96)]), st.integers(1, 3)), min_size=1, max_size=12),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
    world=st.integers(1, 4),
)
def test_every_picture_is_seen_as_often_as_it_is_repeated(
    parts: list[tuple[list[tuple[tuple[int, int], int]], int]], seed: int, epoch: int, world: int
) -> None:
    records = [[record_of(number, *item) for number, item in enumerate(items)] for items, _ in parts]
    made = [Part.of(RecordTable.of(own), size, 1.0) for own, (_, size) in zip(records, parts, strict=True)]
    dataset = ImageDataset(tuple(made), seed, tokenizer=None)  # type: ignore[arg-type]
    plan = list(dataset.plan(epoch))
    assert len(plan) == dataset.num_batches
    seen = Counter((part, tuple(item)) for part, items in plan for item in items)
    expected = {(part, (number, repeat)) for part, own in enumerate(records) for number, record in enumerate(own)
                for repeat in range(record.repeats)}  # fmt: skip
    assert seen == dict.fromkeys(expected, 1)
    for part, items in plan:
        assert 1 <= len(items) <= parts[part][1]
        assert len({records[part][number].placement.bucket for number, _ in items}) == 1
    each = [list(EpochKeys(len(plan), epoch=epoch, epochs=epoch + 1, start=0, rank=rank, world=world)) for rank in range(world)]
    assert len({len(keys) for keys in each}) == 1, "processes have to make as many steps"
    assert {index for keys in each for _, index in keys} == set(range(len(plan)))


# ---- captions --------------------------------------------------------------------------------------------------------

tags = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
captions = st.lists(tags, min_size=1, max_size=8)
moments = st.builds(CaptionMoment, seed=st.integers(0, 99), epoch=st.integers(0, 99), step=st.integers(0, 99))


@laws
@given(captions, st.integers(0, 9), st.sampled_from([",", ";", " | ", "."]), moments)
def test_shuffling_loses_nothing_and_moves_no_kept_tag(
    words: list[str], keep: int, separator: str, moment: CaptionMoment
) -> None:
    options = CaptionOptions(shuffle=True, keep_tokens=keep, separator=separator)
    text = final_caption(separator.join(words), options, moment, "key")
    read = [word.strip() for word in text.split(separator)]
    assert sorted(read) == sorted(words) and read[:keep] == words[:keep]
    assert text == final_caption(separator.join(words), options, moment, "key"), "the same moment, the same reading"


@laws
@given(captions, captions, captions, moments, st.floats(0, 1))
def test_what_stands_outside_the_marks_stays(
    front: list[str], middle: list[str], back: list[str], moment: CaptionMoment, rate: float
) -> None:
    options = CaptionOptions(shuffle=True, keep_tokens_separator="|||", tag_dropout_rate=rate, keep_tokens=1)
    text = final_caption(" ||| ".join(map(", ".join, (front, middle, back))), options, moment, "key")
    read = text.split(", ")
    assert read[: len(front)] == front and read[len(read) - len(back) :] == back
    left = Counter(read[len(front) : len(read) - len(back)])
    assert not left - Counter(middle), "what is left was there"


@laws
@given(captions, st.integers(1, 8), st.integers(1, 50))
def test_warming_up_shows_ever_more_tags_from_the_start(words: list[str], least: int, steps: int) -> None:
    options = CaptionOptions(token_warmup_min=least, token_warmup_step=steps)
    shown = [final_caption(",".join(words), options, CaptionMoment(step=step), "k").split(", ") for step in range(steps + 2)]
    counts = [len(read) for read in shown]
    assert counts[0] == min(least, len(words)) and counts[-1] == counts[steps] == len(words)
    if least <= len(words):
        assert counts == sorted(counts)
    assert all(read == words[: len(read)] for read in shown)


@laws
@given(
    st.lists(captions.map(" ".join), min_size=1, max_size=4), st.text("ab ", max_size=4), st.text("yz ", max_size=4), moments
)
def test_prefix_and_suffix_are_there_whatever_line_is_picked(
    lines: list[str], prefix: str, suffix: str, moment: CaptionMoment
) -> None:
    text = final_caption("\n".join(lines), CaptionOptions(wildcard=True, prefix=prefix, suffix=suffix), moment, "key")
    around = [f"{prefix} {line}" if prefix else line for line in lines]
    assert text in [f"{line} {suffix}" if suffix else line for line in around]


@laws
@given(
    st.floats(0, 1),
    st.integers(0, 5),
    st.lists(st.tuples(moments, st.text(max_size=3)), min_size=1, max_size=5),
)
def test_a_caption_is_dropped_whole_or_not_at_all(rate: float, every: int, seen: list[tuple[CaptionMoment, str]]) -> None:
    options = CaptionOptions(dropout_rate=rate, dropout_every_n_epochs=every, prefix="p", suffix="s")
    for moment, key in seen:
        dropped = is_dropped(options, moment, key)
        assert final_caption("a, b", options, moment, key) == ("" if dropped else "p a, b s")
        if every and (moment.epoch + 1) % every == 0 or rate == 1:
            assert dropped
        elif rate == 0:
            assert not dropped


# ---- the fallback order ----------------------------------------------------------------------------------------------

booleans, rates, texts = st.booleans(), st.floats(0, 1), st.text("abc,;|", min_size=1, max_size=3)
counts = st.integers(1, 99)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "batch_size": counts,
    "validation_split": rates,
    "validation_seed": st.integers(0, 99),
    "network_multiplier": st.floats(-2, 2),
    "num_repeats": counts,
    "keep_tokens": st.integers(0, 9),
    "token_warmup_min": counts,
    "token_warmup_step": st.floats(0, 9),
    "caption_dropout_every_n_epochs": st.integers(0, 9),
    **dict.fromkeys(["caption_dropout_rate", "caption_tag_dropout_rate"], rates),
    **dict.fromkeys(
        ["shuffle_caption", "enable_wildcard", "color_aug", "flip_aug", "random_crop", "recursive", "bucket_no_upscale"],
        booleans,
    ),
    **dict.fromkeys(
        [
            "caption_separator",
            "keep_tokens_separator",
            "secondary_separator",
            "caption_prefix",
            "caption_suffix",
            "class_tokens",
        ],
        texts,
    ),
    "caption_extension": st.sampled_from([".txt", ".cap"]),
    "resize_interpolation": st.sampled_from(["area", "nearest", "lanczos"]),
    "loss_weight": st.floats(0, 9),
    "face_crop_aug_range": st.sampled_from([[1.0, 2.0], [0.5, 4.0]]),
    "custom_attributes": st.dictionaries(st.sampled_from(["one", "two"]), st.integers(0, 9), min_size=1),
}
"""Key -> values it may have. The sizes depend on each other; `test_config_util.py` has them."""

NOT_TRIED = {"resolution", "resolutions", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "buckets",
             "cache_info", "image_dir", "is_reg", "alpha_mask", "metadata_file", "conditioning_data_dir"}  # fmt: skip

CAPTION_FIELDS = {
    "shuffle_caption": "shuffle",
    "enable_wildcard": "wildcard",
    "caption_separator": "separator",
    "caption_prefix": "prefix",
    "caption_suffix": "suffix",
    "caption_dropout_rate": "dropout_rate",
    "caption_dropout_every_n_epochs": "dropout_every_n_epochs",
    "caption_tag_dropout_rate": "tag_dropout_rate",
}


def in_effect(key: str, dataset: DatasetConfig, subset: SubsetConfig) -> Any:
    """The value that `key` ended up with."""
    if key == "bucket_no_upscale":
        return dataset.rule.no_upscale
    if key == "face_crop_aug_range":
        return list(subset.face_crop_range) if subset.face_crop_range else None
    if key in ("custom_attributes", "num_repeats"):
        return getattr(subset, key)
    for holder in (subset, subset.captions, dataset):
        name = CAPTION_FIELDS.get(key, key)
        if hasattr(holder, name):
            return getattr(holder, name)
    raise AssertionError(key)


def test_every_key_has_its_place_in_the_law_below() -> None:
    assert VALUES.keys() | NOT_TRIED == KEYS.keys() and not VALUES.keys() & NOT_TRIED


@laws
@given(data=st.data(), chosen=st.sets(st.sampled_from(sorted(VALUES)), min_size=1, max_size=6), as_json=st.booleans())
def test_the_innermost_level_that_has_a_key_decides(
    data: st.DataObject, chosen: set[str], as_json: bool, tmp_path: Path
) -> None:
    levels: dict[str, dict[str, Any]] = {"subset": {}, "dataset": {}, "general": {}, "flags": {}}
    for key in sorted(chosen):
        possible = [level for level in levels if level != "subset" or KEYS[key].level == "subset"]
        if key in ("class_tokens", "custom_attributes", "loss_weight", "validation_split", "validation_seed"):
            possible.remove("flags")  # no flag of that name for every script
        if key == "network_multiplier":
            possible.remove("flags")
        for level in data.draw(st.sets(st.sampled_from(possible)), label=f"{key} at"):
            levels[level][key] = data.draw(VALUES[key])
    document = {
        "general": levels["general"],
        "datasets": [{"resolution": 64, **levels["dataset"], "subsets": [{"image_dir": "a", **levels["subset"]}]}],
    }
    path = tmp_path / ("data.json" if as_json else "data.toml")
    write_toml(path, json.dumps(document) if as_json else toml.dumps(document))
    flags = {KEYS[key].flag or key: value for key, value in levels["flags"].items()}
    if "face_crop_aug_range" in flags:
        flags["face_crop_aug_range"] = ",".join(map(str, flags["face_crop_aug_range"]))
    (dataset,) = load_data_config(make_options(dataset_config=str(path), **flags), 8).datasets
    for key in VALUES:
        holders = [levels[level][key] for level in levels if key in levels[level]]
        expected = holders[0] if holders else KEYS[key].default
        if key == "custom_attributes":
            expected = expected or {}
        found = in_effect(key, dataset, dataset.subsets[0])
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), key
