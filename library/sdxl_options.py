"""Flags of SDXL's scripts. Names and defaults are sd-scripts'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from library.option_groups import FullTrainOptions
from library.option_rules import Rule
from library.options import opt
from library.unet_options import UnetOptions

NUM_BLOCKS = 23
"""Blocks with a rate of their own: the embeddings of time and size, 9 input blocks, 3 middle ones, 9 output blocks, the end."""


def rates_text(value: Any) -> str:
    """`--block_lr`'s text, once it is known to be numbers of at least 0, separated by commas."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected numbers separated by commas, got {text!r}") from None
    if any(not rate >= 0 for rate in rates):
        raise ValueError(f"expected rates of at least 0, got {text!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class SdxlOptions(UnetOptions):
    """SDXL."""

    disable_mmap_load_safetensors: bool = opt(False, "read files without mapping them", inert="files are never mapped")

    model_tells_v: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        *UnetOptions.rules,
        Rule(lambda o: o.model.v2, "--v2 is for Stable Diffusion 2.x, and this script trains SDXL. Remove it."),
        Rule(
            lambda o: o.training.clip_skip is not None,
            "--clip_skip {clip_skip} has no effect: SDXL always takes the last layer but one of both text encoders.",
            warning=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class SdxlFullOptions(SdxlOptions):
    """SDXL, fine-tuned whole."""

    learning_rate_te1: float | None = opt(
        None, "rate of the first text encoder (CLIP-L), 0 leaves it as it is; --learning_rate_te unless given", minimum=0
    )
    learning_rate_te2: float | None = opt(
        None, "rate of the second one (OpenCLIP bigG), 0 leaves it as it is; --learning_rate_te unless given", minimum=0
    )
    block_lr: str | None = opt(
        None,
        f"learning rates of the UNet's {NUM_BLOCKS} blocks, separated by commas, or one for all; 0 leaves a block as it is",
        type=rates_text,
    )
    fused_optimizer_groups: int | None = opt(
        None, "the same as --fused_backward_pass: every weight is a group of its own; 0 is off", minimum=0
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        *SdxlOptions.rules,
        Rule(
            lambda o: o.family.block_rates is not None and len(o.family.block_rates) != NUM_BLOCKS,
            f"--block_lr {{block_lr}}: SDXL's UNet has {NUM_BLOCKS} blocks. Give that many rates, or one for all.",
            scope=FullTrainOptions,
        ),
        Rule(
            lambda o: o.family.block_rates is not None and not any(o.family.block_rates),
            "--block_lr {block_lr}: every rate is 0, so the UNet would not learn. Give one block a rate.",
            scope=FullTrainOptions,
        ),
        Rule(
            lambda o: _encoder_rates_given(o.family) and not o.full.trains_text_encoder,
            "--learning_rate_te1 and --learning_rate_te2 have no effect: the text encoders are not trained "
            "(--train_text_encoder).",
            scope=FullTrainOptions,
            warning=True,
        ),
    )

    @property
    def fused_backward(self) -> bool:
        return bool(self.fused_optimizer_groups)

    @property
    def block_rates(self) -> tuple[float, ...] | None:
        """Rate of each block of the UNet; None where all have the same one."""
        if self.block_lr is None:
            return None
        rates = tuple(float(part) for part in self.block_lr.split(","))
        return rates * NUM_BLOCKS if len(rates) == 1 else rates

    def denoiser_learns(self, rate: float) -> bool:
        return any(self.block_rates or (rate,))

    def text_encoder_rates(self, shared: float | None) -> tuple[float | None, ...]:
        own = (self.learning_rate_te1, self.learning_rate_te2)
        return tuple(shared if rate is None else rate for rate in own)


def _encoder_rates_given(family: SdxlFullOptions) -> bool:
    return any((family.learning_rate_te1, family.learning_rate_te2))
