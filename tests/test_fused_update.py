"""Weights stepped during the backward pass, and weights that learn in bf16."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from accelerate import Accelerator
from runs import CASES, MODES, SHALLOW_CASES, Mode, Workspace
from test_resume import assert_same_end, step_state
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from library.bf16_updates import COMPENSATION, Bf16Rounding, keyed_bits, round_stochastically
from library.errors import UserError
from library.fused_update import FusedBackwardUpdate
from library.number_check import NumberCheck
from library.optimizers import ParamGroup, create_optimizer, load_exactly, steps_jointly
from library.option_groups import FullTrainOptions, OptimizerOptions
from library.option_rules import check_rules
from library.options import from_flags
from library.processes import Processes
from library.rng import key_to_seed, keyed_generator
from library.separate_steps import SeparateSteps
from library.train_util import Trainer

ULP = 2.0**-7
"""Between two neighbours in bf16, in [1, 2)."""


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return runs.Workspaces(SHALLOW_CASES, tmp_path_factory.mktemp)


# ---- rounding ----------------------------------------------------------------------------------------------------------


def test_the_expected_value_is_the_exact_one_and_neighbours_are_all_there_is() -> None:
    exact = torch.tensor([1 + ULP / 4, -1 - ULP / 4, 1.999, 3e-39, -1e30, 1 + ULP * 0.9])
    draws = 20_000
    rounded = round_stochastically(exact.expand(draws, -1).contiguous(), key_to_seed("draws")).float()
    below = (exact.view(torch.int32) & -65536).view(torch.float32)  # toward zero
    above = ((exact.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    share = ((exact - below) / (above - below)).double()
    deviation = (rounded == above).double().mean(0) - share
    assert (deviation.abs() < 5 * (share * (1 - share) / draws).sqrt()).all(), deviation


def test_what_bf16_can_hold_is_not_changed_and_what_is_no_number_stays_none() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(torch.bfloat16).float()
    assert torch.equal(
        round_stochastically(values, key_to_seed("all")).view(torch.int16)[~values.isnan()], bits[~values.isnan()]
    )
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(odd.repeat(100), key_to_seed("nan")).isnan().all()


def hashed(key: int, index: int) -> int:
    """What `keyed_bits` is said to be, in Python's own numbers."""
    first, second = key % 2**30, key // 2**30
    word = first + index // 2
    word ^= word >> 16
    word = (word * 0x45D9F3B + second) % 2**32
    word ^= word >> 16
    word = word * 0x45D9F3B % 2**32
    word ^= word >> 16
    bits = word >> 16 if index % 2 else word % 2**16
    return bits - 2**16 if bits >= 2**15 else bits


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", [0, 1, 2**56 - 1, key_to_seed("any")])
def test_random_bits_are_a_function_of_key_and_place_alone(key: int, device: str) -> None:
    """Computed in whole numbers, so that a GPU gives what a CPU gives."""
    count = 1001
    assert keyed_bits(key, count, torch.device(device)).tolist() == [hashed(key, index) for index in range(count)]


def test_random_bits_are_evenly_spread_and_unlike_those_of_their_neighbours() -> None:
    keys = [key_to_seed("spread", number) for number in range(4)]
    draws = torch.stack([keyed_bits(key, 1 << 16, torch.device("cpu")) for key in keys]).double() / 2**15  # -1 to 1
    assert draws.mean(1).abs().max() < 5 * (1 / 3 / draws.shape[1]) ** 0.5
    assert (draws.square().mean(1) * 3 - 1).abs().max() < 0.02
    pairs = [(draws[:, :-lag], draws[:, lag:]) for lag in (1, 2, 3, 64)] + [(draws[:1], draws[1:])]
    for one, other in pairs:
        assert (3 * (one * other).mean(1)).abs().max() < 5 / draws.shape[1] ** 0.5
    bits = keyed_bits(keys[0], 1 << 16, torch.device("cpu")).int() & 0xFFFF
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(16)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / draws.shape[1] ** 0.5


