"""Caches: cached equals live, what changed is made again and named, and a file is whole or not there."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from data_tools import CPU, Case, build, make_bundle, make_options, make_strategies, write_folder, write_picture, write_toml

from library.cache_formats import LatentFormat
from library.cache_io import cache_path, describe_npz, entry_key, read_npz, write_npz
from library.caching import cache_latents, cache_text_outputs
from library.dataset import TrainData, make_loader
from library.errors import UserError
from library.strategy_base import Strategies
from library.strategy_sd import SdLatentsCachingStrategy


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def case(tmp_path: Path, strategies: Strategies) -> Case:
    write_folder(tmp_path / "img", [(64, 64), (64, 64), (80, 64), (128, 48)])
    return Case(tmp_path, strategies)


def npz_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("**/*.npz"))


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache_latents", "cache_latents_to_disk"])
@pytest.mark.parametrize("vae_batch_size", [1, 3])
def test_cached_latents_are_those_of_live_encoding(where: str, vae_batch_size: int, case: Case) -> None:
    live, cached = (
        case.data(subset="flip_aug = true\n"),
        case.data(subset="flip_aug = true\n", vae_batch_size=vae_batch_size, **{where: True}),
    )
    case.latents(cached)
    vae = make_bundle().vae
    flips = 0
    for epoch in range(3):
        for index in range(live.train.num_batches):
            one, other = live.train[(epoch, index)], cached.train[(epoch, index)]
            assert one.images is not None and other.images is None and other.latents is not None
            encoded = case.strategies.latents_caching.stored(vae, one.images, one.latent_seeds).float()
            assert torch.allclose(other.latents, encoded, atol=1e-5, rtol=2**-10)  # one step: batches of other sizes
            assert one.captions == other.captions and one.latent_seeds == other.latent_seeds
            assert torch.equal(one.crop_top_lefts, other.crop_top_lefts)
            flips += len(one)
    assert cached.train.latent_cache is not None and flips == 12


def test_mirrored_latents_are_cached_only_where_they_are_needed(case: Case) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    arrays = read_npz(case.folder / "img" / "p0_0064x0064_sd.npz")
    assert arrays is not None and set(arrays) == {"latents", "original_size", "crop_ltrb", "fingerprint"}
    case.latents(case.data(subset="flip_aug = true\n", cache_latents_to_disk=True))
    arrays = read_npz(case.folder / "img" / "p0_0064x0064_sd.npz")
    assert arrays is not None and arrays["latents_flipped"].shape == arrays["latents"].shape == (4, 8, 8)
    assert not np.array_equal(arrays["latents"], arrays["latents_flipped"])


def test_files_have_the_names_and_arrays_of_sd_scripts(case: Case) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    names = ["p0_0064x0064_sd.npz", "p1_0064x0064_sd.npz", "p2_0080x0064_sd.npz", "p3_0128x0048_sd.npz"]
    assert npz_files(case.folder / "img") == names
    arrays = read_npz(case.folder / "img" / "p2_0080x0064_sd.npz")
    assert arrays is not None
    assert arrays["latents"].dtype == np.float16  # sd-scripts passes them through torch.FloatTensor, which takes any float
    assert arrays["original_size"].tolist() == [80, 64]
    assert arrays["crop_ltrb"].tolist() == [8, 0, 64 - 8, 64]  # 80x64 is cut to 64x64


def test_a_second_run_reads_the_files_and_not_the_vae(case: Case) -> None:
    assert case.latents(case.data(cache_latents_to_disk=True)) == ["vae"]
    again = case.data(cache_latents_to_disk=True)
    assert case.latents(again) == []
    assert again.train[(0, 0)].latents is not None


def test_latents_in_memory_are_served_without_files_or_workers(case: Case) -> None:
    data = case.data(cache_latents=True, max_data_loader_n_workers=2)
    case.latents(data)
    assert npz_files(case.folder) == []
    loader = make_loader(data.train, epoch=0, start=0, rank=0, world=1, options=data.options, pin=False)
    assert loader.num_workers == 0
    assert sum(len(batch) for batch in loader) == 4


def test_files_are_served_by_worker_processes(case: Case) -> None:
    data = case.data(cache_latents_to_disk=True, max_data_loader_n_workers=2)
    case.latents(data)
    loader = make_loader(data.train, epoch=0, start=0, rank=0, world=1, options=data.options, pin=False)
    assert loader.num_workers > 0
    assert sum(len(batch) for batch in loader) == 4


def test_nothing_is_cached_unasked(case: Case) -> None:
    data = case.data()
    assert case.latents(data) == [] and case.text(data) == []
    assert data.train.latent_cache is None and data.train.text_cache is None


def stale_image(case: Case) -> dict[str, Any]:
    write_picture(case.folder / "img" / "p0.png", (64, 64), key=99)
    return {}


STALE = {
    "the image's content": stale_image,
    "the VAE": lambda case: {"bundle": make_bundle(vae_identity="vae-2")},
    "the image's size, bucket or resizing": lambda case: {"dataset": "resize_interpolation = 'lanczos'\n"},
    "how latents are encoded": lambda case: {"strategies": replace(case.strategies, latents_caching=OtherEncoding())},
}


class OtherEncoding(SdLatentsCachingStrategy):
    def fingerprint(self) -> str:
        return "another"


@pytest.mark.parametrize("what", STALE)
def test_what_changed_is_named_and_made_again(what: str, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    before = {name: (case.folder / "img" / name).read_bytes() for name in npz_files(case.folder / "img")}
    caplog.clear()
    changes = STALE[what](case)
    data = case.data(dataset=changes.get("dataset", ""), cache_latents_to_disk=True)
    loaded = case.latents(data, changes.get("bundle"), changes.get("strategies"))
    assert loaded == ["vae"]
    said = [record.getMessage() for record in caplog.records if "made again" in record.getMessage()]
    assert len(said) == 1 and f"because of {what}" in said[0]
    after = {name: (case.folder / "img" / name).read_bytes() for name in npz_files(case.folder / "img")}
    assert before.keys() == after.keys()
    assert before["p0_0064x0064_sd.npz"] != after["p0_0064x0064_sd.npz"] or "resizing" in what
    assert case.latents(case.data(dataset=changes.get("dataset", ""), cache_latents_to_disk=True), changes.get("bundle"),
                        changes.get("strategies")) == []  # fmt: skip


def test_another_resolution_makes_them_again_with_the_right_shape(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    text = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{case.folder / 'img'}'\n"
    options = make_options(dataset_config=write_toml(case.folder / "small.toml", text), cache_latents_to_disk=True)
    data = build(options, case.strategies)
    assert case.latents(data) == ["vae"]
    assert "bucket" in caplog.text
    latents = data.train[(0, 0)].latents
    assert latents is not None and latents.shape[-2:] == (4, 4)


def test_copying_a_picture_with_a_new_time_keeps_its_cache(case: Case) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    os.utime(case.folder / "img" / "p0.png", (1, 1))
    assert case.latents(case.data(cache_latents_to_disk=True)) == []


def test_one_picture_at_two_resolutions_has_two_entries(case: Case) -> None:
    more = f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{case.folder / 'img'}'\n"
    flags = {"more": more, "cache_latents_to_disk": True}
    assert case.latents(case.data(**flags)) == ["vae"]
    again = case.data(**flags)
    assert case.latents(again) == []
    shapes = {tuple(again.train[(0, index)].latents.shape[-2:]) for index in range(again.train.num_batches)}  # type: ignore[union-attr]
    assert {(8, 8), (4, 4)} <= shapes


class MultiResolution(SdLatentsCachingStrategy):
    format = LatentFormat("sd", by_resolution=True)


def test_a_family_with_resolutions_in_its_keys_keeps_all_of_them_in_one_file(case: Case) -> None:
    strategies = replace(case.strategies, latents_caching=MultiResolution())
    for resolution, expected in ((64, {"latents_8x8"}), (32, {"latents_8x8", "latents_4x4"})):
        text = f"[[datasets]]\nresolution = {resolution}\n[[datasets.subsets]]\nimage_dir = '{case.folder / 'img'}'\n"
        flags = {"dataset_config": write_toml(case.folder / "data.toml", text), "cache_latents_to_disk": True}
        case.latents(build(make_options(**flags), strategies), strategies=strategies)
        arrays = read_npz(case.folder / "img" / "p0_0064x0064_sd.npz")
        assert arrays is not None and {name for name in arrays if name.startswith("latents")} == expected
        assert {name for name in arrays if name.startswith("fingerprint")} == {
            n.replace("latents", "fingerprint") for n in expected
        }
    assert case.latents(build(make_options(**flags), strategies), strategies=strategies) == []


def write_foreign(case: Case, shape: tuple[int, int, int] = (4, 8, 8), suffix: str = "", **changes: Any) -> None:
    """Files as sd-scripts writes them, for every picture of the square bucket."""
    for name, size in (("p0_0064x0064", (64, 64)), ("p1_0064x0064", (64, 64)), ("p2_0080x0064", (80, 64))):
        arrays = {"latents": np.full(shape, 0.5, np.float32), "original_size": np.array(size), "crop_ltrb": np.zeros(4)}
        np.savez(
            case.folder / "img" / f"{name}_sd.npz", **{key + suffix: value for key, value in {**arrays, **changes}.items()}
        )
    write_picture(case.folder / "img" / "p3.png", (64, 64))
    np.savez(case.folder / "img" / "p3_0064x0064_sd.npz", **{f"latents{suffix}": np.full(shape, 0.5, np.float32)})


@pytest.mark.parametrize("suffix", ["", "_8x8"])
def test_files_by_sd_scripts_are_used_with_one_warning(suffix: str, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    write_foreign(case, suffix=suffix)
    data = case.data(cache_latents_to_disk=True)
    assert case.latents(data) == []
    latents = data.train[(0, 0)].latents
    assert latents is not None and (latents == 0.5).all()
    assert [record.getMessage()[:39] for record in caplog.records if "fingerprint" in record.getMessage()] == [
        "4 cached latents have no fingerprint (m"
    ]


def test_sd_scripts_old_file_without_size_and_family_is_used_until_there_is_a_new_one(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    write_foreign(case, shape=(4, 16, 16))  # new names, shapes that do not fit
    for name, level, shape in (("p0", 0.25, (4, 8, 8)), ("p1", 0.25, (4, 8, 8)), ("p2", 0.25, (4, 16, 16))):
        for new in (case.folder / "img").glob(f"{name}_*.npz"):
            new.unlink()
        np.savez(case.folder / "img" / f"{name}.npz", latents=np.full(shape, level, np.float32))
    before = {path: path.read_bytes() for path in (case.folder / "img").glob("p?.npz")}
    assert len(before) == 3
    data = case.data(cache_latents_to_disk=True)
    assert case.latents(data) == ["vae"]
    assert "2 cached latents have no fingerprint" in caplog.text and "latents: 2 made, 2 found on disk" in caplog.text
    cached = {
        record.path.stem: data.train.latent_cache.get(entry_key(record.path, record.recipe)) for record in data.train.records
    }
    assert [bool((cached[name].latents == 0.25).all()) for name in ("p0", "p1", "p2", "p3")] == [True, True, False, False]
    assert {path: path.read_bytes() for path in before} == before  # never written to

    write_foreign(case)
    again = case.data(cache_latents_to_disk=True)
    case.latents(again)
    latents = again.train[(0, 0)].latents
    assert latents is not None and (latents == 0.5).all()


def crops_of(data: TrainData, width: int, epochs: int) -> set[tuple[int, int]]:
    """(top, left) told to batches for the pictures of this width."""
    batches = [data.train[(epoch, index)] for epoch in range(epochs) for index in range(data.train.num_batches)]
    rows = [row for b in batches for row in zip(b.original_sizes[:, 1].tolist(), b.crop_top_lefts.tolist(), strict=True)]
    return {(top, left) for own, (top, left) in rows if own == width}


def test_the_crop_that_a_file_records_is_told_whoever_wrote_it(case: Case) -> None:
    """sd-scripts recorded letterbox offsets; its latents were trained with those, and go on being."""
    flips = "flip_aug = true\n"
    live = case.data(subset=flips)
    assert crops_of(live, 80, 1) == {(0, 8)}  # 80x64 is cut to 64x64, as much on either side
    case.latents(ours := case.data(subset=flips, cache_latents_to_disk=True))
    assert crops_of(ours, 80, 1) == {(0, 8)}
    path = case.folder / "img" / "p2_0080x0064_sd.npz"
    foreign = {name: array for name, array in np.load(path).items() if name != "fingerprint"}
    np.savez(path, **{**foreign, "crop_ltrb": np.array([1.0, 6.0, 60.0, 57.0])})
    assert case.latents(theirs := case.data(subset=flips, cache_latents_to_disk=True)) == []
    assert crops_of(theirs, 80, 20) == {(6, 1), (6, 4)}  # mirrored: 64 - 60 from the left


def test_files_by_sd_scripts_of_another_shape_or_size_are_made_again(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    write_foreign(case, shape=(4, 16, 16))
    assert case.latents(case.data(cache_latents_to_disk=True)) == ["vae"]
    assert "4 cached latents are made again, because of latents of another shape" in caplog.text
    write_foreign(case, original_size=np.array([10, 10]))
    assert case.latents(case.data(cache_latents_to_disk=True)) == ["vae"]
    assert "because of the image's size" in caplog.text


def test_a_file_is_checked_by_its_headers_and_small_arrays(tmp_path: Path) -> None:
    """Reading all latents or text encoder outputs at every start would take minutes."""
    arrays = {"latents": np.arange(4 * 64 * 64, dtype=np.float16).reshape(4, 64, 64), "fingerprint": np.array("{}")}
    write_npz(path := tmp_path / "a.npz", arrays)
    data = bytearray(path.read_bytes())
    data[data.index(arrays["latents"].tobytes()) + 9000] ^= 1
    path.write_bytes(data)
    assert read_npz(path) is None, "the damage is real"
    described = describe_npz(path)
    assert described is not None and described["fingerprint"] == arrays["fingerprint"]
    assert (described["latents"].shape, described["latents"].dtype) == ((4, 64, 64), np.float16)
    assert described["latents"].strides == (0, 0, 0)
    np.savez(path, big=np.array([{}] * 5000))
    assert describe_npz(path) is None


def test_small_arrays_are_described_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {
        "text": np.array("a caption, é"),
        "number": np.array(7),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 4), np.float16),
        "flags": np.array([True, False]),
    }
    write_npz(tmp_path / "x.npz", arrays)
    described = describe_npz(tmp_path / "x.npz")
    assert described is not None and described.keys() == arrays.keys()
    for name, array in arrays.items():
        assert described[name].dtype == array.dtype and np.array_equal(described[name], array)
    np.savez(tmp_path / "y.npz", pickled=np.array([{}]))
    assert describe_npz(tmp_path / "y.npz") is None


def test_a_damaged_file_is_made_again(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    path = case.folder / "img" / "p0_0064x0064_sd.npz"
    path.write_bytes(path.read_bytes()[:300])
    assert case.latents(case.data(cache_latents_to_disk=True)) == ["vae"]
    assert "1 cached latents are made again, because of unreadable file" in caplog.text
    assert read_npz(path) is not None


def test_skip_cache_check_uses_what_is_there(case: Case) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    data = case.data(cache_latents_to_disk=True, skip_cache_check=True)
    assert case.latents(data, make_bundle(vae_identity="vae-2")) == []


def test_cache_dir_keeps_files_of_equal_names_apart(case: Case) -> None:
    write_folder(case.folder / "other" / "img", [(64, 64)])
    more = f"[[datasets.subsets]]\nimage_dir = '{case.folder / 'other' / 'img'}'\n"
    case.latents(case.data(more=more, cache_latents_to_disk=True, cache_dir=str(case.folder / "cache")))
    assert npz_files(case.folder / "img") == npz_files(case.folder / "other") == []
    assert npz_files(case.folder / "cache").count("p0_0064x0064_sd.npz") == 2
    beside = case.folder / "img" / "x.npz"
    assert cache_path(beside, None) == beside


def test_a_cache_folder_that_cannot_be_written_is_named(case: Case) -> None:
    (case.folder / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write the cache file .*taken.*--cache_dir"):
        case.latents(case.data(cache_latents_to_disk=True, cache_dir=str(case.folder / "taken")))


def test_a_vae_that_overflows_names_the_images_and_what_to_do(case: Case) -> None:
    data = case.data(cache_latents=True)
    bundle = make_bundle()
    tiny.overflow_in_fp16(bundle.vae)
    cache_latents(data, case.strategies, bundle, data.options, CPU)
    bundle.vae.half()
    with pytest.raises(UserError, match=r"p0\.png(?s:.*)Use --no_half_vae"):
        cache_latents(data, case.strategies, bundle, data.options, CPU)
    with torch.no_grad():
        next(bundle.vae.float().parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"p0\.png(?s:.*)The VAE is damaged. Give another --vae"):
        cache_latents(data, case.strategies, bundle, data.options, CPU)


def test_latents_on_disk_that_are_not_finite_are_never_trained(case: Case) -> None:
    case.latents(case.data(cache_latents_to_disk=True))
    path = case.folder / "img" / "p1_0064x0064_sd.npz"
    arrays = dict(np.load(path))
    arrays["latents"][0, 0, 0] = np.inf
    np.savez(path, **arrays)
    data = case.data(cache_latents_to_disk=True)
    case.latents(data)
    with pytest.raises(UserError, match=r"p1_0064x0064_sd.npz does not fit .latents with NaN or infinite values.* Remove it"):
        _ = [data.train[(0, index)] for index in range(data.train.num_batches)]


def test_pictures_that_change_cannot_be_cached(case: Case) -> None:
    with pytest.raises(UserError, match=r"img: color_aug, random_crop and face_crop_aug_range change the pictures"):
        case.data(subset="random_crop = true\n", cache_latents=True)
    with pytest.raises(UserError, match=r"img: token_warmup_step changes the captions"):
        case.data(subset="token_warmup_step = 5\n", cache_text_encoder_outputs=True)


def test_a_cache_file_that_is_lost_while_training_costs_its_picture_and_all_of_them_the_run(case: Case) -> None:
    data = case.data(cache_latents_to_disk=True)
    case.latents(data)
    names = npz_files(case.folder / "img")
    whole = (case.folder / "img" / names[0]).read_bytes()
    (case.folder / "img" / names[0]).write_bytes(whole[: len(whole) // 2])
    (case.folder / "img" / names[1]).unlink()
    seen = [caption for index in range(data.train.num_batches) for caption in data.train[(0, index)].captions]
    assert set(seen) == {"picture 2, tag", "picture 3, tag"}
    reasons = {path.stem: reason for path, reason in data.train.quarantine.found.items()}
    assert reasons.keys() == {"p0", "p1"} and all("was removed or damaged while training" in r for r in reasons.values())
    (case.folder / "img" / names[0]).write_bytes(whole)  # a disk that is back
    assert "picture 0, tag" in [c for index in range(data.train.num_batches) for c in data.train[(1, index)].captions]
    for name in npz_files(case.folder / "img"):
        (case.folder / "img" / name).unlink()
    with pytest.raises(UserError, match="no picture can be used any more"):
        data.train[(0, 0)]


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_time_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "entry.npz"
    write_npz(path, {"value": np.zeros(2_000_000)})
    for attempt in range(4):
        child = os.fork()
        if child == 0:
            for number in range(1, 10**6):
                write_npz(path, {"value": np.full(2_000_000, float(number))})
            os._exit(0)
        time.sleep(0.03 + 0.02 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        arrays = read_npz(path)
        assert arrays is not None and len(set(arrays["value"][::9999])) == 1


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    class Unpicklable:
        def __reduce__(self) -> str:
            raise RuntimeError("half way")

    path = tmp_path / "entry.npz"
    write_npz(path, {"value": np.ones(3)})
    with pytest.raises(RuntimeError):
        write_npz(path, {"value": np.zeros(3), "bad": np.array([Unpicklable()], dtype=object)})
    arrays = read_npz(path)
    assert arrays is not None and arrays["value"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


# ---- text encoder outputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
def test_cached_outputs_are_those_of_live_encoding_and_nothing_is_tokenized(where: str, case: Case) -> None:
    live, cached = case.data(), case.data(**{where: True})
    case.text(cached)
    encoders = make_bundle().text_encoders
    for index in range(live.train.num_batches):
        one, other = live.train[(0, index)], cached.train[(0, index)]
        assert one.tokens is not None and other.tokens is None and other.conditioning is not None
        expected = case.strategies.text_encoding.encode(encoders, one.tokens).tensors()
        for name, value in other.conditioning.tensors().items():
            assert torch.allclose(value, expected[name], atol=1e-5), name
        assert not other.conditioning.missing()


def test_the_prefix_is_part_of_what_is_cached_and_equal_captions_are_encoded_once(case: Case) -> None:
    for index in range(4):
        (case.folder / "img" / f"p{index}.txt").write_text("same" if index else "other", encoding="utf-8")
    data = case.data(subset="caption_prefix = 'P'\n", cache_text_encoder_outputs=True)
    case.text(data)
    assert data.train.text_cache is not None
    assert set(data.train.text_cache.memory) == {"P same", "P other", ""}


def test_a_dropped_caption_is_served_from_the_cache(case: Case) -> None:
    data = case.data(subset="caption_dropout_rate = 1.0\n", cache_text_encoder_outputs=True)
    case.text(data)
    batch = data.train[(0, 0)]
    empty = case.strategies.text_encoding.encode(make_bundle().text_encoders, case.strategies.tokenize.tokenize([""]))
    assert set(batch.captions) == {""} and batch.conditioning is not None
    assert torch.allclose(batch.conditioning.tensors()["context"][0], empty.tensors()["context"][0], atol=1e-5)


def test_outputs_on_disk_are_used_again_and_made_again_when_caption_or_encoder_changes(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"cache_text_encoder_outputs_to_disk": True}
    assert case.text(case.data(**flags)) == ["text_encoder"]
    assert len(npz_files(case.folder / "img")) == 5  # four captions and the empty one
    assert case.text(case.data(**flags)) == []
    (case.folder / "img" / "p0.txt").write_text("edited", encoding="utf-8")
    assert case.text(case.data(**flags)) == ["text_encoder"]
    assert "because of the caption: " in caplog.text
    assert case.text(case.data(**flags), make_bundle(text_identity="text-2")) == ["text_encoder"]
    assert "5 cached text encoder outputs are made again, because of text_encoder: " in caplog.text


def test_outputs_in_half_precision_keep_their_type_on_disk(case: Case) -> None:
    data = case.data(cache_text_encoder_outputs_to_disk=True, mixed_precision="bf16")
    bundle = make_bundle()
    bundle.text_encoders["text_encoder"].to(torch.bfloat16)
    cache_text_outputs(data, case.strategies, bundle, data.options, CPU)
    conditioning = data.train[(0, 0)].conditioning
    assert conditioning is not None and conditioning.tensors()["context"].dtype == torch.bfloat16


def test_encoders_left_out_of_the_cache_stay_live(case: Case) -> None:
    data = case.data(cache_text_encoder_outputs=True)
    case.text(data, sources=frozenset())
    batch = data.train[(0, 0)]
    assert batch.tokens is not None and batch.conditioning is not None
    assert batch.conditioning.missing() == {"text_encoder"}


def test_an_entry_that_is_lost_while_training_costs_its_caption_and_not_the_run(case: Case) -> None:
    data = case.data(cache_text_encoder_outputs_to_disk=True)
    case.text(data)
    (case.folder / "img" / "p0_sd_te.npz").unlink()
    (case.folder / "img" / "p1_sd_te.npz").write_bytes(b"damaged")
    seen = [caption for index in range(data.train.num_batches) for caption in data.train[(0, index)].captions]
    assert set(seen) == {"picture 2, tag", "picture 3, tag"}
    assert {path.stem for path in data.train.quarantine.found} == {"p0", "p1"}


def test_one_picture_with_two_captions_has_two_entries(case: Case) -> None:
    more = f"[[datasets.subsets]]\nimage_dir = '{case.folder / 'img'}'\ncaption_prefix = 'P'\n"
    flags = {"more": more, "cache_text_encoder_outputs_to_disk": True}
    case.text(case.data(**flags))
    assert len(npz_files(case.folder / "img")) == 9
    assert case.text(case.data(**flags)) == []
