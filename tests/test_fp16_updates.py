"""Weights that learn in fp16: steps in float32 from scaled gradients, rounded without losing small ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from accelerate import Accelerator
from runs import CASES, MODES, Mode, Workspace
from torch import nn

from library.fp16_updates import Fp16GradScaler, Fp16Rounding, Fp16Update, round_to_fp16
from library.number_check import SCALED_PATIENCE, NumberCheck
from library.processes import Processes
from library.separate_steps import SeparateSteps


def test_rounding_gives_a_neighbour_and_is_right_on_average() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = every[every.isfinite()]
    assert torch.equal(round_to_fp16(numbers.float(), 1), numbers)  # subnormal ones, too
    for value in (1.0003, -0.1, 3e-7, 1234.56):
        drawn = round_to_fp16(torch.full((20_000,), value), 2).float()
        low, high = sorted(set(drawn.tolist()))
        assert low < value < high
        assert drawn.mean() == pytest.approx(value, abs=0.02 * (high - low))
    beyond = round_to_fp16(torch.tensor([1e6, -1e6, torch.inf, torch.nan]), 3)
    assert beyond[:3].tolist() == [torch.inf, -torch.inf, torch.inf] and beyond[3].isnan()


def an_update(weights: torch.Tensor, max_grad_norm: float = 0.0) -> tuple[nn.Parameter, Fp16Update]:
    parameter = nn.Parameter(weights.half())
    rounding = Fp16Rounding(5, kahan=False)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = Fp16GradScaler("cpu")
    steps = SeparateSteps(torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0), rounding)
    numbers = NumberCheck(Processes(accelerator), SCALED_PATIENCE)
    return parameter, Fp16Update(steps, rounding, max_grad_norm, accelerator, numbers)


def make_step(parameter: nn.Parameter, update: Fp16Update, loss: torch.Tensor, step: int) -> bool:
    update.before_last_batch(step, 1)
    update.accelerator.backward(loss)
    return update.step([parameter], loss)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-7])
def test_gradients_that_fp16_cannot_hold_make_the_steps_that_float32_makes(max_grad_norm: float) -> None:
    """Unscaled they are 1e-8, and zero in fp16; so are the squares that AdamW keeps."""
    start, slope = torch.full((2000,), 0.5), torch.linspace(1, 3, 2000) * 1e-8
    parameter, update = an_update(start, max_grad_norm)
    exact = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    for step in range(20):
        assert make_step(parameter, update, (parameter.float() * slope).sum(), step)
        exact.grad = slope.clone()
        if max_grad_norm:
            nn.utils.clip_grad_norm_([exact], max_grad_norm)
        reference.step()
    assert update.norm is None if not max_grad_norm else update.norm == pytest.approx(float(slope.norm()), rel=1e-2)
    assert parameter.dtype == torch.float16
    assert float(parameter.detach().float().mean()) == pytest.approx(float(exact.detach().mean()), abs=2e-4)
    state = update.optimizer.state[parameter]
    torch.testing.assert_close(state["exp_avg_sq"], reference.state[exact]["exp_avg_sq"], rtol=3e-2, atol=0)


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    parameter, update = an_update(torch.ones(4))
    scaler = update.accelerator.scaler
    assert scaler is not None
    before = scaler.get_scale()
    assert not make_step(parameter, update, parameter.float().sum() * 10, 0)  # 10 * 65536 is beyond fp16
    assert scaler.get_scale() == before / 2
    assert torch.equal(parameter, torch.ones(4).half()) and parameter.grad is None
    assert make_step(parameter, update, parameter.float().sum(), 1)
    assert (parameter < 1).all()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["flux"], tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_learns_with_fp16_weights(mode: Mode, workspace: Workspace, tmp_path: Path) -> None:
    """On a CPU accelerate has no fp16, so its scaler and autocast are put in by hand."""
    prepared = workspace.prepared(mode, tmp_path, "--seed=1")
    precision = replace(prepared.options.precision, full_fp16=True, mixed_precision="fp16")
    prepared = replace(prepared, options=replace(prepared.options, precision=precision))
    prepared.accelerator.scaler = Fp16GradScaler("cpu", init_scale=256.0)
    trainer = prepared.assemble(prepared.load(), prepared.previews())
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float16}
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.trainable.train()
    with torch.autocast("cpu", torch.float16):
        for batch in runs.first_batches(trainer, 2):
            assert torch.isfinite(trainer.update([batch])["loss"])
            trainer.state.step += 1
    changed = [not torch.equal(one, other) for one, other in zip(before, trainer.parameters, strict=True)]
    assert sum(changed) > len(changed) / 2
