"""Flags of FLUX.1 and Chroma. Names are sd-scripts'; defaults too, but for `model_prediction_type` and `guidance_scale`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.dit_options import FLOW_RULES, DitModelOptions, DitOptions
from library.option_rules import Rule
from library.options import opt

TIME_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
SPLIT_MODE_BLOCKS = 18
"""sd-scripts' number."""
_NEVER_WORKED = "sd-scripts does not read it, either"


@dataclass(frozen=True, kw_only=True)
class FluxModelOptions(DitModelOptions):
    """FLUX.1 and Chroma."""

    clip_l: str | None = opt(None, "CLIP-L text encoder, where the model is not a whole folder; Chroma has none")
    t5xxl: str | None = opt(None, "T5-XXL text encoder, where the model is not a whole folder")
    ae: str | None = opt(None, "autoencoder, where the model is not a whole folder")
    controlnet_model_name_or_path: str | None = opt(None, "ControlNet", planned=True)
    model_type: str | None = opt(None, "flux or chroma; told from the file unless given", choices=("flux", "chroma"))
    t5xxl_max_token_length: int | None = opt(
        None, "T5 tokens of a caption; 256 for schnell, 512 otherwise, unless given", minimum=1, maximum=512
    )
    apply_t5_attn_mask: bool = opt(False, "hide padding from T5 and from the transformer; Chroma always does")
    split_mode: bool = opt(False, f"the same as --blocks_to_swap {SPLIT_MODE_BLOCKS}, unless that is given")

    @property
    def swapped_blocks(self) -> int:
        return SPLIT_MODE_BLOCKS if self.split_mode and self.blocks_to_swap is None else self.blocks_to_swap or 0


FluxModelOptions.model_group = FluxModelOptions


@dataclass(frozen=True, kw_only=True)
class FluxOptions(FluxModelOptions, DitOptions):
    """FLUX.1 and Chroma."""

    guidance_scale: float = opt(1.0, "guidance that the model is told in training; dev only", minimum=0)
    timestep_sampling: str = opt("sigma", "density of times", choices=TIME_SAMPLINGS)
    sigmoid_scale: float = opt(1.0, "spread of sigmoid, shift and flux_shift", minimum=0)
    discrete_flow_shift: float = opt(3.0, "push times toward noise, under sigma and shift", minimum=0.001)
    model_prediction_type: str = opt(
        "raw",
        "how the loss reads the model: raw, its velocity; sigma_scaled, the data it implies, weighted by --weighting_scheme; "
        "additive, the same as raw",
        choices=("raw", "additive", "sigma_scaled"),
    )

    several_text_encoders: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        *FLOW_RULES,
        Rule(
            lambda o: o.family.split_mode and o.family.blocks_to_swap is not None,
            "--split_mode has no effect beside --blocks_to_swap {blocks_to_swap}.",
            warning=True,
        ),
        Rule(
            lambda o: o.model.vae is not None,
            "--vae {vae}: FLUX.1 and Chroma take their autoencoder as --ae.",
        ),
        Rule(
            lambda o: o.family.weighting_scheme not in ("uniform", "none") and not _reads_weighting(o.family),
            "--weighting_scheme {weighting_scheme} has no effect with --timestep_sampling {timestep_sampling} and "
            "--model_prediction_type {model_prediction_type}: it is a density of sigma, or a weight of sigma_scaled.",
            warning=True,
        ),
        Rule(
            lambda o: o.family.model_type == "chroma" and o.family.clip_l is not None,
            "--clip_l {clip_l} has no effect: Chroma has no CLIP.",
            warning=True,
        ),
    )


def _reads_weighting(family: FluxOptions) -> bool:
    if family.weighting_scheme in ("sigma_sqrt", "cosmap"):
        return family.model_prediction_type == "sigma_scaled"
    return family.timestep_sampling == "sigma"


@dataclass(frozen=True, kw_only=True)
class FluxFullOptions(FluxOptions):
    """FLUX.1, fine-tuned whole."""

    mem_eff_save: bool = opt(False, "save tensor by tensor", inert="saving never copies the whole model")
    blockwise_fused_optimizers: bool = opt(False, "the same as --fused_backward_pass")
    fused_optimizer_groups: int | None = opt(None, "optimizers that parameters are divided among", inert=_NEVER_WORKED)
    double_blocks_to_swap: int | None = opt(None, "see --blocks_to_swap", inert=_NEVER_WORKED)
    single_blocks_to_swap: int | None = opt(None, "see --blocks_to_swap", inert=_NEVER_WORKED)
    skip_latents_validity_check: bool = opt(False, "see --skip_cache_check", inert=_NEVER_WORKED)

    @property
    def fused_backward(self) -> bool:
        return self.blockwise_fused_optimizers
