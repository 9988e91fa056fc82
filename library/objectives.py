"""What is learned: how a clean latent is corrupted, what is predicted, and how much a time counts. Pure functions of tensors.

Shapes: B batch, C latent channels, h x w latent pixels. Everything is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from library.option_groups import LossOptions, NoiseOptions


@dataclass(frozen=True)
class Noised:
    """One corrupted batch."""

    x_t: Tensor  # [B, C, h, w]
    target: Tensor  # [B, C, h, w], what `ModelFamily.predict` should give
    noise: Tensor  # [B, C, h, w]


class Objective(Protocol):
    """A corruption path. Times: an index in [0, T) for DDPM, t in [0, 1] with 1 = noise for flows."""

    @property
    def latest_time(self) -> float:
        """What times go up to: T, or 1."""
        ...

    def sample_times(self, x0: Tensor, rng: torch.Generator, quantile: float | None = None) -> Tensor:
        """[B]. `quantile` in [0, 1]: that fixed quantile of the time density instead of a draw, for validation."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, perturbed: Tensor | None = None) -> Noised:
        """`perturbed`: the noise to mix in where it differs from the one to predict (input perturbation)."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """[B], the loss weight of each time."""
        ...

    def huber_threshold(self, t: Tensor) -> Tensor:
        """[B], the threshold c of the Huber losses under the configured schedule."""
        ...


def range_and_huber(noise: NoiseOptions, loss: LossOptions) -> dict[str, Any]:
    """The settings that every objective has, as its arguments: the range of times, and the Huber losses' threshold."""
    return {
        "min_timestep": noise.min_timestep or 0,
        "max_timestep": 1000 if noise.max_timestep is None else noise.max_timestep,
        "huber_schedule": loss.huber_schedule,
        "huber_c": loss.huber_c,
        "huber_scale": loss.huber_scale,
    }


_LEAST_QUANTILE = 1e-7  # keeps the normal distribution's quantiles finite in float32


def logit_normal(q: Tensor, mean: float, std: float) -> Tensor:
    """The quantiles q, in (0, 1), of sigmoid(N(mean, std))."""
    return torch.sigmoid(mean + std * torch.special.ndtri(q))


