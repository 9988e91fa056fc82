"""Objectives, losses and noise against formulas written out here, and against diffusers' own schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from library.losses import element_loss, image_means
from library.noise import make_noise, perturb
from library.objectives import DiscreteDDPM, zero_terminal_snr_betas
from library.option_groups import NoiseOptions
from library.rng import StepRng, keyed_generator

SHAPE = (6, 4, 8, 8)
CPU = torch.device("cpu")


def latents(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def diffusers_schedule(**changes: object):
    from diffusers import DDPMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(num_train_timesteps=1000, clip_sample=False, **betas, **changes)


TIMES = torch.tensor([0, 1, 250, 500, 998, 999])


# ---- the whole loss against diffusers ----------------------------------------------------------------------------------


def by_hand(x0: Tensor, noise: Tensor, model: Callable[[Tensor], Tensor], *, v: bool, gamma: float | None) -> Tensor:
    """Mean squared error with min-SNR weights, from diffusers' scheduler alone."""
    schedule = diffusers_schedule()
    x_t = schedule.add_noise(x0, noise, TIMES)
    target = schedule.get_velocity(x0, noise, TIMES) if v else noise
    loss = F.mse_loss(model(x_t), target, reduction="none").mean(dim=(1, 2, 3))
    if gamma is not None:
        alphas = schedule.alphas_cumprod[TIMES]
        snr = alphas / (1 - alphas)
        loss = loss * snr.clamp(max=gamma) / (snr + 1 if v else snr)
    return loss.mean()


@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize("v", [False, True])
def test_the_loss_is_the_one_computed_from_diffusers_schedule(v, gamma):
    x0, noise = latents(0), latents(1)
    objective = DiscreteDDPM(v_prediction=v, min_snr_gamma=gamma)
    noised = objective.corrupt(x0, noise, TIMES)
    error = element_loss(torch.tanh(noised.x_t), noised.target, "l2")
    ours = (image_means(error, None) * objective.weight(TIMES)).mean()
    torch.testing.assert_close(ours, by_hand(x0, noise, torch.tanh, v=v, gamma=gamma), rtol=2e-6, atol=1e-6)


def test_the_table_is_diffusers_table():
    torch.testing.assert_close(DiscreteDDPM().alphas_cumprod, diffusers_schedule().alphas_cumprod, rtol=1e-5, atol=1e-7)


def test_the_zero_terminal_snr_table_is_diffusers_table():
    ours = DiscreteDDPM(zero_terminal_snr=True).alphas_cumprod
    theirs = diffusers_schedule(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)
    assert ours[-1] == 0 and ours[0] == pytest.approx(DiscreteDDPM().alphas_cumprod[0].item(), rel=1e-6)


def test_everything_is_float32_for_float32_latents():
    objective = DiscreteDDPM(v_prediction=True, min_snr_gamma=5.0, debiased=True)
    noised = objective.corrupt(latents(), latents(1), TIMES)
    for tensor in (noised.x_t, noised.target, objective.weight(TIMES), objective.huber_threshold(TIMES), objective.snr(TIMES)):
        assert tensor.dtype == torch.float32


# ---- schedule ------------------------------------------------------------------------------------------------------------


def test_corruption_keeps_unit_variance_and_its_target_gives_back_the_latent():
    x0, noise = latents(0), latents(1)
    objective = DiscreteDDPM(v_prediction=True)
    noised = objective.corrupt(x0, noise, TIMES)
    alphas = objective.alphas_cumprod[TIMES].view(-1, 1, 1, 1)
    torch.testing.assert_close(alphas.sqrt() * noised.x_t - (1 - alphas).sqrt() * noised.target, x0, rtol=0, atol=1e-5)


def test_perturbed_noise_goes_into_the_input_only():
    x0, noise, other = latents(0), latents(1), latents(2)
    for v in (False, True):
        objective = DiscreteDDPM(v_prediction=v)
        plain, mixed = objective.corrupt(x0, noise, TIMES), objective.corrupt(x0, noise, TIMES, other)
        assert torch.equal(plain.target, mixed.target)
        assert torch.equal(mixed.x_t, objective.corrupt(x0, other, TIMES).x_t)


