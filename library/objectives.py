"""What is learned: how a clean latent is corrupted, what is predicted, and how much a time counts. Pure functions of tensors.

Shapes: B batch, C latent channels, h x w latent pixels. Everything is float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noised:
    """One corrupted batch."""

    x_t: Tensor  # [B, C, h, w]
    target: Tensor  # [B, C, h, w], what `ModelFamily.predict` should give
    noise: Tensor  # [B, C, h, w]


class Objective(Protocol):
    """A corruption path. Times: an index in [0, T) for DDPM, t in [0, 1] with 1 = noise for flows."""

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
    min_snr_gamma: float | None = None
    debiased: bool = False
    scale_v_like_noise: bool = False
    v_like_loss: float | None = None
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0

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
        if self.scale_v_like_noise:
            weight = weight * snr / (snr + 1)
        if self.v_like_loss is not None:
            weight = weight * (1 + self.v_like_loss * (snr + 1) / snr.clamp(min=1e-8))
        if self.debiased:  # Yu et al. 2023, arXiv 2310.08442
            clamped = snr.clamp(max=1000)
            weight = weight * (1 / (clamped + 1) if self.v_prediction else clamped.clamp(min=1e-8).rsqrt())
        return weight

    def huber_threshold(self, t: Tensor) -> Tensor:
        if self.huber_schedule == "constant":
            return torch.full_like(t, self.huber_c * self.huber_scale, dtype=torch.float32)
        if self.huber_schedule == "exponential":
            return torch.exp(math.log(self.huber_c) * t / self.num_steps) * self.huber_scale
        alpha, sigma = self._alpha_sigma(t)
        return (1 - self.huber_c) / (1 + sigma / alpha.clamp(min=1e-8)) ** 2 + self.huber_c