def zero_terminal_snr_betas(betas: Tensor) -> Tensor:
    """Rescale betas so that the last step is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1). [T] -> [T]."""
    root = (1.0 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1.0 - alphas


@dataclass(frozen=True)
class DiscreteDDPM:
    """DDPM with scaled-linear betas (Rombach et al. 2022): x_t = a_t x0 + s_t noise.

    What is predicted is the noise, or v = a_t noise - s_t x0 (Salimans & Ho 2022).
    The SNR table is made after the zero-terminal-SNR fix, so every weight below sees the schedule that is trained.
    """

    v_prediction: bool = False
    zero_terminal_snr: bool = False
    num_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    min_timestep: int = 0
    max_timestep: int = 1000  # exclusive
    density: str = "uniform"
    """Of times between those: `uniform`, or `logit_normal` as for flows (Esser et al. 2024): sigmoid(N(mean, std))."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    debiased: bool = False
    scale_v_like_noise: bool = False
    v_like_loss: float | None = None
    p2_gamma: float | None = None
    p2_k: float = 1.0
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0

    @property
    def latest_time(self) -> float:
        return float(self.num_steps)

    @cached_property
    def betas(self) -> Tensor:
        """[T]. float64 while the table is made, as small differences near the last step would be lost in float32."""
        steps = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_steps, dtype=torch.float64) ** 2
        return zero_terminal_snr_betas(steps) if self.zero_terminal_snr else steps

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return (1.0 - self.betas).cumprod(0).float()  # [T]

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t), each [B]. The tables are kept per device, so a step copies nothing from the host."""
        if t.device not in self._tables:
            table = self.alphas_cumprod.to(t.device)
            self._tables[t.device] = (table.sqrt(), (1.0 - table).sqrt())
        alphas, sigmas = self._tables[t.device]
        return alphas[t], sigmas[t]

    def sample_times(self, x0: Tensor, rng: torch.Generator, quantile: float | None = None) -> Tensor:
        """[B] int64 in [min_timestep, max_timestep)."""
        count = self.max_timestep - self.min_timestep
        if self.density == "logit_normal":
            q = torch.rand(len(x0), generator=rng, device=x0.device)
            q = q if quantile is None else torch.full_like(q, quantile)
            share = logit_normal(q.clamp(_LEAST_QUANTILE, 1 - _LEAST_QUANTILE), self.logit_mean, self.logit_std)
            return self.min_timestep + (share * count).long().clamp(max=count - 1)
        if quantile is not None:
            index = self.min_timestep + min(int(quantile * count), count - 1)
            return torch.full((x0.shape[0],), index, device=x0.device, dtype=torch.long)
        return torch.randint(self.min_timestep, self.max_timestep, (x0.shape[0],), generator=rng, device=x0.device)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, perturbed: Tensor | None = None) -> Noised:
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in self._alpha_sigma(t))
        target = alpha * noise - sigma * x0 if self.v_prediction else noise
        return Noised(x_t=alpha * x0 + sigma * (noise if perturbed is None else perturbed), target=target, noise=noise)

    def snr(self, t: Tensor) -> Tensor:
        """a_t² / s_t², [B]; zero at the last step of a zero-terminal-SNR schedule."""
        alpha, sigma = self._alpha_sigma(t)
        return (alpha / sigma) ** 2

    def weight(self, t: Tensor) -> Tensor:
        """[B]. Factors multiply; each is 1 when its option is off."""
        snr = self.snr(t)
        weight = torch.ones_like(snr)
        if self.min_snr_gamma is not None:  # Hang et al. 2023, arXiv 2303.09556
            clipped = snr.clamp(max=self.min_snr_gamma)
            # noise prediction has no loss weight to clip at SNR 0: there min(SNR, gamma) / SNR is 1, its limit
            weight = weight * (clipped / (snr + 1) if self.v_prediction else torch.where(snr > 0, clipped / snr, 1.0))
        clamped = snr.clamp(max=1000)  # the first steps have almost no noise
        if self.scale_v_like_noise:
            weight = weight * clamped / (clamped + 1)
        if self.v_like_loss is not None:
            weight = weight * (1 + self.v_like_loss * (clamped + 1) / clamped.clamp(min=1e-8))
        if self.p2_gamma is not None:  # Choi et al. 2022, arXiv 2204.00227
            weight = weight * (self.p2_k + snr).pow(-self.p2_gamma)
        if self.debiased:  # Yu et al. 2023, arXiv 2310.08442
            weight = weight * (1 / (clamped + 1) if self.v_prediction else clamped.clamp(min=1e-8).rsqrt())
        return weight

    def huber_threshold(self, t: Tensor) -> Tensor:
        if self.huber_schedule == "constant":
            return torch.full_like(t, self.huber_c * self.huber_scale, dtype=torch.float32)
        if self.huber_schedule == "exponential":
            return torch.exp(math.log(self.huber_c) * t / self.num_steps) * self.huber_scale
        alpha, sigma = self._alpha_sigma(t)
        return (1 - self.huber_c) / (1 + sigma / alpha.clamp(min=1e-8)) ** 2 + self.huber_c


# ---- flows -----------------------------------------------------------------------------------------------------------

