"""Two processes on the CPU train as one would: same images, same weights, the gradient of all images together."""

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
import torch
from runs import CASES, MODES, Mode, Workspace
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2
ONE_STEP = ["--max_train_steps=1", "--train_batch_size=4", "--max_grad_norm=0", "--save_state", "--optimizer_type=SGD"]
MOMENTUM = ["--optimizer_args", "momentum=0.9"]
"""After the first step SGD's momentum is the gradient itself."""
ONE_STEP_SEED = 5
STOP_AT = 2
STATE_AT = 3


SWAPS = {
    "unswapped": [],
    "swapped": ["--blocks_to_swap=2"],
    "swapped-fused": ["--blocks_to_swap=2", "--fused_backward_pass", "--gradient_checkpointing"],
}


def swapping_jobs(folder: Path) -> list[list[Any]]:
    case = CASES["flux"]
    assert case.write_swappable is not None
    flux = runs.make_workspace(replace(case, write_model=case.write_swappable), folder / "flux")
    few = ["--max_train_steps=2", "--max_grad_norm=0", "--cache_latents", "--cache_text_encoder_outputs"]
    return [
        [name, flux.script("full"), flux.arguments("full", folder / name, *few, *extra), 0] for name, extra in SWAPS.items()
    ]


def jobs(workspace: Workspace, folder: Path) -> list[list[Any]]:
    """[name, script, arguments, step to stop at] of every run."""
    rows: list[list[Any]] = []
    for mode in MODES:
        script = workspace.script(mode)
        output = folder / f"epoch-{mode}"
        epoch = ["--max_train_epochs=1", "--save_state", "--cache_latents_to_disk", f"--cache_dir={folder / 'cache'}"]
        if mode == "network":
            epoch += [f"--save_every_n_steps={STATE_AT}", "--network_dropout=0.3"]
        rows.append([f"epoch-{mode}", script, workspace.arguments(mode, output, *epoch), 0])
        if mode == "network":
            resume = f"--resume={output / f'tiny-step{STATE_AT:08d}-state'}"
            rows.append(["resumed", script, workspace.arguments(mode, folder / "resumed", *epoch, resume), 0])
        arguments = workspace.arguments(mode, folder / f"step-{mode}", *ONE_STEP, f"--seed={ONE_STEP_SEED}", *MOMENTUM)
        rows.append([f"step-{mode}", script, arguments, 0])
    for name, extra in (("ordinary", []), ("fused", ["--fused_backward_pass", "--gradient_checkpointing"])):
        few = ["--max_train_steps=3", "--max_grad_norm=0", "--gradient_accumulation_steps=2", *extra]
        rows.append([name, workspace.script("full"), workspace.arguments("full", folder / name, *few), 0])
    stopped = workspace.arguments("network", folder / "stopped", "--max_train_steps=50")
    return [*rows, *swapping_jobs(folder), ["stopped", workspace.script("network"), stopped, STOP_AT]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["sd"], tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def finished(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; they share one launch, since starting takes longer than training."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "jobs.json").write_text(json.dumps(jobs(workspace, folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "process_run.py"), str(folder)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return folder


def facts(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each process noted."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("mode", MODES)
def test_every_image_of_an_epoch_is_seen_by_one_of_the_processes(mode: Mode, finished: Path, workspace: Workspace) -> None:
    seen = [Counter(seed for batch in process["seen"] for seed in batch) for process in facts(finished, f"epoch-{mode}")]
    images = {path for path in workspace.images.rglob("*.png")}
    assert len(seen[0] | seen[1]) == len(images)
    # seven batches for two processes: the first one is trained twice, so that both have four
    assert [len(process["seen"]) for process in facts(finished, f"epoch-{mode}")] == [4, 4]
    assert sum((seen[0] + seen[1]).values()) == 2 * 7 + 2


@pytest.mark.parametrize("mode", MODES)
def test_files_are_written_once_and_all_processes_end_with_the_same_weights(mode: Mode, finished: Path) -> None:
    output = finished / f"epoch-{mode}"
    step = f"tiny-step{STATE_AT:08d}"
    on_the_way = {f"{step}.safetensors", f"{step}-state"} if mode == "network" else set()
    assert {path.name for path in output.iterdir()} == {
        "tiny.safetensors", "tiny-state", "metrics.csv", "image_losses.csv", *on_the_way,
    }  # fmt: skip
    assert len(runs.losses(output)) == 4
    first, second = (process["weights"] for process in facts(finished, f"epoch-{mode}"))
    runs.assert_same_tensors(first, second)
    runs.assert_same_tensors(first, load_file(output / "tiny-state" / "trainable.safetensors"))


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_one_process_over_all_images(
    mode: Mode, finished: Path, workspace: Workspace, tmp_path: Path
) -> None:
    """The two batches differ in size, so a mean of the two means would be another number."""
    trainer = workspace.trainer(mode, tmp_path, *ONE_STEP, f"--seed={ONE_STEP_SEED}", *MOMENTUM)
    trainer.trainable.train()
    batches = [trainer.data.train[(0, rank)] for rank in range(WORLD)]
    total = sum(len(batch) for batch in batches)
    assert len(batches[0]) != len(batches[1]), "choose another ONE_STEP_SEED"
    loss, gradients = 0.0, [torch.zeros_like(parameter) for parameter in trainer.parameters]
    for rank, batch in enumerate(batches):
        trainer.rng = type(trainer.rng)(ONE_STEP_SEED, rank=rank)
        own = trainer.loss(batch)
        loss += own.item() * len(batch) / total
        for mean, gradient in zip(gradients, torch.autograd.grad(own, trainer.parameters), strict=True):
            mean += gradient * (len(batch) / total)
    state = torch.load(finished / f"step-{mode}" / "tiny-state" / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert len(state) == len(gradients)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(state[index]["momentum_buffer"], gradient, atol=1e-6, rtol=1e-5)
    assert runs.losses(finished / f"step-{mode}") == pytest.approx([loss], rel=1e-5)


def test_processes_that_step_during_backward_end_where_others_do(finished: Path) -> None:
    """Gradients are averaged one by one, in an order that both processes keep to."""
    ordinary, fused = (facts(finished, name) for name in ("ordinary", "fused"))
    for one, other in zip(ordinary, fused, strict=True):
        runs.assert_same_tensors(one["weights"], other["weights"])


def test_processes_whose_blocks_are_swapped_end_where_others_do(finished: Path) -> None:
    """Each swaps its own, and gradients are averaged wherever they are."""
    expected = facts(finished, "unswapped")[0]["weights"]
    for name in SWAPS:
        for process in facts(finished, name):
            runs.assert_same_tensors(process["weights"], expected)


def test_several_processes_resume_exactly(finished: Path) -> None:
    """Each with its own random numbers: dropout is on."""
    whole, resumed = (facts(finished, name) for name in ("epoch-network", "resumed"))
    for one, other in zip(whole, resumed, strict=True):
        assert other["seen"] == one["seen"][STATE_AT:]
        runs.assert_same_tensors(one["weights"], other["weights"])


def test_one_process_that_is_asked_to_stop_stops_all_after_the_same_step(finished: Path) -> None:
    processes = facts(finished, "stopped")
    assert [process["step"] for process in processes] == [STOP_AT, STOP_AT]
    assert all("--resume" in process["said"] for process in processes)
    state = finished / "stopped" / f"tiny-step{STOP_AT:08d}-state"
    runs.assert_same_tensors(processes[1]["weights"], load_file(state / "trainable.safetensors"))