def test_where_a_weight_is_stepped_and_in_which_portion_changes_no_bit() -> None:
    """Swapped weights are stepped in main memory, or not, as others are swapped with them."""
    ends = []
    for portions in ([[0, 1]], [[1], [0]]):
        parameters = [nn.Parameter(torch.full((300,), 1.0 + number, dtype=torch.bfloat16)) for number in range(2)]
        made = AdamW(parameters, lr=1e-3)
        separate = SeparateSteps(made, Bf16Rounding(3, kahan=False))
        separate.begin(0)
        for portion in portions:
            for number in portion:
                parameters[number].grad = torch.ones_like(parameters[number])
            torch.manual_seed(len(portion))  # of no consequence
            separate.step([parameters[number] for number in portion])
        separate.finish()
        ends.append([*parameters, *(made.state[parameter]["exp_avg_sq"] for parameter in parameters)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], ends[0][1] - 1), "each has its own"


def learn(kind: str, *, steps: int, rate: float, optimizer: Callable[..., Optimizer] = SGD) -> tuple[nn.Parameter, Optimizer]:
    """A thousand bf16 ones, or float32 ones, under a constant gradient of 1."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    parameter = nn.Parameter(torch.ones(1000, dtype=dtype))
    made = optimizer([parameter], lr=rate)
    rounding = Bf16Rounding(3, kahan=kind == "kahan") if kind in ("stochastic", "kahan") else None
    separate = SeparateSteps(made, rounding)
    for step in range(steps):
        parameter.grad = torch.ones_like(parameter)
        separate.begin(step)
        separate.step_all()
    return parameter, made


def test_steps_too_small_for_bf16_add_up() -> None:
    """A thousand steps of a 64th of what bf16 can tell apart just below 1."""
    rate = ULP / 2 / 64
    assert (learn("nearest", steps=1000, rate=rate)[0] == 1).all(), "which is why it is not the default"
    exact = 1 - 1000 * rate
    stochastic = learn("stochastic", steps=1000, rate=rate)[0].float()
    # each weight is a sum of 1000 independent errors of at most one unit
    assert abs(stochastic.mean().item() - exact) < 5 * (ULP / 2) * math.sqrt(1000 / 64) / math.sqrt(1000)
    assert stochastic.unique().numel() > 3
    kahan, made = learn("kahan", steps=1000, rate=rate)
    assert (kahan == torch.tensor(exact).to(torch.bfloat16)).all()
    whole = kahan.float() + made.state[kahan][COMPENSATION].float()
    torch.testing.assert_close(whole, torch.full_like(whole, exact), rtol=1000 * 2.0**-17, atol=0)


@pytest.mark.parametrize("kind", ["stochastic", "kahan"])
def test_one_step_goes_to_a_neighbour_of_the_float32_one(kind: str) -> None:
    expected = learn("float32", steps=1, rate=0.3, optimizer=AdamW)[0]
    rounded = learn(kind, steps=1, rate=0.3, optimizer=AdamW)[0]
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - expected).abs() < ULP / 2).all()
    if kind == "kahan":
        assert torch.equal(rounded, expected.to(torch.bfloat16))


def test_the_state_of_a_bf16_weight_is_as_small_as_the_weight_and_decays() -> None:
    """Rounded to the nearest, a second moment that is to be multiplied by 0.999 stays for ever."""
    parameter, made = learn("stochastic", steps=1, rate=1e-3, optimizer=AdamW)
    state = made.state[parameter]
    assert state["exp_avg_sq"].dtype == state["exp_avg"].dtype == torch.bfloat16
    before = state["exp_avg_sq"].float().mean()
    separate = SeparateSteps(made, Bf16Rounding(3, kahan=False))
    for step in range(1, 301):
        parameter.grad = torch.zeros_like(parameter)
        separate.begin(step)
        separate.step_all()
    assert made.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(before.item() * 0.999**300, rel=0.02)


def test_a_state_is_loaded_in_the_precision_it_was_saved_in() -> None:
    """torch itself rounds it to that of the weight."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    made = SGD([parameter], momentum=0.9)
    made.state[parameter] = {"row": torch.tensor([1.001, 2.002])}
    again = SGD([parameter], momentum=0.9)
    load_exactly(again, made.state_dict())
    assert torch.equal(again.state[parameter]["row"], torch.tensor([1.001, 2.002]))


# ---- in portions -------------------------------------------------------------------------------------------------------


class SharedNorm(SGD):
    """Divides by the norm of all gradients of the group, and remembers it there."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["norm"] = sum(float(p.grad.norm()) for p in group["params"] if p.grad is not None)
        super().step(closure)


class Counting(SGD):
    """Counts its steps outside of states and groups."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls = self.calls + 1
        super().step(closure)


