"""Optimizers by name, their arguments, and the step."""

from __future__ import annotations

import io

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.errors import UserError
from library.number_check import NumberCheck
from library.optimizers import (
    OPTIMIZERS,
    ParamGroup,
    StandardUpdate,
    create_optimizer,
    describe_optimizer,
    group_rates,
    parse_literals,
)
from library.option_groups import OptimizerOptions
from library.processes import Processes


def groups() -> list[ParamGroup]:
    torch.manual_seed(0)
    return [
        ParamGroup("textencoder", [nn.Parameter(torch.randn(4, 4))], 1e-4),
        ParamGroup("unet", [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3))], 2e-3),
    ]


def make(kind: str, *arguments: str, rate: float = 1e-3) -> torch.optim.Optimizer:
    return create_optimizer(OptimizerOptions(optimizer_type=kind, optimizer_args=arguments, learning_rate=rate), groups())


def test_groups_keep_their_name_rate_and_order_and_empty_ones_are_left_out():
    made = create_optimizer(OptimizerOptions(), [ParamGroup("empty", [], 1.0), *groups()])
    assert type(made) is torch.optim.AdamW
    assert [(g["name"], g["lr"], len(g["params"])) for g in made.param_groups] == [
        ("textencoder", 1e-4, 1),
        ("unet", 2e-3, 2),
    ]


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="nothing to train"):
        create_optimizer(OptimizerOptions(), [ParamGroup("unet", [], 1e-4)])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("adamw", "torch.optim.adamw.AdamW"),
        ("RAdam", "torch.optim.radam.RAdam"),
        ("rmsprop", "torch.optim.rmsprop.RMSprop"),
        ("torch.optim.Adamax", "torch.optim.adamax.Adamax"),
        ("AdamW8bit", "bitsandbytes.optim.adamw.AdamW8bit"),
        ("PagedAdamW8bit", "bitsandbytes.optim.adamw.PagedAdamW8bit"),
        ("Lion8bit", "bitsandbytes.optim.lion.Lion8bit"),
        ("AdamWScheduleFree", "schedulefree.adamw_schedulefree.AdamWScheduleFree"),
    ],
)
def test_names_are_found_whatever_their_case(kind, expected):
    for package in ("bitsandbytes", "schedulefree"):
        if expected.startswith(package):
            pytest.importorskip(package)
    made = type(make(kind))
    assert f"{made.__module__}.{made.__name__}" == expected


def test_nesterov_is_momentum_sgd_and_arguments_win_over_its_defaults():
    assert make("SGDNesterov").defaults["momentum"] == 0.9
    made = make("SGDNesterov", "momentum=0.5")
    assert made.defaults["nesterov"] is True
    assert made.defaults["momentum"] == 0.5


def test_literals_become_python_values():
    assert parse_literals(["a=1e-2", "betas=0.9,0.99", "c=True", "d=None", "e='x=y'"], "--f") == {
        "a": 1e-2, "betas": (0.9, 0.99), "c": True, "d": None, "e": "x=y",
    }  # fmt: skip
    assert make("AdamW", "betas=0.8,0.9").defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("AdamWW", (), "Did you mean 'AdamW'"),
        ("prodgy", (), "Did you mean 'Prodigy'"),
        ("torch.optim.AdamQ", (), "torch.optim has no 'AdamQ'"),
        ("nowhere.Adam", (), "pip install nowhere"),
        ("AdamW", ("weight_decay",), "not of the form key=value"),
        ("AdamW", ("weight_decay=much",), "not a Python literal: much"),
        ("AdamW", ("weight_dekay=0.1",), "Did you mean 'weight_decay'"),
        ("AdamW", ("lr=0.1",), "--learning_rate"),
        ("AdamW", ("betas=7,8",), "does not accept"),
    ],
)
def test_a_wrong_name_or_argument_says_what_to_do(kind, arguments, message):
    with pytest.raises(UserError, match=message):
        make(kind, *arguments)


def test_a_missing_package_is_named():
    missing = [(name, source) for name, source in OPTIMIZERS.items() if source.package in ("dadaptation", "lion-pytorch")]
    assert missing
    for name, source in missing:
        try:
            __import__(source.module)
        except ImportError:
            with pytest.raises(UserError, match=f"pip install {source.package}"):
                make(name)


def test_older_flags_are_names_for_optimizers():
    pytest.importorskip("bitsandbytes")
    assert "AdamW8bit" in describe_optimizer(OptimizerOptions(use_8bit_adam=True))


