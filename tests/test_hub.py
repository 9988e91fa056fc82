"""Models named by hub ids: found in the cache of the hub without a connection, or an error that lists what to do."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import runs
import tiny
import tiny_flux
import tiny_sdxl
import torch
from huggingface_hub import constants
from runs import CASES, Workspace
from safetensors.torch import save_file

from library import model_io, unet_parts
from library.errors import UserError
from library.family_base import family_class
from library.option_groups import FullTrainOptions, ModelOptions


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub's, which is all there is: the tests run with HF_HUB_OFFLINE."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)  # files that go beside a model would lie beside a hub id otherwise, in the current folder
    model_io.download_snapshot.cache_clear()
    yield tmp_path / "hub"
    model_io.download_snapshot.cache_clear()


def put(cache: Path, hub_id: str, folder: Path) -> Path:
    """The files of `folder` as a download of `hub_id` leaves them: links to files that are named after their content."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789" * 4
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        content = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = repository / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        content.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, content)
        link.symlink_to(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def options(**model: Any) -> FullTrainOptions:
    return FullTrainOptions(model=ModelOptions(**model))


@pytest.mark.parametrize("safe", [True, False])
def test_a_diffusers_model_and_a_vae_are_found_in_the_cache(safe: bool, cache: Path, tmp_path: Path) -> None:
    snapshot = put(cache, "someone/tiny-sd", tiny.write_sd_diffusers(tmp_path / "sd", safe=safe))
    put(cache, "someone/tiny-vae", tiny.write_sd_diffusers(tmp_path / "other", seed=7) / "vae")
    family = family_class("sd")()
    chosen = options(pretrained_model_name_or_path="someone/tiny-sd", vae="someone/tiny-vae")
    family.check(chosen)
    bundle = family.load(chosen, device=torch.device("cpu"), dtype=torch.float32)
    assert bundle.facts["source"] == snapshot
    assert tiny.same_tensors(dict(bundle.denoiser.state_dict()), tiny.sd_modules()["denoiser"].state_dict())
    assert tiny.same_tensors(dict(bundle.vae.state_dict()), tiny.sd_modules(seed=7)["vae"].state_dict())
    assert bundle.facts["tokenizers"]["tokenizer"] == snapshot / "tokenizer"


def as_variant(folder: Path) -> Path:
    """The same model with its weights as `*.fp16.safetensors`, as a download of the variant alone has them."""
    for path in sorted(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    return folder


def test_a_model_whose_weights_are_a_variant_alone_is_found(cache: Path, tmp_path: Path) -> None:
    folder = as_variant(tiny_sdxl.write_folder(tmp_path / "sdxl"))
    put(cache, "someone/tiny-sdxl", folder)
    family = family_class("sdxl")()
    expected = tiny_sdxl.modules()
    for name in (str(folder), "someone/tiny-sdxl"):
        bundle = family.load(options(pretrained_model_name_or_path=name), device=torch.device("cpu"), dtype=torch.float32)
        for part, module in expected.items():
            assert tiny.same_tensors(dict(bundle.part(part).state_dict()), dict(module.state_dict())), part


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, {"unet": "x.safetensors", "vae": "x.safetensors"}),
        ({"x.safetensors": ""}, {"unet": "diffusion_pytorch_model.bin", "vae": "diffusion_pytorch_model.bin"}),
        ({"x.safetensors": "unet"}, {"unet": "diffusion_pytorch_model.bin", "vae": "x.safetensors"}),
        (
            {"x.safetensors": "", "diffusion_pytorch_model.bin": "vae"},
            {"unet": "diffusion_pytorch_model.bin", "vae": "x.fp16-00001-of-00002.safetensors"},
        ),
    ],
)
def test_of_a_repository_each_parts_best_files_alone_are_downloaded(
    change: dict[str, str], taken: dict[str, str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """change: files that are not there, in which part ("" is both)."""
    from huggingface_hub.utils import filter_repo_objects

    names = ["x.safetensors", "diffusion_pytorch_model.bin", "openvino_model.bin", "x.non_ema.safetensors"]
    names += [f"x.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files = [f"{part}/{name}" for part in ("unet", "vae") for name in names if change.get(name) not in ("", part)]

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None) -> str:
        """The hub's, without a hub."""
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    unet_parts.find_models(ModelOptions(pretrained_model_name_or_path="someone/some-model"), ("unet", "vae"))
    for part, first in taken.items():
        downloaded = sorted(path.name for path in (tmp_path / part).iterdir())
        assert downloaded == [first, first.replace("-00001-", "-00002-")][: 1 + ("-00001-" in first)]


def test_whole_plain_weights_go_before_shards_and_variants(tmp_path: Path) -> None:
    names = ["m.safetensors", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    names += ["m.fp16.safetensors", "m-00001-of-00002.non_ema.safetensors", "m-00002-of-00002.non_ema.safetensors"]
    for name in names:
        save_file({f"a{name}": torch.zeros(1)}, tmp_path / name)
    for chosen in ({names[0]}, {*names[1:3]}, {names[3]}, {*names[4:]}):
        assert set(model_io.open_component(tmp_path).keys()) == {f"a{name}" for name in chosen}
        for name in chosen:
            (tmp_path / name).unlink()
    assert not model_io.has_weights(tmp_path)


def test_a_script_trains_flux_from_the_cache_and_saves_the_tokenizers_themselves(cache: Path, tmp_path: Path) -> None:
    put(cache, "someone/tiny-flux", tiny_flux.write_flux_folder(tmp_path / "flux"))
    images = tiny.write_images(tmp_path / "images" / "1_thing", 2, (64, 64)).parent
    workspace = Workspace(CASES["flux"], Path("someone/tiny-flux"), tmp_path / "none", images)
    flags = ("--no-tokenizer", "--t5xxl_max_token_length=32", "--max_train_steps=1")
    saved = workspace.train("full", tmp_path / "out", *flags) / "tiny"
    assert (saved / "model_index.json").is_file()
    assert (saved / "tokenizer" / "vocab.json").is_file() and not (saved / "tokenizer" / "vocab.json").is_symlink()
    shutil.rmtree(cache)  # what was saved stands on its own
    workspace.trainer("full", tmp_path / "again", *flags, f"--pretrained_model_name_or_path={saved}")


@pytest.mark.parametrize("name", CASES)
def test_offline_and_not_in_the_cache_the_error_lists_what_to_do(name: str, cache: Path, tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images" / "1_thing", 2, (64, 64)).parent
    workspace = Workspace(CASES[name], Path("someone/some-model"), tmp_path, images)
    with pytest.raises(UserError) as caught:
        workspace.trainer("network", tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("--pretrained_model_name_or_path: someone/some-model is not a path here")
    for way in ("hf download someone/some-model --local-dir", "HF_HOME", "HF_HUB_OFFLINE", "correct it"):
        assert way in message


def test_runs_are_the_same_from_the_cache_and_from_the_folder(cache: Path, tmp_path: Path) -> None:
    """What is remembered of a model depends on its content, not on where it is."""
    folder = tiny.write_sd_diffusers(tmp_path / "sd")
    put(cache, "someone/tiny-sd", folder)
    images = tiny.write_images(tmp_path / "images" / "1_thing", 2, (64, 64)).parent
    flags = ("--cache_latents_to_disk", f"--cache_dir={tmp_path / 'cache'}", "--max_train_steps=2")
    losses = []
    for model in (folder, Path("someone/tiny-sd")):
        workspace = Workspace(CASES["sd"], model, folder / "tokenizer", images)
        losses.append(runs.losses(workspace.train("network", tmp_path / model.name, *flags)))
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*_sd.npz")}
        assert written
        if len(losses) == 1:
            first = written
    assert written == first and losses[0] == losses[1]