TIME_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift", "density")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
_LEAST_TIME = 1e-3  # where weights that grow without bound near t = 0 stop growing: the least time of the 1000-step grid


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Push times toward noise. t [B] in [0, 1], 1 = noise; shift 1 is the identity; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(num_tokens: int) -> float:
    """FLUX's shift for an image of so many tokens: exp(mu), mu linear from 0.5 at 256 to 1.15 at 4096 tokens."""
    return math.exp(0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256))


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths from data to noise (Liu et al. 2022, arXiv 2209.03003): x_t = (1 - t) x0 + t noise, target noise - x0.

    Densities of t, with sd-scripts' names and formulas: `uniform`; `sigmoid`: sigmoid(sigmoid_scale * N(0, 1)); `shift` and
    `flux_shift`: the same, pushed toward noise by `flow_shift` or by the image's size; `nextdit_shift`: uniform, pushed by the
    image's size; `sigma`: the 1000 shifted levels of a scheduler, drawn by `density` (Esser et al. 2024, arXiv 2403.03206:
    logit_normal, mode; uniform otherwise); `density`: that density itself, pushed by `flow_shift`.
    """

    sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    flow_shift: float = 3.0
    density: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    patch: int = 2
    """Latent pixels along a token's side."""
    min_timestep: int = 0
    max_timestep: int = 1000
    """Times are mapped linearly into [min, max] / 1000."""
    weighting: str = "none"
    """Loss weight: sigma_sqrt t^-2, cosmap 2 / (pi (1 - 2t + 2t^2)), else 1."""
    data_error: bool = False
    """Measure the error of the data that a prediction implies, x_t - t v against x0, which is t times the velocity's."""
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0

    @property
    def latest_time(self) -> float:
        return 1.0

    def times_at(self, quantile: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """The inverse of t's distribution function. quantile [B] in [0, 1] -> [B]; never decreasing."""
        q = quantile.float().clamp(_LEAST_QUANTILE, 1 - _LEAST_QUANTILE)
        if self.sampling == "sigma":
            level = (1000 - (self._density_at(q) * 1000).floor().clamp(max=999)) / 1000
            t = shift_time(level, self.flow_shift)
        elif self.sampling == "density":
            t = shift_time(self._density_at(1 - q), self.flow_shift)
        else:
            t = (
                q
                if self.sampling in ("uniform", "nextdit_shift")
                else torch.sigmoid(self.sigmoid_scale * torch.special.ndtri(q))
            )
            if self.sampling == "shift":
                t = shift_time(t, self.flow_shift)
            elif self.sampling in ("flux_shift", "nextdit_shift"):
                height, width = latent_size
                t = shift_time(t, resolution_shift((height // self.patch) * (width // self.patch)))
        low, high = self.min_timestep / 1000, self.max_timestep / 1000
        return low + (high - low) * t

    def _density_at(self, q: Tensor) -> Tensor:
        """sd-scripts' u, which counts from noise: its distribution is turned round, so that times still grow with q."""
        if self.density == "logit_normal":
            return logit_normal(1 - q, self.logit_mean, self.logit_std)
        if self.density == "mode":
            return 1 - q - self.mode_scale * (torch.cos(math.pi * q / 2) ** 2 - 1 + q)
        return 1 - q

    def sample_times(self, x0: Tensor, rng: torch.Generator, quantile: float | None = None) -> Tensor:
        """[B] float32 in [0, 1]."""
        if quantile is None:
            q = torch.rand(x0.shape[0], generator=rng, device=x0.device)
        else:
            q = torch.full((x0.shape[0],), quantile, device=x0.device)
        return self.times_at(q, (x0.shape[-2], x0.shape[-1]))

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor, perturbed: Tensor | None = None) -> Noised:
        time = t.view(-1, *[1] * (x0.ndim - 1))
        x_t = (1 - time) * x0 + time * (noise if perturbed is None else perturbed)
        return Noised(x_t=x_t, target=noise - x0, noise=noise)

    def weight(self, t: Tensor) -> Tensor:
        time = t.float().clamp(min=_LEAST_TIME)
        weight = torch.ones_like(time)
        if self.weighting == "sigma_sqrt":
            weight = time**-2
        elif self.weighting == "cosmap":
            weight = 2 / (math.pi * (1 - 2 * time + 2 * time**2))
        if self.data_error:  # an error t times as large: its square counts t^2, its size t
            weight = weight * (time**2 if self.loss_type in ("l2", "huber") else time)
        return weight

    def huber_threshold(self, t: Tensor) -> Tensor:
        """As for DDPM, with the noise-to-signal ratio t / (1 - t), which makes `snr` (1 - c)(1 - t)^2 + c."""
        time = t.float()
        if self.huber_schedule == "constant":
            c = torch.full_like(time, self.huber_c * self.huber_scale)
        elif self.huber_schedule == "exponential":
            c = torch.exp(math.log(self.huber_c) * time) * self.huber_scale
        else:
            c = (1 - self.huber_c) * (1 - time) ** 2 + self.huber_c
        return c / time.clamp(min=_LEAST_TIME) if self.data_error else c  # of the data's error, in units of the velocity's
