"""The mean of several saves, and files written one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.streamed_safetensors import LazyTensor, write_streamed
from tools import average_models


def test_a_streamed_file_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "half": torch.arange(6, dtype=torch.float16).view(2, 3),
        "scalar": torch.tensor(2.5),
        "brain": torch.ones(5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "whole": torch.arange(3),
        "few": torch.ones(2).to(torch.float8_e4m3fn),
    }
    made = {name: LazyTensor(value.dtype, tuple(value.shape), lambda value=value: value) for name, value in tensors.items()}
    write_streamed(tmp_path / "x.safetensors", made, {"name": "été"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"name": "été"}


def test_a_tensor_of_another_shape_than_announced_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_streamed(tmp_path / "x.safetensors", {"a": LazyTensor(torch.float32, (2,), lambda: torch.zeros(3))}, {})


def write_saves(folder: Path) -> list[Path]:
    paths = [folder / f"step{number}.safetensors" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        weights = {"up": torch.full((2, 2), float(number)).half(), "count": torch.tensor(number)}
        save_file(weights, path, metadata={"step": str(number)})
    return paths


@pytest.mark.parametrize(("power", "mean"), [("0", 1.0), ("1", (1 * 2 + 2 * 3) / 6)])
def test_files_are_averaged_and_later_ones_can_count_more(power: str, mean: float, tmp_path: Path) -> None:
    saves = write_saves(tmp_path)
    average_models.main([*map(str, saves), "--output", str(tmp_path / "mean.safetensors"), "--power", power])
    read = load_file(tmp_path / "mean.safetensors")
    assert torch.equal(read["up"], torch.full((2, 2), mean).half())
    assert read["count"] == 2, "what is no weight is the newest one's"
    with safe_open(tmp_path / "mean.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"step": "2"}


def test_folders_are_averaged_file_by_file(tmp_path: Path) -> None:
    folders = [tmp_path / "old", tmp_path / "new"]
    for number, folder in enumerate(folders):
        (folder / "unet").mkdir(parents=True)
        save_file({"w": torch.full((3,), float(number))}, folder / "unet" / "model.safetensors")
        (folder / "unet" / "config.json").write_text(f'{{"run": {number}}}')
    average_models.main([*map(str, folders), "--output", str(tmp_path / "mean")])
    assert load_file(tmp_path / "mean" / "unet" / "model.safetensors")["w"].tolist() == [0.5] * 3
    assert (tmp_path / "mean" / "unet" / "config.json").read_text() == '{"run": 1}'


def test_saves_of_different_runs_are_refused(tmp_path: Path) -> None:
    saves = write_saves(tmp_path)
    save_file({"up": torch.zeros(2, 3), "count": torch.tensor(1)}, saves[0])
    with pytest.raises(UserError, match="'up' differs"):
        average_models.main([*map(str, saves), "--output", str(tmp_path / "mean.safetensors")])
    assert not (tmp_path / "mean.safetensors").exists()
    with pytest.raises(UserError, match="is one of the saves"):
        average_models.main([*map(str, saves), "--output", str(saves[1])])
