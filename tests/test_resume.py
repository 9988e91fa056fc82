"""A run that was stopped and resumed is, bit for bit, the run that was not; and nothing that is only looked at changes it."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import MODES, SHALLOW_CASES, Mode, Workspace
from safetensors.torch import load_file
from tqdm import tqdm

from library.errors import UserError
from library.resume import find_state, resumed_state
from library.rng import keyed_random
from library.run_setup import RunLength, TrainState
from library.run_writer import RunWriter
from library.train_util import Trainer

TOTAL, STOP = 5, 3
STATE = "tiny-state"


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return runs.Workspaces(SHALLOW_CASES, tmp_path_factory.mktemp)


@pytest.fixture
def workspace(workspaces: dict[str, Workspace]) -> Workspace:
    """For what is the same in every family."""
    return workspaces["sd"]


def step_state(output: Path, step: int) -> Path:
    return output / f"tiny-step{step:08d}-state"


def optimizer_state(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """Tensors by parameter and name; groups with what else the optimizer remembers."""
    state = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]
    return dict(nested_tensors(state["state"])), state["param_groups"]


def nested_tensors(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """bitsandbytes wraps what it has quantised in a mapping of its own."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from nested_tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule and position of two output folders with a state at the end."""
    runs.assert_same_tensors(
        load_file(one / STATE / "trainable.safetensors"), load_file(other / STATE / "trainable.safetensors")
    )
    tensors, groups = optimizer_state(one / STATE)
    other_tensors, other_groups = optimizer_state(other / STATE)
    runs.assert_same_tensors(tensors, other_tensors)
    assert groups == other_groups
    first, second = (json.loads((folder / STATE / "train_state.json").read_text()) for folder in (one, other))
    assert [first[key] for key in ("step", "epoch", "position", "micro_step")] == [
        second[key] for key in ("step", "epoch", "position", "micro_step")
    ]


def train_and_resume(workspace: Workspace, mode: Mode, folder: Path, *flags: str, total: int, stop: int) -> tuple[Path, Path]:
    """Output folders of a run of `total` updates, and of what goes on from its state after update `stop`."""
    flags = (*flags, f"--max_train_steps={total}", f"--save_every_n_steps={stop}", "--save_state")
    whole = workspace.train(mode, folder / "whole", *flags)
    resumed = workspace.train(mode, folder / "resumed", *flags, f"--resume={step_state(whole, stop)}")
    return whole, resumed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "workers"), [("sd", 2), ("sdxl", 0), ("flux", 2), ("chroma", 0), ("sd3", 2), ("lumina", 0)])
def test_three_steps_and_two_more_are_five(
    family: str, mode: Mode, workers: int, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """Four batches are two updates an epoch, so steps 3 and 5 are inside one; with schedule, dropout, flips, accumulation."""
    whole, resumed = train_and_resume(
        workspaces[family],
        mode,
        tmp_path,
        "--train_batch_size=4",
        "--gradient_accumulation_steps=2",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=2",
        "--flip_aug",
        "--shuffle_caption",
        "--caption_dropout_rate=0.3",
        "--noise_offset=0.1",
        f"--max_data_loader_n_workers={workers}",
        *(["--network_dropout=0.2"] if mode == "network" else []),
        total=TOTAL,
        stop=STOP,
    )
    assert_same_end(resumed, whole)
    runs.assert_same_tensors(load_file(resumed / "tiny.safetensors"), load_file(whole / "tiny.safetensors"))
    for column in ("loss/current", "loss/average", "lr/unet"):
        assert runs.rows(resumed, column) == runs.rows(whole, column)[STOP:]
    position = json.loads((whole / STATE / "train_state.json").read_text())["position"]
    assert position != 0, "the stop should fall inside an epoch"


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("network", ["--mixed_precision=bf16", "--no_half_vae", "--full_bf16", "--gradient_checkpointing"]),
        ("network", ["--network_args", "module_dropout=0.3", "rank_dropout=0.3", "--scale_weight_norms=0.01"]),
        ("network", ["--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01", "--gradient_checkpointing"]),
        ("full", ["--stop_text_encoder_training=2"]),
        ("full", ["--mixed_precision=bf16", "--no_half_vae", "--full_bf16"]),
        ("full", ["--mixed_precision=bf16", "--no_half_vae", "--full_bf16", "--bf16_update=kahan", "--fused_backward_pass"]),
        ("full", ["--mixed_precision=bf16", "--no_half_vae", "--full_bf16", "--optimizer_type=Adafactor"]),
        ("full", ["--fused_backward_pass", "--stop_text_encoder_training=2", "--gradient_accumulation_steps=2"]),
    ],
    ids=[
        "network-bf16",
        "dropped-modules",
        "disturbed",
        "stopped-encoder",
        "full-bf16",
        "kahan-fused",
        "bf16-factored",
        "fused-stopped-encoder",
    ],
)
def test_what_keeps_a_state_of_its_own_resumes_exactly(
    mode: Mode, flags: list[str], workspace: Workspace, tmp_path: Path
) -> None:
    assert_same_end(*train_and_resume(workspace, mode, tmp_path, *flags, total=3, stop=2))