def test_description_is_the_path_and_the_arguments():
    options = OptimizerOptions(optimizer_type="adamw", optimizer_args=("weight_decay=0.1", "betas=0.9,0.99"))
    assert describe_optimizer(options) == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert describe_optimizer(OptimizerOptions()) == "torch.optim.adamw.AdamW"


def test_logged_rates_have_the_group_names_and_the_estimate_where_there_is_one():
    made = make("AdamW")
    assert group_rates(made) == {"lr/textencoder": 1e-4, "lr/unet": 2e-3}
    made.param_groups[1]["d"] = 0.5
    assert group_rates(made)["lr/d*lr/unet"] == 1e-3


def test_a_state_survives_a_safe_read_and_continues_equally(tmp_path):
    pytest.importorskip("bitsandbytes")
    for kind in ("AdamW", "AdamW8bit", "Adafactor"):
        ours, theirs = make(kind), make(kind)
        for optimizer in (ours, theirs):
            for step in range(2):
                set_gradients(optimizer, step)
                optimizer.step()
        torch.save(ours.state_dict(), tmp_path / "state.pt")
        resumed = make(kind)
        for new, old in zip(parameters(resumed), parameters(ours), strict=True):
            new.data.copy_(old.data)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for optimizer in (resumed, theirs):
            set_gradients(optimizer, 7)
            optimizer.step()
        for a, b in zip(parameters(resumed), parameters(theirs), strict=True):
            assert torch.equal(a, b), kind


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for index, parameter in enumerate(parameters(optimizer)):
        generator = torch.Generator().manual_seed(seed * 100 + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def an_update(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> StandardUpdate:
    accelerator = Accelerator(cpu=True)
    return StandardUpdate(accelerator.prepare(optimizer), max_grad_norm, accelerator, NumberCheck(Processes(accelerator)))


# ---- the step --------------------------------------------------------------------------------------------------------


def test_a_step_clips_the_norm_of_all_gradients_together():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    made = create_optimizer(
        OptimizerOptions(optimizer_type="SGD"), [ParamGroup("a", [first], 1.0), ParamGroup("b", [second], 1.0)]
    )
    update = an_update(made, 1.0)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert update.step([first, second], torch.tensor(1.0)) is True
    assert update.norm is not None and update.norm.item() == pytest.approx(5.0)
    assert (first.item(), second.item()) == pytest.approx((-0.6, -0.8), rel=1e-5)
    assert first.grad is None and second.grad is None


def test_zero_does_not_clip():
    parameter = nn.Parameter(torch.zeros(1))
    made = create_optimizer(OptimizerOptions(optimizer_type="SGD"), [ParamGroup("a", [parameter], 1.0)])
    update = an_update(made, 0.0)
    parameter.grad = torch.tensor([30.0])
    update.step([parameter], torch.tensor(1.0))
    assert parameter.item() == -30.0


def test_schedule_free_weights_are_swapped_while_evaluating_and_put_back():
    pytest.importorskip("schedulefree")
    parameter = nn.Parameter(torch.ones(3))
    made = create_optimizer(OptimizerOptions(optimizer_type="AdamWScheduleFree"), [ParamGroup("a", [parameter], 0.1)])
    update = an_update(made, 0.0)
    for value in (1.0, -2.0, 0.5):
        parameter.grad = torch.full((3,), value)
        update.step([parameter], torch.tensor(1.0))
    training = parameter.detach().clone()
    with update.evaluating():
        assert not torch.allclose(parameter, training)
    torch.testing.assert_close(parameter.detach(), training)
    assert made.param_groups[0]["train_mode"] is True


def test_evaluating_changes_nothing_for_other_optimizers():
    made = make("AdamW")
    before = [parameter.detach().clone() for group in made.param_groups for parameter in group["params"]]
    update = an_update(made, 1.0)
    with update.evaluating():
        inside = [parameter.detach().clone() for group in made.param_groups for parameter in group["params"]]
    assert before
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))


OWN_PACKAGES = (
    "pytorch_optimizer.CAME",
    "pytorch_optimizer.StableAdamW",
    "prodigyplus.ProdigyPlusScheduleFree",
    "torch.optim.NAdam",
)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OWN_PACKAGES])
def test_every_optimizer_lowers_the_loss_and_keeps_a_state_that_is_read_safely(name):
    """Six steps, since RAdam's first five are not rectified and its schedule-free form makes none of them."""
    rate = 1.0 if "dadapt" in name.lower() or "prodigy" in name.lower() else 1e-2
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    groups = [ParamGroup("unet", list(model.parameters()), rate)]
    optimizer = create_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=rate), groups)
    losses = []
    for _ in range(7):
        loss = (model(torch.ones(4, 8)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    assert torch.load(stored, weights_only=True).keys() == optimizer.state_dict().keys()