@pytest.mark.parametrize(("cls", "reason"), [(SharedNorm, "looks at all parameters"), (Counting, "counts its steps")])
def test_an_optimizer_that_is_found_to_need_everything_at_once_is_refused(cls: type[SGD], reason: str) -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = cls(parameters, lr=0.1)
    separate = SeparateSteps(optimizer)
    separate.begin(0)
    parameters[0].grad, parameters[1].grad = torch.ones(2), torch.full((2,), 2.0)
    with pytest.raises(UserError, match=reason):
        for parameter in parameters:
            separate.step([parameter])
    assert optimizer.param_groups[0]["params"] == parameters


@pytest.mark.parametrize("name", ["Prodigy", "ProdigyPlusScheduleFree", "DAdaptAdam", "LBFGS"])
def test_optimizers_that_look_at_everything_are_known_by_name(name: str) -> None:
    assert steps_jointly(type(name, (SGD,), {}))
    assert not any(steps_jointly(cls) for cls in (SGD, AdamW))


def test_a_joint_optimizer_steps_bf16_weights_all_at_once() -> None:
    class ProdigyLike(SharedNorm):
        pass

    ProdigyLike.__name__ = "ProdigyLike"
    parameters = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = ProdigyLike(parameters, lr=2**-10)
    separate = SeparateSteps(optimizer, Bf16Rounding(1, kahan=True))
    for step in range(8):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        separate.begin(step)
        separate.step_all()
    assert all((parameter == 1 - 2**-7).all() and parameter.dtype == torch.bfloat16 for parameter in parameters)
    assert optimizer.param_groups[0]["norm"] == pytest.approx(2 * math.sqrt(2))


# ---- in the loop -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": [],
    "AdamW8bit": [],
    "Adafactor": ["--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False"],
    "SGDNesterov": [],
    "AdamWScheduleFree": ["--optimizer_args", "warmup_steps=3"],
    "Lion8bit": [],
}
BF16 = ["--mixed_precision=bf16", "--full_bf16", "--no_half_vae"]
UNCLIPPED = "--max_grad_norm=0"


def updates(trainer: Trainer, accumulation: int = 1, count: int = 2) -> None:
    """A few updates, without files."""
    trainer.trainable.train()
    batches = iter(runs.first_batches(trainer, accumulation * count))
    for _ in range(count):
        group = [next(batches) for _ in range(accumulation)]
        trainer.update(group)
        trainer.state.advance(len(group), trainer.length)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.trainable.state_dict().items()}


def assert_fused_is_ordinary(
    workspace: Workspace, mode: Mode, folder: Path, flags: Sequence[str], accumulation: int = 1
) -> None:
    clipping = [] if any(flag.startswith("--max_grad_norm") for flag in flags) else [UNCLIPPED]
    common = ["--lr_scheduler=cosine", f"--gradient_accumulation_steps={accumulation}", *clipping, *flags]
    ordinary = workspace.trainer(mode, folder / "ordinary", *common)
    start = weights(ordinary)
    updates(ordinary, accumulation)
    fused = workspace.trainer(mode, folder / "fused", *common, "--fused_backward_pass")
    updates(fused, accumulation)
    expected = weights(ordinary)
    runs.assert_same_tensors(weights(fused), expected)
    assert any(not torch.equal(start[name], expected[name]) for name in start)
    assert all(parameter.grad is None for parameter in fused.parameters)
    ours, theirs = fused.optimizer.state_dict(), ordinary.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert flat_tensors(ours["state"]).keys() == flat_tensors(theirs["state"]).keys()
    runs.assert_same_tensors(flat_tensors(ours["state"]), flat_tensors(theirs["state"]))


def flat_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {prefix: state}
    entries = state.items() if isinstance(state, dict) else ()
    return {name: tensor for key, value in entries for name, tensor in flat_tensors(value, f"{prefix}.{key}").items()}


