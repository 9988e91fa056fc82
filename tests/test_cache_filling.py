"""Filling caches: equal pictures once, captions that vary within bounds, several processes, and what stops half-way."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_tools import CPU, Case, make_bundle, make_strategies, write_folder, write_picture

from library.cache_io import read_npz
from library.caching import Share, cache_latents, cache_text_outputs
from library.errors import UserError
from library.file_index import KnownFiles
from library.image_io import content_hash
from library.strategy_base import Strategies
from library.strategy_sd import SdLatentsCachingStrategy

SHUFFLED = "shuffle_caption = true\n"


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def case(tmp_path: Path, strategies: Strategies) -> Case:
    write_folder(tmp_path / "img", [(64, 64), (64, 64), (80, 64), (128, 48)])
    for index in range(4):
        (tmp_path / "img" / f"p{index}.txt").write_text(f"a, b, c, d, e{index}")
    return Case(tmp_path, strategies)


@dataclass(frozen=True)
class Watched(SdLatentsCachingStrategy):
    """Tells `on_encode` how many pictures the VAE is given, batch by batch."""

    on_encode: Callable[[int], object] = field(kw_only=True, compare=False)

    def encode(self, vae: torch.nn.Module, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        self.on_encode(len(images))
        return super().encode(vae, images, seeds)


def watched(case: Case, on_encode: Callable[[int], object]) -> Strategies:
    return replace(case.strategies, latents_caching=Watched(on_encode=on_encode))


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cache_latents", "cache_latents_to_disk"])
def test_a_picture_that_lies_in_two_folders_is_encoded_once(where: str, case: Case) -> None:
    (case.folder / "copies").mkdir()
    for name in ("p0", "p2"):
        (case.folder / "copies" / f"{name}-again.png").write_bytes((case.folder / "img" / f"{name}.png").read_bytes())
    write_picture(case.folder / "copies" / "p9.png", (64, 64), key=9)
    data = case.data(more=f"[[datasets.subsets]]\nimage_dir = '{case.folder / 'copies'}'\n", **{where: True})
    seen: list[int] = []
    case.latents(data, strategies=watched(case, seen.append))
    assert len(data.train.records) == 7 and sum(seen) == 5
    cache = data.train.latent_cache
    assert cache is not None
    entries = {record.path.stem: cache.get(f"{record.path}|{record.recipe}") for record in data.train.records}
    assert torch.equal(entries["p0"].latents, entries["p0-again"].latents)
    assert torch.equal(entries["p2"].latents, entries["p2-again"].latents)
    assert not torch.equal(entries["p0"].latents, entries["p9"].latents)
    assert entries["p0"].seed == entries["p0-again"].seed != entries["p9"].seed
    if where == "cache_latents_to_disk":
        again = case.data(more=f"[[datasets.subsets]]\nimage_dir = '{case.folder / 'copies'}'\n", **{where: True})
        assert case.latents(again) == []


@pytest.mark.parametrize("where", ["cache_latents", "cache_latents_to_disk"])
def test_what_pictures_contain_is_known_once_they_are_cached(where: str, case: Case) -> None:
    """So that a later run that holds some of them out for validation need not read them all."""
    hour_ago, folder = time.time() - 3600, case.folder / "img"
    for path in folder.iterdir():
        os.utime(path, (hour_ago, hour_ago))
    case.latents(case.data(**{where: True}))
    contents = {path: content_hash(path.read_bytes()) for path in folder.glob("*.png")}
    for path in folder.iterdir():  # whoever does not tell has not read it
        path.write_bytes(b"?" * path.stat().st_size)
        os.utime(path, (hour_ago, hour_ago))
    files = KnownFiles.of_user(None)
    files.open(folder)
    assert {path: files.digest(path) for path in contents} == contents
    assert files.size(folder / "p3.png") == (128, 48)
    assert files.caption(folder / "p3.txt") == ("a, b, c, d, e3", False)


def test_one_unreadable_picture_is_told_when_all_others_are_in_the_cache(case: Case) -> None:
    data = case.data(cache_latents_to_disk=True, strict_data=True)
    whole = (case.folder / "img" / "p1.png").read_bytes()
    (case.folder / "img" / "p1.png").write_bytes(whole[:600])
    with pytest.raises(UserError, match=r"p1\.png.*All others are in the cache"):
        case.latents(data)
    assert len(list((case.folder / "img").glob("*.npz"))) == 3
    (case.folder / "img" / "p1.png").write_bytes(whole)
    assert case.latents(case.data(cache_latents_to_disk=True)) == ["vae"]
    assert case.latents(case.data(cache_latents_to_disk=True)) == []


def test_a_picture_that_changes_after_it_was_read_is_not_taken_for_the_cached_one(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    def change(_: int) -> None:
        write_picture(case.folder / "img" / "p0.png", (64, 64), key=77)  # while it is encoded

    case.latents(case.data(cache_latents_to_disk=True), strategies=watched(case, change))
    caplog.set_level(logging.INFO)
    assert case.latents(case.data(cache_latents_to_disk=True)) == ["vae"]
    assert "1 cached latents are made again, because of the image's content" in caplog.text


def test_processes_share_the_files_and_together_make_each_once(case: Case) -> None:
    seen: list[int] = []
    files = []
    for rank in range(2):
        data = case.data(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True)
        cache_latents(data, watched(case, seen.append), make_bundle(), data.options, CPU, Share(rank, 2))
        cache_text_outputs(data, case.strategies, make_bundle(), data.options, CPU, None, Share(rank, 2))
        files.append(len(list((case.folder / "img").glob("*.npz"))))
    assert sum(seen) == 4 and 0 < files[0] < files[1] == 4 + 5
    assert data.train[(0, 0)].latents is not None and data.train[(0, 0)].conditioning is not None
    again = case.data(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True)
    assert case.latents(again) == [] and case.text(again) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_caching_that_is_killed_goes_on_where_it_was(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(case.folder / "img", [(64, 64)] * 40)
    child = os.fork()
    if child == 0:
        data = case.data(cache_latents_to_disk=True)
        cache_latents(data, case.strategies, make_bundle(), data.options, CPU)
        os._exit(0)
    started = time.monotonic()
    while len(list((case.folder / "img").glob("*.npz"))) < 3:
        assert time.monotonic() - started < 60
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    whole = {path: path.read_bytes() for path in (case.folder / "img").glob("*.npz")}
    assert all(read_npz(path) is not None for path in whole)
    data = case.data(cache_latents_to_disk=True)
    case.latents(data)
    assert f"{40 - len(whole)} made, {len(whole)} found on disk" in caplog.text
    assert {path: path.read_bytes() for path in whole} == whole
    assert len(list((case.folder / "img").glob("*.npz"))) == 40


# ---- what a cache may do to folders ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("flags", "goes_on"), [({}, True), ({"strict_data": True}, False)], ids=["goes on", "strict"])
def test_a_disk_that_fills_costs_the_files_and_not_the_run(flags: dict[str, bool], goes_on: bool, case: Case) -> None:
    """A limit on the size of files stands for a full disk; it holds for the whole process, so this is one of its own."""
    live = case.data()
    expected = case.strategies.latents_caching.stored(
        make_bundle().vae, live.train[(0, 0)].images, live.train[(0, 0)].latent_seeds
    )  # type: ignore[arg-type]

    def full() -> None:
        import resource

        data = case.data(cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, **flags)
        case.latents(data)  # there is room for these
        for path in list((case.folder / "img").glob("p[01]*.npz")):
            path.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
        case.latents(data)
        case.text(data)
        batch = data.train[(0, 0)]
        assert torch.allclose(batch.latents, expected.float(), rtol=2**-10) and batch.conditioning is not None  # type: ignore[arg-type]
        assert sum(len(data.train[(0, index)]) for index in range(data.train.num_batches)) == 4

    assert _in_a_process(full) == goes_on
    assert sorted(path.name[:2] for path in (case.folder / "img").glob("*.npz")) == ["p2", "p3"]
    assert not list((case.folder / "img").glob(".*"))


def _in_a_process(function: Callable[[], None]) -> bool:
    """Whether it goes well; `UserError` is its only way to go wrong."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = io.StringIO()  # what pytest has there are files, too
        try:
            function()
            os._exit(0)
        except UserError:
            os._exit(3)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 3), "it ended in another error"
    return code == 0


