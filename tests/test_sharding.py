"""Models in several files: what is in which, and that nothing is lost on the way there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CASES, Workspace
from safetensors.torch import load_file

from library.errors import UserError
from library.model_io import open_checkpoint, open_component
from library.sharding import write_weights

LIMIT = 60_000


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return {name: runs.make_workspace(CASES[name], tmp_path_factory.mktemp(name)) for name in ("sd", "flux")}


def contents(path: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(path)
    return {key: source.get(key) for key in source}


def assert_in_parts(index: Path, *, limit: int = LIMIT) -> None:
    """Every file holds what the index says, at most `limit` bytes unless it is one tensor, and none is left over."""
    places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(index.with_name(name)) for name in set(places.values())}
    assert len(files) > 1
    assert places == {key: name for name, tensors in files.items() for key in tensors}
    assert {path.name for path in index.parent.glob("*.safetensors")} == files.keys()
    for tensors in files.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_tensors_are_divided_in_their_order_and_none_is_cut(suffix: str, tmp_path: Path) -> None:
    tensors = {name: torch.full((size,), size, dtype=torch.uint8) for name, size in zip("cadb", (4, 4, 20, 2), strict=True)}
    path = tmp_path / f"model{suffix}"
    write_weights(tensors, path, metadata={"a": "b"}, max_shard_size=8)
    index = json.loads((tmp_path / f"model{suffix}.index.json").read_text())
    name = "model-0000{}-of-00003" + suffix
    assert index == {
        "metadata": {"total_size": 30},
        "weight_map": {"a": name.format(1), "b": name.format(3), "c": name.format(1), "d": name.format(2)},
    }
    runs.assert_same_tensors(contents(tmp_path / name.format(2)), tensors)
    write_weights(tensors, path, metadata={}, max_shard_size=30)
    runs.assert_same_tensors(contents(path), tensors)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_model_in_parts_holds_the_same_bytes_and_is_trained_from_like_a_file(
    family: str, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    workspace = workspaces[family]
    flags = (f"--max_shard_size={LIMIT}", "--save_model_as=safetensors")
    trained = workspace.train("full", tmp_path / "out", *flags, "--max_train_steps=1", "--learning_rate=1e-9")
    folder = trained / "tiny"
    assert sorted(path.name for path in trained.iterdir()) == ["image_losses.csv", "metrics.csv", "tiny"]
    assert_in_parts(folder / "model.safetensors.index.json")
    parts = open_checkpoint(next(folder.glob("model-00001-of-*")))
    assert parts.metadata["modelspec.implementation"]

    again = workspace.trainer("full", tmp_path / "again", f"--pretrained_model_name_or_path={folder}", *flags)
    again.trainable.save(tmp_path / "parts", dtype=None, metadata={})
    whole = workspace.trainer("full", tmp_path / "whole", f"--pretrained_model_name_or_path={folder}")
    assert whole.trainable.suffix == ".safetensors"
    whole.trainable.save(tmp_path / "whole.safetensors", dtype=None, metadata={})
    expected = {key: parts.get(key) for key in parts}
    runs.assert_same_tensors(contents(next((tmp_path / "parts").glob("model-00001-of-*"))), expected)
    runs.assert_same_tensors(load_file(tmp_path / "whole.safetensors"), expected)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_diffusers_folder_in_parts_is_read_by_diffusers(
    family: str, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    import diffusers
    import transformers

    flags = ("--save_model_as=diffusers_safetensors",)
    trainer = workspaces[family].trainer("full", tmp_path / "out", *flags, f"--max_shard_size={LIMIT}")
    trainer.trainable.save(tmp_path / "parts", dtype=None, metadata={})
    workspaces[family].trainer("full", tmp_path / "out", *flags).trainable.save(tmp_path / "whole", dtype=None, metadata={})
    readers: dict[str, Any] = {"text_encoder": transformers.CLIPTextModel, "vae": diffusers.AutoencoderKL}
    if family == "sd":
        readers["unet"] = diffusers.UNet2DConditionModel
    else:
        readers |= {"transformer": diffusers.FluxTransformer2DModel, "text_encoder_2": transformers.T5EncoderModel}
    for name, reader in readers.items():
        indices = list((tmp_path / "parts" / name).glob("*.safetensors.index.json"))
        if not indices:
            assert list((tmp_path / "parts" / name).glob("*.safetensors"))[0].stat().st_size < 2 * LIMIT
            continue
        assert_in_parts(indices[0])
        whole = reader.from_pretrained(tmp_path / "whole" / name, local_files_only=True).state_dict()
        runs.assert_same_tensors(reader.from_pretrained(tmp_path / "parts" / name, local_files_only=True).state_dict(), whole)
        assert len(open_component(tmp_path / "parts" / name).keys()) == len(json.loads(indices[0].read_text())["weight_map"])
    assert list((tmp_path / "parts" / ("unet" if family == "sd" else "transformer")).glob("*.index.json"))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_ckpt_cannot_be_divided(family: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    """Nor what is trained from one, unless it is saved otherwise. The empty folder would be the next error, before loading."""
    workspace = workspaces[family]
    (tmp_path / "empty" / "1_thing").mkdir(parents=True)
    flags = (f"--train_data_dir={tmp_path / 'empty'}", "--max_shard_size=5GB")
    torch.save({"state_dict": load_file(workspace.model)}, tmp_path / "model.ckpt")
    for extra in ("--save_model_as=ckpt", f"--pretrained_model_name_or_path={tmp_path / 'model.ckpt'}"):
        with pytest.raises(UserError, match="ckpt is always one file"):
            workspace.trainer("full", tmp_path, *flags, extra)
    with pytest.raises(UserError, match="empty"):
        workspace.trainer("full", tmp_path, *flags, extra, "--use_safetensors")
