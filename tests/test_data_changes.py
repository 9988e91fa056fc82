"""What follows from a change of the data or of how it is used: what is made again, and what a resumed run is told."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from data_tools import Case, make_bundle, make_strategies, write_folder, write_picture

from library.clip_text import ClipCaptions
from library.dataset import TrainData
from library.resume import WARNED, run_record
from library.run_setup import RunLength
from library.strategy_base import Strategies


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def case(tmp_path: Path, strategies: Strategies) -> Case:
    write_folder(tmp_path / "img", [(64, 64), (64, 64), (80, 64), (128, 48)])
    write_folder(tmp_path / "more", [(64, 64)])
    (tmp_path / "more" / "p0.txt").write_text("of the other folder")
    return Case(tmp_path, strategies)


# ---- caches ----------------------------------------------------------------------------------------------------------

CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
LATENTS = {"img/p0_0064x0064", "img/p1_0064x0064", "img/p2_0080x0064", "img/p3_0128x0048", "more/p0_0064x0064"}
TEXTS = {"img/p0", "img/p1", "img/p2", "img/p3", "more/p0"}
EMPTY = "img/p0 (empty)"


@dataclass(frozen=True)
class Change:
    """One change, and the entries that have to be made again because of it."""

    latents: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    files: Callable[[Case], object] = lambda case: None
    first: str = ""
    """Keys that the first folder's subset gets."""
    second: str = ""
    bundle: dict[str, str] = field(default_factory=dict)
    strategies: Callable[[Strategies], Strategies] = lambda strategies: strategies
    flags: dict[str, Any] = field(default_factory=dict)


def longer(strategies: Strategies) -> Strategies:
    captions: ClipCaptions = strategies.tokenize.captions  # type: ignore[attr-defined]
    return replace(strategies, tokenize=replace(strategies.tokenize, captions=replace(captions, max_length=150)))  # type: ignore[call-arg]


def skipping(strategies: Strategies) -> Strategies:
    return replace(strategies, text_encoding=replace(strategies.text_encoding, clip_skip=2))  # type: ignore[call-arg]


CHANGES: dict[str, Change] = {
    "nothing": Change(),
    "one picture": Change({"img/p1_0064x0064"}, files=lambda case: write_picture(case.folder / "img" / "p1.png", key=99)),
    "one picture's time": Change(files=lambda case: (case.folder / "img" / "p1.png").touch()),
    "one caption": Change(texts={"img/p2"}, files=lambda case: (case.folder / "img" / "p2.txt").write_text("edited")),
    "the VAE": Change(LATENTS, bundle={"vae_identity": "another"}),
    "the text encoder": Change(texts=TEXTS | {EMPTY}, bundle={"text_identity": "another"}),
    "the length of captions": Change(texts=TEXTS | {EMPTY}, strategies=longer),
    "the layer that is taken": Change(texts=TEXTS | {EMPTY}, strategies=skipping),
    "a prefix in one folder": Change(texts={"more/p0"}, second="caption_prefix = 'a'\n"),
    "a separator that changes no caption": Change(second="secondary_separator = ';'\n"),
    "how one folder is resized": Change({"img/p3_0128x0048"}, first="resize_interpolation = 'nearest'\n"),  # the others fit
    "mirroring one folder": Change({"more/p0_0064x0064"}, second="flip_aug = true\n"),
    "repeats, weight and dropping": Change(second="num_repeats = 3\nloss_weight = 0.5\ncaption_dropout_rate = 0.3\n"),
    "the precision that encoders run in": Change(texts=TEXTS | {EMPTY}, flags={"mixed_precision": "bf16"}),
    "seed and batch size": Change(flags={"seed": 99, "train_batch_size": 3}),
}


def data_of(case: Case, change: Change) -> TrainData:
    more = f"[[datasets.subsets]]\nimage_dir = '{case.folder / 'more'}'\n{change.second}"
    return case.data(subset=change.first, more=more, **CACHED, **change.flags)


def fill(case: Case, change: Change) -> dict[str, str]:
    """Every cache file by what it is of, with a hash of its content."""
    data = data_of(case, change)
    strategies = change.strategies(case.strategies)
    bundle = make_bundle(**change.bundle)
    case.latents(data, bundle, strategies)
    replace(case, strategies=strategies).text(data, bundle)
    found = {}
    for path in case.folder.glob("*/*.npz"):
        name = f"{path.parent.name}/{path.stem.removesuffix('_sd').removesuffix('_sd_te')}"
        if "_sd_te_" in path.stem:
            name = f"{path.parent.name}/{path.stem.partition('_sd_te_')[0]} (empty)"
        found[name] = hashlib.blake2b(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_made_again_and_nothing_else(name: str, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = fill(case, Change())
    assert before.keys() == LATENTS | TEXTS | {EMPTY}
    change = CHANGES[name]
    change.files(case)
    caplog.clear()
    after = fill(case, change)
    again = {entry for entry in before if before[entry] != after[entry]}
    said = [record.getMessage() for record in caplog.records if " made, " in record.getMessage()]
    made = [int(line.split(": ")[1].split(" made")[0]) for line in said]
    assert after.keys() == before.keys()
    assert made == [len(change.latents), len(change.texts)], said
    assert again <= change.latents | change.texts
    if not change.bundle:  # a model by another name is the same one here
        assert again == change.latents | change.texts
    assert fill(case, change) == after, "and not a second time"


# ---- resuming --------------------------------------------------------------------------------------------------------


def record(case: Case, subset: str = "", **flags: Any) -> dict[str, Any]:
    data = case.data(subset=subset, **flags)
    return run_record(data.options, RunLength.of(data.options.training, data.train.num_batches), 1, data.train)


SHUFFLED = "shuffle_caption = true\n"
VARIED = {"cache_text_encoder_outputs": True, "caption_variants": 3}


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        (("", {}), ("", {}), set()),
        (("", {}), ("", {"cache_latents": True, "cache_text_encoder_outputs": True, "cache_dir": "x"}), set()),
        (("", VARIED), ("", {**VARIED, "caption_variants": 4}), set()),
        ((SHUFFLED, VARIED), (SHUFFLED, {**VARIED, "caption_variants": 4}), {"readings"}),
        ((SHUFFLED, VARIED), (SHUFFLED, {}), {"readings"}),
        (("", {}), (SHUFFLED, {}), {"settings"}),
        (("", {}), ("flip_aug = true\n", {}), {"settings"}),
    ],
)
def test_a_state_tells_what_makes_it_another_run(
    first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]], differs: set[str], case: Case
) -> None:
    one, other = record(case, first[0], **first[1]), record(case, second[0], **second[1])
    assert {key for key in WARNED if one[key] != other[key]} == differs
    assert one["options"] == other["options"]


def test_captions_and_pictures_are_known_by_what_they_are_and_not_by_where(case: Case, tmp_path: Path) -> None:
    before = record(case)
    shutil.move(case.folder / "img", case.folder / "elsewhere")
    (case.folder / "elsewhere").rename(case.folder / "img")
    other = replace(case, folder=tmp_path / "moved")
    shutil.copytree(case.folder / "img", other.folder / "img")
    assert {key: record(other)[key] for key in WARNED} == {key: before[key] for key in WARNED}
    (case.folder / "img" / "p0.txt").write_text("edited")
    assert {key for key in WARNED if record(case)[key] != before[key]} == {"captions"}
    write_picture(case.folder / "img" / "p1.png", (72, 64))
    assert {key for key in WARNED if record(case)[key] != before[key]} == {"captions", "pictures"}
