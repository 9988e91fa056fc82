"""Flags that the UNet families share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from library.option_rules import Rule
from library.options import NoFamilyOptions, opt


@dataclass(frozen=True, kw_only=True)
class UnetOptions(NoFamilyOptions):
    """Times of a diffusion."""

    timestep_sampling: str = opt(
        "uniform", "density of times: all alike, or most around --logit_mean", choices=("uniform", "logit_normal")
    )
    logit_mean: float = opt(0.0, "where --timestep_sampling logit_normal has most: 0 in the middle, above 0 towards noise")
    logit_std: float = opt(1.0, "how far it spreads", minimum=0)

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            lambda o: {"logit_mean", "logit_std"} & o.explicit and o.family.timestep_sampling == "uniform",
            "--logit_mean and --logit_std have no effect without --timestep_sampling logit_normal.",
            warning=True,
        ),
    )

    @property
    def time_density(self) -> dict[str, Any]:
        return {"density": self.timestep_sampling, "logit_mean": self.logit_mean, "logit_std": self.logit_std}
