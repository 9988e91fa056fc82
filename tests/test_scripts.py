"""Every script as a user runs it: two real steps, and the files it should leave. The scripts of a family share a process, as
starting one takes longer than all they do: the first has nothing imported, and each is run as the main module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
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


class Ended(NamedTuple):
    """How a script ended."""

    code: int
    said: str


ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys
ended = []
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv, said = [script, *arguments], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            ended.append((end.code, said.getvalue()))
print(json.dumps(ended))
"""


def run_in_turn(commands: Sequence[Sequence[str]]) -> list[Ended]:
    """In one process that has imported nothing yet."""
    result = run("-c", ONE_AFTER_ANOTHER, json.dumps(commands))
    assert result.returncode == 0, result.stderr[-3000:]
    return [Ended(*found) for found in json.loads(result.stdout.splitlines()[-1])]


def written(folder: Path, text: str) -> Path:
    """A file of prompts."""
    path = folder / "prompts.txt"
    path.write_text(text)
    return path


class Trained(NamedTuple):
    metadata: dict[str, str]
    keys: set[str]
    caches: set[str]
    """Ends of their files' names."""


def trained(folder: Path) -> Trained:
    """What a run of `cached_with_previews` left."""
    assert list((folder / "out" / "sample").glob("*.png"))
    caches = {path.name.rpartition("_")[2] for path in (folder / "cache").rglob("*.npz")}
    with safe_open(folder / "out" / "tiny.safetensors", "pt") as file:
        return Trained(file.metadata(), set(file.keys()), caches)


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


def test_train_db_fine_tune_and_gen_img(workspace: Workspace, tmp_path: Path) -> None:
    folder = workspace.images / "2_thing"
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps({str(path): {"caption": "a thing"} for path in sorted(folder.glob("*.png"))}))
    few = "--max_train_steps=2"
    without_data = [a for a in workspace.arguments("full", tmp_path / "tuned", few) if not a.startswith("--train_data_dir")]
    prompts = written(tmp_path, "a thing --n bad\n# not this one\na thing --d 3\n")
    model = [f"--ckpt={workspace.model}", f"--tokenizer={workspace.tokenizer}", f"--outdir={tmp_path / 'out'}"]
    pictures = ["--W=64", "--H=64", "--steps=2", "--seed=1", "--grid", "--bf16"]
    for ended in run_in_turn(
        [
            ["gen_img.py", *model, f"--from_file={prompts}", *pictures],
            ["train_db.py", *workspace.arguments("full", tmp_path / "trained", few)],
            ["fine_tune.py", *without_data, f"--in_json={metadata}", f"--train_data_dir={folder}", "--train_text_encoder"],
        ]
    ):
        assert ended.code == 0, ended.said[-3000:]
    assert (tmp_path / "trained" / "tiny.safetensors").exists()
    assert (tmp_path / "tuned" / "tiny.safetensors").exists()
    assert [path.name[-6:] for path in sorted((tmp_path / "out").glob("im_*.png"))] == ["_1.png", "_3.png"]
    assert len(list((tmp_path / "out").glob("grid_*.png"))) == 1


def cached_with_previews(workspace: Workspace, mode: Mode, folder: Path, prompt: str, *flags: str) -> list[str]:
    """The command line of two steps."""
    folder.mkdir()
    prompts = written(folder, f"a thing --w 64 --h 64 --s 2 --d 1 --l 3 --n bad {prompt}\n")
    return [
        f"{workspace.script(mode)}.py",
        *workspace.arguments(mode, folder / "out", "--max_train_steps=2", *HALF, f"--cache_dir={folder / 'cache'}"),
        *("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2"),
        *(["--network_train_unet_only"] if mode == "network" else []),
        *flags,
    ]


