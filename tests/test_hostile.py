"""Bad input, one row each: the exit code, what the message says, no traceback, and nothing lost."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import runs
import tiny_sd3
import tiny_sdxl
import torch
from runs import CASES, Mode, Workspace
from safetensors.torch import save_file

from library.cli import run_script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workspace_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    """By family, each made when it is first asked for."""
    return cache(lambda family: runs.make_workspace(CASES[family], tmp_path_factory.mktemp(f"hostile_{family}")))


@pytest.fixture(scope="module")
def workspace(workspace_of: Callable[[str], Workspace]) -> Workspace:
    return workspace_of("sd")


def run_in_process(workspace: Workspace, mode: Mode, arguments: list[str]) -> int:
    """The exit code the script would give."""
    main = importlib.import_module(workspace.script(mode)).main
    with pytest.raises(SystemExit) as exit_info:
        run_script(lambda _: main(arguments))
    return int(exit_info.value.code or 0)


@dataclass(frozen=True)
class Bad:
    """`change(folder, workspace)` prepares what is wrong and gives the flags that point at it."""

    name: str
    change: Callable[[Path, Workspace], list[str]]
    says: tuple[str, ...]
    mode: Mode = "network"
    family: str = "sd"


def file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def dataset(folder: Path, workspace: Workspace, *, general: str = "", subset: str = "") -> list[str]:
    images = (workspace.images / "2_thing").as_posix()
    text = f"[general]\nresolution = 64\n{general}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\n{subset}\n"
    return [f"--dataset_config={file(folder / 'data.toml', text)}", "--no-train_data_dir"]


def truncated(folder: Path, workspace: Workspace) -> list[str]:
    half = folder / "half.safetensors"
    half.write_bytes(workspace.model.read_bytes()[:100_000])
    return [f"--pretrained_model_name_or_path={half}"]


def other_family(folder: Path, workspace: Workspace) -> list[str]:
    keys = (
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.token_embedding.weight",
        "first_stage_model.encoder.conv_in.weight",
    )
    save_file({key: torch.zeros(4, 4) for key in keys}, folder / "xl.safetensors")
    return [f"--pretrained_model_name_or_path={folder / 'xl.safetensors'}"]


def changed_sdxl(
    folder: Path, change: Callable[[str], str | None], tensors: dict[str, torch.Tensor] | None = None
) -> list[str]:
    """The tiny SDXL with its keys renamed, or left out where `change` gives None, and with other tensors in places."""
    kept = {new: value for key, value in tiny_sdxl.ldm_tensors().items() if (new := change(key)) is not None}
    save_file(kept | (tensors or {}), folder / "other.safetensors")
    return [f"--pretrained_model_name_or_path={folder / 'other.safetensors'}"]


def inpainting_sdxl(folder: Path, workspace: Workspace) -> list[str]:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    return changed_sdxl(folder, lambda key: key, {first: torch.zeros(32, 9, 3, 3)})


def refiner(folder: Path, workspace: Workspace) -> list[str]:
    def change(key: str) -> str | None:
        if key.startswith("conditioner.embedders.0."):
            return None
        return key.replace("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")

    return changed_sdxl(folder, change)


def half_sdxl(folder: Path, workspace: Workspace) -> list[str]:
    return changed_sdxl(folder, lambda key: None if key.startswith("conditioner.embedders.1.") else key)


def sd3_without_clip_g(folder: Path, workspace: Workspace) -> list[str]:
    return ["--no-clip_g"]


def vae_of_another_family(folder: Path, workspace: Workspace) -> list[str]:
    tensors = tiny_sd3.tensors()["vae"]
    for half, key in ((2, "encoder.conv_out"), (1, "decoder.conv_in")):
        weight = tensors[f"{key}.weight"]
        tensors[f"{key}.weight"] = (weight[: len(weight) // 2] if half == 2 else weight[:, : weight.shape[1] // 2]).contiguous()
    tensors["encoder.conv_out.bias"] = tensors["encoder.conv_out.bias"][:4].contiguous()
    save_file(tensors, folder / "vae.safetensors")
    return [f"--vae={folder / 'vae.safetensors'}"]


def other_rank(folder: Path, workspace: Workspace) -> list[str]:
    output = workspace.train("network", folder / "rank4", "--max_train_steps=1")
    return [f"--network_weights={output / 'tiny.safetensors'}", "--network_dim=8"]


def broken_image(folder: Path, workspace: Workspace) -> list[str]:
    images = folder / "broken" / "1_thing"
    images.mkdir(parents=True)
    good = next((workspace.images / "2_thing").glob("*.png")).read_bytes()
    (images / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "fine.png").write_bytes(good)
    return ["--strict_data", f"--train_data_dir={folder / 'broken'}"]


def empty_folder(folder: Path, workspace: Workspace) -> list[str]:
    (folder / "empty" / "1_thing").mkdir(parents=True)
    return [f"--train_data_dir={folder / 'empty'}"]


def half_state(folder: Path, workspace: Workspace) -> list[str]:
    file(folder / "half-state" / "train_state.json", '{"current_epoch": 1')
    return [f"--resume={folder / 'half-state'}"]


BAD = [
    Bad("missing image folder", lambda f, w: [f"--train_data_dir={f / 'nowhere'}"], ("nowhere", "does not exist")),
    Bad("empty image folder", empty_folder, ("1_thing", "no image")),
    Bad("broken image", broken_image, ("cut.png",)),
    Bad("missing model", lambda f, w: ["--pretrained_model_name_or_path=/nowhere/model.safetensors"], ("/nowhere/model",)),
    Bad("truncated model", truncated, ("half.safetensors",)),
    Bad("model of another family", other_family, ("SDXL", "sdxl_train_network.py")),
    *(
        Bad(
            f"SD3 given to {family}",
            lambda f, w: [f"--pretrained_model_name_or_path={tiny_sd3.write_files(f)}"],
            ("is Stable Diffusion 3/3.5", "Train it with sd3_train_network.py"),
            family=family,
        )
        for family in ("sd", "lumina")
    ),
    Bad("contradicting version", lambda f, w: ["--v2"], ("--v2", "1")),
    Bad("unknown flag", lambda f, w: ["--learning_rat=1"], ("--learning_rat", "learning_rate")),
    Bad("block swap where there is none", lambda f, w: ["--blocks_to_swap=2"], ("--blocks_to_swap",)),
    Bad("size of nothing", lambda f, w: ["--max_shard_size=5 beers"], ("--max_shard_size", "5GB", "5 beers"), mode="full"),
    Bad(
        "gradients that are freed and needed",
        lambda f, w: ["--fused_backward_pass", "--network_args", "ggpo_sigma=0.1", "ggpo_beta=0.1"],
        ("--fused_backward_pass", "ggpo_sigma"),
    ),
    Bad("flag of the wrong type", lambda f, w: ["--max_train_steps=many"], ("max_train_steps", "many", "a whole number")),
    Bad("flag not implemented yet", lambda f, w: ["--deepspeed"], ("--deepspeed", "not implemented")),
    Bad("quantised weights that learn", lambda f, w: ["--fp8_base"], ("--fp8_base", "cannot learn"), mode="full"),
    Bad(
        "two formats of the base",
        lambda f, w: ["--fp8_base", "--quantize_base=int8"],
        ("--fp8_base", "--quantize_base says int8"),
    ),
    Bad(
        "4-bit products",
        lambda f, w: ["--quantize_base=nf4", "--quantized_compute=8bit"],
        ("--quantized_compute 8bit", "nf4"),
    ),
    Bad(
        "unknown dataset key",
        lambda f, w: dataset(f, w, subset="num_repeat = 2"),
        ("data.toml", "num_repeat", "Did you mean 'num_repeats'"),
    ),
    Bad(
        "dataset key of the wrong type",
        lambda f, w: dataset(f, w, general="enable_bucket = 'yes'"),
        ("data.toml", "enable_bucket", "yes", "bool"),
    ),
    Bad(
        "unknown key in a configuration file",
        lambda f, w: [f"--config_file={file(f / 'run.toml', '[a]' + chr(10) + 'network_dimm = 4')}"],
        ("run.toml", "network_dimm", "network_dim"),
    ),
    Bad(
        "wrong type in a configuration file",
        lambda f, w: [f"--config_file={file(f / 'run.toml', 'flip_aug = 3')}"],
        ("run.toml", "flip_aug", "3"),
    ),
    Bad("broken configuration file", lambda f, w: [f"--config_file={file(f / 'run.toml', 'a = = 1')}"], ("run.toml",)),
    Bad("unknown network argument", lambda f, w: ["--network_args", "conv_dimm=4"], ("conv_dimm", "conv_dim")),
    Bad("network argument of the wrong type", lambda f, w: ["--network_args", "conv_dim=four"], ("conv_dim", "four")),
    Bad("missing network package", lambda f, w: ["--network_module=no_such_package.kohya"], ("no_such_package",)),
    Bad("rank of another file", other_rank, ("rank mismatch", "4", "8", "--dim_from_weights")),
    Bad("missing weights", lambda f, w: ["--network_weights=/nowhere/a.safetensors"], ("/nowhere/a.safetensors",)),
    *(
        []
        if torch.cuda.is_available()
        else [Bad("precision the device cannot compute in", lambda f, w: ["--mixed_precision=fp16"], ("fp16", "cpu", "bf16"))]
    ),
    Bad("contradicting attention", lambda f, w: ["--sdpa", "--xformers"], ("contradict", "--sdpa", "--xformers")),
    Bad("attention without a backward pass", lambda f, w: ["--attn_mode=sageattn"], ("sageattn", "sdpa")),
    Bad("unknown compiler", lambda f, w: ["--torch_compile", "--dynamo_backend=fx2trt"], ("fx2trt", "inductor")),
    *(
        []
        if torch.cuda.is_available()
        else [Bad("attention the device cannot do", lambda f, w: ["--attn_mode=flex"], ("flex", "CUDA", "cpu", "sdpa"))]
    ),
    Bad("unknown optimizer", lambda f, w: ["--optimizer_type=AdamV"], ("AdamV", "AdamW")),
    Bad(
        "optimizer that needs all gradients at once",
        lambda f, w: ["--fused_backward_pass", "--optimizer_type=LBFGS"],
        ("--fused_backward_pass", "LBFGS", "AdamW"),
        mode="full",
    ),
    Bad(
        "fused backward with scaled gradients",
        lambda f, w: ["--fused_backward_pass", "--mixed_precision=fp16"],
        ("--fused_backward_pass", "fp16", "--mixed_precision bf16"),
        mode="full",
    ),
    Bad("unknown rounding", lambda f, w: ["--bf16_update=up"], ("bf16_update", "up", "stochastic")),
    Bad("missing state", lambda f, w: ["--resume=/nowhere/state"], ("/nowhere/state",)),
    Bad("half-written state", half_state, ("half-state",)),
    Bad("output folder that is a file", lambda f, w: [f"--output_dir={file(f / 'taken', '')}"], ("taken",)),
    Bad("missing prompts", lambda f, w: ["--sample_prompts=/nowhere.txt", "--sample_every_n_steps=1"], ("/nowhere.txt",)),
    Bad(
        "caches against captions that grow",
        lambda f, w: ["--cache_text_encoder_outputs", "--network_train_unet_only", "--token_warmup_step=5"],
        ("cache_text_encoder_outputs", "token_warmup_step"),
    ),
    Bad("bucket step the latents cannot have", lambda f, w: ["--bucket_reso_steps=12"], ("bucket_reso_steps", "12", "8")),
    Bad("SDXL for an inpainting model", inpainting_sdxl, ("inpainting", "9 channels"), family="sdxl"),
    Bad("SDXL's refiner", refiner, ("the SDXL refiner", "needs SDXL"), family="sdxl"),
    Bad("SDXL without its second text encoder", half_sdxl, ("no text encoder", "OpenCLIP bigG"), family="sdxl"),
    Bad("SDXL with the flag of another", lambda f, w: ["--v2"], ("--v2", "SDXL"), family="sdxl"),
    Bad("too few rates of blocks", lambda f, w: ["--block_lr=1,2"], ("--block_lr 1,2", "23"), mode="full", family="sdxl"),
    Bad(
        "more rates than text encoders",
        lambda f, w: ["--text_encoder_lr", "1", "2", "3"],
        ("--text_encoder_lr has 3 values", "2 text encoders"),
        family="sdxl",
    ),
    Bad("SD3 without CLIP-G", sd3_without_clip_g, ("does not hold all parts", "--clip_g"), family="sd3"),
    Bad("a VAE of another family", vae_of_another_family, ("vae.safetensors makes 2 latent channels", "takes 4"), family="sd3"),
    Bad(
        "T5 that learns and is not there",
        lambda f, w: ["--no-t5xxl", "--network_args", "train_t5xxl=true"],
        ("no T5 in the model", "--t5xxl", "train_t5xxl"),
        family="sd3",
    ),
    Bad(
        "an SD3 given to Lumina",
        lambda f, w: [f"--pretrained_model_name_or_path={tiny_sd3.write_files(f)}"],
        ("Stable Diffusion 3/3.5", "needs Lumina-Image-2.0", "sd3_train_network.py"),
        family="lumina",
    ),
    Bad("Lumina without Gemma", lambda f, w: ["--no-gemma2"], ("does not hold all parts", "--gemma2"), family="lumina"),
    Bad(
        "a system prompt with its mark",
        lambda f, w: ["--system_prompt=You are. <Prompt Start> "],
        ("--system_prompt", "<Prompt Start>", "Remove it"),
        family="lumina",
    ),
    Bad("SD3 with the flag of another", lambda f, w: ["--v2"], ("--v2", "this model is a flow"), family="sd3"),
    Bad(
        "more blocks than there are",
        lambda f, w: ["--num_last_block_to_freeze=3"],
        ("--num_last_block_to_freeze 3", "2 blocks"),
        mode="full",
        family="sd3",
    ),
    Bad(
        "caches of text encoders that learn",
        lambda f, w: ["--cache_text_encoder_outputs"],
        ("--cache_text_encoder_outputs", "--network_train_unet_only"),
        family="sdxl",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name.replace(" ", "_"))
def test_bad_input_is_a_message(
    bad: Bad, workspace_of: Callable[[str], Workspace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = workspace_of(bad.family)
    arguments = workspace.arguments(bad.mode, tmp_path / "out", *bad.change(tmp_path, workspace))
    capsys.readouterr()
    code = run_in_process(workspace, bad.mode, arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    missing = [fragment for fragment in bad.says if fragment not in said]
    assert not missing, f"{missing} not in: {said}"


def test_a_folder_without_captions_is_named_in_a_warning(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "silent" / "1_thing"
    images.mkdir(parents=True)
    for path in (workspace.images / "2_thing").glob("*.png"):
        (images / path.name).write_bytes(path.read_bytes())
    config = file(
        tmp_path / "d.toml", f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n"
    )
    workspace.train("network", tmp_path / "out", "--max_train_steps=1", f"--dataset_config={config}", "--no-train_data_dir")
    assert any("1_thing" in record.message and "caption" in record.message for record in caplog.records)


def start(workspace: Workspace, mode: Mode, arguments: list[str], **keywords: object) -> subprocess.Popen[str]:
    command = [sys.executable, f"{workspace.script(mode)}.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)  # type: ignore[call-overload, no-any-return]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups that a signal could be sent to")
def test_ctrl_c_saves_the_state_and_says_how_to_go_on(workspace: Workspace, tmp_path: Path) -> None:
    """With workers that get it, too; test_processes.py stops a run without."""
    output = tmp_path / "out"
    arguments = workspace.arguments("network", output, "--max_train_steps=100000", "--max_data_loader_n_workers=2")
    process = start(workspace, "network", arguments, start_new_session=True)
    metrics = output / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    states = list(output.glob("*-state"))
    assert len(states) == 1
    assert "--resume" in said and states[0].name in said
    before = int(states[0].name.split("step")[1].split("-")[0])
    workspace.train("network", tmp_path / "on", f"--max_train_steps={before + 1}", f"--resume={states[0]}")
    assert len(runs.losses(tmp_path / "on")) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_full_disk_loses_nothing(workspace: Workspace, tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the write fails half way, as it would there."""
    import resource

    output = tmp_path / "out"
    workspace.train("full", output, "--max_train_steps=1")
    before = (output / "tiny.safetensors").read_bytes()
    limit = len(before) // 2
    process = start(
        workspace,
        "full",
        workspace.arguments("full", output, "--max_train_steps=2", "--learning_rate=1e-2"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "tiny.safetensors" in said
    assert (output / "tiny.safetensors").read_bytes() == before
    assert not [path for path in output.iterdir() if "tmp" in path.name], "the half-written file should be gone"