def need(optimizer: str) -> None:
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    if "ScheduleFree" in optimizer:
        pytest.importorskip("schedulefree")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_fused_is_the_ordinary_step(family: str, optimizer: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    need(optimizer)
    flags = [f"--optimizer_type={optimizer}", *OPTIMIZERS[optimizer]]
    assert_fused_is_ordinary(workspaces[family], "full", tmp_path, flags)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Adafactor", "AdamWScheduleFree"])
@pytest.mark.parametrize("kind", ["stochastic", "kahan", "nearest"])
def test_so_it_is_in_bf16(kind: str, optimizer: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    need(optimizer)
    flags = [f"--optimizer_type={optimizer}", *OPTIMIZERS[optimizer], *BF16, f"--bf16_update={kind}"]
    assert_fused_is_ordinary(workspaces["flux"], "full", tmp_path, flags)


@pytest.mark.parametrize(("family", "mode"), [(family, mode) for family in CASES for mode in MODES])
def test_fused_with_accumulation_and_checkpointing(
    family: str, mode: Mode, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    assert_fused_is_ordinary(workspaces[family], mode, tmp_path, ["--gradient_checkpointing"], accumulation=2)


def test_a_weight_that_the_last_batch_does_not_reach_is_stepped_too(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    flags = ["--network_args", "module_dropout=0.5"]
    assert_fused_is_ordinary(workspaces["sd"], "network", tmp_path, flags, accumulation=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["stochastic", "kahan", "float32"])
def test_hooks_step_wherever_the_backward_pass_runs(kind: str, device: str) -> None:
    """On a GPU in a thread of autograd's, with its own generators and one-kernel steps."""
    ends = []
    for fused in (False, True):
        layers = [nn.Linear(64, 64, device=device) for _ in range(4)]
        for number, layer in enumerate(layers):
            generator = keyed_generator("layer", number, device=device)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.1, generator=generator)
        model = nn.Sequential(*layers).to(torch.float32 if kind == "float32" else torch.bfloat16)
        parameters = list(model.parameters())
        options = OptimizerOptions(learning_rate=1e-3)
        optimizer = create_optimizer(options, [ParamGroup("unet", parameters, 1e-3)])
        steps = SeparateSteps(optimizer, None if kind == "float32" else Bf16Rounding(5, kahan=kind == "kahan"))
        processes = Processes(Accelerator(cpu=device == "cpu"))
        rule = FusedBackwardUpdate(steps, parameters, 0, processes, NumberCheck(processes)) if fused else None
        for step in range(4):
            x = torch.randn(8, 64, generator=keyed_generator("x", step, device=device), device=device).to(parameters[0].dtype)
            (rule.before_last_batch(step, 8) if rule else steps.begin(step))
            model(x).float().square().mean().backward()
            if rule is None:
                steps.step_all()
                optimizer.zero_grad()
            else:
                assert all(parameter.grad is None for parameter in parameters)
                rule.after_backward(parameters)
                rule.step(parameters, torch.tensor(0.0))
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    runs.assert_same_tensors(*ends)


@pytest.mark.parametrize(
    ("family", "flag"), [("flux", "--blockwise_fused_optimizers"), ("sdxl", "--fused_optimizer_groups=10")]
)
def test_the_other_flags_of_fused_steps_are_names_of_the_same(
    family: str, flag: str, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    trainer = workspaces[family].trainer("full", tmp_path / "a", flag, UNCLIPPED)
    assert peak_of_gradients(trainer)[1] < 0.5
    ordinary = workspaces[family].trainer("full", tmp_path / "b", UNCLIPPED)
    updates(ordinary, count=1)
    runs.assert_same_tensors(weights(trainer), weights(ordinary))


def peak_of_gradients(trainer: Trainer) -> tuple[int, float]:
    """Most bytes of gradients held at a time in an update, and their share of all."""
    peak = 0

    def look(gradient: Tensor) -> None:
        nonlocal peak
        held = sum(p.grad.nbytes for p in trainer.parameters if p.grad is not None)
        peak = max(peak, held + gradient.nbytes)

    handles = [parameter.register_hook(look) for parameter in trainer.parameters]
    updates(trainer, count=1)
    for handle in handles:
        handle.remove()
    return peak, peak / sum(parameter.nbytes for parameter in trainer.parameters)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_gradients_are_not_held_together(family: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    ordinary = peak_of_gradients(workspaces[family].trainer("full", tmp_path / "ordinary"))
    assert ordinary[1] == 1
    trainer = workspaces[family].trainer("full", tmp_path / "fused", "--fused_backward_pass")
    peak, _ = peak_of_gradients(trainer)
    assert peak <= 2 * max(parameter.nbytes for parameter in trainer.parameters)
    assert peak < ordinary[0] / 4


def test_each_gradient_is_clipped_alone(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    """With SGD, what a weight moved by in a first step is its clipped gradient."""
    flags = ["--optimizer_type=SGD", "--learning_rate=1", "--max_grad_norm=1e-3", "--fused_backward_pass"]
    trainer = workspaces["sd"].trainer("full", tmp_path, *flags)
    before = weights(trainer)
    updates(trainer, count=1)
    moved = [float((after - before[name]).double().norm()) for name, after in weights(trainer).items()]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)
    assert sum(norm > 0.9e-3 for norm in moved) > 10, "all together they would be that long"


CLIPPED = ["--max_grad_norm=1e-3", "--fused_clip=all"]
"""Far below the norm of these models' gradients."""


@pytest.mark.parametrize(
    ("family", "mode", "accumulation", "flags"),
    [
        ("sd", "full", 1, ["--optimizer_type=SGDNesterov"]),
        ("flux", "full", 1, ["--gradient_checkpointing", "--optimizer_type=Adafactor", *OPTIMIZERS["Adafactor"]]),
        ("sd", "network", 1, ["--network_dropout=0.3", "--network_args", "rank_dropout=0.3"]),
        ("flux", "full", 2, []),
    ],
)
def test_the_norm_of_all_gradients_can_be_clipped(
    family: str, mode: Mode, accumulation: int, flags: list[str], workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """To the bit as in the ordinary step; dropout drops the same both times. With accumulation they are held in any case."""
    assert_fused_is_ordinary(workspaces[family], mode, tmp_path, [*CLIPPED, *flags], accumulation)


def test_to_clip_the_norm_of_all_gradients_none_are_held_and_nothing_is_counted_twice(
    workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    trainer = workspaces["sd"].trainer("full", tmp_path, "--fused_backward_pass", *CLIPPED)
    assert peak_of_gradients(trainer)[1] < 0.5
    assert trainer.update_rule.logs()["norm/gradient"] > 1e-3
    assert trainer.image_losses is not None
    seen = sum(count for count, *_ in trainer.image_losses.state()["images"].values())
    assert seen == len(trainer.data.train[(0, 0)])


CROSSED = {
    "AdamW": [],
    "Adafactor": [*BF16, *OPTIMIZERS["Adafactor"]],
    "AdamW8bit": [*BF16, "--bf16_update=kahan"],
    "AdamWScheduleFree": [*BF16],
}


@pytest.mark.parametrize("optimizer", CROSSED)
@pytest.mark.parametrize("fused_first", [True, False])
def test_a_state_saved_fused_resumes_unfused_and_back(
    optimizer: str, fused_first: bool, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    need(optimizer)
    flags = [f"--optimizer_type={optimizer}", *CROSSED[optimizer], UNCLIPPED, "--max_train_steps=3", "--save_state"]
    first, then = ([], ["--fused_backward_pass"])[:: -1 if fused_first else 1]
    whole = workspaces["flux"].train("full", tmp_path / "whole", *flags, *first, "--save_every_n_steps=2")
    resumed = workspaces["flux"].train("full", tmp_path / "resumed", *flags, *then, f"--resume={step_state(whole, 2)}")
    assert_same_end(resumed, whole)


def test_a_remainder_is_forgotten_by_a_run_that_does_not_keep_it(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    """It would be added to weights it does not belong to, were it taken up again later."""
    flags = [*BF16, "--save_state_on_train_end"]
    kept = workspaces["flux"].train("full", tmp_path / "kept", *flags, "--bf16_update=kahan", "--max_train_steps=1")
    state = kept / "tiny-state"
    assert any(COMPENSATION in entry for entry in optimizer_entries(state))
    dropped = workspaces["flux"].train(
        "full", tmp_path / "dropped", *flags, "--bf16_update=nearest", "--max_train_steps=2", f"--resume={state}"
    )
    assert not any(COMPENSATION in entry for entry in optimizer_entries(dropped / "tiny-state"))


def optimizer_entries(folder: Path) -> list[dict[str, Any]]:
    entries = list(torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"].values())
    assert entries
    return entries


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fused_backward_pass": True}, "clipped to --max_grad_norm 1.0 alone"),
        ({"fused_backward_pass": True, "gradient_accumulation_steps": 4}, "held until the last batch"),
        ({"fused_clip": "all"}, "--fused_clip all has no effect"),
        ({"bf16_update": "kahan"}, "no effect without --full_bf16"),
    ],
)
def test_what_is_done_differently_is_told(flags: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    base = {"pretrained_model_name_or_path": "m", "output_dir": "o", "train_data_dir": ".", "resolution": "64"}
    with caplog.at_level(logging.WARNING):
        check_rules(from_flags(FullTrainOptions, **base, **flags))
    assert message in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_rules(from_flags(FullTrainOptions, **base))
    assert message not in caplog.text
