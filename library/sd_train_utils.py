"""Stable Diffusion 1.x/2.x as a model family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from library.clip_tokenizer import SD1_TOKENIZER, SD2_TOKENIZER, find_tokenizer, load_clip_tokenizer
from library.family_base import LatentSpec, ModelBundle, ModelFamily, SampleRequest
from library.model_parts import enable_encoder_checkpointing
from library.objectives import DiscreteDDPM
from library.sampling import guided_pair, make_scheduler, sample_diffusion
from library.sd_saving import SINGLE_FILE_FORMATS, SdCheckpoint, check_single_file
from library.sd_utils import TITLE, VAE_SCALE, SdModel, check_flags, describe
from library.strategy_base import Strategies
from library.strategy_sd import (
    TEXT_ENCODER,
    SdConditioning,
    SdLatentsCachingStrategy,
    SdTextEncoderOutputsCachingStrategy,
    SdTextEncodingStrategy,
    SdTokenizeStrategy,
)
from library.vae_parts import decode_latents
from networks.lora_sd import ARCH

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.option_groups import TrainOptions
    from networks.network_targets import NetworkArch


class SdFamily(ModelFamily):
    """Stable Diffusion 1.x/2.x: a UNet that predicts noise or v, conditioned on CLIP's hidden states."""

    name: ClassVar[str] = "sd"
    title: ClassVar[str] = TITLE
    scripts: ClassVar[Mapping[str, str]] = {"network": "train_network.py", "full": "train_db.py", "metadata": "fine_tune.py"}
    arch: ClassVar[NetworkArch] = ARCH

    # ---- facts -------------------------------------------------------------------------------------------------------

    def latent(self, options: TrainOptions) -> LatentSpec:
        config = describe(options.model).vae.config
        return LatentSpec(
            channels=config.get("latent_channels", 4),
            stride=2 ** (len(config["block_out_channels"]) - 1),
            scale=config.get("scaling_factor", VAE_SCALE),
        )

    def check(self, options: TrainOptions) -> None:
        model = describe(options.model)
        check_flags(model, options.model, zero_terminal_snr=options.noise.zero_terminal_snr)
        tokenizer_folder(model, options)
        full = getattr(options, "full", None)
        if full is not None and full.save_model_as in SINGLE_FILE_FORMATS:
            check_single_file(model)

    def base_model_version(self, options: TrainOptions) -> str:
        suffix = "_v" if options.model.v_parameterization else ""
        return f"sd_{describe(options.model).version}{suffix}"

    def prediction_type(self, options: TrainOptions) -> str | None:
        return "v" if options.model.v_parameterization else "epsilon"

    def modelspec_architecture(self, options: TrainOptions) -> str:
        if describe(options.model).version == "v1":
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if options.model.v_parameterization else "stable-diffusion-v2-512"

    # ---- the model ---------------------------------------------------------------------------------------------------

    def load(
        self,
        options: TrainOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        learning: Mapping[str, torch.dtype] | None = None,
    ) -> ModelBundle:
        model = describe(options.model)
        check_flags(model, options.model, zero_terminal_snr=options.noise.zero_terminal_snr)
        dtypes = {name: dtype for name in model.parts} | dict(learning or {})
        if options.precision.no_half_vae:
            dtypes["vae"] = torch.float32
        loaders = {
            name: (lambda part=part, kind=dtypes[name]: part.load(dtype=kind, device=device))
            for name, part in model.parts.items()
        }
        return ModelBundle(
            loaders=loaders,
            text_encoder_names=(TEXT_ENCODER,),
            device=device,
            dtype=dtype,
            identity={
                name: f"{model.parts[name].identity()}-{str(dtypes[name]).removeprefix('torch.')}"
                for name in ("vae", "text_encoder")
            },
            facts={
                "source": model.path,
                "format": model.format,
                "version": model.version,
                "model": model,
                "v_prediction": options.model.v_parameterization,
                "zero_terminal_snr": options.noise.zero_terminal_snr,
                "tokenizer": tokenizer_folder(model, options),
            },
        )

    def strategies(self, options: TrainOptions) -> Strategies:
        model = describe(options.model)
        size = model.text_encoder.config.get("max_position_embeddings", 77)
        return Strategies(
            tokenize=SdTokenizeStrategy(
                tokenizer=load_clip_tokenizer(tokenizer_folder(model, options)),
                max_length=options.training.max_token_length or size - 2,
                size=size,
                weighted=options.loss.weighted_captions,
            ),
            text_encoding=SdTextEncodingStrategy(clip_skip=options.training.clip_skip),
            latents_caching=SdLatentsCachingStrategy(),
            text_caching=SdTextEncoderOutputsCachingStrategy(),
        )

    def enable_gradient_checkpointing(self, part: str, module: nn.Module) -> None:
        if part == "denoiser":
            unet: Any = module
            unet.enable_gradient_checkpointing()
        else:
            enable_encoder_checkpointing(module)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def objective(self, options: TrainOptions) -> DiscreteDDPM:
        noise, loss = options.noise, options.loss
        return DiscreteDDPM(
            v_prediction=options.model.v_parameterization,
            zero_terminal_snr=noise.zero_terminal_snr,
            min_timestep=noise.min_timestep or 0,
            max_timestep=1000 if noise.max_timestep is None else noise.max_timestep,
            min_snr_gamma=loss.min_snr_gamma or None,
            debiased=loss.debiased_estimation_loss,
            scale_v_like_noise=loss.scale_v_pred_loss_like_noise_pred,
            v_like_loss=loss.v_pred_like_loss or None,
            huber_schedule=loss.huber_schedule,
            huber_c=loss.huber_c,
            huber_scale=loss.huber_scale,
        )

    def predict(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: SdConditioning,
        batch: TrainBatch | None,
        options: TrainOptions,
    ) -> Tensor:
        context = cond.context
        if not torch.is_autocast_enabled(x_t.device.type):
            dtype = next(denoiser.parameters()).dtype
            x_t, context = x_t.to(dtype), context.to(dtype)
        output: Tensor = denoiser(x_t, t, encoder_hidden_states=context, return_dict=False)[0]
        return output

    def sample(self, denoiser: nn.Module, request: SampleRequest, options: TrainOptions, device: torch.device) -> Tensor:
        spec = self.latent(options)
        cond: Any = type(request.positive).collate([request.positive.rows(0), request.negative.rows(0)]).to(device)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            """One row for each of x_t's: the positive prompt, then, when guided, the negative one."""
            return self.predict(denoiser, x_t, t, cond.rows(slice(0, len(x_t))), None, options).float()

        return sample_diffusion(
            predict if request.guidance == 1 else guided_pair(predict, request.guidance),
            make_scheduler(request.sampler, self.objective(options)),
            (1, spec.channels, request.height // spec.stride, request.width // spec.stride),
            steps=request.steps,
            seed=request.seed,
            device=device,
        )

    def decode(self, vae: nn.Module, latents: Tensor, options: TrainOptions) -> Tensor:
        return decode_latents(vae, self.latent(options).denormalize(latents))

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, bundle: ModelBundle, path: Path, *, format: str, dtype: torch.dtype | None, metadata: Mapping[str, str]
    ) -> None:
        facts = bundle.facts
        checkpoint = SdCheckpoint(
            model=facts["model"],
            modules={name: bundle.part(name) for name in ("denoiser", TEXT_ENCODER) if bundle.loaded(name)},
            v_prediction=facts["v_prediction"],
            zero_terminal_snr=facts["zero_terminal_snr"],
            tokenizer_folder=facts["tokenizer"],
        )
        checkpoint.write(path, format=format, dtype=dtype, metadata=metadata)


def tokenizer_folder(model: SdModel, options: TrainOptions) -> Path:
    """Where the tokenizer is; downloads it when that is what is left. Raises `UserError` when there is none."""
    return find_tokenizer(
        flag=options.model.tokenizer,
        model_folder=model.path if model.path.is_dir() else None,
        cache_dir=options.model.tokenizer_cache_dir,
        hub_id=SD1_TOKENIZER if model.version == "v1" else SD2_TOKENIZER,
        subfolder=None if model.version == "v1" else "tokenizer",
    )