OPTIMIZER_FLAGS = {
    "AdamW": [],
    "AdamW8bit": ["--optimizer_args", "min_8bit_size=64"],  # the tiny model's weights are below what it packs otherwise
    "AdamWScheduleFree": ["--optimizer_args", "warmup_steps=2"],
    "Adafactor": [],
    "Prodigy": ["--learning_rate=1"],
}


@pytest.mark.parametrize("optimizer", OPTIMIZER_FLAGS)
@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_optimizer_goes_on_exactly_inside_an_epoch_and_at_its_end(
    mode: Mode, optimizer: str, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """Three batches are an epoch."""
    flags = [f"--optimizer_type={optimizer}", *OPTIMIZER_FLAGS[optimizer], "--train_batch_size=8", "--max_train_steps=4"]
    whole = workspaces["flux"].train(mode, tmp_path / "whole", *flags, "--save_state", "--save_every_n_steps=1")
    kinds = {value.dtype for value in optimizer_state(whole / STATE)[0].values()}
    assert (torch.uint8 in kinds) == (optimizer == "AdamW8bit")
    for step, position in ((2, 2), (3, 0)):
        state = step_state(whole, step)
        assert json.loads((state / "train_state.json").read_text())["position"] == position
        resumed = workspaces["flux"].train(mode, tmp_path / f"{step}", *flags, "--save_state_on_train_end", f"--resume={state}")
        assert_same_end(resumed, whole)


def test_a_text_encoder_that_stopped_learning_stays_as_it_is(workspace: Workspace, tmp_path: Path) -> None:
    """Stopped before and after the state was saved; AdamW's momentum would move it on."""
    flags = ["--stop_text_encoder_training=2", "--save_state", "--save_every_n_steps=1", "--max_train_steps=4"]
    output = workspace.train("full", tmp_path, *flags)
    encoders = [
        {name: value for name, value in load_file(folder / "trainable.safetensors").items() if name.startswith("text_encoder.")}
        for folder in [step_state(output, step) for step in (1, 2, 4)]
    ]
    runs.assert_same_tensors(encoders[1], encoders[2])
    with pytest.raises(AssertionError):
        runs.assert_same_tensors(encoders[0], encoders[1])


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamWScheduleFree"])
def test_previews_and_saves_change_nothing(optimizer: str, workspace: Workspace, tmp_path: Path) -> None:
    """Also not through modules that are dropped at random, and optimizers that move the weights to show them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n")
    common = [
        f"--optimizer_type={optimizer}",
        "--network_dropout=0.2",
        "--network_args",
        "module_dropout=0.3",
        "--save_state_on_train_end",
        "--max_train_steps=4",
    ]
    looked_at = workspace.train(
        "network",
        tmp_path / "looked at",
        *common,
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=1",
        "--sample_at_first",
        "--save_every_n_steps=1",
    )
    assert len(list((looked_at / "sample").glob("*.png"))) == 5
    alone = workspace.train("network", tmp_path / "alone", *common)
    assert_same_end(looked_at, alone)
    assert runs.losses(looked_at) == runs.losses(alone)


def test_an_epoch_s_state_is_named_after_it_and_begins_the_next(workspace: Workspace, tmp_path: Path) -> None:
    flags = ["--max_train_epochs=2", "--train_batch_size=8", "--save_every_n_epochs=1", "--save_state"]
    whole = workspace.train("network", tmp_path / "whole", *flags)
    assert {path.name for path in whole.glob("*-state")} == {"tiny-000001-state", STATE}
    assert {path.name for path in whole.glob("*.safetensors")} == {"tiny-000001.safetensors", "tiny.safetensors"}
    resumed = workspace.train("network", tmp_path / "resumed", *flags, f"--resume={whole / 'tiny-000001-state'}")
    assert_same_end(resumed, whole)
    assert runs.rows(resumed, "loss/epoch_average") == runs.rows(whole, "loss/epoch_average")[1:]


def test_a_complete_run_says_so_and_goes_on_when_it_is_given_more_steps(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Constant rates know nothing of the length of the run; a cosine goes on along the longer curve."""
    flags = ["--save_state_on_train_end", "--train_batch_size=4", "--gradient_accumulation_steps=2"]
    first = workspace.train("network", tmp_path / "first", *flags, "--max_train_steps=3")
    with pytest.raises(UserError, match=r"nothing is left to train.*after step 3.*--max_train_steps"):
        workspace.train("network", tmp_path / "again", *flags, "--max_train_steps=3", f"--resume={first / STATE}")
    caplog.clear()
    more = [*flags, "--max_train_steps=5", f"--resume={first / STATE}"]
    longer = workspace.train("network", tmp_path / "longer", *more)
    assert any("--max_train_steps was 3 and is now 5" in record.message for record in caplog.records)
    assert_same_end(longer, workspace.train("network", tmp_path / "whole", *flags, "--max_train_steps=5"))
    curved = workspace.train("network", tmp_path / "curved", *more, "--lr_scheduler=cosine", "--learning_rate=2e-3")
    assert runs.rows(curved, "lr/unet") == pytest.approx([2e-3 * 0.345491, 2e-3 * 0.095492], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optimizer_type=SGD", "--optimizer_args", "momentum=0.9"], "optimizer was torch.optim.AdamW"),
        (["--network_dim=8"], "parameters differ"),
        (["--network_train_unet_only"], "parameters differ"),
    ],
)
def test_a_state_of_another_run_is_refused(
    flags: list[str], says: str, workspace: Workspace, tmp_path: Path, saved_state: Path
) -> None:
    with pytest.raises(UserError, match=says):
        workspace.trainer("network", tmp_path, f"--resume={saved_state}", *flags)


