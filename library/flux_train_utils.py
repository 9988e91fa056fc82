"""FLUX.1 and Chroma as a model family."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.clip_tokenizer import load_clip_tokenizer
from library.dit_family import DitFamily
from library.dit_layers import image_ids
from library.dit_parts import DitLayout
from library.dit_text import find_tokenizers
from library.family_base import SampleRequest
from library.flux_models import Flux, pack, unpack
from library.flux_saving import FluxCheckpoint
from library.flux_utils import FLUX_LAYERS, LAYOUT, TITLE, FluxModel, describe
from library.objectives import resolution_shift
from library.quantization import LayerTable
from library.sampling import flow_levels, guided_pair, sample_flow
from library.strategy_base import Strategies
from library.strategy_dit import CLIP_L
from library.strategy_flux import (
    ChromaConditioning,
    FluxConditioning,
    FluxLatentsCachingStrategy,
    FluxTextEncoderOutputsCachingStrategy,
    FluxTextEncodingStrategy,
    FluxTokenizeStrategy,
    with_one_padding,
)
from library.t5_parts import load_t5_tokenizer
from networks.lora_flux import ARCH

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.flux_options import FluxOptions
    from library.option_groups import TrainOptions
    from networks.network_targets import NetworkArch

logger = logging.getLogger(__name__)

PREVIEW_GUIDANCE = 3.5
"""What dev is published with; a prompt line's `--g` goes before it."""