def test_the_scripts_of_sdxl(tmp_path: Path) -> None:
    sdxl = runs.make_workspace(CASES["sdxl"], tmp_path)
    network, full = tmp_path / "network", tmp_path / "full"
    for ended in run_in_turn(
        [
            cached_with_previews(sdxl, "network", network, ""),
            cached_with_previews(sdxl, "full", full, "", "--no-train_text_encoder", "--full_bf16"),
        ]
    ):
        assert ended.code == 0, ended.said[-3000:]
    network_made, full_made = trained(network), trained(full)
    assert network_made.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert any(key.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q") for key in network_made.keys)
    assert full_made.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert {"conditioner.embedders.1.model.text_projection", "first_stage_model.encoder.conv_in.weight"} <= full_made.keys
    for made in (network_made, full_made):
        assert made.caches >= {"sdxl.npz", "outputs.npz"}


def test_the_scripts_of_flux(tmp_path: Path) -> None:
    flux = runs.make_workspace(replace(CASES["flux"], write_model=CASES["flux"].write_swappable), tmp_path)
    network, full = tmp_path / "network", tmp_path / "full"
    shift, swap = "--timestep_sampling=flux_shift", ["--blocks_to_swap=2", "--cpu_offload_checkpointing"]
    model = [f"--ckpt_path={flux.model}", *flux.case.arguments(flux.model.parent), "--dtype=bfloat16"]
    picture = ["--prompt=a thing", "--width=64", "--height=64", "--steps=2", "--seed=5", "--guidance=3.5"]
    ended = run_in_turn(
        [
            cached_with_previews(flux, "network", network, "--g 2", "--network_module=networks.lora_flux", shift),
            cached_with_previews(flux, "full", full, "--g 2", shift, *swap),
            ["flux_minimal_inference.py", *model, *picture, f"--output_dir={tmp_path / 'pictures'}"],
        ]
    )
    for one in ended:
        assert one.code == 0, one.said[-3000:]
    network_made, full_made = trained(network), trained(full)
    assert network_made.metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert network_made.metadata["ss_timestep_sampling"] == "flux_shift"
    assert network_made.metadata["ss_base_model_version"] == "flux1"
    assert full_made.metadata["modelspec.architecture"] == "flux-1-dev"
    for made in (network_made, full_made):
        assert made.caches >= {"flux.npz", "te.npz"}
    assert "1 of 3 double blocks and 2 of 4 single blocks" in ended[1].said
    assert "gains nothing" in ended[1].said
    assert [path.name[-10:] for path in (tmp_path / "pictures").glob("*.png")] == ["_000_5.png"]


def test_the_script_of_lumina(tmp_path: Path) -> None:
    lumina = runs.make_workspace(CASES["lumina"], tmp_path)
    flags = ["--network_module=networks.lora_lumina", "--timestep_sampling=nextdit_shift"]
    (ended,) = run_in_turn(
        [cached_with_previews(lumina, "network", tmp_path / "network", "--ctr 0.5 --rcfg 1", *flags)]
    )  # fmt: skip
    assert ended.code == 0, ended.said[-3000:]
    made = trained(tmp_path / "network")
    assert made.metadata["modelspec.architecture"] == "lumina-2/lora"
    assert made.metadata["ss_timestep_sampling"] == "nextdit_shift"
    assert made.metadata["ss_base_model_version"] == "lumina2"
    assert "lora_unet_layers_0_attention_qkv.alpha" in made.keys
    assert made.caches >= {"lumina.npz", "te.npz"}


def test_the_scripts_of_sd3(tmp_path: Path) -> None:
    """A picture is made with the network that was trained."""
    case = replace(CASES["sd3"], write_model=CASES["sd3"].write_swappable, full_extra=())
    sd3 = runs.make_workspace(case, tmp_path)
    network, full = tmp_path / "network", tmp_path / "full"
    flags = ["--blocks_to_swap=2", "--t5_dropout_rate=0.3", "--training_shift=3"]
    saved = network / "out" / "tiny.safetensors"
    model = [f"--ckpt_path={sd3.model}", *sd3.case.arguments(sd3.model.parent), f"--lora_weights={saved};0.8"]
    picture = ["--prompt=a thing", "--width=64", "--height=64", "--steps=2", "--seed=5", "--bf16"]
    ended = run_in_turn(
        [
            cached_with_previews(sd3, "network", network, "", "--network_module=networks.lora_sd3", *flags),
            cached_with_previews(sd3, "full", full, "", *flags),
            ["sd3_minimal_inference.py", *model, *picture, f"--output_dir={tmp_path / 'pictures'}"],
        ]
    )
    for one in ended:
        assert one.code == 0, one.said[-3000:]
    network_made, full_made = trained(network), trained(full)
    assert network_made.metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    assert network_made.metadata["ss_base_model_version"] == "5-medium"
    assert full_made.metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium"
    for made in (network_made, full_made):
        assert made.caches >= {"sd3.npz", "te.npz"}
    assert all("2 of 5 joint blocks" in one.said for one in ended[:2])
    assert ["--save_format diffusers" in one.said for one in ended[:2]] == [True, False]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
