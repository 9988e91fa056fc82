"""Validation, the best model, stopping early, and averages of the weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny
import torch
from runs import SHALLOW_CASES, Workspace
from safetensors.torch import load_file

from library.errors import UserError
from library.model_io import open_checkpoint
from library.rng import StepRng, key_to_seed
from library.validation import BestLoss, Validation, ValidationLoss, evenly, quantiles_of

HELD_OUT = ("--validation_split=0.4", "--validation_quantiles=3", "--noise_offset=0.1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sd"], tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sdxl"], tmp_path_factory.mktemp("sdxl"))


def test_quantiles_are_the_middles_of_equal_parts() -> None:
    assert quantiles_of(4) == [0.125, 0.375, 0.625, 0.875]


def test_few_batches_are_spread_over_all() -> None:
    assert (evenly(3, None), evenly(3, 8), evenly(10, 4)) == ([0, 1, 2], [0, 1, 2], [0, 2, 5, 7])


def test_the_lowest_loss_is_kept_and_a_loss_that_is_no_number_is_not_low() -> None:
    best = BestLoss()
    assert [best.take(loss, step) for step, loss in enumerate([3.0, 2.0, 2.0, float("nan"), 1.0])] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert best == BestLoss(1.0, 4, 0)


def test_logs_have_a_mean_a_distance_from_training_and_a_curve_for_each_quantile() -> None:
    assert ValidationLoss((1.0, 2.0)).logs("step", 1.25) == {
        "loss/validation/step_average": 1.5,
        "loss/validation/step_divergence": 0.25,
        "loss/validation/quantile_25": 1.0,
        "loss/validation/quantile_75": 2.0,
    }


@pytest.mark.parametrize("of", ["workspace", "sdxl_workspace"])
def test_a_round_is_the_mean_over_pictures_and_times_and_every_round_is_alike(
    of: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    workspace: Workspace = request.getfixturevalue(of)
    trainer = workspace.trainer("network", tmp_path, *HELD_OUT)
    validation = Validation.of(trainer)
    assert validation is not None
    with trainer.looking():
        found = validation.measure()
        assert validation.measure() == found
    seed, expected = key_to_seed(7, "validation"), []
    for quantile in quantiles_of(3):
        total, pictures = 0.0, 0
        for index in range(validation.dataset.num_batches):
            batch = validation.dataset[(0, index)]
            trainer.rng = StepRng(seed, step=index)
            with trainer.looking(), torch.no_grad():
                total += float(trainer.loss(replace(batch, quantile=quantile))) * len(batch)
            pictures += len(batch)
        expected.append(total / pictures)
    assert list(found.by_quantile) == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 3


def test_validation_changes_nothing_of_what_is_learned(workspace: Workspace, tmp_path: Path) -> None:
    often = ("--validate_every_n_steps=1", "--save_best", "--max_validation_steps=1", "--network_args", "rank_dropout=0.5")
    plain = workspace.train("network", tmp_path / "a", *HELD_OUT, *often[3:])
    validated = workspace.train("network", tmp_path / "b", *HELD_OUT, *often)
    runs.assert_same_tensors(load_file(plain / "tiny.safetensors"), load_file(validated / "tiny.safetensors"))
    curve = runs.rows(validated, "loss/validation/step_average")
    assert len(curve) == 4
    assert runs.rows(plain, "loss/validation/epoch_average"), "every epoch, where nothing else is asked for"
    assert (validated / "tiny-best.safetensors").is_file()


def test_a_run_stops_when_validation_finds_nothing_better_and_remembers_it(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    flags = (*HELD_OUT, "--learning_rate=1e-30", "--validate_every_n_steps=1", "--early_stopping_patience=3")
    once = workspace.train("network", tmp_path / "once", *flags, "--max_train_steps=9")
    assert len(runs.losses(once)) == 4
    assert "stopped early: the validation loss was lowest after step 1" in caplog.text
    first = workspace.train("network", tmp_path / "parts", *flags, "--max_train_steps=2", "--save_state_on_train_end")
    again = workspace.train("network", first, *flags, "--max_train_steps=9", f"--resume={first / 'tiny-state'}")
    assert runs.losses(again) == runs.losses(once)


def test_several_sets_have_a_loss_each(workspace: Workspace, tmp_path: Path) -> None:
    held_out = '[[datasets]]\nvalidation_split = 1.0\n[[datasets.subsets]]\nimage_dir = "{}"\n'
    sets = [workspace.images / "2_wide", tmp_path / "others"]
    tiny.write_images(sets[1], 3, (72, 72))
    trained = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{workspace.images / "2_thing"}"\n'
    config = tmp_path / "data.toml"
    config.write_text("[general]\nbatch_size = 1\n" + trained + "".join(held_out.format(folder) for folder in sets))
    trainer = workspace.trainer("network", tmp_path / "out", f"--dataset_config={config}", "--validation_quantiles=2")
    validation = Validation.of(trainer)
    assert validation is not None
    with trainer.looking():
        found = validation.measure()
    assert found.by_set.keys() == {"2_wide", "others"}
    assert found.mean == pytest.approx((2 * found.by_set["2_wide"] + 3 * found.by_set["others"]) / 5, rel=1e-5)
    assert "loss/validation/others_average" in found.logs("step", 0.0)


def test_a_validation_without_pictures_is_refused(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace.prepared("network", tmp_path, "--validation_seed=3")
    assert "--validation_seed has no effect" in caplog.text
    with pytest.raises(UserError, match="--early_stopping_patience: no pictures are held out"):
        workspace.trainer("network", tmp_path, "--early_stopping_patience=3")


# Averages


@pytest.mark.parametrize("mode", runs.MODES)
def test_an_average_is_that_of_the_weights_after_each_step(mode: runs.Mode, workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--ema", "--ema_decay=0.6", "--save_every_n_steps=1", "--max_train_steps=3", "--save_model_as=safetensors")
    start = workspace.trainer(mode, tmp_path / "start")
    start.trainable.save(tmp_path / "start.safetensors", dtype=None, metadata={})
    output = workspace.train(mode, tmp_path / "out", *flags, "--ema_evaluate", "--validation_split=0.4")
    expected = {name: value.double() for name, value in load_file(tmp_path / "start.safetensors").items()}
    for number, stem in enumerate(["tiny-step00000001", "tiny-step00000002", "tiny"]):
        decay = min(0.6, (1 + number) / (10 + number))
        for name, value in load_file(output / f"{stem}.safetensors").items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
    averages = load_file(output / "tiny-ema.safetensors")
    for name, value in averages.items():
        torch.testing.assert_close(value.double(), expected[name].double(), atol=1e-6, rtol=1e-5)
    raw = load_file(output / "tiny.safetensors")
    assert any(not torch.equal(value, averages[name]) for name, value in raw.items())
    said = [open_checkpoint(output / f"{stem}.safetensors").metadata for stem in ("tiny", "tiny-ema")]
    assert [(one.get("ss_ema_decay"), one["ss_steps"]) for one in said] == [(None, "3"), ("0.6", "3")]


def test_averages_go_on_exactly_and_do_not_change_what_is_learned(workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--ema", "--ema_update_every=2", "--ema_on_cpu")
    plain = workspace.train("network", tmp_path / "plain")
    once = workspace.train("network", tmp_path / "once", *flags)
    first = workspace.train("network", tmp_path / "parts", *flags, "--max_train_steps=3", "--save_state_on_train_end")
    again = workspace.train("network", first, *flags, f"--resume={first / 'tiny-state'}")
    runs.assert_same_tensors(load_file(plain / "tiny.safetensors"), load_file(once / "tiny.safetensors"))
    runs.assert_same_tensors(load_file(again / "tiny-ema.safetensors"), load_file(once / "tiny-ema.safetensors"))


def test_an_optimizer_that_averages_itself_needs_no_other_average(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="averages weights itself"):
        workspace.trainer("network", tmp_path, "--ema", "--optimizer_type=AdamWScheduleFree")
