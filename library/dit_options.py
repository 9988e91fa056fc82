"""Flags that the transformer families share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.option_groups import FullTrainOptions, TrainOptions
from library.option_rules import Rule, warn_unused
from library.options import NoFamilyOptions, opt
from library.unused_options import DEPENDENT_OF_FLOWS, DEPENDENT_OF_VELOCITIES

TIME_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
WEIGHTINGS = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


@dataclass(frozen=True, kw_only=True)
class DitModelOptions(NoFamilyOptions):
    """The model, and memory."""

    is_flow: ClassVar[bool] = True

    blocks_to_swap: int | None = opt(None, "keep about this many blocks in main memory until they are needed", minimum=0)
    disable_mmap_load_safetensors: bool = opt(False, "read files without mapping them", inert="files are never mapped")

    @property
    def swapped_blocks(self) -> int:
        return self.blocks_to_swap or 0


DitModelOptions.model_group = DitModelOptions


@dataclass(frozen=True, kw_only=True)
class DitOptions(DitModelOptions):
    """Times and weights of a flow, and memory."""

    weighting_scheme: str = opt(
        "uniform", "density of times under --timestep_sampling sigma, and loss weight where the family has one",
        choices=WEIGHTINGS,
    )  # fmt: skip
    logit_mean: float = opt(0.0, "mean of --weighting_scheme logit_normal")
    logit_std: float = opt(1.0, "standard deviation of --weighting_scheme logit_normal", minimum=0)
    mode_scale: float = opt(1.29, "strength of --weighting_scheme mode")


@dataclass(frozen=True, kw_only=True)
class VelocityOptions(DitOptions):
    """Times, and what the loss makes of the velocity, for families that have a choice. Defaults are FLUX.1's."""

    timestep_sampling: str = opt("sigma", "density of times", choices=TIME_SAMPLINGS)
    discrete_flow_shift: float = opt(3.0, "push times toward noise, under sigma and shift", minimum=0.001)
    sigmoid_scale: float = opt(1.0, "spread of sigmoid, shift and flux_shift", minimum=0)
    model_prediction_type: str = opt(
        "raw",
        "how the loss reads the model: raw, its velocity; sigma_scaled, the data it implies, weighted by --weighting_scheme; "
        "additive, the same as raw",
        choices=("raw", "additive", "sigma_scaled"),
    )


@dataclass(frozen=True, kw_only=True)
class VelocityFullOptions(VelocityOptions):
    """The same, fine-tuned whole."""

    mem_eff_save: bool = opt(False, "save tensor by tensor", inert="saving never copies the whole model")
    blockwise_fused_optimizers: bool = opt(False, "the same as --fused_backward_pass")

    @property
    def fused_backward(self) -> bool:
        return self.blockwise_fused_optimizers


def _weights_of_ddpm(o: TrainOptions) -> bool:
    loss = o.loss
    given = loss.min_snr_gamma or loss.debiased_estimation_loss or loss.v_pred_like_loss or loss.p2_gamma
    return bool(given or loss.scale_v_pred_loss_like_noise_pred)


def _stays_small(o: FullTrainOptions) -> bool:
    """Whether autograd keeps no copies of the weights."""
    return o.memory.recomputes or o.precision.learns_in_half


FLOW_RULES: tuple[Rule, ...] = (
    *map(warn_unused, DEPENDENT_OF_FLOWS),
    Rule(
        lambda o: o.model.v2 or o.model.v_parameterization or o.noise.zero_terminal_snr,
        "--v2, --v_parameterization and --zero_terminal_snr are Stable Diffusion's, and this model is a flow. Remove them.",
    ),
    Rule(
        _weights_of_ddpm,
        "--min_snr_gamma, --debiased_estimation_loss, --p2_gamma, --v_pred_like_loss and --scale_v_pred_loss_like_noise_pred "
        "have no effect: they weight by the SNR of a noise schedule, which a flow does not have.",
        warning=True,
    ),
    Rule(
        lambda o: o.training.clip_skip is not None or o.training.max_token_length is not None,
        "--clip_skip and --max_token_length have no effect: they are Stable Diffusion's.",
        warning=True,
    ),
    Rule(
        lambda o: o.family.swapped_blocks and o.precision.mixed_precision != "no" and not _stays_small(o),
        "--blocks_to_swap {blocks_to_swap} saves little: each block's weights are cast to {mixed_precision}, and the casts are "
        "kept on the device until the backward pass. Add --gradient_checkpointing, or --full_bf16.",
        scope=FullTrainOptions,
        warning=True,
    ),
    Rule(
        lambda o: o.family.swapped_blocks and o.precision.mixed_precision == "fp16",
        "--blocks_to_swap cannot be used with --mixed_precision fp16 in full fine-tuning: gradients lie on two devices when "
        "their scale is taken off. Use --mixed_precision bf16.",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: o.family.swapped_blocks and o.memory.shard_weights,
        "--shard_weights and --blocks_to_swap both say where a block is while others compute. Remove one of them.",
    ),
    Rule(
        lambda o: o.loss.weighted_captions,
        "--weighted_captions is for CLIP's hidden states, which this model does not use. Remove it.",
    ),
)
"""Rules of every family that is a flow."""


def _reads_weighting(family: VelocityOptions) -> bool:
    if family.weighting_scheme in ("sigma_sqrt", "cosmap"):
        return family.model_prediction_type == "sigma_scaled"
    return family.timestep_sampling == "sigma"


VELOCITY_RULES: tuple[Rule, ...] = (
    *FLOW_RULES,
    *map(warn_unused, DEPENDENT_OF_VELOCITIES),
    Rule(
        lambda o: o.full.trains_text_encoder,
        "--train_text_encoder: full fine-tuning trains the transformer alone. Remove it, or train an adapter.",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: o.full.learning_rate_te is not None or o.full.stop_text_encoder_training is not None,
        "--learning_rate_te and --stop_text_encoder_training have no effect: the text encoders are not trained.",
        scope=FullTrainOptions,
        warning=True,
    ),
    Rule(
        lambda o: o.model.vae is not None,
        "--vae {vae}: this model's autoencoder is given as --ae.",
    ),
    Rule(
        lambda o: o.family.weighting_scheme not in ("uniform", "none") and not _reads_weighting(o.family),
        "--weighting_scheme {weighting_scheme} has no effect with --timestep_sampling {timestep_sampling} and "
        "--model_prediction_type {model_prediction_type}: it is a density of sigma, or a weight of sigma_scaled.",
        warning=True,
    ),
)
"""Rules of families with `VelocityOptions` and an autoencoder of FLUX.1's kind, whose text encoders stay as they are in full
fine-tuning."""