def test_zero_terminal_snr_comes_before_the_weights():
    objective = DiscreteDDPM(v_prediction=True, zero_terminal_snr=True, min_snr_gamma=5.0)
    assert objective.snr(TIMES)[-1] == 0
    assert objective.weight(TIMES)[-1] == 0  # min(0, 5) / (0 + 1); a table made before the fix would give 0.0047
    assert torch.isfinite(DiscreteDDPM(zero_terminal_snr=True, min_snr_gamma=5.0).weight(TIMES)).all()


def test_rescaled_betas_leave_the_first_and_end_in_pure_noise():
    betas = DiscreteDDPM().betas
    fixed = zero_terminal_snr_betas(betas)
    torch.testing.assert_close(fixed[0], betas[0])
    assert fixed[-1] == 1
    torch.testing.assert_close(zero_terminal_snr_betas(fixed), fixed)


# ---- times -------------------------------------------------------------------------------------------------------------


def test_times_cover_the_range_evenly_and_never_leave_it():
    objective = DiscreteDDPM(min_timestep=100, max_timestep=300)
    t = objective.sample_times(torch.zeros(20_000, 1), keyed_generator("times"))
    assert t.dtype == torch.int64
    assert (t.min(), t.max()) == (100, 299)
    assert t.float().mean().item() == pytest.approx(199.5, abs=2)
    counts = torch.bincount(t - 100, minlength=200)
    assert counts.min() > 50 and counts.max() < 160


def test_times_of_a_normal_density_have_its_quantiles_and_its_range():
    objective = DiscreteDDPM(min_timestep=100, max_timestep=900, density="logit_normal", logit_mean=0.5, logit_std=0.8)
    drawn = objective.sample_times(torch.zeros(20_000, 1, 1, 1), keyed_generator("x"))
    assert drawn.dtype == torch.long and drawn.min() >= 100 and drawn.max() < 900
    normal = NormalDist(0.5, 0.8)
    for quantile in (0.1, 0.5, 0.9):
        expected = 100 + 800 / (1 + math.exp(-normal.inv_cdf(quantile)))
        assert float(drawn.float().quantile(quantile)) == pytest.approx(expected, abs=8)
        fixed = objective.sample_times(latents(), keyed_generator("x"), quantile)
        assert (fixed - expected).abs().max() <= 1
    for end in (0.0, 1.0):
        assert 100 <= int(objective.sample_times(latents(), keyed_generator("x"), end)[0]) < 900


def test_a_time_depends_on_the_key_alone():
    objective = DiscreteDDPM()
    rng = StepRng(seed=3)
    draw = [objective.sample_times(latents(), rng.at(step)("time")) for step in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize(("quantile", "expected"), [(0.0, 100), (0.5, 200), (0.999, 299), (1.0, 299)])
def test_a_quantile_is_a_fixed_time(quantile, expected):
    objective = DiscreteDDPM(min_timestep=100, max_timestep=300)
    assert objective.sample_times(latents(), keyed_generator("x"), quantile).tolist() == [expected] * 6


# ---- weights and thresholds ----------------------------------------------------------------------------------------------


def snr_at(t: int) -> float:
    alpha = DiscreteDDPM().alphas_cumprod[t].double().item()
    return alpha / (1 - alpha)


@pytest.mark.parametrize("t", [0, 250, 999])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda snr: 1.0),
        ({"min_snr_gamma": 5.0}, lambda snr: min(snr, 5) / snr),
        ({"min_snr_gamma": 5.0, "v_prediction": True}, lambda snr: min(snr, 5) / (snr + 1)),
        ({"scale_v_like_noise": True, "v_prediction": True}, lambda snr: min(snr, 1000) / (min(snr, 1000) + 1)),
        ({"v_like_loss": 0.5}, lambda snr: 1 + 0.5 / (min(snr, 1000) / (min(snr, 1000) + 1))),
        ({"debiased": True}, lambda snr: 1 / math.sqrt(min(snr, 1000))),
        ({"debiased": True, "v_prediction": True}, lambda snr: 1 / (min(snr, 1000) + 1)),
        ({"min_snr_gamma": 1.0, "debiased": True}, lambda snr: min(snr, 1) / snr / math.sqrt(min(snr, 1000))),
    ],
)
def test_a_weight_is_its_formula(options, expected, t):
    weight = DiscreteDDPM(**options).weight(torch.tensor([t]))
    assert weight.item() == pytest.approx(expected(snr_at(t)), rel=1e-5)