class FluxFamily(DitFamily):
    """FLUX.1 dev, schnell and Kontext's shape, and Chroma: a transformer that predicts the velocity noise - data."""

    name: ClassVar[str] = "flux"
    title: ClassVar[str] = TITLE
    scripts: ClassVar[Mapping[str, str]] = {"network": "flux_train_network.py", "full": "flux_train.py"}
    arch: ClassVar[NetworkArch] = ARCH
    layout: ClassVar[DitLayout] = LAYOUT
    quantized_layers: ClassVar[LayerTable] = FLUX_LAYERS
    flow_keys: ClassVar[tuple[str, ...]] = (*DitFamily.flow_keys, "guidance_scale")

    # ---- facts -------------------------------------------------------------------------------------------------------

    def describe(self, options: TrainOptions) -> FluxModel:
        return describe(options)

    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        model = describe(options)
        return find_tokenizers(options, model.path, LAYOUT.text_parts(model.params))

    def checkpoint(self, **contents: Any) -> FluxCheckpoint:
        return FluxCheckpoint(**contents)

    def check(self, options: TrainOptions) -> None:
        model = describe(options)
        self.tokenizers(options)
        flags: FluxOptions = options.family
        if model.kind != "dev" and "guidance_scale" in options.explicit:
            logger.warning("--guidance_scale has no effect: %s has no guidance embedding.", model.path)
        if model.kind == "chroma" and flags.clip_l is not None:
            logger.warning("--clip_l has no effect: %s is Chroma, which has no CLIP.", model.path)

    def base_model_version(self, options: TrainOptions) -> str:
        return "chroma" if describe(options).kind == "chroma" else "flux1"

    def modelspec_architecture(self, options: TrainOptions) -> str:
        kind = describe(options).kind
        return kind if kind == "chroma" else f"flux-1-{kind}"

    def preview_guidance(self, options: TrainOptions) -> float:
        """dev and schnell are distilled: their guidance is an input, or none."""
        return 4.0 if describe(options).kind == "chroma" else 1.0

    def metadata(self, options: TrainOptions) -> dict[str, Any]:
        flags: FluxOptions = options.family
        model = describe(options)
        return {
            "ss_model_type": "chroma" if model.kind == "chroma" else "flux",
            "ss_apply_t5_attn_mask": _masks_text(model, flags),
            **super().metadata(options),
        }

    # ---- the model ---------------------------------------------------------------------------------------------------

    def strategies(self, options: TrainOptions) -> Strategies:
        model = describe(options)
        flags: FluxOptions = options.family
        folders = self.tokenizers(options)
        length = flags.t5xxl_max_token_length or (256 if model.kind == "schnell" else 512)
        conditioning: type[ChromaConditioning] = ChromaConditioning if model.kind == "chroma" else FluxConditioning
        scale, shift = self.latent_scale(options)
        masked = _masks_text(model, flags)
        return Strategies(
            tokenize=FluxTokenizeStrategy(
                t5=load_t5_tokenizer(folders["t5xxl"]),
                t5_length=length,
                clip=load_clip_tokenizer(folders[CLIP_L]) if CLIP_L in folders else None,
                spare=model.spare_tokens if masked else None,
            ),
            text_encoding=FluxTextEncodingStrategy(conditioning=conditioning, mask_t5=masked),
            latents_caching=FluxLatentsCachingStrategy(scale=scale, shift=shift),
            text_caching=FluxTextEncoderOutputsCachingStrategy(
                conditioning=conditioning, mask_t5=masked, shapes=_entry_shapes(model, length)
            ),
        )

    # ---- steps -------------------------------------------------------------------------------------------------------

    def predict(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: ChromaConditioning,
        batch: TrainBatch | None,
        options: TrainOptions,
    ) -> Tensor:
        flags: FluxOptions = options.family
        return velocity(denoiser, x_t, t, cond, guidance=flags.guidance_scale, masked=flags.apply_t5_attn_mask)

    def sample(self, denoiser: nn.Module, request: SampleRequest, options: TrainOptions, device: torch.device) -> Tensor:
        """`--l` above 1 guides with the negative prompt; `--g` is the guidance that dev is told; `--fs` the shift of times."""
        spec = self.latent(options)
        height, width = request.height // spec.stride, request.width // spec.stride
        flags: FluxOptions = options.family
        both = request.both(device)
        told = request.extra.get("guidance_scale", PREVIEW_GUIDANCE)
        model = describe(options)
        if _masks_text(model, flags):
            both = both.fitted([length + model.spare_tokens for length in both.mask.sum(1).tolist()])

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            """One row for each of x_t's: the positive prompts, then, when guided, the negative ones."""
            cond = both.rows(slice(0, len(x_t)))
            return velocity(denoiser, x_t, t, cond, guidance=told, masked=flags.apply_t5_attn_mask).float()

        shift = request.extra.get("flow_shift", 1.0 if model.kind == "schnell" else resolution_shift(height * width // 4))
        return sample_flow(
            predict if request.guidance == 1 else guided_pair(predict, request.guidance),
            flow_levels(request.steps, shift),
            (request.count, spec.channels, height, width),
            seed=request.seeds,
            device=device,
            start=request.start,
        )


def _entry_shapes(model: FluxModel, length: int) -> dict[str, tuple[int, ...]]:
    """What the text encoders give for one caption of `length` tokens of T5."""
    shapes: dict[str, tuple[int, ...]] = {"context": (length, model.parts["t5xxl"].config["d_model"]), "mask": (length,)}
    return shapes if CLIP_L not in model.parts else shapes | {"pooled": (model.parts[CLIP_L].config["hidden_size"],)}


def _masks_text(model: FluxModel, flags: FluxOptions) -> bool:
    return model.kind == "chroma" or flags.apply_t5_attn_mask


def velocity(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: ChromaConditioning, *, guidance: float, masked: bool) -> Tensor:
    """What the transformer gives for latents x_t [B, C, h, w] at t [B], same shape. masked: hide padding (Chroma always)."""
    model = cast(Flux, denoiser)
    height, width = x_t.shape[-2:]
    mask = cond.mask.bool()
    if model.params.approximator is not None:
        mask, masked = with_one_padding(mask), True
    pooled = cond.pooled.to(model.dtype) if isinstance(cond, FluxConditioning) else None
    out: Tensor = denoiser(
        pack(x_t).to(model.dtype),
        image_ids(height, width, x_t.device),
        cond.context.to(model.dtype),
        torch.zeros(1, cond.context.shape[1], 3, device=x_t.device),
        t.float(),
        pooled=pooled,
        guidance=torch.full((len(x_t),), guidance, device=x_t.device),
        txt_mask=mask if masked and not cond.whole else None,
    )
    return unpack(out, height, width)