def test_a_picture_may_have_the_longest_name_there_can_be(case: Case) -> None:
    for number, stem in enumerate(("x" * 251, "x" * 250 + "y", "日本" * 41)):
        write_picture(case.folder / "img" / f"{stem}.png", key=20 + number, caption=f"long {number}")
    flags = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    data = case.data(subset="shuffle_caption = true\n", **flags)
    assert case.latents(data) == ["vae"] and case.text(data) == ["text_encoder"]
    assert sum(len(data.train[(0, index)]) for index in range(data.train.num_batches)) == 7
    again = case.data(subset="shuffle_caption = true\n", **flags)
    assert case.latents(again) == [] == case.text(again)
    assert len(list((case.folder / "img").glob("*_sd.npz")) + list((case.folder / "img").glob("x*_[0-9a-f]*.npz"))) >= 6


def test_what_a_killed_writer_left_is_removed_when_it_is_old(case: Case) -> None:
    old, young, other = (case.folder / "img" / name for name in (f".{'0' * 16}.npz.tmp", f".{'1' * 16}.npz.tmp", ".notes.tmp"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (1, 1))
    case.latents(case.data(cache_latents_to_disk=True))
    assert not old.exists() and young.exists() and other.exists()


def test_readings_of_captions_are_bounded_on_the_disk(case: Case) -> None:
    """Each seed shuffles anew. A picture keeps what this run needs, and as many of the others: those used last."""
    flags = {"cache_text_encoder_outputs_to_disk": True, "caption_variants": 3}
    folder = case.folder / "img"
    (folder / "p9_sd_te_01234567.npz").write_bytes(b"the user's own")
    np.savez(folder / "p0_sd_te_01234567.npz", context=np.zeros(3))  # sd-scripts could have written it: no fingerprint
    foreign = {path: path.read_bytes() for path in folder.glob("*_01234567.npz")}

    def of_p0(seed: int) -> tuple[set[Path], set[Path]]:
        before = set(folder.glob("p0_sd_te_*.npz"))
        data = case.data(subset=SHUFFLED, seed=seed, **flags)
        case.text(data)
        after = set(folder.glob("p0_sd_te_*.npz"))
        cache = data.train.text_cache
        assert cache is not None and cache.files is not None and all(path.exists() for path in cache.files.paths)
        return after - before, after - foreign.keys()

    first, _ = of_p0(1)
    second, kept = of_p0(2)
    assert len(first) == 4 and len(second) == 3 and kept == first | second  # the empty caption is the fourth
    _, kept = of_p0(1)  # finds its own again, which makes them the youngest
    third, kept = of_p0(3)
    assert len(third) == 3 and kept == first | third
    assert {path: path.read_bytes() for path in foreign} == foreign


# ---- captions that vary ----------------------------------------------------------------------------------------------


def captions_of(data: object, epochs: int) -> list[tuple[str, ...]]:
    train = data.train  # type: ignore[attr-defined]
    return [train[(epoch, index)].captions for epoch in range(epochs) for index in range(train.num_batches)]


@pytest.mark.parametrize("where", ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_varied_captions_are_those_of_live_training_up_to_the_bound(where: str, repeats: int, case: Case) -> None:
    """Six readings of each picture: as many as the run has when live, or no more than that many different ones."""
    subset = f"{SHUFFLED}caption_dropout_rate = 0.3\nnum_repeats = {repeats}\n"
    live, cached = case.data(subset=subset), case.data(subset=subset, caption_variants=6, **{where: True})
    case.text(cached)
    epochs = 6 // repeats
    assert captions_of(cached, epochs) == captions_of(live, epochs)
    batch = cached.train[(epochs + 5, 0)]  # later on there are no new ones
    assert batch.tokens is None and batch.conditioning is not None
    encoders = make_bundle().text_encoders
    expected = case.strategies.text_encoding.encode(encoders, case.strategies.tokenize.tokenize(batch.captions))
    for name, value in batch.conditioning.tensors().items():
        assert torch.allclose(value, expected.tensors()[name], atol=1e-5), name


def test_the_number_of_readings_is_bounded_and_dropping_still_happens_in_every_epoch(case: Case) -> None:
    data = case.data(subset=SHUFFLED + "caption_dropout_rate = 0.5\n", caption_variants=3, cache_text_encoder_outputs=True)
    case.text(data)
    cache = data.train.text_cache
    assert cache is not None and len(cache.memory) <= 4 * 3 + 1
    seen = captions_of(data, 30)
    assert {caption for batch in seen for caption in batch} == set(cache.memory)
    dropped = [sum(caption == "" for batch in captions_of(data, epoch + 1)[-3:] for caption in batch) for epoch in range(30)]
    assert len(set(dropped)) > 1, "which captions are dropped differs from epoch to epoch"


def test_a_run_of_few_epochs_encodes_no_more_readings_than_it_has(case: Case) -> None:
    data = case.data(subset=SHUFFLED, max_train_epochs=2, cache_text_encoder_outputs=True)
    case.text(data)
    assert data.train.text_cache is not None and len(data.train.text_cache.memory) <= 4 * 2 + 1


def test_another_seed_encodes_only_captions_that_are_new(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    flags = {"cache_text_encoder_outputs_to_disk": True, "caption_variants": 4}
    tags = "enable_wildcard = true\n"
    for index in range(4):
        (case.folder / "img" / f"p{index}.txt").write_text("{red|blue} thing")
    case.text(case.data(subset=tags, **flags))
    assert "text encoder outputs: 3 made" in caplog.text
    caplog.clear()
    assert case.text(case.data(subset=tags, seed=99, **flags)) == []
    (case.folder / "img" / "p2.txt").write_text("{red|blue|green} thing")
    case.text(case.data(subset=tags, seed=98, **{**flags, "caption_variants": 30}))
    assert "text encoder outputs: 1 made, 3 found on disk" in caplog.text


def test_bfloat16_outputs_take_two_bytes_where_sd_scripts_would_not_read_them(case: Case) -> None:
    bundle = make_bundle()
    bundle.text_encoders["text_encoder"].to(torch.bfloat16)
    loaded = []
    for number, flags in enumerate(({}, {"cache_dir": str(case.folder / "cache")})):
        data = case.data(cache_text_encoder_outputs_to_disk=True, mixed_precision="bf16", **flags)
        cache_text_outputs(data, case.strategies, bundle, data.options, CPU)
        folder = case.folder / ("cache" if number else "img")
        arrays = read_npz(next(folder.glob("**/p0_sd_te.npz")))
        assert arrays is not None and arrays["context"].dtype.itemsize == (2 if number else 4)
        conditioning = data.train[(0, 0)].conditioning
        assert conditioning is not None
        loaded.append(conditioning.tensors()["context"])
    assert loaded[0].dtype == loaded[1].dtype == torch.bfloat16 and torch.equal(*loaded)
