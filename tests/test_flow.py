"""Rectified flow: time densities against sd-scripts' formulas, paths, weights and the loss by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from library.losses import element_loss, image_means
from library.objectives import TIME_SAMPLINGS, RectifiedFlow, resolution_shift, shift_time
from library.rng import keyed_generator

N = 20_000
SIZE = (16, 24)  # latent pixels: 96 tokens


def draw(flow: RectifiedFlow, count: int = N) -> Tensor:
    return flow.sample_times(torch.zeros(count, 1, *SIZE), keyed_generator("times"))


def normal(count: int = N) -> Tensor:
    return torch.randn(count, generator=keyed_generator("reference"), dtype=torch.float64)


def uniform(count: int = N) -> Tensor:
    return torch.rand(count, generator=keyed_generator("reference"), dtype=torch.float64)


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest distance between the two distribution functions."""
    points = torch.cat([a, b]).sort().values
    counts = [torch.searchsorted(sample.sort().values, points, right=True) / len(sample) for sample in (a, b)]
    return float((counts[0] - counts[1]).abs().max())


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def scheduler_level(u: Tensor, shift: float) -> Tensor:
    """sd-scripts: the index floor(1000 u) into diffusers' descending, shifted levels."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    levels = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).timesteps.double() / 1000
    return levels[(u * 1000).long().clamp(max=999)]


def mode(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def flux_time_shift(t: Tensor, tokens: int) -> Tensor:
    """Black Forest Labs' formula: e^mu / (e^mu + (1/t - 1))."""
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = slope * tokens + 0.5 - slope * 256
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


DENSITIES = {
    "uniform": (RectifiedFlow(sampling="uniform"), lambda: uniform()),
    "sigmoid": (RectifiedFlow(sampling="sigmoid", sigmoid_scale=1.3), lambda: logistic(1.3 * normal())),
    "shift": (
        RectifiedFlow(sampling="shift", flow_shift=3.1, sigmoid_scale=0.8),
        lambda: (s := logistic(0.8 * normal())) * 3.1 / (1 + 2.1 * s),
    ),
    "flux_shift": (RectifiedFlow(sampling="flux_shift"), lambda: flux_time_shift(logistic(normal()), 96)),
    "nextdit_shift": (RectifiedFlow(sampling="nextdit_shift"), lambda: flux_time_shift(uniform(), 96)),
    "density": (
        RectifiedFlow(sampling="density", flow_shift=3.0),
        lambda: (u := uniform()) * 3 / (1 + 2 * u),
    ),
    "density logit_normal": (
        RectifiedFlow(sampling="density", density="logit_normal", logit_mean=0.5, logit_std=0.7, flow_shift=1.5),
        lambda: (u := logistic(0.5 + 0.7 * normal())) * 1.5 / (1 + 0.5 * u),
    ),
    "density mode": (
        RectifiedFlow(sampling="density", density="mode", flow_shift=1.0),
        lambda: mode(uniform(), 1.29).clamp(0, 1),
    ),
    "sigma": (RectifiedFlow(flow_shift=3.0), lambda: scheduler_level(uniform(), 3.0)),
    "sigma logit_normal": (
        RectifiedFlow(density="logit_normal", logit_mean=0.5, logit_std=0.7, flow_shift=1.5),
        lambda: scheduler_level(logistic(0.5 + 0.7 * normal()), 1.5),
    ),
    "sigma mode": (
        RectifiedFlow(density="mode", mode_scale=1.29, flow_shift=1.0),
        lambda: scheduler_level(mode(uniform(), 1.29).clamp(0, 1), 1.0),
    ),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_times_are_distributed_as_the_formulas_say(name: str) -> None:
    flow, reference = DENSITIES[name]
    times = draw(flow)
    assert times.dtype == torch.float32
    assert kolmogorov_smirnov(times.double(), reference()) < 1.63 * math.sqrt(2 / N)  # passes 99 of 100 equal pairs


def test_the_distribution_test_tells_other_shifts_apart() -> None:
    one, other = (draw(RectifiedFlow(sampling="shift", flow_shift=shift)).double() for shift in (3.0, 3.3))
    assert kolmogorov_smirnov(one, other) > 1.63 * math.sqrt(2 / N)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_quantile_is_the_quantile_of_what_is_drawn(name: str) -> None:
    flow = DENSITIES[name][0]
    times = draw(flow)
    for quantile in (0.05, 0.5, 0.9):
        fixed = flow.sample_times(torch.zeros(3, 1, *SIZE), keyed_generator("x"), quantile)
        assert fixed.unique().numel() == 1
        assert float((times <= fixed[0]).float().mean()) == pytest.approx(quantile, abs=0.02)


def test_every_sampling_has_a_density_test() -> None:
    assert {name.split()[0] for name in DENSITIES} == set(TIME_SAMPLINGS)


@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_times_stay_within_the_limits_that_are_set(sampling: str) -> None:
    times = draw(RectifiedFlow(sampling=sampling, min_timestep=200, max_timestep=600))
    assert 0.2 <= times.min() < 0.3
    assert 0.5 < times.max() <= 0.6


def test_shifting_keeps_the_ends_and_is_undone_by_the_inverse_shift() -> None:
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t)
    assert shift_time(t, 3.0)[[0, -1]].tolist() == [0.0, 1.0]
    assert (shift_time(t, 3.0)[1:-1] > t[1:-1]).all()
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))


