"""Our SDXL against diffusers and transformers: loading, key tables, a conditioned step, and the training loss."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import tiny_sdxl
import torch
from runs import CASES, Workspace
from torch import Tensor

from library.noise import make_noise
from library.option_groups import ModelOptions, NetworkTrainOptions
from library.rng import keyed_generator
from library.sdxl_models import block_number
from library.sdxl_options import NUM_BLOCKS
from library.sdxl_train_utils import SdxlFamily, preview_sizes
from library.sdxl_utils import CLIP_L_PREFIX, OPEN_CLIP_PREFIX
from library.strategy_sdxl import CLIP_L, OPEN_CLIP, SdxlConditioning
from library.unet_parts import UNET_PREFIX

FAMILY = SdxlFamily()
CPU = torch.device("cpu")
PROMPTS = ["a red circle on blue", "a green square, large"]


def randn(*shape: int, key: str = "x") -> Tensor:
    return torch.randn(shape, generator=keyed_generator("test", key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_folder(tmp_path_factory.mktemp("sdxl") / "folder")


@pytest.fixture(scope="module")
def options(folder: Path) -> NetworkTrainOptions:
    """Of a single file, whose tokenizer is in a folder."""
    path = tiny_sdxl.write_checkpoint(folder.parent / "sdxl.safetensors")
    return NetworkTrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(path), tokenizer=str(folder / "tokenizer")))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def test_a_single_file_gives_the_outputs_of_modules_built_directly(options: NetworkTrainOptions) -> None:
    bundle = FAMILY.load(options, device=CPU, dtype=torch.float32)
    direct: dict[str, Any] = tiny_sdxl.modules()
    ids = torch.randint(0, tiny.VOCABULARY_SIZE, (2, 77), generator=keyed_generator("ids"))
    x, t, image = randn(2, 4, 8, 8), torch.tensor([3, 700]), randn(1, 3, 32, 32)
    added = {"text_embeds": randn(2, 64), "time_ids": torch.tensor([[64.0, 80, 0, 8, 64, 64], [48, 64, 4, 0, 32, 64]])}
    encoders: dict[str, Any] = bundle.text_encoders
    denoiser: Any = bundle.denoiser
    with torch.no_grad():
        for name in (CLIP_L, OPEN_CLIP):
            ours, theirs = (model[name](input_ids=ids, output_hidden_states=True) for model in (encoders, direct))
            for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            encoders[OPEN_CLIP](input_ids=ids).text_embeds, direct[OPEN_CLIP](input_ids=ids).text_embeds, atol=1e-5, rtol=0
        )
        context = randn(2, 77, 128, key="context")
        expected = direct["denoiser"](x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
        ours = denoiser(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.1
        vae: Any = bundle.vae
        torch.testing.assert_close(
            vae.encode(image).latent_dist.mean, direct["vae"].encode(image).latent_dist.mean, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(vae.decode(x).sample, direct["vae"].decode(x).sample, atol=1e-5, rtol=0)


def test_sizes_told_from_shapes_are_those_the_model_was_made_with(options: NetworkTrainOptions) -> None:
    bundle = FAMILY.load(options, device=CPU, dtype=torch.float32)
    for name, module in tiny_sdxl.modules().items():
        found = []
        for own in (bundle.part(name), module):
            config: Any = own.config
            values = config.to_dict() if name in (CLIP_L, OPEN_CLIP) else dict(config)
            left_out = ("_name_or_path", "_use_default_values", "dtype", "sample_size")
            found.append({k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k not in left_out})
        assert found[0] == found[1], name


def test_key_tables_agree_with_the_converters_of_diffusers() -> None:
    from diffusers.loaders import single_file_utils as oracle

    file = tiny_sdxl.ldm_tensors()
    parts, configs = tiny_sdxl.modules(), tiny_sdxl.configs()
    unet = {key: value for key, value in file.items() if key.startswith(UNET_PREFIX)}
    converted = {
        "denoiser": oracle.convert_ldm_unet_checkpoint(unet, configs["denoiser"] | {"layers_per_block": 2}),
        CLIP_L: oracle.convert_ldm_clip_checkpoint(
            {key.replace(CLIP_L_PREFIX, "cond_stage_model.transformer."): value for key, value in file.items()}
        ),
        OPEN_CLIP: oracle.convert_open_clip_checkpoint(parts[OPEN_CLIP], dict(file), prefix=OPEN_CLIP_PREFIX),
    }
    for name, theirs in converted.items():
        ours = parts[name].state_dict()
        prefix = "text_model." if name == CLIP_L else ""
        theirs = {key.removeprefix(prefix): value for key, value in theirs.items() if "position_ids" not in key}
        assert theirs.keys() == ours.keys(), name
        for key, value in theirs.items():
            assert torch.equal(value.reshape(ours[key].shape), ours[key]), key


def encode(options: NetworkTrainOptions, prompts: list[str]) -> tuple[Any, SdxlConditioning]:
    bundle = FAMILY.load(options, device=CPU, dtype=torch.float32)
    strategies = FAMILY.strategies(options)
    with torch.no_grad():
        cond: Any = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize(prompts))
    return bundle, cond


def test_a_conditioned_step_is_that_of_the_pipeline(options: NetworkTrainOptions, pipeline: Any) -> None:
    bundle, cond = encode(options, PROMPTS)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, device=CPU, do_classifier_free_guidance=False)
    torch.testing.assert_close(torch.cat([cond.hidden_state1, cond.hidden_state2], dim=-1), embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(cond.pool2, pooled, atol=1e-5, rtol=0)
    x, t = randn(2, 4, 4, 12), torch.tensor([40, 900])
    sizes = pipeline._get_add_time_ids((32, 96), (0, 0), (32, 96), dtype=torch.float32, text_encoder_projection_dim=64)
    assert torch.equal(preview_sizes(x, 8), sizes.repeat(2, 1).long())
    with torch.no_grad():
        ours = FAMILY.predict(bundle.denoiser, x, t, cond, None, options)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(2, 1)}
        theirs = pipeline.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = runs.make_workspace(CASES["sdxl"], tmp_path_factory.mktemp("runs"))
    tiny.write_images(made.images.parent / "wide" / "1_thing", 2, (96, 64))
    return made


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_equals_one_computed_by_hand_from_the_pipelines_parts(
    prediction: str, workspace: Workspace, pipeline: Any, tmp_path: Path
) -> None:
    from diffusers import DDPMScheduler

    flags = ["--v_parameterization", "--zero_terminal_snr"] if prediction == "v_prediction" else []
    wide = workspace.images.parent / "wide"
    trainer = workspace.trainer("network", tmp_path, f"--train_data_dir={wide}", "--no-enable_bucket", *flags)
    batch: Any = trainer.data.train[(0, 0)]
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=prediction == "v_prediction",
    )
    with torch.no_grad():
        loss = trainer.loss(batch)

        posterior = pipeline.vae.encode(batch.images).latent_dist
        draws = torch.stack([torch.randn(4, 8, 8, generator=keyed_generator("vae", seed)) for seed in batch.latent_seeds])
        stored = (posterior.mean + posterior.std * draws).half().float()  # latents are kept in float16, live ones too
        x0 = stored * 0.13025
        t = trainer.objective.sample_times(x0, trainer.rng("time", CPU))
        noise = make_noise(x0, trainer.options.noise, trainer.rng)
        embeds, _, pooled, _ = pipeline.encode_prompt(list(batch.captions), device=CPU, do_classifier_free_guidance=False)
        # 96x64 is cut to 64x64 in the middle
        sizes = pipeline._get_add_time_ids((64, 96), (0, 16), (64, 64), dtype=torch.float32, text_encoder_projection_dim=64)
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(2, 1)}
        pred = pipeline.unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        target = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
        expected = ((pred - target) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_blocks_of_block_lr_are_the_ones_the_original_names_count() -> None:
    names = [name for name, _ in tiny_sdxl.modules()["denoiser"].named_parameters()]
    numbers = {name: block_number(name) for name in names}
    assert set(numbers.values()) == set(range(NUM_BLOCKS))
    assert numbers["add_embedding.linear_1.weight"] == numbers["time_embedding.linear_2.bias"] == 0
    assert numbers["conv_in.weight"] == 1
    assert numbers["down_blocks.1.attentions.1.proj_in.weight"] == 6
    assert numbers["mid_block.attentions.0.proj_in.weight"] == 11
    assert numbers["up_blocks.2.resnets.2.conv1.weight"] == 21
    assert numbers["conv_out.bias"] == numbers["conv_norm_out.weight"] == 22


@pytest.mark.parametrize("part", ["denoiser", CLIP_L, OPEN_CLIP])
def test_gradient_checkpointing_changes_no_gradient(part: str, options: NetworkTrainOptions) -> None:
    gradients = []
    for checkpointing in (False, True):
        bundle = FAMILY.load(options, device=CPU, dtype=torch.float32)
        module = bundle.part(part).requires_grad_(True).train()
        if checkpointing:
            FAMILY.enable_gradient_checkpointing(part, module)
        strategies = FAMILY.strategies(options)
        cond: Any = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize(PROMPTS[:1]))
        out = FAMILY.predict(bundle.denoiser, randn(1, 4, 8, 8), torch.tensor([10]), cond, None, options)
        out.square().mean().backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_sizes_stay_exact_whatever_the_weights_are_held_in(autocast: bool, options: NetworkTrainOptions) -> None:
    x, t = randn(1, 4, 8, 8), torch.tensor([500])
    cond = SdxlConditioning(
        hidden_state1=randn(1, 77, 64), hidden_state2=randn(1, 77, 64, key="b"), pool2=randn(1, 64, key="c")
    )
    bundles = [FAMILY.load(options, device=CPU, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        exact, rounded = (FAMILY.predict(bundle.denoiser, x, t, cond, None, options).float() for bundle in bundles)
    assert exact.isfinite().all()
    assert (exact - rounded).std() < 0.1 * exact.std()


def test_previews_are_guided_in_one_call_and_decode_to_the_pictures_size(options: NetworkTrainOptions) -> None:
    from library.family_base import SampleRequest

    bundle, cond = encode(options, ["a red circle"])
    _, empty = encode(options, [""])
    calls: list[tuple[int, list[float]]] = []

    def note(module: object, args: Any, kwargs: Any, out: object) -> None:
        calls.append((len(args[0]), kwargs["added_cond_kwargs"]["time_ids"][-1].tolist()))

    bundle.denoiser.register_forward_hook(note, with_kwargs=True)
    base: dict[str, Any] = {"positive": cond, "negative": empty, "width": 64, "height": 32, "steps": 2, "sampler": "ddim"}
    guided = FAMILY.sample(bundle.denoiser, SampleRequest(**base, guidance=5.0, seeds=(1,)), options, CPU)
    FAMILY.sample(bundle.denoiser, SampleRequest(**base, guidance=1.0, seeds=(1,)), options, CPU)
    assert calls == [(2, [32, 64, 0, 0, 32, 64])] * 2 + [(1, [32, 64, 0, 0, 32, 64])] * 2
    assert FAMILY.decode(bundle.vae, guided, options).shape == (1, 3, 32, 64)


def test_the_folder_and_the_file_of_one_model_are_alike(folder: Path, options: NetworkTrainOptions) -> None:
    of_folder = NetworkTrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(folder)))
    one, other = (FAMILY.load(o, device=CPU, dtype=torch.float32) for o in (of_folder, options))
    for name in ("denoiser", "vae", CLIP_L, OPEN_CLIP):
        assert tiny.same_tensors(dict(one.part(name).state_dict()), dict(other.part(name).state_dict())), name
    first, second = (FAMILY.strategies(o).tokenize.tokenize(PROMPTS) for o in (of_folder, options))
    assert all(torch.equal(first[name], second[name]) for name in (CLIP_L, OPEN_CLIP))
