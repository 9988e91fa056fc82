"""Schedules against their closed forms, counted in updates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.optimizers import ParamGroup, create_optimizer
from library.option_groups import OptimizerOptions, ScheduleOptions
from library.schedulers import SCHEDULERS, count_updates, create_scheduler

RATE = 0.5
TOTAL = 20


def optimizer(kind: str = "SGD", *arguments: str) -> torch.optim.Optimizer:
    parameters = [
        ParamGroup("unet", [nn.Parameter(torch.ones(2))], RATE),
        ParamGroup("te", [nn.Parameter(torch.ones(2))], RATE / 5),
    ]
    return create_optimizer(OptimizerOptions(optimizer_type=kind, optimizer_args=arguments, learning_rate=RATE), parameters)


def curve(options: ScheduleOptions, total: int = TOTAL) -> list[float]:
    """The factor on the rate at each update. Both groups have to follow it."""
    made = optimizer()
    scheduler = create_scheduler(options, made, total)
    factors = []
    for _ in range(total):
        first, second = (group["lr"] for group in made.param_groups)
        assert second == pytest.approx(first / 5)
        factors.append(first / RATE)
        made.step()
        scheduler.step()
    return factors


def cosine(step: int, warmup: int, cycles: float = 0.5, low: float = 0.0) -> float:
    progress = (step - warmup) / (TOTAL - warmup)
    return low + (1 - low) * 0.5 * (1 + math.cos(2 * math.pi * cycles * progress))


def restarts(step: int, warmup: int, cycles: int) -> float:
    progress = (step - warmup) / (TOTAL - warmup)
    return 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1.0)))


CASES = {
    "constant": (ScheduleOptions(), lambda s: 1.0),
    "constant_with_warmup": (ScheduleOptions(lr_warmup_steps=5), lambda s: min(1.0, s / 5)),
    "linear": (ScheduleOptions(lr_warmup_steps=4), lambda s: s / 4 if s < 4 else (TOTAL - s) / (TOTAL - 4)),
    "cosine": (ScheduleOptions(lr_warmup_steps=0.2), lambda s: s / 4 if s < 4 else cosine(s, 4)),
    "cosine_with_restarts": (
        ScheduleOptions(lr_warmup_steps=2, lr_scheduler_num_cycles=3),
        lambda s: s / 2 if s < 2 else restarts(s, 2, 3),
    ),
    "polynomial": (
        ScheduleOptions(lr_scheduler_power=2.0),
        lambda s: ((RATE - 1e-7) * (1 - s / TOTAL) ** 2 + 1e-7) / RATE,
    ),
    "piecewise_constant": (
        ScheduleOptions(lr_scheduler_args=("step_rules='1:10,0.1:15,0.01'",)),
        lambda s: 1.0 if s < 10 else 0.1 if s < 15 else 0.01,
    ),
    "inverse_sqrt": (
        ScheduleOptions(lr_warmup_steps=4, lr_scheduler_timescale=9),
        lambda s: s / 4 if s < 4 else 1 / math.sqrt((s + 9 - 4) / 9),
    ),
    "cosine_with_min_lr": (
        ScheduleOptions(lr_warmup_steps=4, lr_scheduler_min_lr_ratio=0.25),
        lambda s: s / 4 if s < 4 else cosine(s, 4, low=0.25),
    ),
    "cosine_warmup_with_min_lr": (
        ScheduleOptions(lr_warmup_steps=4, lr_scheduler_min_lr_ratio=0.25, lr_scheduler_args=("warmup_lr_rate=0.1",)),
        lambda s: 0.1 + 0.9 * s / 3 if s < 4 else cosine(s + 1, 4, low=0.25),
    ),
    "rex": (
        ScheduleOptions(lr_warmup_steps=4, lr_scheduler_min_lr_ratio=0.1),
        lambda s: s / 4 if s < 4 else 0.1 + 0.9 * (1 - (s - 4) / 16) / (0.5 + 0.5 * (1 - (s - 4) / 16)),
    ),
    "warmup_stable_decay": (
        ScheduleOptions(lr_warmup_steps=4, lr_decay_steps=0.4, lr_scheduler_min_lr_ratio=0.1),
        lambda s: 0.1 + 0.9 * s / 4 if s < 4 else 1.0 if s < 12 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 12) / 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_its_closed_form(name):
    options, expected = CASES[name]
    assert curve(replace(options, lr_scheduler=name)) == pytest.approx([expected(step) for step in range(TOTAL)], abs=1e-6)


def test_every_name_has_a_test():
    assert SCHEDULERS.keys() == CASES.keys() | {"adafactor"}


def test_a_number_of_updates_is_a_count_or_a_share():
    assert [count_updates(value, 200, "--x") for value in (0, 7, 0.1, 0.999, 30.0)] == [0, 7, 20, 199, 30]
    for wrong in (-1, 1.5):
        with pytest.raises(UserError, match="--x"):
            count_updates(wrong, 200, "--x")


def test_warm_up_and_decay_have_to_fit():
    options = ScheduleOptions(lr_scheduler="warmup_stable_decay", lr_warmup_steps=15, lr_decay_steps=10)
    with pytest.raises(UserError, match="more than the 20 steps"):
        curve(options)


def test_what_a_schedule_does_not_use_is_told(caplog):
    shape = {"lr_warmup_steps": 5, "lr_decay_steps": 4, "lr_scheduler_num_cycles": 2, "lr_scheduler_power": 2.0,
             "lr_scheduler_timescale": 3, "lr_scheduler_min_lr_ratio": 0.1}  # fmt: skip
    curve(ScheduleOptions(lr_scheduler="constant", **shape))
    assert [f"--{flag} {value} is not used by --lr_scheduler constant" for flag, value in shape.items()] == caplog.messages
    caplog.clear()
    used = {"warmup_stable_decay": shape.keys() - {"lr_scheduler_power", "lr_scheduler_timescale"},
            "polynomial": {"lr_warmup_steps", "lr_scheduler_power"}, "cosine": {"lr_warmup_steps"},
            "inverse_sqrt": {"lr_warmup_steps", "lr_scheduler_timescale"}}  # fmt: skip
    for name, flags in used.items():
        curve(ScheduleOptions(lr_scheduler=name, **{flag: shape[flag] for flag in flags}))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScheduleOptions(lr_scheduler="cosin"), "Did you mean 'cosine'"),
        (ScheduleOptions(lr_scheduler="adafactor"), "--optimizer_type Adafactor"),
        (ScheduleOptions(lr_scheduler="reduce_lr_on_plateau"), "--early_stopping_patience"),
        (ScheduleOptions(lr_scheduler_type="StepLRR"), "Did you mean 'StepLR'"),
        (ScheduleOptions(lr_scheduler_type="StepLR", lr_scheduler_args=("step=3",)), "Did you mean 'step_size'"),
        (ScheduleOptions(lr_scheduler_type="StepLR"), "does not accept"),
        (ScheduleOptions(lr_scheduler="piecewise_constant"), "does not accept"),
        (ScheduleOptions(lr_scheduler_type="nowhere.Schedule"), "pip install nowhere"),
    ],
)
def test_a_wrong_schedule_says_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        curve(options)


def test_a_class_of_torch_or_a_dotted_path_is_used_with_its_arguments():
    for name in ("StepLR", "torch.optim.lr_scheduler.StepLR"):
        factors = curve(ScheduleOptions(lr_scheduler_type=name, lr_scheduler_args=("step_size=5", "gamma=0.1")))
        assert factors == pytest.approx([0.1 ** (step // 5) for step in range(TOTAL)])


def test_adafactor_shows_the_rate_it_makes_for_itself(caplog):
    made = optimizer("Adafactor", "scale_parameter=False")
    scheduler = create_scheduler(ScheduleOptions(lr_scheduler="cosine"), made, TOTAL)
    assert "neither --lr_scheduler cosine nor a learning rate is used" in caplog.text
    for _ in range(3):
        for group in made.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        made.step()
        made.zero_grad(set_to_none=True)
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([1e-2, 1e-2])


def test_a_schedule_free_optimizer_keeps_its_rate():
    pytest.importorskip("schedulefree")
    made = optimizer("AdamWScheduleFree")
    scheduler = create_scheduler(ScheduleOptions(lr_scheduler="cosine"), made, TOTAL)
    for _ in range(TOTAL):
        made.step()
        scheduler.step()
    assert made.param_groups[0]["lr"] == RATE


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_resumes_where_it_was(name, tmp_path):
    options = replace(CASES[name][0], lr_scheduler=name)
    whole = curve(options)
    made = optimizer()
    scheduler = create_scheduler(options, made, TOTAL)
    for _ in range(7):
        made.step()
        scheduler.step()
    torch.save((made.state_dict(), scheduler.state_dict()), tmp_path / "state.pt")
    resumed = optimizer()
    again = create_scheduler(options, resumed, TOTAL)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    rest = []
    for _ in range(7, TOTAL):
        rest.append(resumed.param_groups[0]["lr"] / RATE)
        resumed.step()
        again.step()
    assert rest == whole[7:]
