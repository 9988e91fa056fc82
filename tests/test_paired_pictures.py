"""The third kind of data set: pictures with the picture that a ControlNet is given beside each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import CPU, LATENT, make_bundle, make_options, make_strategies, write_folder, write_picture, write_toml
from PIL import Image

from library.batch import TrainBatch
from library.batch_page import page
from library.caching import cache_latents
from library.dataset import TrainData, build_train_data, make_loader
from library.errors import UserError
from library.memory_plan import training_batch
from library.strategy_base import Strategies

ODD = [(64, 64), (80, 64), (128, 48), (300, 210)]


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


def write_pairs(tmp_path: Path, sizes: list[tuple[int, int]] = ODD) -> None:
    """Each picture's partner is its negative, so that what was done to one can be read off the other."""
    folder = write_folder(tmp_path / "img", sizes)
    (tmp_path / "cond").mkdir()
    for path in folder.glob("*.png"):
        Image.fromarray(255 - np.array(Image.open(path))).save(tmp_path / "cond" / f"{path.stem}.bmp")


def data_of(
    tmp_path: Path, strategies: Strategies, subset: str = "", dataset: str = "", *, conditioned: bool = True, **flags: Any
) -> TrainData:
    text = (
        "[general]\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
        f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{dataset}[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
        f"conditioning_data_dir = '{tmp_path / 'cond'}'\n{subset}"
    )
    options = make_options(dataset_config=write_toml(tmp_path / "data.toml", text), **flags)
    return build_train_data(options, LATENT, strategies, mode="network", conditioned=conditioned)


def batches_of(data: TrainData, epochs: int = 1) -> list[TrainBatch]:
    return [data.train[(epoch, index)] for epoch in range(epochs) for index in range(data.train.num_batches)]


@pytest.mark.parametrize(
    "augmented", ["", "flip_aug = true\n", "flip_aug = true\nrandom_crop = true\nresize_interpolation = 'nearest'\n"]
)
def test_a_partner_is_cut_resized_and_mirrored_with_its_picture(augmented: str, tmp_path: Path, strategies: Strategies) -> None:
    write_pairs(tmp_path)
    crops = set()
    for batch in batches_of(data_of(tmp_path, strategies, augmented), epochs=6):
        assert batch.images is not None and batch.conditioning_images is not None and batch.mask is None
        assert batch.conditioning_images.shape == batch.images.shape
        torch.testing.assert_close(batch.conditioning_images, -batch.images, atol=2.1 / 127.5, rtol=0)  # rounded when resized
        crops |= {(caption, *place) for caption, place in zip(batch.captions, batch.crop_top_lefts.tolist(), strict=True)}
    assert (len(crops) > len(ODD)) == bool(augmented)


def test_colours_vary_in_the_picture_alone_and_a_partner_of_another_size_fits(tmp_path: Path, strategies: Strategies) -> None:
    write_pairs(tmp_path, [(64, 64)])
    plain = data_of(tmp_path, strategies).train[(0, 0)]
    partner = Image.open(tmp_path / "cond" / "p0.bmp")
    partner.resize((128, 128), Image.Resampling.NEAREST).save(tmp_path / "cond" / "p0.bmp")
    data = data_of(tmp_path, strategies, "color_aug = true\n")
    seen = [data.train[(epoch, 0)] for epoch in range(8)]
    assert any(not torch.equal(batch.images, plain.images) for batch in seen)  # type: ignore[arg-type]
    for batch in seen:
        assert torch.equal(batch.conditioning_images, plain.conditioning_images)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["cache_latents", "cache_latents_to_disk"])
def test_partners_stand_beside_cached_latents_and_are_read_by_workers(
    where: str, tmp_path: Path, strategies: Strategies
) -> None:
    write_pairs(tmp_path)
    live = data_of(tmp_path, strategies, "flip_aug = true\n")
    cached = data_of(tmp_path, strategies, "flip_aug = true\n", max_data_loader_n_workers=1, **{where: True})
    cache_latents(cached, strategies, make_bundle(), cached.options, CPU)
    loader = make_loader(cached.train, epoch=0, start=0, rank=0, world=1, options=cached.options, pin=False)
    assert loader.num_workers == 1
    for one, other in zip(batches_of(live), loader, strict=True):
        assert other.latents is not None and other.images is None and one.captions == other.captions
        assert torch.equal(one.conditioning_images, other.conditioning_images)  # type: ignore[arg-type]


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_memory_plan_counts_partners_and_masks(conditioned: bool, tmp_path: Path, strategies: Strategies) -> None:
    write_pairs(tmp_path)
    data = data_of(tmp_path, strategies, conditioned=conditioned, masked_loss=not conditioned)
    planned = training_batch(data)
    field = "conditioning_images" if conditioned else "mask"
    real = [batch for batch in batches_of(data) if batch.images.shape == planned.images.shape]  # type: ignore[union-attr]
    assert real
    for batch in real:
        found, wanted = getattr(planned, field), getattr(batch, field)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


