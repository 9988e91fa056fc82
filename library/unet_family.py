"""What the UNet families share: a diffusers UNet that predicts noise or v on a DDPM schedule, with CLIP for its text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from library.clip_text import ClipCaptions
from library.clip_tokenizer import load_clip_tokenizer
from library.family_base import LatentSpec, ModelBundle, ModelFamily, SampleRequest
from library.model_io import open_checkpoint
from library.model_loading import lazy_bundle
from library.model_parts import Component, SaveSettings, enable_encoder_checkpointing
from library.objectives import DiscreteDDPM, range_and_huber
from library.quantization import UNET_LAYERS, LayerTable
from library.quantized_layers import Quantizer
from library.sampling import guided_pair, make_scheduler, sample_diffusion
from library.unet_parts import UnetModel, file_unet, folder_unet
from library.unet_saving import SINGLE_FILE_FORMATS, UnetCheckpoint, check_single_file
from library.vae_parts import decode_latents

if TYPE_CHECKING:
    from library.option_groups import TrainOptions


class UnetFamily(ModelFamily):
    """Stable Diffusion 1.x/2.x or SDXL: they differ in their text encoders and in what else the UNet is told."""

    quantized_layers: ClassVar[LayerTable] = UNET_LAYERS

    # ---- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def describe(self, options: TrainOptions) -> UnetModel:
        """The model that `options` name, from headers alone, once its flags have been found to fit."""

    @abstractmethod
    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        """Folder in a diffusers model -> where that tokenizer is now; downloads it when that is what is left."""

    @abstractmethod
    def checkpoint(self, **contents: Any) -> UnetCheckpoint: ...

    def predicts_v(self, options: TrainOptions) -> bool:
        return options.model.v_parameterization

    def ends_in_noise(self, options: TrainOptions) -> bool:
        """Whether the noise schedule is rescaled to a zero terminal SNR."""
        return options.noise.zero_terminal_snr

    # ---- facts -------------------------------------------------------------------------------------------------------

    def latent(self, options: TrainOptions) -> LatentSpec:
        config = self.describe(options).vae.config
        return LatentSpec(
            channels=config.get("latent_channels", 4),
            stride=2 ** (len(config["block_out_channels"]) - 1),
            scale=config["scaling_factor"],
        )

    def check(self, options: TrainOptions) -> None:
        model = self.describe(options)
        self.tokenizers(options)
        full = getattr(options, "full", None)
        if full is not None and full.save_model_as in SINGLE_FILE_FORMATS:
            check_single_file(model)

    def source_format(self, options: TrainOptions) -> str:
        return self.describe(options).format

    def head_widths(self, options: TrainOptions) -> Sequence[int]:
        config = self.describe(options).unet.config
        channels, heads = config["block_out_channels"], config["attention_head_dim"]  # which diffusers means as their number
        counts = heads if isinstance(heads, list | tuple) else [heads] * len(channels)
        return tuple(width // count for width, count in zip(channels, counts, strict=True))

    def prediction_type(self, options: TrainOptions) -> str | None:
        return "v" if self.predicts_v(options) else "epsilon"

    def clip_captions(self, options: TrainOptions, part: str, folder: Path) -> ClipCaptions:
        """How captions become ids of the tokenizer in `folder` for the text encoder `part`."""
        size = self.describe(options).parts[part].config.get("max_position_embeddings", 77)
        return ClipCaptions(
            tokenizer=load_clip_tokenizer(folder),
            max_length=options.training.max_token_length or size - 2,
            size=size,
            weighted=options.loss.weighted_captions,
        )

    # ---- the model ---------------------------------------------------------------------------------------------------

    def load(
        self,
        options: TrainOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        learning: Mapping[str, torch.dtype] | None = None,
        quantizers: Mapping[str, Quantizer] | None = None,
    ) -> ModelBundle:
        facts = {
            "v_prediction": self.predicts_v(options),
            "zero_terminal_snr": self.ends_in_noise(options),
            "tokenizers": self.tokenizers(options),
        }
        model = self.describe(options)
        return lazy_bundle(model, options, device=device, dtype=dtype, learning=learning, quantizers=quantizers, facts=facts)

    def open_denoiser(self, path: Path) -> Component:
        return folder_unet(path / "unet") if path.is_dir() else file_unet(open_checkpoint(path))

    def open_parts(self, path: Path, others: Mapping[str, Path]) -> Mapping[str, Component]:
        from library.option_groups import FullTrainOptions, ModelOptions

        super().open_parts(path, others)
        return self.describe(FullTrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(path)))).parts

    def enable_gradient_checkpointing(self, part: str, module: nn.Module) -> None:
        if part == "denoiser":
            unet: Any = module
            unet.enable_gradient_checkpointing()
        else:
            enable_encoder_checkpointing(module)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def objective(self, options: TrainOptions) -> DiscreteDDPM:
        loss = options.loss
        return DiscreteDDPM(
            v_prediction=self.predicts_v(options),
            zero_terminal_snr=self.ends_in_noise(options),
            min_snr_gamma=loss.min_snr_gamma or None,
            debiased=loss.debiased_estimation_loss,
            p2_gamma=loss.p2_gamma,
            p2_k=loss.p2_k,
            scale_v_like_noise=loss.scale_v_pred_loss_like_noise_pred,
            v_like_loss=loss.v_pred_like_loss or None,
            **range_and_huber(options.noise, loss),
            **options.family.time_density,
        )

    def sample(self, denoiser: nn.Module, request: SampleRequest, options: TrainOptions, device: torch.device) -> Tensor:
        spec = self.latent(options)
        cond = request.both(device)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            """One row for each of x_t's: the positive prompts, then, when guided, the negative ones."""
            return self.predict(denoiser, x_t, t, cond.rows(slice(0, len(x_t))), None, options).float()

        return sample_diffusion(
            predict if request.guidance == 1 else guided_pair(predict, request.guidance),
            make_scheduler(request.sampler, self.objective(options)),
            (request.count, spec.channels, request.height // spec.stride, request.width // spec.stride),
            steps=request.steps,
            seed=request.seeds,
            device=device,
            start=request.start,
        )

    def decode(self, vae: nn.Module, latents: Tensor, options: TrainOptions) -> Tensor:
        return decode_latents(vae, self.latent(options).denormalize(latents))

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, bundle: ModelBundle, path: Path, settings: SaveSettings) -> None:
        facts = bundle.facts
        names = ("denoiser", *bundle.text_encoder_names)
        self.checkpoint(
            model=facts["model"],
            modules={name: bundle.part(name) for name in names if bundle.loaded(name)},
            v_prediction=facts["v_prediction"],
            zero_terminal_snr=facts["zero_terminal_snr"],
            tokenizers=facts["tokenizers"],
        ).write(path, settings)


