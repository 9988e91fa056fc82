"""Flags of Stable Diffusion 3 and 3.5. Names and defaults are sd-scripts'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.dit_options import FLOW_RULES, DitModelOptions, DitOptions
from library.option_groups import FullTrainOptions
from library.option_rules import Rule
from library.options import opt

CHANCES = ("clip_l", "clip_g", "t5xxl", "crop", "crop_top", "crop_left")
"""What is drawn for every picture of a batch."""
_FORMATS = "Use --mixed_precision for all, and --quantize_text_encoders for fewer bits."
_NO_TEXT_IN_ADAPTERS = "a network's file has the text encoders' networks in it in any case, and never the encoders"
_CACHED_ANYWAY = "text encoders that learn are never cached, and frozen ones give the same from a cache"


@dataclass(frozen=True, kw_only=True)
class Sd3ModelOptions(DitModelOptions):
    """Stable Diffusion 3 and 3.5."""

    clip_l: str | None = opt(None, "CLIP-L text encoder, where the model's file does not hold it")
    clip_g: str | None = opt(None, "CLIP-G text encoder, where the model's file does not hold it")
    t5xxl: str | None = opt(None, "T5-XXL text encoder; where there is none anywhere, its part of the text is zeros")
    t5xxl_max_token_length: int = opt(256, "T5 tokens of a caption", aliases=("t5xxl_token_length",), minimum=1, maximum=512)
    apply_lg_attn_mask: bool = opt(False, "padding is zeros in what CLIP-L and CLIP-G give")
    apply_t5_attn_mask: bool = opt(False, "hide padding from T5; it is zeros in what T5 gives")
    enable_scaled_pos_embed: bool = opt(
        False, "pictures of any size have the positions of one of 1024 x 1024 (SD3.5 medium only)"
    )


Sd3ModelOptions.model_group = Sd3ModelOptions


@dataclass(frozen=True, kw_only=True)
class Sd3Options(Sd3ModelOptions, DitOptions):
    """Stable Diffusion 3 and 3.5."""

    training_shift: float = opt(1.0, "push times toward noise; 3 is what the models were trained with", minimum=0.001)
    clip_l_dropout_rate: float = opt(0.0, "share of pictures that are trained without CLIP-L", minimum=0, maximum=1)
    clip_g_dropout_rate: float = opt(0.0, "share of pictures that are trained without CLIP-G", minimum=0, maximum=1)
    t5_dropout_rate: float = opt(0.0, "share of pictures that are trained without T5", minimum=0, maximum=1)
    pos_emb_random_crop_rate: float = opt(
        0.0, "share of pictures whose positions are cut from anywhere in the table (SD3.5 medium only)", minimum=0, maximum=1
    )
    t5xxl_device: str | None = opt(None, "device of T5", inert="it is where the others are, and freed once it is cached")
    t5xxl_dtype: str | None = opt(None, "format of T5", planned=True, instead=_FORMATS)
    save_clip: bool = opt(False, "see sd3_train.py", inert=_NO_TEXT_IN_ADAPTERS)
    save_t5xxl: bool = opt(False, "see sd3_train.py", inert=_NO_TEXT_IN_ADAPTERS)

    several_text_encoders: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (
        *FLOW_RULES,
        Rule(
            lambda o: o.family.enable_scaled_pos_embed and o.family.pos_emb_random_crop_rate > 0,
            "--enable_scaled_pos_embed and --pos_emb_random_crop_rate {pos_emb_random_crop_rate} both say where a picture's "
            "positions are. Keep one.",
        ),
    )

    @property
    def dropout_rates(self) -> dict[str, float]:
        """By text encoder."""
        return {"clip_l": self.clip_l_dropout_rate, "clip_g": self.clip_g_dropout_rate, "t5xxl": self.t5_dropout_rate}

    @property
    def saved_text(self) -> frozenset[str]:
        """Text encoders that saved single files hold, whether or not the model's own does."""
        return frozenset()

    @property
    def chances(self) -> tuple[str, ...]:
        return CHANCES if any(self.dropout_rates.values()) or self.pos_emb_random_crop_rate else ()


@dataclass(frozen=True, kw_only=True)
class Sd3FullOptions(Sd3Options):
    """Stable Diffusion 3 and 3.5, fine-tuned whole."""

    train_t5xxl: bool = opt(False, "train T5, too, with --train_text_encoder, which trains both CLIPs")
    learning_rate_te1: float | None = opt(
        None, "rate of CLIP-L, 0 leaves it as it is; --learning_rate_te unless given", minimum=0
    )
    learning_rate_te2: float | None = opt(
        None, "rate of CLIP-G, 0 leaves it as it is; --learning_rate_te unless given", minimum=0
    )
    learning_rate_te3: float | None = opt(None, "rate of T5; --learning_rate_te unless given", minimum=0)
    use_t5xxl_cache_only: bool = opt(False, "cache T5 alone", inert=_CACHED_ANYWAY)
    num_last_block_to_freeze: int | None = opt(None, "leave so many of the last blocks as they are", minimum=0)
    blockwise_fused_optimizers: bool = opt(False, "the same as --fused_backward_pass")
    fused_optimizer_groups: int | None = opt(
        None, "optimizers that parameters are divided among", inert="sd-scripts does not read it, either"
    )
    save_clip: bool = opt(False, "saved single files hold CLIP-L and CLIP-G, too; those that learn are in them in any case")
    save_t5xxl: bool = opt(False, "saved single files hold T5, too; it is in them in any case if it learns")

    rules: ClassVar[tuple[Rule, ...]] = (
        *Sd3Options.rules,
        Rule(
            lambda o: o.family.train_t5xxl and not o.full.trains_text_encoder,
            "--train_t5xxl has no effect without --train_text_encoder. Add it, or remove --train_t5xxl.",
            scope=FullTrainOptions,
        ),
        Rule(
            lambda o: any(o.family.own_rates) and not o.full.trains_text_encoder,
            "--learning_rate_te1, --learning_rate_te2 and --learning_rate_te3 have no effect: the text encoders are not "
            "trained (--train_text_encoder).",
            scope=FullTrainOptions,
            warning=True,
        ),
        Rule(
            lambda o: bool(o.family.learning_rate_te3) and not o.family.train_t5xxl and o.full.trains_text_encoder,
            "--learning_rate_te3 {learning_rate_te3} has no effect without --train_t5xxl.",
            scope=FullTrainOptions,
            warning=True,
        ),
    )

    @property
    def own_rates(self) -> tuple[float | None, float | None, float | None]:
        return self.learning_rate_te1, self.learning_rate_te2, self.learning_rate_te3

    @property
    def fused_backward(self) -> bool:
        return self.blockwise_fused_optimizers

    def text_encoder_rates(self, shared: float | None) -> tuple[float | None, ...]:
        first, second, third = (shared if rate is None else rate for rate in self.own_rates)
        return first, second, third if self.train_t5xxl else 0.0

    @property
    def saved_text(self) -> frozenset[str]:
        return frozenset([*(("clip_l", "clip_g") if self.save_clip else ()), *(("t5xxl",) if self.save_t5xxl else ())])
