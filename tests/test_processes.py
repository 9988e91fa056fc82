"""Two processes on the CPU train as one would: same images, same weights, the gradient of all images together.

They are started as users do it, by `accelerate launch --num_processes 2`. With `--shard_weights` each holds a part of the
weights, and the result is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from runs import CASES, MODES, Mode, Workspace
from safetensors.torch import load_file

from library.state_parts import split_optimizer

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2
STOP_AT = 2
STATE_AT = 3

PAIR = [
    "--max_train_steps=3", "--train_batch_size=8", "--optimizer_type=SGD", "--optimizer_args", "momentum=0.9",
    "--lr_scheduler=linear", "--lr_warmup_steps=1", "--validation_split=0.3", "--validate_every_n_steps=3",
    "--validation_quantiles=3", "--save_state_on_train_end", "--learning_rate=0.1", "--noise_offset=0.1",
]  # fmt: skip
"""What two processes do, and one that accumulates twice as many batches; two are an epoch. SGD: no step is larger than its
gradient says."""

VARIANTS = {
    "plain": [],
    "fused": ["--fused_backward_pass", "--gradient_checkpointing"],
    "swapped": ["--blocks_to_swap=2"],
    "swapped-fused": ["--blocks_to_swap=2", "--fused_backward_pass", "--gradient_checkpointing"],
}
SHARDED = ["--shard_weights", "--ema", "--save_state"]
UNET = ["--max_train_steps=2", "--optimizer_type=SGD", "--learning_rate=0.1", "--gradient_accumulation_steps=2"]
CLIPPED = ["--max_train_steps=2", "--max_grad_norm=1e-3"]


def jobs(workspace: Workspace, folder: Path) -> list[list[Any]]:
    """A row of `process_run` for every run."""
    rows: list[list[Any]] = [
        [f"pair-{mode}", workspace.script(mode), workspace.arguments(mode, folder / f"pair-{mode}", *PAIR), 0, ""]
        for mode in MODES
    ]
    network = workspace.script("network")
    epoch = ["--max_train_epochs=1", "--save_state", "--cache_latents_to_disk", f"--cache_dir={folder / 'cache'}"]
    epoch += [f"--save_every_n_steps={STATE_AT}", "--network_dropout=0.3"]
    rows.append(["epoch", network, workspace.arguments("network", folder / "epoch", *epoch), 0, ""])
    resume = f"--resume={folder / 'epoch' / f'tiny-step{STATE_AT:08d}-state'}"
    rows.append(["resumed", network, workspace.arguments("network", folder / "resumed", *epoch, resume), 0, ""])
    few = ["--max_train_steps=2", "--max_grad_norm=0", "--gradient_accumulation_steps=2"]
    cached = ["--cache_latents", "--cache_text_encoder_outputs"]
    for name, extra in VARIANTS.items():
        arguments = workspace.arguments("full", folder / name, *few, *cached, *extra)
        rows.append([name, workspace.script("full"), arguments, 0, ""])
    for name, extra in (("clipped", []), ("clipped-fused", ["--fused_backward_pass", "--fused_clip=all"])):
        rows.append(
            [name, workspace.script("full"), workspace.arguments("full", folder / name, *CLIPPED, *cached, *extra), 0, ""]
        )
    for name in ("plain", "fused"):
        arguments = workspace.arguments("full", folder / f"broken-{name}", *cached, *VARIANTS[name])
        rows.append([f"broken-{name}", workspace.script("full"), arguments, STOP_AT + 1, "nan"])
    stopped = workspace.arguments("network", folder / "stopped", "--max_train_steps=50")
    return [*rows, ["stopped", network, stopped, STOP_AT, "stop"]]


def sharded_jobs(workspace: Workspace, unet: Workspace, folder: Path) -> list[list[Any]]:
    """Of them, those of weights that are shared out; and whole ones of a UNet beside them."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n")  # one: a process alone could not make it
    full, pair = workspace.script("full"), [*PAIR, *SHARDED, f"--sample_prompts={prompts}", "--sample_at_first"]
    resume = f"--resume={folder / 'sharded-stopped' / f'tiny-step{STOP_AT:08d}-state'}"
    rows: list[list[Any]] = [
        ["sharded-full", full, workspace.arguments("full", folder / "sharded-full", *pair), 0, ""],
        ["sharded-stopped", full, workspace.arguments("full", folder / "sharded-stopped", *pair), STOP_AT, "stop"],
        ["sharded-resumed", full, workspace.arguments("full", folder / "sharded-resumed", *pair, resume), 0, ""],
    ]
    alone = workspace.arguments("network", folder / "sharded-network", *PAIR, "--shard_weights", "--gradient_checkpointing")
    rows.append(["sharded-network", workspace.script("network"), alone, 0, ""])
    regularisation = tiny.write_images(folder / "regularisation" / "1_thing", 2, (64, 64)).parent
    asks = [f"--reg_data_dir={regularisation}", "--preserve_prior"]  # some batches need the frozen model, and others do not
    for mode in MODES:
        for name, extra in (("whole", []), ("sharded", ["--shard_weights"])):
            own = [*UNET, *extra, *(asks if mode == "network" else [])]
            name = f"unet-{name}-{mode}"
            rows.append([name, unet.script(mode), unet.arguments(mode, folder / name, *own), 0, ""])
    return rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    case = CASES["flux"]
    assert case.write_swappable is not None
    return runs.make_workspace(replace(case, write_model=case.write_swappable), tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(runs.SHALLOW_CASES["sd"], tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def finished(workspace: Workspace, unet: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; they share one launch, since starting takes longer than training."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "jobs.json").write_text(json.dumps(jobs(workspace, folder) + sharded_jobs(workspace, unet, folder)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={WORLD}"]
    command = [*launch, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "process_run.py"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return folder


def facts(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each process noted."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_every_image_of_an_epoch_is_seen_by_one_of_the_processes(finished: Path, workspace: Workspace) -> None:
    seen = [Counter(seed for batch in process["seen"] for seed in batch) for process in facts(finished, "epoch")]
    images = {path for path in workspace.images.rglob("*.png")}
    assert len(seen[0] | seen[1]) == len(images)
    # seven batches for two processes: the first one is trained twice, so that both have four
    assert [len(process["seen"]) for process in facts(finished, "epoch")] == [4, 4]
    assert sum((seen[0] + seen[1]).values()) == 2 * 7 + 2


def test_files_are_written_once_and_all_processes_end_with_the_same_weights(finished: Path) -> None:
    output, step = finished / "epoch", f"tiny-step{STATE_AT:08d}"
    assert {path.name for path in output.iterdir()} == {
        "tiny.safetensors", "tiny-state", "metrics.csv", "image_losses.csv", f"{step}.safetensors", f"{step}-state",
    }  # fmt: skip
    assert len(runs.losses(output)) == 4
    first, second = (process["weights"] for process in facts(finished, "epoch"))
    runs.assert_same_tensors(first, second)
    runs.assert_same_tensors(first, load_file(output / "tiny-state" / "trainable.safetensors"))


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one_that_accumulates_twice_as_many_batches(
    mode: Mode, finished: Path, workspace: Workspace, tmp_path: Path
) -> None:
    """Weights, losses, rates and validation. Batches differ in size, so a mean of two means would be another number."""
    together = finished / f"pair-{mode}"
    alone = workspace.train(mode, tmp_path, *PAIR, f"--gradient_accumulation_steps={WORLD}")
    sizes = [len(batch) for process in facts(finished, f"pair-{mode}") for batch in process["seen"]]
    assert len(set(sizes)) > 1
    ends = [load_file(output / "tiny-state" / "trainable.safetensors") for output in (together, alone)]
    start = workspace.trainer(mode, tmp_path / "start", *PAIR).trainable.state_dict()
    assert ends[0].keys() == ends[1].keys() == start.keys()
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, atol=1e-5, rtol=0)
    assert max(float((ends[0][name] - value).abs().max()) for name, value in start.items()) > 1e-3
    assert runs.rows(together, "lr/unet") == runs.rows(alone, "lr/unet") == pytest.approx([0.0, 0.1, 0.05])
    columns = ["loss/current", "loss/average", "norm/gradient", "loss/validation/step_average"]
    columns += [f"loss/validation/quantile_{quantile}" for quantile in (17, 50, 83)]
    for column in columns:
        expected = runs.rows(alone, column)
        assert expected and runs.rows(together, column) == pytest.approx(expected, rel=1e-5), column


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_processes_end_alike_however_their_weights_are_stepped_and_moved(name: str, finished: Path) -> None:
    """Fused, gradients are averaged one by one, in an order that both processes keep to; swapped, wherever they are."""
    expected = facts(finished, "plain")[0]["weights"]
    for process in facts(finished, name):
        runs.assert_same_tensors(process["weights"], expected)


def test_processes_clip_the_norm_of_all_gradients_also_when_none_are_held(finished: Path) -> None:
    expected, *others = (facts(finished, name)[rank]["weights"] for name in ("clipped", "clipped-fused") for rank in (0, 1))
    for weights in others:
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=1e-7, rtol=1e-5)
    assert runs.rows(finished / "clipped-fused", "norm/gradient") == pytest.approx(
        runs.rows(finished / "clipped", "norm/gradient"), rel=1e-5
    )


def test_several_processes_resume_exactly(finished: Path) -> None:
    """Each with its own random numbers: dropout is on."""
    whole, resumed = (facts(finished, name) for name in ("epoch", "resumed"))
    for one, other in zip(whole, resumed, strict=True):
        assert other["seen"] == one["seen"][STATE_AT:]
        runs.assert_same_tensors(one["weights"], other["weights"])


def test_one_process_that_is_asked_to_stop_stops_all_after_the_same_step(finished: Path) -> None:
    processes = facts(finished, "stopped")
    assert [process["step"] for process in processes] == [STOP_AT, STOP_AT]
    assert all("--resume" in process["said"] for process in processes)
    state = finished / "stopped" / f"tiny-step{STOP_AT:08d}-state"
    runs.assert_same_tensors(processes[1]["weights"], load_file(state / "trainable.safetensors"))


@pytest.mark.parametrize("name", ["plain", "fused"])
def test_a_loss_that_is_no_number_on_one_process_stops_all_before_they_step(name: str, finished: Path) -> None:
    processes = facts(finished, f"broken-{name}")
    assert [process["step"] for process in processes] == [STOP_AT, STOP_AT]
    assert all(f"at step {STOP_AT + 1}" in process["said"] and ".png" in process["said"] for process in processes)
    state = finished / f"broken-{name}" / f"tiny-step{STOP_AT:08d}-state"
    for process in processes:
        runs.assert_same_tensors(process["weights"], load_file(state / "trainable.safetensors"))


# ---- sharded weights ---------------------------------------------------------------------------------------------------


def model_file(finished: Path, name: str, stem: str = "tiny") -> dict[str, torch.Tensor]:
    return load_file(finished / name / f"{stem}.safetensors")


@pytest.mark.parametrize(
    ("sharded", "whole"),
    [
        ("sharded-full", "pair-full"),
        ("sharded-network", "pair-network"),
        ("unet-sharded-full", "unet-whole-full"),
        ("unet-sharded-network", "unet-whole-network"),
    ],
)
def test_sharded_weights_learn_what_whole_ones_do(sharded: str, whole: str, finished: Path) -> None:
    """With text encoders that learn, clipping, unequal batches, and accumulation; and their files have the same tensors."""
    ends = [model_file(finished, name) for name in (sharded, whole)]
    assert [*ends[0]] == [*ends[1]]
    for name, value in ends[1].items():
        assert ends[0][name].dtype == value.dtype
        torch.testing.assert_close(ends[0][name], value, atol=1e-5, rtol=0)
    for column in ("loss/current", "norm/gradient", *(["loss/validation/step_average"] if "pair" in whole else [])):
        expected = runs.rows(finished / whole, column)
        assert expected and runs.rows(finished / sharded, column) == pytest.approx(expected, rel=1e-5), column


def test_each_process_holds_half_of_the_weights(finished: Path) -> None:
    for sharded, whole in (("sharded-full", "pair-full"), ("unet-sharded-network", "unet-whole-network")):
        (everything, _), parts = ([process["held"] for process in facts(finished, name)] for name in (whole, sharded))
        assert sum(parts) == everything
        assert max(parts) < 0.53 * everything


def test_a_file_of_sharded_weights_is_read_by_one_process(finished: Path, workspace: Workspace, tmp_path: Path) -> None:
    path = finished / "sharded-full" / "tiny.safetensors"
    read = workspace.trainer("full", tmp_path, f"--pretrained_model_name_or_path={path}").trainable.state_dict()
    for name, value in model_file(finished, "sharded-full").items():
        torch.testing.assert_close(read[f"denoiser.{name}"], value, atol=0, rtol=0)


def test_sharded_runs_stop_and_resume_exactly(finished: Path) -> None:
    """One process was asked to stop; the state has a part of each."""
    state = finished / "sharded-stopped" / f"tiny-step{STOP_AT:08d}-state"
    parts = {f"{name}-{rank}-of-00002" for name in ("trainable", "optimizer", "averages") for rank in ("00001", "00002")}
    assert {path.stem for path in state.glob("*.safetensors")} == parts
    assert set(json.loads((state / "manifest.json").read_text())) == {path.name for path in state.iterdir()} - {"manifest.json"}
    for stem in ("tiny", "tiny-ema"):
        runs.assert_same_tensors(model_file(finished, "sharded-full", stem), model_file(finished, "sharded-resumed", stem))
    raw, averaged = (model_file(finished, "sharded-full", stem) for stem in ("tiny", "tiny-ema"))
    assert any(not torch.equal(value, averaged[name]) for name, value in raw.items())
    for one, other in zip(facts(finished, "sharded-full"), facts(finished, "sharded-resumed"), strict=True):
        runs.assert_same_tensors(one["weights"], other["weights"])


def test_a_state_in_parts_is_resumed_by_one_process_with_whole_weights(
    finished: Path, workspace: Workspace, tmp_path: Path
) -> None:
    state = finished / "sharded-stopped" / f"tiny-step{STOP_AT:08d}-state"
    trainer = workspace.trainer("full", tmp_path, *PAIR, "--ema", f"--resume={state}")
    assert trainer.state.step == STOP_AT and trainer.average is not None
    optimizer = split_optimizer(trainer.optimizer.state_dict())[1]
    own = {"trainable": trainer.trainable.state_dict(), "averages": trainer.average.state_dict(), "optimizer": optimizer}
    for name, tensors in own.items():
        first, second = (load_file(state / f"{name}-0000{number}-of-00002.safetensors") for number in (1, 2))
        runs.assert_same_tensors(tensors, {key: torch.cat([value, second[key]]) for key, value in first.items()})


def test_a_preview_of_sharded_weights_is_made_by_all_and_written_once(finished: Path) -> None:
    assert len(list((finished / "sharded-full" / "sample").glob("*.png"))) == 1