def _learns_from_within(denoiser: Any) -> bool:
    """Whether the first layers are frozen and later ones learn themselves."""
    return not denoiser.conv_in.weight.requires_grad and any(parameter.requires_grad for parameter in denoiser.parameters())


def run_unet(denoiser: nn.Module, x_t: Tensor, t: Tensor, context: Tensor, added: Mapping[str, Tensor] | None = None) -> Tensor:
    """The UNet's prediction, the shape of x_t [B, C, h, w]; context [B, M, D]. added: further conditions, by diffusers' name.

    Outside of autocast the inputs take the dtype of the weights; `added` is left to the UNet, which embeds sizes in float32.
    """
    if not torch.is_autocast_enabled(x_t.device.type):
        dtype = next(denoiser.parameters()).dtype
        x_t, context = x_t.to(dtype), context.to(dtype)
    if x_t.device.type == "cpu" and torch.is_grad_enabled() and _learns_from_within(denoiser):
        # GroupNorm's backward pass crashes (torch 2.13) where its weight learns and its channels-last input has no gradient
        x_t = x_t.detach().requires_grad_()
    extra = {} if added is None else {"added_cond_kwargs": dict(added)}
    output: Tensor = denoiser(x_t, t, encoder_hidden_states=context, return_dict=False, **extra)[0]
    return output
