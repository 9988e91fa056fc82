"""Every script as a user runs it: a process of its own, two real steps, and the files it should leave."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import runs
from runs import CASES, Mode, Workspace
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "train_network.py",
    "train_db.py",
    "fine_tune.py",
    "sdxl_train_network.py",
    "sdxl_train.py",
    "flux_train_network.py",
    "flux_train.py",
    "lumina_train_network.py",
    "lumina_train.py",
    "sd3_train_network.py",
    "sd3_train.py",
    "gen_img.py",
    "sdxl_minimal_inference.py",
]
HALF = ("--mixed_precision=bf16", "--no_half_vae")
"""Convolutions in bfloat16 take a CPU ten times as long."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["sd"], tmp_path_factory.mktemp("scripts"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_loading_anything(script: str) -> None:
    result = run("-X", "importtime", script, "--help")
    assert result.returncode == 0, result.stderr
    assert "--pretrained_model_name_or_path" in result.stdout
    assert "| torch\n" not in result.stderr


def test_train_network_with_a_dataset_file_under_accelerate_launch(workspace: Workspace, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset.toml"
    folder = (workspace.images / "2_thing").as_posix()
    dataset.write_text(
        f'[general]\nresolution = 64\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{folder}"\n'
        'num_repeats = 2\ncaption_extension = ".txt"\n'
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 1 --l 3 --n bad\n")
    result = run(
        *("-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"),
        *("--dynamo_backend=no", "--cpu", "train_network.py"),
        f"--pretrained_model_name_or_path={workspace.model}",
        f"--tokenizer={workspace.tokenizer}",
        f"--dataset_config={dataset}",
        f"--output_dir={tmp_path / 'out'}",
        "--output_name=tiny",
        "--network_module=networks.lora",
        "--max_train_steps=2",
        "--seed=1",
        "--max_data_loader_n_workers=1",
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=2",
        "--mixed_precision=bf16",
        f"--logging_dir={tmp_path / 'logs'}",
        "--learning_rate=1e-3",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with safe_open(tmp_path / "out" / "tiny.safetensors", "pt") as file:
        assert any(key.startswith("lora_te_text_model_") for key in file.keys())  # noqa: SIM118
        assert any(file.get_tensor(key).abs().sum() > 0 for key in file.keys() if "lora_up" in key)  # noqa: SIM118
    assert list((tmp_path / "out" / "sample").glob("*.png"))
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_train_db_saves_every_format_and_reads_it_again(suffix: str, workspace: Workspace, tmp_path: Path) -> None:
    first = workspace.train("full", tmp_path / "first", "--max_train_steps=1", f"--save_model_as={suffix}")
    saved = first / ("tiny" if suffix.startswith("diffusers") else f"tiny.{suffix}")
    assert saved.exists()
    workspace.train("full", tmp_path / "second", "--max_train_steps=1", f"--pretrained_model_name_or_path={saved}")


def test_train_db_in_a_process_of_its_own(workspace: Workspace, tmp_path: Path) -> None:
    result = run("train_db.py", *workspace.arguments("full", tmp_path, "--max_train_steps=2"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "tiny.safetensors").exists()


def test_fine_tune_from_a_metadata_file(workspace: Workspace, tmp_path: Path) -> None:
    import json

    folder = workspace.images / "2_thing"
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps({str(path): {"caption": "a thing"} for path in sorted(folder.glob("*.png"))}))
    arguments = [a for a in workspace.arguments("full", tmp_path / "out") if not a.startswith("--train_data_dir")]
    result = run(
        "fine_tune.py", *arguments, f"--in_json={metadata}", f"--train_data_dir={folder}", "--train_text_encoder",
        "--max_train_steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out" / "tiny.safetensors").exists()


class Trained(NamedTuple):
    metadata: dict[str, str]
    keys: set[str]
    caches: set[str]
    """Ends of their files' names."""


def train_with_caches_and_previews(workspace: Workspace, mode: Mode, folder: Path, prompt: str, *flags: str) -> Trained:
    """In a process of its own."""
    prompts = folder / "prompts.txt"
    prompts.write_text(f"a thing --w 64 --h 64 --s 2 --d 1 --l 3 --n bad {prompt}\n")
    result = run(
        f"{workspace.script(mode)}.py",
        *workspace.arguments(mode, folder / "out", "--max_train_steps=2", *HALF, *flags),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", f"--cache_dir={folder / 'cache'}"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((folder / "out" / "sample").glob("*.png"))
    caches = {path.name.rpartition("_")[2] for path in (folder / "cache").rglob("*.npz")}
    with safe_open(folder / "out" / "tiny.safetensors", "pt") as file:
        return Trained(file.metadata(), set(file.keys()), caches)


@pytest.mark.parametrize("mode", ["network", "full"])
def test_sdxl_trains_with_caches_and_previews(mode: Mode, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    sdxl = runs.make_workspace(CASES["sdxl"], tmp_path_factory.mktemp("sdxl"))
    flags = ["--network_train_unet_only"] if mode == "network" else ["--no-train_text_encoder", "--full_bf16"]
    made = train_with_caches_and_previews(sdxl, mode, tmp_path, "", *flags)
    architecture = "stable-diffusion-xl-v1-base"
    assert made.metadata["modelspec.architecture"] == (f"{architecture}/lora" if mode == "network" else architecture)
    if mode == "network":
        assert any(key.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q") for key in made.keys)
    else:
        assert {"conditioner.embedders.1.model.text_projection", "first_stage_model.encoder.conv_in.weight"} <= made.keys
    assert made.caches >= {"sdxl.npz", "outputs.npz"}


@pytest.mark.parametrize("mode", ["network", "full"])
def test_flux_trains_with_caches_and_previews(mode: Mode, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    flux = runs.make_workspace(CASES["flux"], tmp_path_factory.mktemp("flux"))
    flags = ["--network_module=networks.lora_flux", "--network_train_unet_only"] if mode == "network" else []
    made = train_with_caches_and_previews(flux, mode, tmp_path, "--g 2", "--timestep_sampling=flux_shift", *flags)
    assert made.metadata["modelspec.architecture"] == ("flux-1-dev/lora" if mode == "network" else "flux-1-dev")
    if mode == "network":
        assert made.metadata["ss_timestep_sampling"] == "flux_shift"
        assert made.metadata["ss_base_model_version"] == "flux1"
    assert made.caches >= {"flux.npz", "te.npz"}


def test_flux_trains_with_swapped_blocks_in_a_process_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    case = replace(CASES["flux"], write_model=CASES["flux"].write_swappable)
    flux = runs.make_workspace(case, tmp_path_factory.mktemp("flux"))
    flags = ["--max_train_steps=2", *HALF, "--blocks_to_swap=2", "--cpu_offload_checkpointing"]
    result = run("flux_train.py", *flux.arguments("full", tmp_path / "out", *flags))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "1 of 3 double blocks and 2 of 4 single blocks" in result.stderr
    assert "gains nothing" in result.stderr
    assert (tmp_path / "out" / "tiny.safetensors").exists()


def test_lumina_trains_with_caches_and_previews_in_a_process_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    lumina = runs.make_workspace(CASES["lumina"], tmp_path_factory.mktemp("lumina"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 1 --l 3 --ctr 0.5 --rcfg 1 --n bad\n")
    result = run(
        "lumina_train_network.py",
        *lumina.arguments("network", tmp_path / "out", "--max_train_steps=2", *HALF),
        *("--network_module=networks.lora_lumina", "--network_train_unet_only", "--timestep_sampling=nextdit_shift"),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with safe_open(tmp_path / "out" / "tiny.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "lumina-2/lora"
        assert file.metadata()["ss_timestep_sampling"] == "nextdit_shift"
        assert file.metadata()["ss_base_model_version"] == "lumina2"
        assert "lora_unet_layers_0_attention_qkv.alpha" in file.keys()  # noqa: SIM118
    assert list((tmp_path / "out" / "sample").glob("*.png"))
    assert {path.name.rpartition("_")[2] for path in (tmp_path / "cache").rglob("*.npz")} >= {"lumina.npz", "te.npz"}


def test_gen_img_makes_pictures_and_a_sheet_in_a_process_of_its_own(workspace: Workspace, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --n bad\n# not this one\na thing --d 3\n")
    model = [f"--ckpt={workspace.model}", f"--tokenizer={workspace.tokenizer}", f"--outdir={tmp_path / 'out'}"]
    result = run(
        "gen_img.py", *model, f"--from_file={prompts}", "--W=64", "--H=64", "--steps=2", "--seed=1", "--grid", "--bf16"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert [path.name[-6:] for path in sorted((tmp_path / "out").glob("im_*.png"))] == ["_1.png", "_3.png"]
    assert len(list((tmp_path / "out").glob("grid_*.png"))) == 1


@pytest.mark.parametrize("mode", ["network", "full"])
def test_sd3_trains_with_caches_swapped_blocks_and_previews_in_a_process_of_its_own(
    mode: Mode, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Then a picture is made with the network."""
    case = replace(CASES["sd3"], write_model=CASES["sd3"].write_swappable, full_extra=())
    sd3 = runs.make_workspace(case, tmp_path_factory.mktemp("sd3"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --d 1 --l 3 --n bad\n")
    result = run(
        f"{sd3.script(mode)}.py",
        *sd3.arguments(mode, tmp_path / "out", "--max_train_steps=2", *HALF, "--blocks_to_swap=2"),
        *(["--network_module=networks.lora_sd3", "--network_train_unet_only"] if mode == "network" else []),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--t5_dropout_rate=0.3", "--training_shift=3"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    saved = tmp_path / "out" / "tiny.safetensors"
    with safe_open(saved, "pt") as file:
        architecture = file.metadata()["modelspec.architecture"]
        assert architecture == "stable-diffusion-3-5-medium" + ("/lora" if mode == "network" else "")
        if mode == "network":
            assert file.metadata()["ss_base_model_version"] == "5-medium"
    assert "2 of 5 joint blocks" in result.stderr
    assert ("--save_format diffusers" in result.stderr) == (mode == "network")
    assert list((tmp_path / "out" / "sample").glob("*.png"))
    assert {path.name.rpartition("_")[2] for path in (tmp_path / "cache").rglob("*.npz")} >= {"sd3.npz", "te.npz"}
    if mode == "full":
        return
    model = [f"--ckpt_path={sd3.model}", *sd3.case.arguments(sd3.model.parent), f"--lora_weights={saved};0.8"]
    flags = ["--prompt=a thing", "--width=64", "--height=64", "--steps=2", "--seed=5", "--bf16"]
    result = run("sd3_minimal_inference.py", *model, *flags, f"--output_dir={tmp_path / 'pictures'}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1


def test_flux_minimal_inference_makes_a_picture_in_a_process_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    flux = runs.make_workspace(CASES["flux"], tmp_path_factory.mktemp("flux"))
    model = [f"--ckpt_path={flux.model}", *flux.case.arguments(flux.model.parent), "--dtype=bfloat16"]
    flags = ["--prompt=a thing", "--width=64", "--height=64", "--steps=2", "--seed=5", "--guidance=3.5"]
    result = run("flux_minimal_inference.py", *model, *flags, f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [path.name[-10:] for path in tmp_path.glob("*.png")] == ["_000_5.png"]
