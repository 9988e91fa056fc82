"""Sources, batches and loaders: every image every epoch, and a batch that depends on its key alone."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import LATENT, build, make_options, make_strategies, write_folder, write_picture, write_toml
from PIL import Image

from library.batch import TrainBatch
from library.buckets import Placement
from library.dataset import ImageDataset, Row, TrainData, batches_per_rank, make_loader
from library.errors import UserError
from library.image_io import Crop, choose_crop, fit, list_images, resize, vary_color
from library.records import Record
from library.rng import keyed_random
from library.strategy_base import Strategies


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


def from_toml(tmp_path: Path, strategies: Strategies, text: str, **flags: Any) -> TrainData:
    return build(make_options(dataset_config=write_toml(tmp_path / "data.toml", text), **flags), strategies)


BUCKETS = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"


def varied(tmp_path: Path, strategies: Strategies, subset: str = "", **flags: Any) -> TrainData:
    """Five square, two wide and one tall picture, repeated twice, in batches of three."""
    write_folder(tmp_path / "img", [(64, 64)] * 5 + [(128, 48)] * 2 + [(48, 128)])
    text = f"[general]\nresolution = 64\n{BUCKETS}[[datasets]]\nbatch_size = 3\n[[datasets.subsets]]\n"
    return from_toml(tmp_path, strategies, f"{text}image_dir = '{tmp_path / 'img'}'\nnum_repeats = 2\n{subset}", **flags)


def epoch_of(dataset: ImageDataset, epoch: int) -> list[TrainBatch]:
    return [dataset[(epoch, index)] for index in range(dataset.num_batches)]


def assert_same(one: TrainBatch, other: TrainBatch) -> None:
    assert one.captions == other.captions and one.latent_seeds == other.latent_seeds
    for name in ("images", "latents", "loss_weights", "original_sizes", "crop_top_lefts", "target_sizes"):
        first, second = getattr(one, name), getattr(other, name)
        assert first is second is None or torch.equal(first, second), name


# ---- epochs ----------------------------------------------------------------------------------------------------------


def test_every_image_is_seen_with_its_repeats_in_every_epoch_and_short_batches_are_kept(
    tmp_path: Path, strategies: Strategies
) -> None:
    dataset = varied(tmp_path, strategies).train
    assert dataset.num_batches == 4 + 2 + 1  # 10 square, 4 wide and 2 tall pictures in threes
    for epoch in (0, 1, 5):
        batches = epoch_of(dataset, epoch)
        assert Counter(caption for batch in batches for caption in batch.captions) == {f"picture {i}, tag": 2 for i in range(8)}
        assert sorted(len(batch) for batch in batches) == [1, 1, 2, 3, 3, 3, 3]


def test_a_batch_has_one_size_and_pixels_between_minus_one_and_one(tmp_path: Path, strategies: Strategies) -> None:
    for batch in epoch_of(varied(tmp_path, strategies).train, 0):
        assert batch.images is not None and batch.images.dtype == torch.float32
        assert batch.images.shape[0] == len(batch) and batch.images.shape[1] == 3
        assert (batch.target_sizes == torch.tensor(batch.images.shape[-2:])).all()
        assert -1 <= batch.images.min() < -0.8 and 0.8 < batch.images.max() <= 1
        assert batch.tokens is not None and batch.tokens["text_encoder"].shape == (len(batch), 1, 77)
        assert batch.conditioning is None and batch.latents is None and batch.preserve is None


def test_order_changes_with_epoch_and_seed_only(tmp_path: Path, strategies: Strategies) -> None:
    first, again = varied(tmp_path, strategies).train, varied(tmp_path, strategies).train
    other = varied(tmp_path, strategies, seed=8).train
    assert list(first.plan(3)) == list(again.plan(3))
    assert list(first.plan(3)) != list(first.plan(4))
    assert list(first.plan(3)) != list(other.plan(3))


def test_a_batch_is_a_pure_function_of_its_key(tmp_path: Path, strategies: Strategies) -> None:
    augmented = "flip_aug = true\ncolor_aug = true\nrandom_crop = true\nshuffle_caption = true\ncaption_dropout_rate = 0.3\n"
    dataset = varied(tmp_path, strategies, augmented).train
    late = dataset[(2, 5)]
    epoch_of(dataset, 0)
    assert_same(dataset[(2, 5)], late)
    assert_same(pickle.loads(pickle.dumps(dataset))[(2, 5)], late)


@pytest.mark.parametrize(
    ("workers", "start", "world"),
    [(0, None, 1), (2, None, 1), (1, "spawn", 1), (0, None, 3), (1, None, 2)],
    ids=["none", "forked", "spawned", "three processes", "two processes with workers"],
)
def test_batches_are_the_same_with_any_number_of_workers_and_processes(
    workers: int, start: str | None, world: int, tmp_path: Path, strategies: Strategies
) -> None:
    """Spawned ones start afresh, as on Windows and macOS: all they need is sent to them by pickling."""
    augmented = "flip_aug = true\nrandom_crop = true\nshuffle_caption = true\n"
    data = varied(tmp_path, strategies, augmented, max_data_loader_n_workers=workers)
    loaded = []
    for rank in range(world):
        loader = make_loader(data.train, epoch=1, start=0, epochs=3, rank=rank, world=world, options=data.options, pin=False)
        loader.multiprocessing_context = start
        loaded.append(list(loader))
        assert len(loader) == len(loaded[0]) == len(loaded[rank])
    per_epoch = batches_per_rank(data.train, world)
    for number, epoch in enumerate((1, 2)):
        shown = [batches[number * per_epoch + turn] for turn in range(per_epoch) for batches in loaded]
        expected = epoch_of(data.train, epoch)
        for one, other in zip(shown, expected + expected[: len(shown) - len(expected)], strict=True):
            assert_same(one, other)


def test_starting_late_gives_the_same_tail(tmp_path: Path, strategies: Strategies) -> None:
    data = varied(tmp_path, strategies)

    def batches(start: int) -> list[TrainBatch]:
        return list(make_loader(data.train, epoch=1, start=start, rank=0, world=1, options=data.options, pin=False))

    for one, other in zip(batches(0)[4:], batches(4), strict=True):
        assert_same(one, other)


def test_processes_share_an_epoch_and_the_first_batches_fill_up_the_end(tmp_path: Path, strategies: Strategies) -> None:
    data = varied(tmp_path, strategies)
    assert batches_per_rank(data.train, 2) == 4
    indices = []
    for rank in (0, 1):
        loader = make_loader(data.train, epoch=0, start=0, rank=rank, world=2, options=data.options, pin=False)
        indices.append([index for _, index in loader.sampler])
    assert indices == [[0, 2, 4, 6], [1, 3, 5, 0]]


def test_several_datasets_train_together_each_with_its_size_and_batch_size(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)] * 4)
    text = "".join(
        f"[[datasets]]\nresolution = {size}\nbatch_size = {batch}\nnetwork_multiplier = {multiplier}\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
        for size, batch, multiplier in ((32, 4, 1.0), (64, 1, 0.5))
    )
    batches = epoch_of(from_toml(tmp_path, strategies, text).train, 0)
    seen = [(len(batch), tuple(batch.target_sizes[0].tolist()), batch.multiplier) for batch in batches]
    assert Counter(seen) == {(4, (32, 32), 1.0): 1, (1, (64, 64), 0.5): 4}


def test_subsets_of_one_dataset_mix_in_a_batch(tmp_path: Path, strategies: Strategies) -> None:
    subsets = ""
    for name in "ab":
        write_picture(tmp_path / name / "p.png", caption=name)
        subsets += f"[[datasets.subsets]]\nimage_dir = '{tmp_path / name}'\n"
    (batch,) = epoch_of(from_toml(tmp_path, strategies, f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{subsets}").train, 0)
    assert set(batch.captions) == {"a", "b"}


class Louder(ImageDataset):
    """What a user might put in the place of ours."""

    def collate(self, records: Sequence[Record], rows: Sequence[Row], multiplier: float) -> TrainBatch:
        shouted = [replace(row, caption=row.caption.upper()) for row in rows]
        return super().collate(records, shouted, multiplier)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_of_the_users_can_make_the_batches(workers: int, tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)] * 4)
    flags = {"dataset_class": f"{__name__}.Louder", "max_data_loader_n_workers": workers}
    text = "[[datasets]]\nresolution = 64\nvalidation_split = 0.25\n[[datasets.subsets]]\n"
    data = from_toml(tmp_path, strategies, f"{text}image_dir = '{tmp_path / 'img'}'\n", **flags)
    loader = make_loader(data.train, epoch=0, start=0, rank=0, world=1, options=data.options, pin=False)
    seen = [caption for batch in loader for caption in batch.captions]
    assert len(seen) == 3 and all(caption.startswith("PICTURE ") for caption in seen)
    assert data.validation is not None and data.validation[(0, 0)].captions[0].startswith("PICTURE ")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("Louder", "is not a class derived from library.dataset.ImageDataset"),
        ("nowhere.Louder", "No module named 'nowhere'"),
        (f"{__name__}.Quieter", "has no attribute 'Quieter'"),
        ("library.batch.TrainBatch", "sd-scripts' dataset classes make batches of another form"),
    ],
)
def test_a_class_that_cannot_is_told(path: str, says: str, tmp_path: Path, strategies: Strategies) -> None:
    with pytest.raises(UserError, match=says):
        from_toml(tmp_path, strategies, folder_toml(tmp_path / "img"), dataset_class=path)


# ---- augmentation and weights ----------------------------------------------------------------------------------------


def test_flips_and_random_crops_are_drawn_anew_each_epoch_and_told_to_the_batch(tmp_path: Path, strategies: Strategies) -> None:
    write_picture(tmp_path / "img" / "p.png", (96, 64), caption="x")
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
    dataset = from_toml(tmp_path, strategies, text + "flip_aug = true\nrandom_crop = true\n").train
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "img" / "p.png"))).permute(2, 0, 1).float() / 127.5 - 1
    seen = set()
    for epoch in range(12):
        batch = dataset[(epoch, 0)]
        assert batch.images is not None
        top, left = batch.crop_top_lefts[0].tolist()
        crops = [source[:, top : top + 64, left : left + 64] for source in (picture, picture.flip(-1))]
        matches = [torch.allclose(batch.images[0], crop, atol=1e-6) for crop in crops]
        assert any(matches), "the recorded crop is not where the pixels come from"
        seen.add((matches[1], left))
    assert {flipped for flipped, _ in seen} == {True, False}
    assert len({left for _, left in seen}) > 3


def test_original_sizes_and_crops_are_height_first(tmp_path: Path, strategies: Strategies) -> None:
    write_picture(tmp_path / "img" / "p.png", (300, 210), caption="x")
    text = f"[[datasets]]\nresolution = 192\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
    batch = from_toml(tmp_path, strategies, text).train[(0, 0)]
    assert batch.original_sizes.tolist() == [[210, 300]]
    assert batch.crop_top_lefts.tolist() == [[0, 41]]  # 300x210 -> 274x192: 82 pixels are cut from the width
    assert batch.target_sizes.tolist() == [[192, 192]]


def test_regularisation_images_are_repeated_to_match_and_weigh_less(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "train" / "3_cat", [(64, 64)] * 3)
    write_folder(tmp_path / "reg" / "1_animal", [(64, 64)] * 2, captions=False)
    flags = {"train_data_dir": str(tmp_path / "train"), "reg_data_dir": str(tmp_path / "reg"), "resolution": "64"}
    data = build(make_options(prior_loss_weight=0.25, train_batch_size=2, **flags), strategies)
    seen = Counter(
        (caption, weight.item())
        for batch in epoch_of(data.train, 0)
        for caption, weight in zip(batch.captions, batch.loss_weights, strict=True)
    )
    assert seen == {**{(f"picture {i}, tag", 1.0): 3 for i in range(3)}, ("animal", 0.25): 9}


def test_more_regularisation_than_training_images_leaves_the_rest_out(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "train" / "1_cat", [(64, 64)] * 2)
    write_folder(tmp_path / "reg" / "1_animal", [(64, 64)] * 5)
    flags = {"train_data_dir": str(tmp_path / "train"), "reg_data_dir": str(tmp_path / "reg"), "resolution": "64"}
    data = build(make_options(**flags), strategies)
    assert data.train.num_images == 4
    assert data.metadata()["ss_num_reg_images"] == "5"


def test_rows_that_preserve_the_model_are_marked(tmp_path: Path, strategies: Strategies) -> None:
    write_picture(tmp_path / "a" / "p.png", caption="a")
    write_picture(tmp_path / "b" / "p.png", caption="b")
    text = (
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'b'}'\nis_reg = true\n"
        "custom_attributes = { diff_output_preservation = true }\n"
    )
    (batch,) = epoch_of(from_toml(tmp_path, strategies, text).train, 0)
    assert batch.preserve is not None
    assert dict(zip(batch.captions, batch.preserve.tolist(), strict=True)) == {"a": False, "b": True}


def test_a_dropped_caption_is_empty_and_is_tokenized_as_such(tmp_path: Path, strategies: Strategies) -> None:
    batch = varied(tmp_path, strategies, "caption_dropout_rate = 1.0\n").train[(0, 0)]
    assert set(batch.captions) == {""}
    assert batch.tokens is not None
    assert torch.equal(batch.tokens["text_encoder"][:1], strategies.tokenize.tokenize([""])["text_encoder"])


@pytest.mark.parametrize(("warmup", "flags"), [(4, {}), (0.25, {"max_train_epochs": 8}), (0.25, {"max_train_steps": 16})])
def test_token_warmup_counts_optimizer_steps(
    warmup: float, flags: dict[str, Any], tmp_path: Path, strategies: Strategies
) -> None:
    write_picture(tmp_path / "img" / "p.png", caption="a, b, c, d, e")
    text = folder_toml(tmp_path / "img") + f"num_repeats = 3\ntoken_warmup_step = {warmup}\n"
    data = from_toml(tmp_path, strategies, text, gradient_accumulation_steps=2, **flags)
    loader = make_loader(data.train, epoch=0, start=0, epochs=3, rank=0, world=1, options=data.options, pin=False)
    # three batches an epoch make two steps: the second takes what is left
    assert [len(batch.captions[0].split(", ")) for batch in loader] == [1, 1, 2, 3, 3, 4, 5, 5, 5]


def test_the_seed_of_a_latent_depends_on_the_content_and_not_on_the_name(tmp_path: Path, strategies: Strategies) -> None:
    write_picture(tmp_path / "img" / "a.png", key=1, caption="a")
    write_picture(tmp_path / "img" / "b.png", key=1, caption="b")
    write_picture(tmp_path / "img" / "c.png", key=2, caption="c")
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 3\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
    batch = from_toml(tmp_path, strategies, text).train[(0, 0)]
    seeds = dict(zip(batch.captions, batch.latent_seeds, strict=True))
    assert seeds["a"] == seeds["b"] != seeds["c"]


# ---- validation ------------------------------------------------------------------------------------------------------


def test_held_out_images_are_never_trained_even_where_a_second_dataset_has_the_folder(
    tmp_path: Path, strategies: Strategies
) -> None:
    write_folder(tmp_path / "img", [(64, 64)] * 10)
    subset = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\nnum_repeats = 3\nflip_aug = true\n"
    text = f"[[datasets]]\nresolution = 64\nvalidation_split = 0.3\n{subset}[[datasets]]\nresolution = 32\n{subset}"
    data = from_toml(tmp_path, strategies, text)
    assert data.validation is not None
    held_out = {record.path for record in data.validation.records}
    assert len(held_out) == 3 and data.validation.num_images == 3
    assert not held_out & {record.path for record in data.train.records}
    assert data.train.num_images == 2 * 7 * 3


def test_validation_batches_are_the_same_in_every_epoch(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(80, 64)] * 6)
    subset = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\nflip_aug = true\ncaption_dropout_rate = 0.5\n"
    data = from_toml(tmp_path, strategies, f"[[datasets]]\nresolution = 64\nvalidation_split = 0.5\n{subset}")
    assert data.validation is not None
    for one, other in zip(epoch_of(data.validation, 0), epoch_of(data.validation, 7), strict=True):
        assert_same(one, other)
        assert "" not in one.captions


# ---- captions and metadata files -------------------------------------------------------------------------------------


def captions_of(data: TrainData) -> dict[str, str]:
    return {record.path.name: record.caption for record in data.train.records}


def test_captions_come_from_txt_then_caption_then_the_class_tokens(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.png", "c.png", "a_1_2_3_4.png"):
        write_picture(tmp_path / "img" / name)
    (tmp_path / "img" / "a.txt").write_text("from txt\nsecond line\n", encoding="utf-8")
    (tmp_path / "img" / "a.caption").write_text("not this", encoding="utf-8")
    (tmp_path / "img" / "b.caption").write_bytes("\ufefffrom caption é".encode())
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\nclass_tokens = 'sks'\n"
    expected = {"a.png": "from txt", "b.png": "from caption é", "c.png": "sks", "a_1_2_3_4.png": "from txt"}
    assert captions_of(from_toml(tmp_path, strategies, text)) == expected
    assert "1 caption files have further lines, which only enable_wildcard uses. First: a.txt." in caplog.text


def test_a_folder_without_captions_is_warned_about_once_with_the_extension_that_is_there(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "img", [(64, 64)] * 3)
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
    data = from_toml(tmp_path, strategies, text + "caption_extension = '.caption'\n")
    assert set(captions_of(data).values()) == {""}
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(tmp_path / "img") in message and "no image has a caption file (.caption)" in message
    assert "set caption_extension = '.txt'" in message


def metadata_data(tmp_path: Path, strategies: Strategies, name: str, content: str, extra: str = "") -> TrainData:
    for picture in ("a.png", "b.jpg", "sub/c.png"):
        write_picture(tmp_path / "img" / picture, (64, 64))
    (tmp_path / name).write_text(content, encoding="utf-8")
    text = (
        f"[[datasets]]\nresolution = 64\n{BUCKETS}[[datasets.subsets]]\n"
        f"metadata_file = '{tmp_path / name}'\nimage_dir = '{tmp_path / 'img'}'\n{extra}"
    )
    return from_toml(tmp_path, strategies, text)


def test_a_json_metadata_file_names_images_by_stem_name_or_path(tmp_path: Path, strategies: Strategies) -> None:
    entries = {
        "a": {"caption": "one", "tags": "t, u"},
        "b.jpg": {"tags": "only, tags", "train_resolution": [96, 32]},
        str(tmp_path / "img" / "sub" / "c"): {"caption": "three"},
    }
    data = metadata_data(tmp_path, strategies, "meta.json", json.dumps(entries))
    assert captions_of(data) == {"a.png": "one,t, u", "b.jpg": "only, tags", "c.png": "three"}
    buckets = {record.path.name: record.placement.bucket for record in data.train.records}
    assert buckets == {"a.png": (64, 64), "b.jpg": (96, 32), "c.png": (64, 64)}
    assert json.loads(data.metadata()["ss_tag_frequency"]) == {"meta.json": {"t": 1, "u": 1, "only": 1, "tags": 1}}


def test_buckets_that_a_metadata_file_lists_whole_stand_in_for_a_resolution(tmp_path: Path, strategies: Strategies) -> None:
    for picture in ("a.png", "b.jpg"):
        write_picture(tmp_path / "img" / picture, (64, 64))

    def placed(entries: dict[str, Any]) -> dict[str, tuple[int, int]]:
        (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
        flags = {"in_json": tmp_path / "meta.json", "train_data_dir": tmp_path / "img"}
        return {record.path.name: record.placement.bucket for record in build(make_options(**flags), strategies).train.records}

    listed = {"a": {"caption": "one", "train_resolution": [96, 32]}, "b": {"caption": "two", "train_resolution": [40, 72]}}
    assert placed(listed) == {"a.png": (96, 32), "b.jpg": (40, 72)}
    with pytest.raises(UserError, match="no resolution"):
        placed({**listed, "b": {"caption": "two"}})
    with pytest.raises(UserError, match="train_resolution 97x32 in the metadata file: this model needs multiples of 8"):
        placed({**listed, "a": {"train_resolution": [97, 32]}})


def test_a_metadata_file_may_give_a_picture_several_captions(tmp_path: Path, strategies: Strategies) -> None:
    """As a list, or by naming it again; each reading picks one, and each has the tags behind it. A list of tags is one text."""
    lines: list[dict[str, Any]] = [
        {"image_path": "a.png", "caption": ["one", "two"], "tags": ["t", "u"]},
        {"image_path": "b.jpg", "caption": "three", "image_size": [64, 64]},
        {"image_path": "b.jpg", "caption": "four"},
    ]
    data = metadata_data(tmp_path, strategies, "meta.jsonl", "\n".join(map(json.dumps, lines)))
    assert captions_of(data) == {"a.png": "one,t, u\ntwo,t, u", "b.jpg": "three\nfour"}
    seen = {caption for epoch in range(12) for batch in epoch_of(data.train, epoch) for caption in batch.captions}
    assert seen == {"one,t, u", "two,t, u", "three", "four"} and data.train.num_images == 2


def test_tags_follow_every_line_of_a_caption_when_wildcards_are_on(tmp_path: Path, strategies: Strategies) -> None:
    content = json.dumps({"a": {"caption": "one\ntwo", "tags": "t"}})
    data = metadata_data(tmp_path, strategies, "meta.json", content, "enable_wildcard = true\n")
    assert captions_of(data) == {"a.png": "one,t\ntwo,t"}


def test_a_jsonl_metadata_file_gives_sizes_that_are_checked_when_the_image_is_read(
    tmp_path: Path, strategies: Strategies
) -> None:
    lines = [
        {"image_path": "a.png", "caption": "one", "image_size": [64, 64]},
        {"image_path": "b.jpg", "image_size": [128, 32]},
    ]
    data = metadata_data(tmp_path, strategies, "meta.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert {record.path.name: record.size for record in data.train.records} == {"a.png": (64, 64), "b.jpg": (128, 32)}
    assert {batch.captions for batch in epoch_of(data.train, 0)} == {("one",)}
    ((path, reason),) = data.train.quarantine.found.items()
    assert path.name == "b.jpg" and reason.startswith("it is 64x64, but its metadata") and reason.endswith("says 128x32")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "m.json",
            json.dumps({f"x{i}": {"caption": "c"} for i in range(8)}),
            r"names 8 images that do not exist.*x0, x1.*\.\.\.",
        ),
        ("m.json", "{", r"m\.json: not a metadata file"),
        ("m.json", "[]", r"m\.json: not a metadata file"),
        ("m.json", "{}", r"m\.json: has no entry"),
        ("m.json", '{"a": "text"}', r"the entry of 'a' is 'text'"),
        ("m.json", '{"a": {"caption": 3}}', r"caption of a is 3; expected a text"),
        ("m.jsonl", '{"image_path": "a.png"}\n{"caption": "x"}', r"line 2: the entry has no 'image_path'"),
        ("m.jsonl", '{"image_path": "a.png", "image_size": [64]}', r"image_size is \[64\]; expected \[width, height\]"),
    ],
)
def test_a_wrong_metadata_file_is_explained(name: str, content: str, says: str, tmp_path: Path, strategies: Strategies) -> None:
    with pytest.raises(UserError, match=says):
        metadata_data(tmp_path, strategies, name, content)


# ---- bad images ------------------------------------------------------------------------------------------------------


def folder_toml(folder: Path) -> str:
    return f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"


def test_missing_and_empty_folders_are_named(tmp_path: Path, strategies: Strategies) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        from_toml(tmp_path, strategies, folder_toml(tmp_path / "nowhere"))
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty has no image .*subfolders \(inner"):
        from_toml(tmp_path, strategies, folder_toml(tmp_path / "empty"))


def test_strictly_every_file_that_is_no_image_is_named_before_anything_is_loaded(
    tmp_path: Path, strategies: Strategies
) -> None:
    write_folder(tmp_path / "img", [(64, 64)])
    for name in ("bad1.png", "bad2.jpg"):
        (tmp_path / "img" / name).write_bytes(b"not an image")
    with pytest.raises(UserError) as caught:
        from_toml(tmp_path, strategies, folder_toml(tmp_path / "img"), strict_data=True)
    assert "bad1.png" in str(caught.value) and "bad2.jpg" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_cut_short_is_one_line_with_its_path_from_workers_too(
    workers: int, tmp_path: Path, strategies: Strategies
) -> None:
    path = write_picture(tmp_path / "img" / "cut.png", caption="x")
    path.write_bytes(path.read_bytes()[:2000])
    data = from_toml(tmp_path, strategies, folder_toml(tmp_path / "img"), max_data_loader_n_workers=workers)
    with pytest.raises(UserError) as caught:
        list(make_loader(data.train, epoch=0, start=0, rank=0, world=1, options=data.options, pin=False))
    assert "cut.png" in str(caught.value) and "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_cache_files_are_not_mistaken_for_images(tmp_path: Path) -> None:
    write_folder(tmp_path, [(64, 64)])
    np.savez(tmp_path / "p0_0064x0064_sd.npz", latents=np.zeros(3))
    write_picture(tmp_path / "UPPER.PNG")
    assert [path.name for path in list_images(tmp_path)] == ["UPPER.PNG", "p0.png"]


def test_only_regularisation_images_is_an_error(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)])
    with pytest.raises(UserError, match="no training image"):
        from_toml(tmp_path, strategies, folder_toml(tmp_path / "img") + "is_reg = true\n")


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_shrinking_by_two_averages_and_keeps_exact_pixels_when_nothing_changes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    means = pixels.reshape(4, 2, 4, 2, 3).astype(float).mean((1, 3))
    assert np.abs(resize(pixels, (4, 4), "area").astype(float) - means).max() <= 0.5
    assert resize(pixels, (8, 8), "area") is pixels


def test_enlarging_is_pillows_lanczos() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    fitted = fit(pixels, Placement((16, 12), (16, 16)), Crop(0, 2, (0, 4)), None)
    expected = np.array(Image.fromarray(pixels).resize((16, 16), Image.Resampling.LANCZOS))[2:14]
    assert (fitted == expected).all()


def test_a_mirrored_crop_counts_from_the_other_side() -> None:
    crop = choose_crop(Placement((64, 64), (75, 64)))
    assert (crop.left, crop.top) == (5, 0)
    assert crop.mirrored().left == 6
    assert crop.stored_ltrb((64, 64)) == (5, 0, 64 - 6, 64)


def test_transparency_is_dropped_and_a_picture_is_turned_as_its_tag_says(tmp_path: Path, strategies: Strategies) -> None:
    (tmp_path / "img").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "img" / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), (0, 0, 255)).save(tmp_path / "img" / "turned.jpg", exif=exif)
    data = from_toml(tmp_path, strategies, folder_toml(tmp_path / "img") + "class_tokens = 'x'\n")
    sizes = {record.path.name: record.size for record in data.train.records}
    assert sizes["turned.jpg"] == (32, 64)
    red = next(b for b in epoch_of(data.train, 0) if b.original_sizes[0].tolist() == [64, 64])
    assert red.images is not None and red.images[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_color_variation_changes_some_pictures_a_little() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    changed = [vary_color(pixels, keyed_random(number)) for number in range(300)]
    share = sum(not (one == pixels).all() for one in changed) / 300
    assert 0.25 < share < 0.4
    assert max(abs(one.astype(int).mean() - pixels.mean()) for one in changed) < 8


# ---- metadata --------------------------------------------------------------------------------------------------------


def test_command_line_datasets_have_flat_metadata(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "train" / "2_cat", [(64, 64), (128, 48)])
    flags = {"train_data_dir": str(tmp_path / "train"), "resolution": "64", "train_batch_size": 2, "flip_aug": True}
    buckets = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
    metadata = build(make_options(**flags, **buckets), strategies).metadata(world=2)
    assert metadata["ss_num_train_images"] == "4"
    assert metadata["ss_num_batches_per_epoch"] == "1"  # two batches, one for each of two processes
    assert metadata["ss_total_batch_size"] == "4"
    assert metadata["ss_resolution"] == "(64, 64)"
    assert (metadata["ss_flip_aug"], metadata["ss_enable_bucket"]) == ("True", "True")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 2}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {}
    assert json.loads(metadata["ss_tag_frequency"]) == {"2_cat": {"picture 0": 1, "tag": 2, "picture 1": 1}}
    info = json.loads(metadata["ss_bucket_info"])
    assert info["buckets"] == {"0": {"resolution": [64, 64], "count": 2}, "1": {"resolution": [96, 32], "count": 2}}
    assert info["mean_img_ar_error"] == pytest.approx(abs(96 / 32 - 128 / 48) / 2)
    assert "ss_datasets" not in metadata


def test_datasets_from_a_file_have_their_metadata_in_one_list(tmp_path: Path, strategies: Strategies) -> None:
    metadata = varied(tmp_path, strategies).metadata()
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["is_dreambooth"] and dataset["resolution"] == [64, 64] and dataset["batch_size_per_device"] == 3
    assert dataset["num_train_images"] == 16
    assert sum(bucket["count"] for bucket in dataset["bucket_info"]["buckets"].values()) == 16
    (subset,) = dataset["subsets"]
    assert (subset["image_dir"], subset["img_count"], subset["num_repeats"], subset["is_reg"]) == ("img", 8, 2, False)
    assert json.loads(metadata["ss_dataset_dirs"]) == {"img": {"n_repeats": 2, "img_count": 8}}
    assert json.loads(metadata["ss_tag_frequency"])["img"]["tag"] == 8
    assert "ss_bucket_info" not in metadata
    assert all(isinstance(value, str) for value in metadata.values())


def test_the_summary_counts_images_repeats_and_buckets(tmp_path: Path, strategies: Strategies) -> None:
    summary = varied(tmp_path, strategies).summary()
    for part in ("16 training images", "img: 8 images, repeated 2 times", "64x64: 10", "7 batches per epoch"):
        assert part in summary


def test_the_step_of_the_model_rules_the_buckets(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)])
    options = make_options(dataset_config=write_toml(tmp_path / "d.toml", folder_toml(tmp_path / "img")), resolution="72")
    assert build(options, strategies, LATENT).train.num_batches == 1
