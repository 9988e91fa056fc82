"""Flags of Lumina-Image-2.0. Names and defaults are sd-scripts'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.dit_options import TIME_SAMPLINGS, VELOCITY_RULES, DitModelOptions, VelocityFullOptions, VelocityOptions
from library.option_rules import Rule
from library.options import opt

PROMPT_MARK = "<Prompt Start>"
"""Between the system prompt and a caption, as the model was trained."""


@dataclass(frozen=True, kw_only=True)
class LuminaModelOptions(DitModelOptions):
    """Lumina-Image-2.0."""

    bounds_guidance: ClassVar[bool] = True

    gemma2: str | None = opt(
        None, "Gemma-2 2B text encoder, where the model is not a whole file or folder", aliases=("gemma2_path",)
    )
    ae: str | None = opt(None, "autoencoder, where the model is not a whole file or folder", aliases=("ae_path",))
    gemma2_max_token_length: int | None = opt(
        None, "Gemma-2 tokens of a caption, with the system prompt; 256 unless given", minimum=1, maximum=4096
    )
    system_prompt: str = opt("", "what Gemma-2 is told before every caption, but for empty ones")
    use_flash_attn: bool = opt(False, "the same as --attn_mode flash")
    use_sage_attn: bool = opt(False, "the same as --attn_mode sageattn")

    @property
    def token_length(self) -> int:
        return self.gemma2_max_token_length or 256

    @property
    def attention_modes(self) -> frozenset[str]:
        named = {"flash": self.use_flash_attn, "sageattn": self.use_sage_attn}
        return frozenset(name for name, given in named.items() if given)


LuminaModelOptions.model_group = LuminaModelOptions


@dataclass(frozen=True, kw_only=True)
class LuminaOptions(LuminaModelOptions, VelocityOptions):
    """Lumina-Image-2.0."""

    timestep_sampling: str = opt("shift", "density of times", choices=(*TIME_SAMPLINGS, "nextdit_shift"))
    discrete_flow_shift: float = opt(6.0, "push times toward noise, under sigma and shift", minimum=0.001)
    sample_batch_size: int | None = opt(None, "previews that are made together", inert="they are made one by one")

    rules: ClassVar[tuple[Rule, ...]] = (
        *VELOCITY_RULES,
        Rule(
            lambda o: PROMPT_MARK in o.family.system_prompt,
            f"--system_prompt: '{PROMPT_MARK}' is put behind it by itself. Remove it there.",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class LuminaFullOptions(LuminaOptions, VelocityFullOptions):
    """Lumina-Image-2.0, fine-tuned whole."""
