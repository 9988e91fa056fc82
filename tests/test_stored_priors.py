"""Where the model itself learns, regularisation pictures can keep what it predicted before: those predictions are stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import runs
import tiny
import torch
from runs import SHALLOW_CASES, Workspace
from safetensors.torch import load_file

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.train_util import Trainer

CHOICES = 2


def make(family: str, folder: Path) -> Workspace:
    tiny.write_images(folder / "regular" / "1_any", 2, (64, 64))
    return runs.make_workspace(SHALLOW_CASES[family], folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make("flux", tmp_path_factory.mktemp("priors"))


@pytest.fixture(scope="module")
def sdxl_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Text encoders learn, too."""
    return make("sdxl", tmp_path_factory.mktemp("sdxl"))


def flags(workspace: Workspace, folder: Path) -> list[str]:
    regular = workspace.images.parent / "regular"
    return [
        f"--reg_data_dir={regular}",
        "--preserve_prior",
        f"--prior_choices={CHOICES}",
        f"--cache_dir={folder}",
        "--flip_aug",
    ]


def keeping(trainer: Trainer) -> list[TrainBatch]:
    """The batches of two epochs with pictures that keep their predictions."""
    dataset = trainer.data.train
    batches = [dataset[(epoch, index)] for epoch in range(2) for index in range(len(dataset))]
    return [batch for batch in batches if batch.preserve is not None]


def stored(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.rglob("*_prior.npz"):
        with np.load(path) as archive:
            found |= {f"{path.name}/{name}": archive[name] for name in archive.files if name.startswith("prediction")}
    return found


@pytest.mark.parametrize("of", ["workspace", "sdxl_workspace"])
def test_the_untrained_model_has_nothing_to_learn_of_what_it_predicted(
    of: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In whatever batch it stands, with its own noise and time; every picture is seen in a few views only, in turn."""
    workspace: Workspace = request.getfixturevalue(of)
    trainer = workspace.trainer("full", tmp_path / "out", *flags(workspace, tmp_path))
    keys: dict[str, set[int | None]] = {}
    for batch in keeping(trainer):
        assert batch.preserve is not None
        with torch.no_grad():
            losses = trainer.batch_loss(batch).of_images
        assert losses[batch.preserve].max() < 1e-6
        assert (losses[~batch.preserve] > 0.1).all()
        for name, key, kept in zip(batch.names, batch.prior_keys, batch.preserve.tolist(), strict=True):
            assert (key is not None) == kept
            if kept:
                keys.setdefault(Path(name).name, set()).add(key)
    assert [len(found) for found in keys.values()] == [CHOICES, CHOICES]
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(0.05)
        batch = keeping(trainer)[0]
        assert batch.preserve is not None
        assert trainer.batch_loss(batch).of_images[batch.preserve].min() > 1e-4


def test_predictions_are_found_again_and_made_again_where_they_would_be_others(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    common = flags(workspace, tmp_path)
    workspace.trainer("full", tmp_path / "one", *common)
    assert "of 2 images made, of 0 found" in caplog.text
    first = stored(tmp_path)
    assert len(first) == 2 * CHOICES
    caplog.clear()
    workspace.trainer("full", tmp_path / "two", *common, "--learning_rate=1e-5", "--loss_type=l1", "--optimizer_type=SGD")
    assert "of 0 images made, of 2 found" in caplog.text
    caplog.clear()
    workspace.trainer("full", tmp_path / "three", *common, "--noise_offset=0.2")
    assert "made again, because of the views, noises or times that it is asked about" in caplog.text
    assert any((stored(tmp_path)[name] != first[name]).any() for name in first)


def test_a_run_goes_on_exactly_with_predictions_of_the_model_as_it_was(workspace: Workspace, tmp_path: Path) -> None:
    """Also where they have to be made again: the weights of the state are not the untrained ones."""
    common = ["--max_train_steps=3", "--save_every_n_steps=2", "--save_state"]
    whole = workspace.train("full", tmp_path / "whole", *flags(workspace, tmp_path / "a"), *common)
    resume = f"--resume={whole / 'tiny-step00000002-state'}"
    resumed = workspace.train("full", tmp_path / "resumed", *flags(workspace, tmp_path / "b"), *common, resume)
    first, again = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert first.keys() == again.keys() and len(first) == 2 * CHOICES
    assert all((first[name] == again[name]).all() for name in first)
    ends = [load_file(folder / "tiny-state" / "trainable.safetensors") for folder in (whole, resumed)]
    runs.assert_same_tensors(*ends)


def test_the_plan_counts_them(workspace: Workspace, tmp_path: Path) -> None:
    workspace.train("full", tmp_path, *flags(workspace, tmp_path), "--plan")
    found = json.loads((tmp_path / "plan.json").read_text())["caches"]["predictions_to_keep"]
    assert (found["entries"], found["to_make"]) == (2, 2)
    workspace.trainer("full", tmp_path, *flags(workspace, tmp_path))
    made = sum(path.stat().st_size for path in tmp_path.rglob("*_prior.npz"))
    assert found["new_bytes"] == pytest.approx(made, rel=0.5)  # tiny ones are names and fingerprints above all


def test_a_lost_file_leaves_its_picture_out(workspace: Workspace, tmp_path: Path) -> None:
    trainer = workspace.trainer("full", tmp_path / "out", *flags(workspace, tmp_path))
    for path in tmp_path.rglob("*000_*_prior.npz"):
        path.unlink()
    names = {Path(name).parent.name + "/" + Path(name).name for batch in keeping(trainer) for name in batch.names}
    assert "1_any/001.png" in names and "1_any/000.png" not in names


def test_a_network_asks_the_frozen_model_instead(workspace: Workspace, tmp_path: Path) -> None:
    trainer = workspace.trainer("network", tmp_path / "out", *flags(workspace, tmp_path))
    batch = keeping(trainer)[0]
    assert batch.prior is None and not batch.prior_keys and not stored(tmp_path)
    assert batch.preserve is not None
    with torch.no_grad():
        assert trainer.batch_loss(replace(batch, preserve=torch.ones(len(batch), dtype=torch.bool))).total == 0
