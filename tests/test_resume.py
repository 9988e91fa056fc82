"""A run that was stopped and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch
from runs import CASES, MODES, Mode, Workspace
from safetensors.torch import load_file

TOTAL, STOP = 10, 6


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return {name: runs.make_workspace(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


def optimizer_tensors(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]
    return {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CASES)
def test_six_steps_and_four_more_are_ten(
    family: str, mode: Mode, workers: int, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """Seven batches are four updates an epoch, so step 6 is inside one; with schedule, dropout, flips, accumulation."""
    workspace = workspaces[family]
    common = [
        f"--max_train_steps={TOTAL}",
        "--gradient_accumulation_steps=2",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=2",
        "--flip_aug",
        "--shuffle_caption",
        "--caption_dropout_rate=0.3",
        "--noise_offset=0.1",
        f"--max_data_loader_n_workers={workers}",
        "--save_state_on_train_end",
        *(["--network_dropout=0.2"] if mode == "network" else []),
    ]
    whole = workspace.train(mode, tmp_path / "whole", *common)
    parts = tmp_path / "parts"
    workspace.train(mode, parts, *common, f"--save_every_n_steps={STOP}", "--save_state")
    state = parts / f"tiny-step{STOP:08d}-state"
    resumed = workspace.train(mode, tmp_path / "resumed", *common, f"--resume={state}")

    end = "tiny-state"
    runs.assert_same_tensors(
        load_file(resumed / end / "trainable.safetensors"), load_file(whole / end / "trainable.safetensors")
    )
    runs.assert_same_tensors(optimizer_tensors(resumed / end), optimizer_tensors(whole / end))
    runs.assert_same_tensors(load_file(resumed / "tiny.safetensors"), load_file(whole / "tiny.safetensors"))
    assert runs.rows(resumed, "loss/current") == runs.rows(whole, "loss/current")[STOP:]
    assert runs.rows(resumed, "loss/average") == runs.rows(whole, "loss/average")[STOP:]
    assert runs.rows(resumed, "lr/unet") == runs.rows(whole, "lr/unet")[STOP:]
    one, other = (json.loads((folder / end / "train_state.json").read_text()) for folder in (resumed, whole))
    assert one["step"] == other["step"] == TOTAL
    assert one["position"] == other["position"]
    assert one["position"] != 0, "the stop should fall inside an epoch"
