"""A loss or a gradient that is no number: the run stops before weights are stepped with it, and names the pictures."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate import Accelerator
from runs import SHALLOW_CASES, Workspace
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from library.errors import UserError
from library.number_check import SCALED_PATIENCE, NotFinite, NumberCheck
from library.processes import Processes
from library.train_util import Trainer

FUSED = ["--fused_backward_pass"]
RULES = {
    "ordinary": [],
    "unclipped": ["--max_grad_norm=0"],
    "foreign": ["--optimizer_type=Lion"],
    "one kernel": ["--optimizer_args", "fused=True"],
    "fused": FUSED,
    "fused, clipped together": [*FUSED, "--fused_clip=all"],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sd"], tmp_path_factory.mktemp("sd"))


def all_tensors(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of weights and optimizer state."""
    state: Any = trainer.optimizer.state_dict()
    return copy.deepcopy([*(p.detach() for p in trainer.parameters), *map(torch.as_tensor, tree_leaves(state["state"]))])


def a_started_trainer(workspace: Workspace, folder: Path, *flags: str) -> Trainer:
    trainer = workspace.trainer("network", folder, *flags)
    trainer.trainable.train()
    trainer.update(runs.first_batches(trainer, 1))
    trainer.state.step += 1
    return trainer


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_stepped_with_a_loss_that_is_no_number(rule: str, workspace: Workspace, tmp_path: Path) -> None:
    trainer = a_started_trainer(workspace, tmp_path, *RULES[rule])
    good, bad = runs.first_batches(trainer, 2)
    bad.loss_weights.fill_(float("nan"))
    before, known = all_tensors(trainer), dict(trainer.image_losses.images) if trainer.image_losses else {}
    with pytest.raises(NotFinite, match="loss is nan at step 2") as problem:
        trainer.update([good, bad])
    assert problem.value.untouched
    assert all(name in str(problem.value) for name in bad.names)
    assert not any(name in str(problem.value) for name in set(good.names) - set(bad.names))
    runs.assert_same_tensors(dict(enumerate(all_tensors(trainer))), dict(enumerate(before)))
    assert trainer.image_losses is not None and trainer.image_losses.images == known


@pytest.mark.parametrize("rule", RULES)
def test_gradients_that_are_no_numbers_are_found_though_the_loss_is_one(
    rule: str, workspace: Workspace, tmp_path: Path
) -> None:
    """Fused, each gradient is stepped with before the next one is there, which the error says."""
    trainer = a_started_trainer(workspace, tmp_path, *RULES[rule])
    before, batches = all_tensors(trainer), runs.first_batches(trainer, 1)
    trainer.parameters[3].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NotFinite, match="norm of the gradients is (nan|inf)") as problem:
        trainer.update(batches)
    assert all(name in str(problem.value) for name in batches[0].names)
    assert problem.value.untouched == (rule != "fused")
    same = [torch.equal(now, then) for now, then in zip(all_tensors(trainer), before, strict=True)]
    assert all(same) == problem.value.untouched


def test_the_state_before_such_a_step_is_saved_on_the_way_out(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at step 2: .* --resume .*tiny-step00000001-state"):
        workspace.train("network", tmp_path / "broken", "--learning_rate=1e30")
    whole = workspace.train(
        "network", tmp_path / "one", "--learning_rate=1e30", "--max_train_steps=1", "--save_state_on_train_end"
    )
    states = [tmp_path / "broken" / "tiny-step00000001-state", whole / "tiny-state"]
    runs.assert_same_tensors(*(load_file(state / "trainable.safetensors") for state in states))
    assert len(runs.losses(tmp_path / "broken")) == 1
    with pytest.raises(UserError, match="No step of this run came before it"):
        workspace.train("network", tmp_path / "again", f"--resume={states[0]}", "--learning_rate=1e30")
    assert not list((tmp_path / "again").glob("*-state"))


def test_where_loss_scaling_skips_such_steps_only_many_in_a_row_stop_the_run() -> None:
    check = NumberCheck(Processes(Accelerator(cpu=True)), SCALED_PATIENCE)
    losses = [math.inf] * (SCALED_PATIENCE - 1) + [1.0] + [math.nan] * SCALED_PATIENCE
    for step, loss in enumerate(losses):
        check.begin(step)
        check.seen(("a.png",), torch.tensor(loss))
        check.ask(torch.tensor(loss), torch.tensor(math.inf))
        if step + 1 < len(losses):
            check.settle()
    with pytest.raises(NotFinite, match=rf"nan at step {len(losses)}: .* a\.png"):
        check.settle()