def test_everything_else_of_a_data_set_holds_for_pairs(tmp_path: Path, strategies: Strategies) -> None:
    """Held-out pictures have their partners, captions warm up, a mask comes from the picture itself."""
    write_pairs(tmp_path, [(64, 64)] * 4)
    pixels = np.array(Image.open(tmp_path / "img" / "p0.png"))
    Image.fromarray(np.dstack([pixels, np.full((64, 64), 51, np.uint8)])).save(tmp_path / "img" / "p0.png")
    for path in (tmp_path / "img").glob("*.txt"):
        path.write_text("a, b, c, d")
    subset = "token_warmup_step = 10\nalpha_mask = true\n"
    data = data_of(tmp_path, strategies, subset, "validation_split = 0.25\n", masked_loss=True)
    assert data.validation is not None
    held_out = data.validation[(0, 0)]
    assert held_out.captions == ("a, b, c, d",)
    torch.testing.assert_close(held_out.conditioning_images, -held_out.images, atol=1e-6, rtol=0)  # type: ignore[operator]
    first = data.train[(0, 0)]
    assert set(first.captions) == {"a"} and first.mask is not None
    everyone = [*batches_of(data), held_out]
    assert min(batch.mask.min().item() for batch in everyone if batch.mask is not None) == pytest.approx(0.2)


def test_a_page_of_batches_shows_the_partners(tmp_path: Path, strategies: Strategies) -> None:
    write_pairs(tmp_path, [(64, 64)])
    assert "".join(page(data_of(tmp_path, strategies).train, 1)).count('alt="conditioning picture"') == 1


def test_a_metadata_file_and_a_command_line_can_have_pairs_too(tmp_path: Path, strategies: Strategies) -> None:
    write_pairs(tmp_path, [(64, 64)] * 2)
    (tmp_path / "meta.json").write_text('{"p0": {"caption": "zero"}, "p1": {"caption": "one"}}')
    for flags in ({}, {"in_json": str(tmp_path / "meta.json")}):
        options = make_options(
            train_data_dir=str(tmp_path / "img"),
            conditioning_data_dir=str(tmp_path / "cond"),
            resolution="64",
            train_batch_size=2,
            **flags,
        )
        batch = build_train_data(options, LATENT, strategies, mode="network", conditioned=True).train[(0, 0)]
        torch.testing.assert_close(batch.conditioning_images, -batch.images, atol=1e-6, rtol=0)  # type: ignore[operator]
        assert set(batch.captions) == ({"zero", "one"} if flags else {"picture 0, tag", "picture 1, tag"})


def test_what_is_missing_or_does_not_fit_is_told(tmp_path: Path, strategies: Strategies) -> None:
    write_pairs(tmp_path, [(64, 64)] * 3)
    more = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n"
    with pytest.raises(UserError, match=r"\[\[datasets.subsets\]\] 2: 'conditioning_data_dir' is missing"):
        data_of(tmp_path, strategies, more)
    write_picture(tmp_path / "cond" / "p1.bmp", (64, 32))
    (tmp_path / "cond" / "p2.bmp").write_bytes(b"BM, and then nothing")
    data = data_of(tmp_path, strategies)
    assert {caption for batch in batches_of(data) for caption in batch.captions} == {"picture 0, tag"}
    reasons = {path.name: reason for path, reason in data.train.quarantine.found.items()}
    assert reasons["p1.bmp"] == "it is 64x32, and the picture it belongs to 64x64: another shape"
    assert "not a readable image" in reasons["p2.bmp"]
    (tmp_path / "cond" / "p1.bmp").unlink()
    with pytest.raises(UserError, match=r"has no conditioning picture for 1 of 3 images: p1\.png"):
        data_of(tmp_path, strategies)
