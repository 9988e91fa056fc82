"""Flags of FLUX.1 and Chroma. Names are sd-scripts'; defaults too, but for `model_prediction_type` and `guidance_scale`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.dit_options import VELOCITY_RULES, DitModelOptions, VelocityFullOptions, VelocityOptions
from library.option_rules import Rule
from library.options import opt

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
class FluxOptions(FluxModelOptions, VelocityOptions):
    """FLUX.1 and Chroma."""

    guidance_scale: float = opt(1.0, "guidance that the model is told in training; dev only", minimum=0)

    several_text_encoders: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        *VELOCITY_RULES,
        Rule(
            lambda o: o.family.split_mode and o.family.blocks_to_swap is not None,
            "--split_mode has no effect beside --blocks_to_swap {blocks_to_swap}.",
            warning=True,
        ),
        Rule(
            lambda o: o.family.model_type == "chroma" and o.family.clip_l is not None,
            "--clip_l {clip_l} has no effect: Chroma has no CLIP.",
            warning=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class FluxFullOptions(FluxOptions, VelocityFullOptions):
    """FLUX.1, fine-tuned whole."""

    fused_optimizer_groups: int | None = opt(None, "optimizers that parameters are divided among", inert=_NEVER_WORKED)
    double_blocks_to_swap: int | None = opt(None, "see --blocks_to_swap", inert=_NEVER_WORKED)
    single_blocks_to_swap: int | None = opt(None, "see --blocks_to_swap", inert=_NEVER_WORKED)
    skip_latents_validity_check: bool = opt(False, "see --skip_cache_check", inert=_NEVER_WORKED)
