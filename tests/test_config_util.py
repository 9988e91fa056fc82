"""Dataset configuration: fallback, command line datasets, and messages for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_tools import make_options, write_folder, write_toml

from library.config_util import KEYS, DataConfig, check_preservation, load_data_config
from library.errors import UserError


def load(tmp_path: Path, text: str, **flags: Any) -> DataConfig:
    return load_data_config(make_options(dataset_config=write_toml(tmp_path / "data.toml", text), **flags), 8)


def test_a_key_falls_back_from_subset_to_dataset_to_general_to_the_command_line_to_its_default(tmp_path: Path) -> None:
    text = """
        [general]
        keep_tokens = 1
        caption_prefix = "general"
        resolution = 256
        [[datasets]]
        batch_size = 3
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = "a"
        keep_tokens = 3
        [[datasets.subsets]]
        image_dir = "b"
        [[datasets]]
        resolution = [512, 384]
        [[datasets.subsets]]
        image_dir = "c"
    """
    config = load(tmp_path, text, train_batch_size=5, caption_suffix="line", keep_tokens=9, resolution="64")
    first, second = config.datasets
    assert [subset.captions.keep_tokens for dataset in (first, second) for subset in dataset.subsets] == [3, 2, 1]
    assert (first.batch_size, second.batch_size) == (3, 5)
    assert (first.rule.resolution, second.rule.resolution) == ((256, 256), (512, 384))
    assert {subset.captions.prefix for subset in first.subsets + second.subsets} == {"general"}
    assert {subset.captions.suffix for subset in first.subsets + second.subsets} == {"line"}
    assert first.rule.minimum == 256 and first.subsets[0].num_repeats == 1


def test_a_false_in_the_file_wins_over_a_switch_on_the_command_line(tmp_path: Path) -> None:
    text = 'resolution = 64\nflip_aug = false\n[[datasets.subsets]]\nimage_dir = "a"\n'
    assert not load(tmp_path, "[[datasets]]\n" + text, flip_aug=True).datasets[0].subsets[0].flip_aug


def test_a_json_file_reads_as_the_same_datasets(tmp_path: Path) -> None:
    content = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "a", "num_repeats": 4, "shuffle_caption": True}]}]}
    (tmp_path / "data.json").write_text(json.dumps(content), encoding="utf-8")
    config = load_data_config(make_options(dataset_config=str(tmp_path / "data.json")), 8)
    (subset,) = config.datasets[0].subsets
    assert (subset.num_repeats, subset.captions.shuffle) == (4, True)


def test_every_documented_key_is_read(tmp_path: Path) -> None:
    text = """
        [[datasets]]
        batch_size = 2
        resolution = [512, 768]
        enable_bucket = true
        bucket_no_upscale = true
        min_bucket_reso = 128
        max_bucket_reso = 2048
        bucket_reso_steps = 32
        validation_split = 0.1
        validation_seed = 3
        network_multiplier = 0.5
        resize_interpolation = "area"
        [[datasets.subsets]]
        image_dir = "a"
        is_reg = true
        class_tokens = "cat"
        num_repeats = 2
        shuffle_caption = true
        enable_wildcard = true
        caption_separator = ";"
        keep_tokens = 2
        keep_tokens_separator = "|||"
        secondary_separator = ";;;"
        caption_prefix = "p"
        caption_suffix = "s"
        token_warmup_min = 2
        token_warmup_step = 0.5
        caption_dropout_rate = 0.1
        caption_dropout_every_n_epochs = 2
        caption_tag_dropout_rate = 0.2
        color_aug = true
        flip_aug = true
        random_crop = true
        cache_info = true
        caption_extension = "cap"
        custom_attributes = { diff_output_preservation = true, other = 1 }
    """
    (dataset,) = load(tmp_path, text).datasets
    (subset,) = dataset.subsets
    assert (dataset.validation_split, dataset.validation_seed, dataset.network_multiplier) == (0.1, 3, 0.5)
    assert (dataset.rule.resolution, dataset.rule.minimum, dataset.rule.maximum, dataset.rule.step) == (
        (512, 768),
        128,
        2048,
        32,
    )
    assert dataset.rule.enabled and dataset.rule.no_upscale
    assert subset.is_reg and subset.color_aug and subset.flip_aug and subset.random_crop and subset.preserves
    assert (subset.class_tokens, subset.num_repeats, subset.resize_interpolation) == ("cat", 2, "area")
    assert subset.caption_extension == ".cap"
    captions = subset.captions
    assert (captions.shuffle, captions.wildcard, captions.separator, captions.keep_tokens) == (True, True, ";", 2)
    assert (captions.keep_tokens_separator, captions.secondary_separator) == ("|||", ";;;")
    assert (captions.prefix, captions.suffix) == ("p", "s")
    assert (captions.token_warmup_min, captions.token_warmup_step) == (2, 0.5)
    assert (captions.dropout_rate, captions.dropout_every_n_epochs, captions.tag_dropout_rate) == (0.1, 2, 0.2)


def test_the_misspelt_caption_extension_of_older_files_is_read(tmp_path: Path) -> None:
    text = '[[datasets]]\nresolution = 64\ncaption_extention = ".cap"\n[[datasets.subsets]]\nimage_dir = "a"\n'
    assert load(tmp_path, text).datasets[0].subsets[0].caption_extension == ".cap"


SUBSET = '[[datasets.subsets]]\nimage_dir = "a"\n'
WRONG = {
    "unknown key in a subset": (
        f"[[datasets]]\nresolution = 64\n{SUBSET}num_repeat = 2\n",
        ("data.toml", "[[datasets]] 1, [[datasets.subsets]] 1", "'num_repeat'", "Did you mean 'num_repeats'"),
    ),
    "unknown key in general": ("[general]\nresolutoin = 64\n[[datasets]]\n" + SUBSET, ("[general]", "'resolution'")),
    "unknown table": ("[generl]\n[[datasets]]\nresolution = 64\n" + SUBSET, ("top level", "'generl'", "'general'")),
    "a dataset key in a subset": (
        f"[[datasets]]\nresolution = 64\n{SUBSET}batch_size = 2\n",
        ("'batch_size' does not belong here", "[general] or [[datasets]]"),
    ),
    "a subset's key in general": ("[general]\nis_reg = true\n[[datasets]]\n" + SUBSET, ("'is_reg'", "[[datasets.subsets]]")),
    "a text for a number": (
        f"[[datasets]]\nresolution = 64\nbatch_size = 'two'\n{SUBSET}",
        ("[[datasets]] 1: batch_size is 'two'", "expected a whole number from 1"),
    ),
    "a fraction for a whole number": (f"[[datasets]]\nresolution = 64\n{SUBSET}num_repeats = 1.5\n", ("num_repeats is 1.5",)),
    "true for a number": (f"[[datasets]]\nresolution = 64\n{SUBSET}num_repeats = true\n", ("num_repeats is True",)),
    "a number for a switch": (f"[[datasets]]\nresolution = 64\n{SUBSET}flip_aug = 1\n", ("flip_aug is 1", "true or false")),
    "a rate above one": (f"[[datasets]]\nresolution = 64\n{SUBSET}caption_dropout_rate = 3\n", ("is 3", "from 0 to 1")),
    "three sides": (f"[[datasets]]\nresolution = [1, 2, 3]\n{SUBSET}", ("resolution is [1, 2, 3]", "[width, height]")),
    "an unknown filter": (f"[[datasets]]\nresolution = 64\n{SUBSET}resize_interpolation = 'best'\n", ("'best'", "lanczos")),
    "no resolution": ("[[datasets]]\n" + SUBSET, ("no resolution", "--resolution")),
    "no subset": ("[[datasets]]\nresolution = 64\nsubsets = []\n", ("[[datasets]] 1", "no subset")),
    "no subsets key": ("[[datasets]]\nresolution = 64\n", ("'subsets' is missing",)),
    "no datasets": ("[general]\nresolution = 64\n", ("'datasets' is missing",)),
    "no image_dir": ("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nnum_repeats = 1\n", ("'image_dir' is missing",)),
    "two kinds of subsets": (
        f"[[datasets]]\nresolution = 64\n{SUBSET}[[datasets.subsets]]\nmetadata_file = 'm.json'\n",
        ("1 of 2 subsets have a metadata_file", "make two [[datasets]]"),
    ),
    "a folder's key beside a metadata file": (
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = 'm.json'\nclass_tokens = 'x'\n",
        ("'class_tokens' is only for image folders",),
    ),
    "a range that runs backwards": (
        f"[[datasets]]\nresolution = 64\n{SUBSET}face_crop_aug_range = [2.0, 1.0]\n",
        ("face_crop_aug_range is [2.0, 1.0]", "[least, most]"),
    ),
    "two masks": (
        f"[[datasets]]\nresolution = 64\n{SUBSET}alpha_mask = true\nconditioning_data_dir = 'c'\n",
        ("'conditioning_data_dir' and 'alpha_mask' are two masks", "remove one"),
    ),
    "a bucket the model cannot have": (
        f"[[datasets]]\nbuckets = [[64, 64], [65, 64]]\n{SUBSET}",
        ("buckets has 65x64", "multiples of 8"),
    ),
    "a step the model cannot have": (
        f"[[datasets]]\nresolution = 512\nenable_bucket = true\nbucket_reso_steps = 20\n{SUBSET}",
        ("bucket_reso_steps is 20", "multiple of 8"),
    ),
    "broken TOML": ("[[datasets]\n", ("data.toml", "not valid TOML")),
}


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name.replace(" ", "_"))
def test_a_wrong_file_is_answered_with_file_section_and_remedy(name: str, tmp_path: Path) -> None:
    text, says = WRONG[name]
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert "data.toml" in str(caught.value)
    missing = [fragment for fragment in says if fragment not in str(caught.value)]
    assert not missing, str(caught.value)


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"[[datasets]]\nbatch_sice = 1\nbatch_size = 'x'\n{SUBSET}flipp_aug = true\n")
    assert all(fragment in str(caught.value) for fragment in ("batch_sice", "batch_size is 'x'", "flipp_aug"))


def test_the_keys_of_masks_faces_and_folders_are_read_with_those_of_our_own(tmp_path: Path) -> None:
    text = (
        "[general]\nrecursive = true\nface_crop_aug_range = [1.5, 3.0]\n"
        "[[datasets]]\nbuckets = [[64, 96], [96, 64], [64, 64]]\n"
        f"{SUBSET}alpha_mask = true\nloss_weight = 0.5\n"
        "[[datasets]]\nresolutions = [[64], [96, 128]]\n[[datasets.subsets]]\nimage_dir = 'b'\nconditioning_data_dir = 'm'\n"
    )
    first, *others = load(tmp_path, text).datasets
    assert first.rule.enabled and first.rule.sizes == ((64, 96), (96, 64), (64, 64))
    (subset,) = first.subsets
    assert (subset.recursive, subset.face_crop_range, subset.alpha_mask, subset.loss_weight) == (True, (1.5, 3.0), True, 0.5)
    assert [dataset.rule.resolution for dataset in others] == [(64, 64), (96, 128)]
    assert {dataset.subsets[0].conditioning_data_dir for dataset in others} == {Path("m")}


def test_masks_and_faces_can_come_from_the_command_line(tmp_path: Path) -> None:
    for name in ("train/2_cat", "train/1_dog", "reg/1_animal", "masks/1_dog"):
        write_folder(tmp_path / name, [(64, 64)])
    flags = {name: str(tmp_path / name) for name in ("train", "reg", "masks")}
    options = make_options(
        train_data_dir=flags["train"], reg_data_dir=flags["reg"], conditioning_data_dir=flags["masks"],
        resolution="64", face_crop_aug_range="2.0,4.0",
    )  # fmt: skip
    subsets = load_data_config(options, 8).datasets[0].subsets
    masks = {subset.name: subset.conditioning_data_dir for subset in subsets}
    assert masks == {"1_dog": tmp_path / "masks" / "1_dog", "2_cat": tmp_path / "masks", "1_animal": None}
    assert {subset.face_crop_range for subset in subsets} == {(2.0, 4.0)}


def test_a_missing_file_and_a_foreign_extension_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml does not exist"):
        load_data_config(make_options(dataset_config=str(tmp_path / "nowhere.toml")), 8)
    with pytest.raises(UserError, match=r"neither \.toml nor \.json"):
        load_data_config(make_options(dataset_config=write_toml(tmp_path / "d.yaml", "a: 1")), 8)


def test_a_file_of_another_encoding_is_read_or_named(tmp_path: Path) -> None:
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "größe"\n'
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
        (tmp_path / "data.toml").write_bytes(text.encode(encoding))
        config = load_data_config(make_options(dataset_config=str(tmp_path / "data.toml")), 8)
        assert config.datasets[0].subsets[0].image_dir == Path("größe")
    (tmp_path / "data.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"data\.toml is not UTF-8 text .* Save it as UTF-8"):
        load_data_config(make_options(dataset_config=str(tmp_path / "data.toml")), 8)


def test_folders_on_the_command_line_carry_repeats_and_class_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/10_sks dog", "train/2_cat", "train/0_unused", "train/notes", "reg/1_dog"):
        write_folder(tmp_path / name, [(64, 64)])
    options = make_options(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="64")
    config = load_data_config(options, 8)
    subsets = config.datasets[0].subsets
    assert [(s.num_repeats, s.class_tokens, s.is_reg) for s in subsets] == [
        (10, "sks dog", False),
        (2, "cat", False),
        (1, "dog", True),
    ]
    assert config.source is None
    assert "notes" in caplog.text


def test_a_folder_without_the_convention_is_told_how_to_name_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "loose", [(64, 64), (64, 64)])
    with pytest.raises(UserError, match=r"10_sks dog.*2 images in .*loose itself are not used"):
        load_data_config(make_options(train_data_dir=str(tmp_path / "loose"), resolution="64"), 8)
    with pytest.raises(UserError, match="does not exist"):
        load_data_config(make_options(train_data_dir=str(tmp_path / "nowhere"), resolution="64"), 8)


def test_in_json_is_a_metadata_subset_with_the_repeats_of_the_flag(tmp_path: Path) -> None:
    options = make_options(train_data_dir="images", in_json="meta.json", dataset_repeats=3, resolution="64")
    (subset,) = load_data_config(options, 8).datasets[0].subsets
    assert (subset.metadata_file, subset.image_dir, subset.num_repeats) == (Path("meta.json"), Path("images"), 3)


def test_what_keeps_its_predictions_does_not_validate_a_model_that_changes(tmp_path: Path) -> None:
    def config(split: float, more: str = "") -> DataConfig:
        keeps = f"{SUBSET}custom_attributes = {{ diff_output_preservation = true }}\n{more}"
        return load(tmp_path, f"[[datasets]]\nresolution = 64\nvalidation_split = {split}\n{keeps}")

    assert check_preservation(config(0.5), "network") and check_preservation(config(0.0), "full")
    assert check_preservation(config(0.5, "is_reg = true\n"), "full")
    assert not check_preservation(load(tmp_path, f"[[datasets]]\nresolution = 64\n{SUBSET}"), "full")
    with pytest.raises(UserError, match="diff_output_preservation.*is_reg = true"):
        check_preservation(config(0.5), "full")


def test_every_key_says_what_it_expects() -> None:
    assert all(key.expected for key in KEYS.values())
