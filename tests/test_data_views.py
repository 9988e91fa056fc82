"""Seeing the data before training: the page of batches, what --plan says of caches, pictures that look alike."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from data_tools import build, make_options, make_strategies, write_picture, write_toml
from PIL import Image, ImageFilter
from runs import SHALLOW_CASES, Workspace

from library.batch_page import PAGE_FILE, page, picture
from library.cache_plan import caches_of_run, disk_of_run
from library.dataset import TrainData, pixels_to_tensor
from library.near_duplicates import MAX_DISTANCE, difference_hash, near_duplicates

GREEN = (20, 200, 60)
VOID = {"img", "meta", "input"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sd"], tmp_path_factory.mktemp("views"))


class Page(HTMLParser):
    """What a browser would make of the page; a tag that is not closed, or closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.captions: list[str] = []
        self.images: list[np.ndarray] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            kind, _, data = (dict(attrs)["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(np.array(Image.open(io.BytesIO(base64.b64decode(data)))))
        if tag not in VOID:
            self.open.append(tag)
        for name, texts in (("section", self.titles), ("figcaption", self.captions)):
            if tag == name:
                texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for name, texts in (("section", self.titles), ("figcaption", self.captions)):
            if name in self.open and not (name == "section" and "figure" in self.open):
                texts[-1] += data


def test_the_page_has_the_batches_that_training_sees_pixel_by_pixel(workspace: Workspace, tmp_path: Path) -> None:
    extra = ["--shuffle_caption", "--flip_aug", "--random_crop", "--caption_dropout_rate=0.3", "--caption_prefix=<b>&amp;"]
    workspace.train("network", tmp_path / "page", "--show_batches=9", *extra)
    assert [path.name for path in (tmp_path / "page").iterdir()] == [PAGE_FILE], "nothing is trained"
    shown = Page((tmp_path / "page" / PAGE_FILE).read_text(encoding="utf-8"))
    train = workspace.trainer("network", tmp_path / "run", *extra).data.train
    batches = [train[(index // train.num_batches, index % train.num_batches)] for index in range(9)]
    assert train.num_batches < 9, "the page goes on into the second epoch"
    assert len(shown.titles) == 9 and f"epoch {8 // train.num_batches + 1}" in shown.titles[8]
    captions = [caption or "(empty caption)" for batch in batches for caption in batch.captions]
    assert shown.captions == captions and {"(empty caption)"} < set(captions)
    images = [image for batch in batches for image in batch.images]  # type: ignore[union-attr]
    assert len(shown.images) == len(images)
    for one, image in zip(shown.images, images, strict=True):
        assert torch.equal(pixels_to_tensor(one), image)
    for title, batch in zip(shown.titles, batches, strict=True):
        height, width = batch.target_sizes[0].tolist()
        assert f"bucket {width}x{height}, {len(batch)} picture" in title


def test_debugging_the_data_set_is_the_page_of_ten_batches(workspace: Workspace, tmp_path: Path) -> None:
    workspace.train("network", tmp_path, "--debug_dataset")
    assert [path.name for path in tmp_path.iterdir()] == [PAGE_FILE]
    assert len(Page((tmp_path / PAGE_FILE).read_text(encoding="utf-8")).titles) == 10


def test_a_page_picture_is_what_was_decoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 5, 3), dtype=np.uint8)
    assert np.array_equal(picture(pixels_to_tensor(pixels)), pixels)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    """Green pictures of which the left half counts, with captions that a page has to be careful with."""
    folder = tmp_path_factory.mktemp("masked")
    captions = ["<script>document.title = 'run'</script>\"><img src=x>", "long" * 200, "", "plain & simple"]
    for number, caption in enumerate(captions):
        for name in ("img", "masks"):
            (folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), GREEN).save(folder / "img" / f"{number}.png")
        (folder / "img" / f"{number}.txt").write_text(caption)
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :32] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    toml = (
        "[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\n"
        f"image_dir = '{folder / 'img'}'\nconditioning_data_dir = '{folder / 'masks'}'\n"
    )
    options = make_options(dataset_config=write_toml(folder / "data.toml", toml), masked_loss=True)
    return build(options, make_strategies(folder))


def test_what_a_mask_leaves_out_is_shaded(masked: TrainData) -> None:
    shown = Page("".join(page(masked.train, 1)))
    shades = [image for image in shown.images if image.shape[-1] == 4]
    assert len(shades) * 2 == len(shown.images) == 8
    assert shades[0].shape == (8, 8, 4)
    assert (shades[0][:, :4, 3] == 0).all() and (shades[0][:, 4:, 3] > 100).all()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
QUIET += "--disable-component-update --disable-sync --hide-scrollbars"


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: .ci/run installs one")
def test_a_browser_shows_the_pictures_their_shades_and_captions_as_text(masked: TrainData, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("".join(page(masked.train, 1)), encoding="utf-8")
    command = [str(CHROMIUM), *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=620,1600"]
    command += [f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    seen = np.array(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    green = (abs(seen - np.array(GREEN)) < 3).all(-1)
    hidden = (seen[..., 0] > 150) & (seen[..., 2] > 100) & (seen[..., 1] < 120)
    for half in (green, hidden):
        rows, columns = half.any(1), half.any(0)
        assert rows.sum() > 400 and columns.sum() > 200, "four pictures in two columns, each half green and half shaded"
    assert (seen.max(-1) < 100).any(1).sum() > 250, "a long word goes on in many lines"
    assert (seen[:, -8:] == seen[0, -1]).all(), "nothing reaches over the edge"


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_is_cached_and_how_much_disk_the_rest_takes(workspace: Workspace, tmp_path: Path) -> None:
    caches = [
        "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only",
        f"--cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    memory = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
    train = workspace.trainer("network", tmp_path / "trainer", *memory).data.train
    assert train.latent_cache is not None and train.text_cache is not None
    caption = train.text_cache.memory[""]
    kept = caches_of_run(workspace.prepared("network", tmp_path / "memory", *memory), caption)["latents"]
    assert (kept["where"], kept["entries"]) == ("memory", 7)
    assert kept["bytes"] == sum(entry.latents.nbytes for entry in train.latent_cache.memory.values())

    run = workspace.prepared("network", tmp_path / "before", *caches)
    before = caches_of_run(run, caption)
    assert not list(tmp_path.glob("cache/**/*_sd*.npz")), "a plan makes no entry"
    assert {name: (cache["found"], cache["to_make"]) for name, cache in before.items()} == {
        "latents": (0, 7),
        "text_encoder_outputs": (0, before["text_encoder_outputs"]["entries"]),
    }
    disk = disk_of_run(run, before)
    assert disk["new_bytes"] == sum(cache["new_bytes"] for cache in before.values()) < disk["free_bytes"]
    workspace.trainer("network", tmp_path / "run", *caches)
    for name, pattern in (("latents", "**/*_sd.npz"), ("text_encoder_outputs", "**/*_sd_te*.npz")):
        written = sum(path.stat().st_size for path in (tmp_path / "cache").glob(pattern))
        assert before[name]["new_bytes"] == pytest.approx(written, rel=0.2)
    after = caches_of_run(workspace.prepared("network", tmp_path / "after", *caches), caption)
    assert all(cache["to_make"] == 0 and cache["new_bytes"] == 0 for cache in after.values())


def test_the_plan_names_a_held_out_picture_that_looks_like_a_trained_one(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "img"
    originals = [write_picture(folder / f"p{key}.png", (64, 64), key=key) for key in range(6)]
    for path in originals:  # a second copy of each, stored otherwise: whichever is held out, the other is trained or held out
        Image.open(path).resize((80, 80), Image.Resampling.BICUBIC).save(folder / f"{path.stem}-larger.jpg", quality=80)
    data = tmp_path / "data.toml"
    data.write_text(
        "[[datasets]]\nresolution = 64\nvalidation_split = 0.25\nvalidation_seed = 1\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\nclass_tokens = 'a'\n"
    )
    (folder / "broken.png").write_bytes(b"no picture")
    workspace.train("network", tmp_path / "out", "--plan", f"--dataset_config={data}", "--cache_latents_to_disk")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert list(plan["data"]["left_out"]) == [str(folder / "broken.png")]
    assert plan["data"]["subsets"] == [{"name": "img", "images": 12, "repeats": 1, "is_reg": False}]
    assert (plan["data"]["images"], plan["data"]["held_out"]) == (9, 3)
    assert plan["caches"]["latents"]["to_make"] == 12 and plan["disk"]["new_bytes"] > 0
    found = plan["held_out_lookalikes"]
    assert found
    for pair in found:
        one, other = (re.sub("-larger$", "", Path(pair[side]).stem) for side in ("held_out", "trained"))
        assert one == other and pair["distance"] <= MAX_DISTANCE
    said = " ".join(capsys.readouterr().out.split())  # lines are wrapped where the folder's name is long
    assert "looks like" in said and "held out" in said and "12: 0 found" in said and "broken.png: not a readable image" in said


def smooth(key: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    noise = np.random.default_rng(key).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_pictures_that_look_alike_are_found_and_others_are_not(tmp_path: Path) -> None:
    changes = {
        "smaller": lambda image: image.resize((48, 32)),
        "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
        "brighter": lambda image: image.point(lambda value: min(255, round(value * 0.9 + 15))),
    }
    trained = []
    for key in range(40):
        smooth(key).save(path := tmp_path / f"{key}.png")
        trained.append(path)
    held_out = []
    for number, (name, change) in enumerate(changes.items()):
        change(smooth(number)).save(path := tmp_path / f"held-{name}.jpg", quality=70)
        held_out.append(path)
    smooth(1000).save(new := tmp_path / "held-new.png")
    (broken := tmp_path / "held-broken.png").write_bytes(b"no picture")
    pairs = near_duplicates([*held_out, new, broken], [*trained, broken])
    assert [(pair.held_out, pair.trained) for pair in pairs] == list(zip(held_out, trained[:3], strict=True))
    assert near_duplicates([], trained) == []


def test_the_hash_is_that_of_a_difference_between_neighbours() -> None:
    ramp = np.broadcast_to(np.arange(0, 252, 28, dtype=np.uint8)[None, :, None], (8, 9, 3))
    assert difference_hash(np.ascontiguousarray(ramp)) == 2**64 - 1
    assert difference_hash(np.ascontiguousarray(ramp[:, ::-1])) == 0
