"""Flags that the transformer families share. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.option_groups import FullTrainOptions, TrainOptions
from library.option_rules import Rule
from library.options import NoFamilyOptions, opt

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


def _weights_of_ddpm(o: TrainOptions) -> bool:
    loss = o.loss
    given = loss.min_snr_gamma or loss.debiased_estimation_loss or loss.v_pred_like_loss or loss.p2_gamma
    return bool(given or loss.scale_v_pred_loss_like_noise_pred)


def _stays_small(o: FullTrainOptions) -> bool:
    """Whether autograd keeps no copies of the weights."""
    return o.memory.recomputes or o.precision.learns_in_half


FLOW_RULES: tuple[Rule, ...] = (
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
        lambda o: o.loss.weighted_captions,
        "--weighted_captions is for CLIP's hidden states, which this model does not use. Remove it.",
    ),
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
)
"""Rules of every family that is a flow."""