@pytest.mark.parametrize("t", [1, 250, 999])
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda t: 0.2 * 3),
        ("exponential", lambda t: math.exp(math.log(0.2) * t / 1000) * 3),
        ("snr", lambda t: 0.8 / (1 + snr_at(t) ** -0.5) ** 2 + 0.2),
    ],
)
def test_a_huber_threshold_is_its_formula(schedule, expected, t):
    objective = DiscreteDDPM(huber_schedule=schedule, huber_c=0.2, huber_scale=3.0)
    assert objective.huber_threshold(torch.tensor([t])).item() == pytest.approx(expected(t), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l2", lambda d, c: d * d),
        ("l1", lambda d, c: abs(d)),
        ("huber", lambda d, c: 2 * c * (math.sqrt(d * d + c * c) - c)),
        ("smooth_l1", lambda d, c: 2 * (math.sqrt(d * d + c * c) - c)),
    ],
)
def test_an_element_loss_is_its_formula_with_each_rows_threshold(kind, expected):
    pred, target = torch.tensor([[[[0.5]]], [[[2.0]]]]), torch.tensor([[[[0.1]]], [[[-1.0]]]])
    threshold = torch.tensor([0.3, 0.7])
    loss = element_loss(pred, target, kind, threshold)
    assert loss.flatten().tolist() == pytest.approx([expected(0.4, 0.3), expected(3.0, 0.7)], rel=1e-5)


def test_a_weight_counts_for_its_own_row_only():
    error = torch.stack([torch.full((4, 2, 2), value) for value in (1.0, 2.0, 3.0)])
    assert (image_means(error, None) * torch.tensor([1.0, 10.0, 0.0])).mean().item() == pytest.approx((1 + 20 + 0) / 3)


def test_a_mask_is_shrunk_by_area_and_not_normalised():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1  # columns 0-2 of 8: latent columns 1, 0.5, 0, 0
    error = torch.ones(1, 4, 4, 4)
    assert (image_means(error, mask) * torch.ones(1)).mean().item() == pytest.approx((1 + 0.5) / 4)


# ---- noise ---------------------------------------------------------------------------------------------------------------


def normal(stream: str, shape: tuple[int, ...], rng: StepRng) -> Tensor:
    return torch.randn(shape, generator=rng(stream))


def test_plain_noise_is_a_keyed_draw():
    rng = StepRng(seed=1, step=4)
    noise = make_noise(latents().half(), NoiseOptions(), rng)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, normal("noise", SHAPE, rng))
    assert perturb(noise, NoiseOptions(), rng) is noise


def test_an_offset_is_one_number_for_each_image_and_channel():
    rng = StepRng(seed=1)
    added = make_noise(latents(), NoiseOptions(noise_offset=0.1), rng) - normal("noise", SHAPE, rng)
    expected = 0.1 * normal("noise_offset", (6, 4, 1, 1), rng)
    torch.testing.assert_close(added, expected.expand(SHAPE), rtol=0, atol=1e-6)


