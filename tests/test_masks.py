"""Masks and face crops follow the picture wherever it is cut or mirrored; held-out pictures have no copy in training."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import build, make_bundle, make_options, make_strategies, write_folder, write_picture, write_toml
from PIL import Image

from library.caching import cache_latents
from library.dataset import TrainData
from library.errors import UserError
from library.face_crop import Face, face_of, face_view
from library.losses import image_means
from library.strategy_base import Strategies
from library.validation_split import chosen

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


def data_of(tmp_path: Path, strategies: Strategies, subset: str = "", dataset: str = "", **flags: Any) -> TrainData:
    text = f"[[datasets]]\nresolution = 64\n{dataset}[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n{subset}"
    return build(make_options(dataset_config=write_toml(tmp_path / "data.toml", text), **flags), strategies)


def blocks(size: tuple[int, int]) -> np.ndarray:
    """A mask of 8x8 blocks, each of one value: uint8 [H, W]."""
    values = np.random.default_rng(3).integers(0, 256, (size[1] // 8, size[0] // 8), dtype=np.uint8)
    return values.repeat(8, 0).repeat(8, 1)


def write_masked(folder: Path, masks: Path, size: tuple[int, int], *, alpha: bool) -> None:
    """A grey picture that is its own mask, so that what was done to one can be read off the other."""
    mask = blocks(size)
    folder.mkdir(parents=True)
    picture = np.stack([mask] * 3 + ([mask] if alpha else []), axis=-1)
    Image.fromarray(picture).save(folder / "p.png")
    (folder / "p.txt").write_text("x", encoding="utf-8")
    if not alpha:
        masks.mkdir()
        Image.fromarray(picture).save(masks / "p.bmp")


@pytest.mark.parametrize("kind", ["alpha", "paired"])
@pytest.mark.parametrize(
    "augmented",
    ["", "flip_aug = true\nrandom_crop = true\n", "flip_aug = true\nface_crop_aug_range = [1.0, 3.0]\n"],
    ids=["plain", "moved", "face"],
)
def test_a_mask_is_cut_resized_and_mirrored_with_its_picture(
    kind: str, augmented: str, tmp_path: Path, strategies: Strategies
) -> None:
    write_masked(tmp_path / "img", tmp_path / "masks", (128, 96), alpha=kind == "alpha")
    if "face" in augmented:
        (tmp_path / "img" / "p.png").rename(tmp_path / "img" / "p_64_48_40_40.png")
        if kind == "paired":
            (tmp_path / "masks" / "p.bmp").rename(tmp_path / "masks" / "p_64_48_40_40.bmp")
    masks = "alpha_mask = true\n" if kind == "alpha" else f"conditioning_data_dir = '{tmp_path / 'masks'}'\n"
    data = data_of(tmp_path, strategies, masks + augmented, masked_loss=kind == "paired")
    seen = set()
    for epoch in range(8):
        batch = data.train[(epoch, 0)]
        assert batch.images is not None and batch.mask is not None and batch.mask.shape == (1, 1, 8, 8)
        shown = torch.nn.functional.avg_pool2d(batch.images[:, :1] / 2 + 0.5, 8)
        torch.testing.assert_close(batch.mask, shown, atol=2 / 255, rtol=0)
        seen.add(tuple(batch.mask.flatten().tolist()))
    assert (len(seen) > 2) == bool(augmented)


@pytest.mark.parametrize("kind", ["alpha", "paired"])
@pytest.mark.parametrize("where", ["cache_latents", "cache_latents_to_disk"])
def test_masks_are_the_same_with_cached_latents(kind: str, where: str, tmp_path: Path, strategies: Strategies) -> None:
    write_masked(tmp_path / "img", tmp_path / "masks", (128, 96), alpha=kind == "alpha")
    masks = "alpha_mask = true\n" if kind == "alpha" else f"conditioning_data_dir = '{tmp_path / 'masks'}'\n"
    flags: dict[str, Any] = {"subset": f"{masks}flip_aug = true\n", "masked_loss": True}
    live = data_of(tmp_path, strategies, **flags)
    cached = data_of(tmp_path, strategies, **flags, **{where: True})
    cache_latents(cached, strategies, make_bundle(), cached.options, CPU)
    found = []
    for epoch in range(6):
        one, other = live.train[(epoch, 0)], cached.train[(epoch, 0)]
        assert one.mask is not None and other.mask is not None and other.latents is not None
        torch.testing.assert_close(one.mask, other.mask, atol=0, rtol=0)
        found.append(one.mask)
    assert any(not torch.equal(found[0], mask) for mask in found)


def test_where_a_mask_is_zero_nothing_is_learnt_and_pictures_without_one_count_whole(
    tmp_path: Path, strategies: Strategies
) -> None:
    write_picture(tmp_path / "img" / "a.png", caption="a")
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, 32:, 3] = 255
    (tmp_path / "b").mkdir()
    Image.fromarray(pixels).save(tmp_path / "b" / "b.png")
    more = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'b'}'\nalpha_mask = true\nclass_tokens = 'b'\n"
    batch = data_of(tmp_path, strategies, more, "batch_size = 2\n").train[(0, 0)]
    assert batch.mask is not None
    masks = dict(zip(batch.captions, batch.mask, strict=True))
    assert masks["a"].min() == 1 and masks["b"][0, :, :4].max() == 0 and masks["b"][0, :, 4:].min() == 1
    error = torch.ones(2, 4, 8, 8, requires_grad=True)
    (image_means(error, batch.mask) * torch.ones(2)).mean().backward()
    assert error.grad is not None
    row = batch.captions.index("b")
    assert error.grad[row, :, :, :4].abs().max() == 0 and error.grad[row, :, :, 4:].min() > 0


def test_masks_that_are_missing_of_another_shape_or_unused_are_told(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "img", [(64, 64)] * 2)
    masks = write_folder(tmp_path / "masks", [(64, 64)], captions=False)
    subset = f"conditioning_data_dir = '{masks}'\n"
    with pytest.raises(UserError, match=r"has no mask for 1 of 2 images: p1\.png"):
        data_of(tmp_path, strategies, subset, masked_loss=True)
    write_picture(masks / "p1.png", (64, 32))
    write_picture(masks / "p9.png")
    with pytest.raises(UserError, match="which --masked_loss uses"):
        data_of(tmp_path, strategies, subset)
    assert "p9.png belongs to no image" in caplog.text
    data = data_of(tmp_path, strategies, subset, masked_loss=True)
    assert {caption for index in range(2) for caption in data.train[(0, index)].captions} == {"picture 0, tag"}
    ((path, reason),) = data.train.quarantine.found.items()
    assert path == masks / "p1.png" and "it is 64x32, and the picture it belongs to 64x64" in reason
    data_of(tmp_path, strategies, masked_loss=True)
    assert "--masked_loss has no effect" in caplog.text


# ---- faces -----------------------------------------------------------------------------------------------------------


def test_the_name_of_a_file_tells_its_face() -> None:
    assert face_of(Path("a_b_10_20_30_40.png")) == Face((10, 20), (30, 40))
    for name in ("a_10_20_30.png", "a_1_2_3_x.png", "a_1_2_0_4.png"):
        assert face_of(Path(name)) is None


@pytest.mark.parametrize("bucket", [(64, 64), (96, 32)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_a_face_crop_lies_within_a_picture_that_covers_the_bucket(bucket: tuple[int, int], random_crop: bool) -> None:
    for seed in range(300):
        draw = Random(seed)
        width, height = draw.randint(16, 400), draw.randint(16, 400)
        center = draw.randint(0, width), draw.randint(0, height)
        face = Face(center, (draw.randint(1, width), draw.randint(1, height)))
        placement, crop = face_view((width, height), bucket, face, (1.0, 4.0), random_crop=random_crop, rng=draw)
        assert placement.bucket == bucket and min(placement.slack) >= 0
        assert 0 <= crop.left <= placement.slack[0] and 0 <= crop.top <= placement.slack[1]


def test_a_face_is_in_the_middle_at_the_zoom_that_is_asked_for() -> None:
    """A face of 100 in a picture of 1000, trained at 200: the least zoom 1 makes it fill the crop, at scale 1 and no more."""
    face = Face((500, 400), (100, 80))
    placement, crop = face_view((1000, 800), (200, 200), face, (4.0, 4.0), random_crop=False, rng=Random(0))
    assert placement.resized == (500, 400)  # 200 / (100 * 4) = 0.5
    assert (crop.left, crop.top) == (150, 100)
    placement, _ = face_view((1000, 800), (200, 200), face, (0.5, 0.5), random_crop=False, rng=Random(0))
    assert placement.resized == (1000, 800)


# ---- validation ------------------------------------------------------------------------------------------------------


def test_the_choice_depends_on_contents_and_seed_alone() -> None:
    for seed in range(100):
        draw = Random(seed)
        digests = [f"{draw.randrange(64):02x}" for _ in range(draw.randint(0, 40))]
        share = draw.choice([0.0, 0.1, 0.37, 1.0])
        taken = chosen(digests, share, seed)
        assert taken == chosen(reversed(digests * 2), share, seed)
        assert len(taken) == round(len(set(digests)) * share)


def test_no_copy_of_a_held_out_picture_is_trained(tmp_path: Path, strategies: Strategies) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 10)
    (tmp_path / "copies").mkdir()
    for number in range(10):
        shutil.copy(folder / f"p{number}.png", tmp_path / "copies" / f"renamed{number}.png")
    copies = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'copies'}'\nclass_tokens = 'x'\n"

    def sides(seed: int) -> tuple[set[bytes], set[bytes]]:
        data = data_of(tmp_path, strategies, copies, f"validation_split = 0.3\nvalidation_seed = {seed}\n")
        assert data.validation is not None
        held, trained = data.validation.records, data.train.records
        return {record.path.read_bytes() for record in held}, {record.path.read_bytes() for record in trained}

    held, trained = sides(1)
    assert len(held) == 3 and len(trained) == 7 and not held & trained
    assert sides(1)[0] == held != sides(2)[0]


def test_a_dataset_of_its_own_can_be_for_validation(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)] * 3)
    for number in range(2):
        write_picture(tmp_path / "held" / f"h{number}.png", key=50 + number, caption=f"held {number}")
    more = f"[[datasets]]\nresolution = 32\nvalidation_split = 1.0\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'held'}'\n"
    data = data_of(tmp_path, strategies, more)
    assert data.validation is not None
    assert {record.caption for record in data.validation.records} == {"held 0", "held 1"}
    assert {record.path.parent.name for record in data.train.records} == {"img"}