def test_the_loss_is_the_one_computed_by_hand() -> None:
    x0, noise = torch.tensor([[[[2.0]]], [[[-1.0]]]]), torch.tensor([[[[0.5]]], [[[3.0]]]])
    t = torch.tensor([0.25, 0.5])
    flow = RectifiedFlow()
    made = flow.corrupt(x0, noise, t)
    assert made.x_t.flatten().tolist() == [0.75 * 2.0 + 0.25 * 0.5, 0.5 * -1.0 + 0.5 * 3.0]
    assert made.target.flatten().tolist() == [-1.5, 4.0]
    pred = torch.tensor([[[[-1.0]]], [[[2.0]]]])
    loss = (image_means(element_loss(pred, made.target, "l2"), None) * flow.weight(t)).mean()
    assert float(loss) == pytest.approx((0.5**2 + 2.0**2) / 2)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_the_error_of_the_implied_data_is_measured_exactly(loss_type: str, schedule: str) -> None:
    """sigma_scaled: x_t - t v against x0, written as weight and threshold of the velocity's error."""
    flow = RectifiedFlow(data_error=True, loss_type=loss_type, huber_schedule=schedule, huber_c=0.2)
    x0, noise, v = (torch.randn(4, 2, 3, 3, generator=keyed_generator("flow", name)) for name in ("x0", "noise", "v"))
    t = torch.tensor([0.05, 0.3, 0.7, 1.0])
    made = flow.corrupt(x0, noise, t)
    ours = element_loss(v, made.target, loss_type, flow.huber_threshold(t)).flatten(1).mean(1) * flow.weight(t)
    plain = RectifiedFlow(huber_schedule=schedule, huber_c=0.2)
    implied = made.x_t - t.view(-1, 1, 1, 1) * v
    expected = element_loss(implied, x0, loss_type, plain.huber_threshold(t)).flatten(1).mean(1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_weights_are_those_of_sd3_and_finite_at_both_ends() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    t = torch.tensor([0.1, 0.5, 0.9])
    for scheme in ("sigma_sqrt", "cosmap", "none"):
        torch.testing.assert_close(RectifiedFlow(weighting=scheme).weight(t), compute_loss_weighting_for_sd3(scheme, t))
        assert RectifiedFlow(weighting=scheme).weight(torch.tensor([0.0, 1.0])).isfinite().all()


def test_huber_thresholds_of_a_flow_follow_its_noise_to_signal_ratio() -> None:
    t = torch.tensor([0.0, 0.5, 0.9])
    ratio = t / (1 - t)
    expected = (1 - 0.1) / (1 + ratio) ** 2 + 0.1
    torch.testing.assert_close(RectifiedFlow(huber_schedule="snr").huber_threshold(t), expected)
    torch.testing.assert_close(RectifiedFlow(huber_schedule="exponential").huber_threshold(t), 0.1**t)
    assert RectifiedFlow(huber_schedule="constant", huber_scale=2.0).huber_threshold(t).tolist() == pytest.approx([0.2] * 3)