def test_a_random_offset_is_scaled_by_one_uniform_draw():
    rng = StepRng(seed=1)
    options = NoiseOptions(noise_offset=0.1, noise_offset_random_strength=True)
    added = make_noise(latents(), options, rng) - normal("noise", SHAPE, rng)
    strength = torch.rand((), generator=rng("noise_offset_strength"))
    torch.testing.assert_close(added[:, :, 0, 0], 0.1 * strength * normal("noise_offset", (6, 4), rng), rtol=0, atol=1e-6)
    strengths = [(make_noise(latents(), options, rng.at(s)) - normal("noise", SHAPE, rng.at(s))).std().item() for s in range(8)]
    assert max(strengths) <= 0.1 * 1.5 and max(strengths) > 2 * min(strengths)


def test_an_adaptive_offset_grows_with_the_latents_mean_and_is_never_negative():
    rng = StepRng(seed=1)
    x0 = latents() + 2.0
    means = x0.mean(dim=(2, 3), keepdim=True).abs()
    draw = normal("noise_offset", (6, 4, 1, 1), rng)
    for scale in (0.05, -1.0):
        added = make_noise(x0, NoiseOptions(noise_offset=0.1, adaptive_noise_scale=scale), rng) - normal("noise", SHAPE, rng)
        expected = (0.1 + scale * means).clamp(min=0) * draw
        torch.testing.assert_close(added, expected.expand(SHAPE), rtol=0, atol=1e-6)


def test_multires_noise_has_unit_deviation_and_more_low_frequencies():
    shape = (4, 4, 32, 32)
    options = NoiseOptions(multires_noise_iterations=6, multires_noise_discount=0.8)
    plain = make_noise(torch.zeros(shape), NoiseOptions(), StepRng(seed=1))
    noise = make_noise(torch.zeros(shape), options, StepRng(seed=1))
    assert noise.std().item() == pytest.approx(1.0, abs=1e-5)
    assert F.avg_pool2d(noise, 8).std() > 2 * F.avg_pool2d(plain, 8).std()
    assert torch.equal(noise, make_noise(torch.zeros(shape), options, StepRng(seed=1)))
    assert not torch.equal(noise, make_noise(torch.zeros(shape), options, StepRng(seed=1, step=1)))


def test_one_level_of_multires_noise_is_two_draws_at_full_size():
    rng = StepRng(seed=2)
    noise = make_noise(latents(), NoiseOptions(multires_noise_iterations=1), rng)
    expected = normal("noise", SHAPE, rng) + normal("multires", SHAPE, rng)
    torch.testing.assert_close(noise, expected / expected.std(), rtol=0, atol=1e-6)


def test_input_perturbation_adds_keyed_noise_of_the_given_strength():
    rng = StepRng(seed=5)
    noise = make_noise(latents(), NoiseOptions(), rng)
    extra = normal("ip_noise", SHAPE, rng)
    torch.testing.assert_close(perturb(noise, NoiseOptions(ip_noise_gamma=0.2), rng), noise + 0.2 * extra)
    options = NoiseOptions(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=True)
    strength = torch.rand((), generator=rng("ip_noise_strength"))
    torch.testing.assert_close(perturb(noise, options, rng), noise + 0.2 * strength * extra)


def test_an_option_that_is_off_moves_nobody_elses_noise():
    rng = StepRng(seed=1)
    first = make_noise(latents(), NoiseOptions(noise_offset=0.0, multires_noise_iterations=0, ip_noise_gamma=0.1), rng)
    assert torch.equal(first, make_noise(latents(), NoiseOptions(), rng))


def test_no_global_generator_is_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    options = NoiseOptions(noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=3, ip_noise_gamma=0.1)
    perturb(make_noise(latents(), options, StepRng(seed=1)), options, StepRng(seed=1))
    DiscreteDDPM().sample_times(latents(), keyed_generator("t"))
    assert torch.equal(before, torch.get_rng_state())


def test_p2_is_its_formula():
    objective = DiscreteDDPM(p2_gamma=0.7, p2_k=2.0)
    weight = objective.weight(TIMES)
    torch.testing.assert_close(weight, (2.0 + objective.snr(TIMES)) ** -0.7)
