"""Our Stable Diffusion against diffusers and transformers: loading, key tables, conditioning, schedule and loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library import clip_parts, unet_names, vae_parts
from library.losses import element_loss, image_means
from library.objectives import DiscreteDDPM
from library.option_groups import LossOptions, ModelOptions, NetworkTrainOptions, NoiseOptions
from library.rng import keyed_generator
from library.sd_train_utils import SdFamily
from library.sd_utils import CLIP_PREFIX, OPEN_CLIP_PREFIX
from library.strategy_sd import SdConditioning
from library.unet_parts import UNET_PREFIX
from library.vae_parts import VAE_PREFIX
from tests import tiny

FAMILY = SdFamily()
OPTIONS = NetworkTrainOptions()
CPU = torch.device("cpu")


def randn(*shape: int, key: str = "x") -> torch.Tensor:
    return torch.randn(shape, generator=keyed_generator("test", key))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NetworkTrainOptions]:
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, NetworkTrainOptions] = {}
    for version in ("v1", "v2"):
        path = tiny.write_sd_checkpoint(folder / f"{version}.safetensors", version=version)
        tokenizer = tiny.write_clip_tokenizer(folder / f"tokenizer_{version}", version=version)
        made[version] = NetworkTrainOptions(
            model=ModelOptions(pretrained_model_name_or_path=str(path), v2=version == "v2", tokenizer=str(tokenizer))
        )
    return made


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_single_file_gives_the_outputs_of_modules_built_directly(version: Any, models: dict[str, NetworkTrainOptions]):
    bundle = FAMILY.load(models[version], device=CPU, dtype=torch.float32)
    direct: dict[str, Any] = tiny.sd_modules(version)
    ids = torch.randint(0, tiny.VOCABULARY_SIZE, (2, 77), generator=keyed_generator("ids"))
    x, t, image = randn(2, 4, 8, 8), torch.tensor([3, 700]), randn(1, 3, 32, 32)
    with torch.no_grad():
        context = direct["text_encoder"](input_ids=ids).last_hidden_state
        torch.testing.assert_close(
            bundle.text_encoders["text_encoder"](input_ids=ids).last_hidden_state, context, atol=1e-5, rtol=0
        )
        expected = direct["denoiser"](x, t, encoder_hidden_states=context).sample
        ours = FAMILY.predict(bundle.denoiser, x, t, SdConditioning(context=context), None, OPTIONS)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.1
        vae: Any = bundle.vae
        torch.testing.assert_close(
            vae.encode(image).latent_dist.mean, direct["vae"].encode(image).latent_dist.mean, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(vae.decode(x).sample, direct["vae"].decode(x).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_sizes_told_from_shapes_are_those_the_model_was_made_with(version: Any, models: dict[str, NetworkTrainOptions]):
    bundle = FAMILY.load(models[version], device=CPU, dtype=torch.float32)
    for name, module in tiny.sd_modules(version).items():
        got, expected = (dict(m.config) if name != "text_encoder" else m.config.to_dict() for m in (bundle.part(name), module))
        for config in (got, expected):
            for key in ("_name_or_path", "_use_default_values", "dtype", "sample_size"):
                config.pop(key, None)
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in got.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in expected.items()
        }


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_key_tables_agree_with_the_converters_of_diffusers(version: Any):
    from diffusers.loaders import single_file_utils as oracle

    file = tiny.sd_ldm_tensors(version)
    configs, modules = tiny.sd_configs(version), tiny.sd_modules(version)
    converted = {
        "denoiser": oracle.convert_ldm_unet_checkpoint(dict(file), configs["denoiser"]),
        "vae": oracle.convert_ldm_vae_checkpoint(dict(file), configs["vae"]),
    }
    if version == "v1":
        converted["text_encoder"] = oracle.convert_ldm_clip_checkpoint(dict(file))
    else:
        found = oracle.convert_open_clip_checkpoint(modules["text_encoder"], dict(file), prefix=OPEN_CLIP_PREFIX)
        converted["text_encoder"] = {k: v for k, v in found.items() if ".layers.2." not in k and k != "text_projection.weight"}
    for name, theirs in converted.items():
        ours = modules[name].state_dict()
        theirs = {key.removeprefix("text_model."): value for key, value in theirs.items() if "position_ids" not in key}
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            assert torch.equal(value.reshape(ours[key].shape), ours[key]), key


def test_key_tables_know_every_key_of_a_file_and_nothing_twice():
    for version in ("v1", "v2"):
        file = tiny.sd_ldm_tensors(version)
        config = tiny.sd_configs(version)["denoiser"]
        tables = {UNET_PREFIX: unet_names.unet_key_map_for(config), VAE_PREFIX: vae_parts.vae_key_map(4)}
        for prefix, table in tables.items():
            keys = [key.removeprefix(prefix) for key in file if key.startswith(prefix)]
            origins, unknown = table.origins(keys)
            assert not unknown
            assert len(origins) == len(keys)
    assert len(clip_parts.CLIP_NAMES.origins(k.removeprefix(CLIP_PREFIX) for k in tiny.sd_ldm_tensors("v1"))[0]) > 30


def test_zero_terminal_snr_betas_equal_those_of_diffusers():
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    plain = DiscreteDDPM().betas
    torch.testing.assert_close(DiscreteDDPM(zero_terminal_snr=True).betas, rescale_zero_terminal_snr(plain), atol=1e-12, rtol=0)
    assert DiscreteDDPM(zero_terminal_snr=True).alphas_cumprod[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_equals_one_computed_by_hand_from_the_ddpm_scheduler(
    prediction: str, gamma: float | None, models: dict[str, NetworkTrainOptions]
):
    from diffusers import DDPMScheduler

    base = models["v1"].model
    options = NetworkTrainOptions(
        model=ModelOptions(
            pretrained_model_name_or_path=base.pretrained_model_name_or_path,
            tokenizer=base.tokenizer,
            v_parameterization=prediction == "v_prediction",
        ),
        loss=LossOptions(min_snr_gamma=gamma),
        noise=NoiseOptions(),
    )
    x0, noise, context = randn(3, 4, 8, 8, key="x0"), randn(3, 4, 8, 8, key="noise"), randn(3, 77, 64, key="context")
    t = torch.tensor([1, 400, 998])
    unet: Any = tiny.sd_modules("v1")["denoiser"]

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)
    with torch.no_grad():
        pred = unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=context).sample
    target = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    per_image = ((pred - target) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
        least = torch.minimum(snr, torch.full_like(snr, gamma))
        per_image = per_image * (least / snr if prediction == "epsilon" else least / (snr + 1))

    objective = FAMILY.objective(options)
    noised = objective.corrupt(x0, noise, t)
    with torch.no_grad():
        ours = FAMILY.predict(unet, noised.x_t, t, SdConditioning(context=context), None, OPTIONS)
    error = element_loss(ours, noised.target, options.loss.loss_type)
    loss = (image_means(error, None) * objective.weight(t)).mean()
    assert abs(loss.item() - per_image.mean().item()) < 1e-6


def test_previews_run_the_predict_that_is_trained_and_decode_to_the_pictures_size(models: dict[str, NetworkTrainOptions]):
    from library.family_base import SampleRequest

    options = models["v1"]
    bundle = FAMILY.load(options, device=CPU, dtype=torch.float32)
    strategies = FAMILY.strategies(options)
    with torch.no_grad():
        positive, negative = (
            strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize([text]))
            for text in ("a red circle", "")
        )
    calls: list[int] = []
    bundle.denoiser.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    base = {"positive": positive, "negative": negative, "width": 64, "height": 48, "steps": 2, "sampler": "ddim", "seeds": (1,)}
    guided = FAMILY.sample(bundle.denoiser, SampleRequest(**base, guidance=5.0), options, CPU)
    plain = FAMILY.sample(bundle.denoiser, SampleRequest(**base, guidance=1.0), options, CPU)
    assert calls == [2, 2, 1, 1]
    assert guided.shape == (1, 4, 6, 8)
    assert not torch.allclose(guided, plain)
    image = FAMILY.decode(bundle.vae, guided, options)
    assert image.shape == (1, 3, 48, 64)
    assert image.abs().max() <= 1


def test_a_stored_latent_is_a_posterior_sample_that_scaling_turns_into_the_training_one(models: dict[str, NetworkTrainOptions]):
    options = models["v1"]
    bundle = FAMILY.load(options, device=CPU, dtype=torch.float32)
    caching = FAMILY.strategies(options).latents_caching
    images = randn(3, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        stored = caching.encode(bundle.vae, images, [5, 6, 7])
        alone = caching.encode(bundle.vae, images[1:2], [6])
        vae: Any = bundle.vae
        posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(stored[1:2], alone, atol=1e-5, rtol=0)
    noise = torch.randn(4, 4, 4, generator=keyed_generator("vae", 7))
    torch.testing.assert_close(stored[2], posterior.mean[2] + posterior.std[2] * noise)
    spec = FAMILY.latent(options)
    assert (spec.scale, spec.stride, spec.channels) == (0.18215, 8, 4)
    torch.testing.assert_close(spec.normalize(stored), stored * 0.18215)


@pytest.mark.parametrize("part", ["denoiser", "text_encoder"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(part: str, models: dict[str, NetworkTrainOptions]):
    gradients, calls = [], []
    for checkpointing in (False, True):
        bundle = FAMILY.load(models["v1"], device=CPU, dtype=torch.float32)
        module: Any = bundle.part(part).requires_grad_(True).train()
        if checkpointing:
            FAMILY.enable_gradient_checkpointing(part, module)
        inner = module.down_blocks[1].resnets[0].conv1 if part == "denoiser" else module.encoder.layers[0].mlp.fc1
        counted: list[int] = []
        inner.register_forward_hook(lambda *args, counted=counted: counted.append(1))
        if part == "denoiser":
            out = FAMILY.predict(
                module, randn(1, 4, 8, 8), torch.tensor([10]), SdConditioning(context=randn(1, 77, 64)), None, OPTIONS
            )
        else:
            out = module(input_ids=torch.arange(77).unsqueeze(0)).last_hidden_state
        out.square().mean().backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
        calls.append(len(counted))
    assert calls == [1, 2]
    assert len(gradients[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_predict_takes_float32_latents_whatever_the_weights_are_held_in(autocast: bool, models: dict[str, NetworkTrainOptions]):
    x, t, cond = randn(1, 4, 8, 8), torch.tensor([500]), SdConditioning(context=randn(1, 77, 64))
    bundles = [FAMILY.load(models["v1"], device=CPU, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        exact, rounded = (FAMILY.predict(bundle.denoiser, x, t, cond, None, OPTIONS).float() for bundle in bundles)
    assert exact.isfinite().all()
    assert (exact - rounded).std() < 0.1 * exact.std()


def test_folder_and_file_of_one_model_predict_alike(tmp_path: Path, models: dict[str, NetworkTrainOptions]):
    folder = tiny.write_sd_diffusers(tmp_path / "folder")
    options = NetworkTrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(folder)))
    from_folder, from_file = (FAMILY.load(o, device=CPU, dtype=torch.float32) for o in (options, models["v1"]))
    for name in ("denoiser", "vae", "text_encoder"):
        a, b = from_folder.part(name).state_dict(), from_file.part(name).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