def test_batches_seed_and_accumulation_may_change_and_are_listed(
    workspace: Workspace, tmp_path: Path, saved_state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The state is one of seven batches into its epoch; of single pictures there are fourteen."""
    flags = ["--seed=8", "--train_batch_size=1", "--gradient_accumulation_steps=2", "--max_train_steps=5"]
    trainer = workspace.trainer("network", tmp_path, f"--resume={saved_state}", *flags)
    assert trainer.state == TrainState(step=1, epoch=0, position=2, micro_step=1)
    workspace.train("network", tmp_path, f"--resume={saved_state}", *flags)
    assert runs.rows(tmp_path, "step") == [2, 3, 4, 5]
    for said in ("--seed was 7 and is now 8", "--train_batch_size was 2", "an epoch has not as many batches", "steps was 1"):
        assert said in caplog.text


def test_on_other_processes_a_run_goes_on_past_what_was_seen() -> None:
    then = {"step": 9, "epoch": 2, "position": 1, "micro_step": 9, "batches_per_epoch": 4, "world": 2}
    assert resumed_state(then, RunLength(4, 1, 20), 2) == TrainState(9, 2, 1, 9)
    assert resumed_state(then, RunLength(8, 1, 20), 1) == TrainState(9, 2, 2, 18)
    assert resumed_state(then, RunLength(2, 1, 20), 4) == TrainState(9, 2, 0, 5)


@pytest.fixture(scope="module")
def saved_state(workspaces: dict[str, Workspace], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("saved")
    workspaces["sd"].train("network", output, "--max_train_steps=4", "--save_every_n_steps=1", "--save_state")
    return step_state(output, 1)


def test_where_data_is_loaded_and_cached_may_change(
    workspace: Workspace, tmp_path: Path, saved_state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    workspace.trainer("network", tmp_path, f"--resume={saved_state}", "--max_data_loader_n_workers=1", "--vae_batch_size=3")
    assert not [record for record in caplog.records if "not the run" in record.message]


@pytest.mark.parametrize(
    ("args", "suffix"),
    [
        (["algo=lokr", "factor=4"], "lokr_w1"),
        (["algo=locon", "conv_dim=2", "conv_alpha=1"], "lora_down.weight"),
    ],
    ids=["lokr", "locon"],
)
def test_lycoris_trains_saves_and_resumes_exactly(args: list[str], suffix: str, workspace: Workspace, tmp_path: Path) -> None:
    flags = ["--network_module=lycoris.kohya", "--network_dropout=0.1", "--network_args", *args]
    whole, resumed = train_and_resume(workspace, "network", tmp_path, *flags, total=3, stop=2)
    assert_same_end(resumed, whole)
    saved = load_file(whole / "tiny.safetensors")
    prefixes = {"_".join(key.split("_")[:2]) for key in saved}
    assert prefixes == {"lora_te", "lora_unet"}
    assert f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{suffix}" in saved
    assert f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.{suffix}" in saved
    before = load_file(step_state(whole, 2) / "trainable.safetensors")
    after = load_file(whole / STATE / "trainable.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in after if "te" in name)


# Beginning later without a state


def test_a_run_can_begin_at_a_later_step_with_its_rate_and_its_pictures(workspace: Workspace, tmp_path: Path) -> None:
    """Seven batches are four updates an epoch: step 6 is two updates, four batches, into the second one."""
    flags = ("--gradient_accumulation_steps=2", "--max_train_steps=8", "--lr_scheduler=linear")
    whole = workspace.train("network", tmp_path / "whole", *flags)
    skipping = (*flags, "--initial_step=6", "--skip_until_initial_step")
    later = workspace.train("network", tmp_path / "later", *skipping)
    assert runs.rows(later, "lr/unet") == runs.rows(whole, "lr/unet")[6:]
    trainer = workspace.trainer("network", tmp_path / "x", *skipping)
    assert trainer.state == TrainState(step=6, epoch=1, position=4, micro_step=11)
    trainer = workspace.trainer("network", tmp_path / "x", *flags, "--initial_epoch=2")
    assert trainer.state == TrainState(step=4, epoch=1, position=0, micro_step=7)
    with pytest.raises(UserError, match=r"begin at step 8 .* ends at step 8"):
        workspace.trainer("network", tmp_path / "x", *flags, "--initial_epoch=3")


# Killed at any moment

KILLS, KILLED_STEPS = 30, 45
KILLED_FLAGS = (
    f"--max_train_steps={KILLED_STEPS}", "--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs",
    "--network_args", "rank_dropout=0.3",
)  # fmt: skip
SAVING_FLAGS = (
    "--save_every_n_steps=1", "--save_state", "--save_last_n_steps_state=3", "--save_last_n_steps=2", "--resume=auto",
)  # fmt: skip


def go_on_in_a_child(trainer: Trainer, seconds: float) -> int:
    """Go on from the newest state in a process of its own, which is killed after so much of the processor's time in the loop
    (0: never), however busy the machine is; the signal that ended it, or 0. `trainer` stays as it was built.

    SIGPROF, to which nobody listens, ends a process as SIGKILL does: at once, also in the middle of a write.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            tqdm.set_lock(threading.RLock())  # its own is shared with children: one that is killed would never release it
            signal.alarm(120)
            saved = find_state(trainer.options)
            if saved is not None:
                trainer.restore(saved)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            trainer.fit(RunWriter(trainer))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed by itself"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_nothing_had_happened(
    workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """Saves after every step, so that many of the kills fall into one."""
    workspace, rng, killed = workspaces["chroma"], keyed_random("kills"), tmp_path / "killed"
    whole = workspace.trainer("network", tmp_path / "whole", *KILLED_FLAGS)
    began = time.process_time()
    whole.fit(RunWriter(whole))
    pace = (time.process_time() - began) / KILLED_STEPS
    trainer = workspace.trainer("network", killed, *KILLED_FLAGS, *SAVING_FLAGS)
    for _ in range(KILLS):
        assert go_on_in_a_child(trainer, rng.uniform(0.3, 6) * pace) == signal.SIGPROF
    assert go_on_in_a_child(trainer, 0) == 0
    runs.assert_same_tensors(load_file(killed / "tiny.safetensors"), load_file(tmp_path / "whole" / "tiny.safetensors"))
    assert runs.losses(killed) == runs.losses(tmp_path / "whole")
