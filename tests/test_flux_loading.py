"""FLUX.1 and Chroma on disk: every layout gives the same model, conditioning is diffusers', and what is saved is read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_flux
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.family_base import ModelBundle, SampleRequest
from library.flux_models import Flux
from library.flux_names import FLUX_DIFFUSERS
from library.flux_options import FluxOptions
from library.flux_train_utils import FluxFamily
from library.flux_utils import describe
from library.model_parts import SaveSettings
from library.option_groups import NetworkTrainOptions
from library.options import from_flags
from library.rng import keyed_generator
from library.strategy_flux import FluxConditioning, with_one_padding

FAMILY = FluxFamily()
CPU = torch.device("cpu")
KINDS = ("dev", "schnell", "chroma")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux")
    return {kind: tiny_flux.write_flux_files(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("diffusers")
    return {kind: tiny_flux.write_flux_folder(folder / kind, kind) for kind in ("dev", "chroma")}


def options(model: Path, beside: Path | None = None, **flags: Any) -> NetworkTrainOptions:
    """beside: the folder with the other parts and the tokenizers, for models that do not hold them."""
    given = dict(argument.removeprefix("--").split("=", 1) for argument in tiny_flux.arguments(beside)) if beside else {}
    given = {key: int(value) if key.endswith("length") else value for key, value in given.items()} | flags
    return from_flags(NetworkTrainOptions, FluxOptions, pretrained_model_name_or_path=str(model), **given)


def load(chosen: NetworkTrainOptions, dtype: torch.dtype = torch.float32) -> ModelBundle:
    return FAMILY.load(chosen, device=CPU, dtype=dtype)


def state(bundle: ModelBundle) -> dict[str, dict[str, Tensor]]:
    return {name: bundle.part(name).state_dict() for name in ("denoiser", "vae", *bundle.text_encoder_names)}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for part in one:
        assert tiny.same_tensors(one[part], other[part]), part


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("flux-loading", key))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_from_the_file(kind: str, files: dict[str, Path]) -> None:
    model = describe(options(files[kind], files[kind].parent))
    assert model.kind == kind
    assert list(model.parts) == ["denoiser", *(["t5xxl"] if kind == "chroma" else ["clip_l", "t5xxl"]), "vae"]
    chosen = options(files[kind], files[kind].parent)
    assert FAMILY.base_model_version(chosen) == ("chroma" if kind == "chroma" else "flux1")
    assert FAMILY.modelspec_architecture(chosen) == ("chroma" if kind == "chroma" else f"flux-1-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_separate_files_give_the_very_weights(kind: str, files: dict[str, Path]) -> None:
    expected = {name: module.state_dict() for name, module in tiny_flux.modules(kind).items()}
    assert_same(state(load(options(files[kind], files[kind].parent))), expected)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_one_file_with_everything_gives_the_same_model(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_flux.write_flux_single(tmp_path / "all.safetensors", kind)
    cache = tiny_flux.write_tokenizers(tmp_path / "tokenizers")
    expected = state(load(options(files[kind], files[kind].parent)))
    assert_same(state(load(options(path, tokenizer_cache_dir=str(cache)))), expected)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_a_diffusers_folder_gives_the_same_model(kind: str, files: dict[str, Path], folders: dict[str, Path]) -> None:
    assert_same(state(load(options(folders[kind]))), state(load(options(files[kind], files[kind].parent))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_lower_precisions_under_the_common_prefix_are_read(dtype: torch.dtype, files: dict[str, Path], tmp_path: Path) -> None:
    path = tiny_flux.write_flux_files(tmp_path, "dev", dtype=dtype, prefix="model.diffusion_model.")
    read = load(options(path, tmp_path)).denoiser.state_dict()
    exact = load_file(files["dev"])
    assert all(torch.equal(read[name], exact[name].to(dtype).float()) for name in exact)


def test_any_number_of_shards_is_one_model(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["dev"])
    names = sorted(tensors)
    for number in range(1, 5):
        part = {name: tensors[name] for name in names[number - 1 :: 4]}
        save_file(part, tmp_path / f"flux-{number:05d}-of-00004.safetensors")
    bundle = load(options(tmp_path / "flux-00002-of-00004.safetensors", files["dev"].parent))
    assert tiny.same_tensors(bundle.denoiser.state_dict(), tensors)


def test_a_pruned_model_is_read(files: dict[str, Path], tmp_path: Path) -> None:
    kept = {name: t for name, t in load_file(files["dev"]).items() if not name.startswith("double_blocks.1.")}
    save_file(kept, tmp_path / "pruned.safetensors")
    denoiser = load(options(tmp_path / "pruned.safetensors", files["dev"].parent)).denoiser
    assert isinstance(denoiser, Flux)
    assert len(denoiser.double_blocks) == 1


def test_all_missing_parts_are_told_at_once(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="--clip_l, --t5xxl, --ae"):
        FAMILY.check(options(files["dev"]))


def test_a_model_type_that_the_file_contradicts_is_an_error(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="is Chroma, and --model_type says flux"):
        FAMILY.check(options(files["chroma"], files["chroma"].parent, model_type="flux"))


def test_a_text_encoder_given_as_the_wrong_one_is_named(files: dict[str, Path]) -> None:
    beside = files["dev"].parent
    with pytest.raises(UserError, match="--t5xxl .*clip_l.safetensors has no T5 encoder in it: it is a CLIP text encoder"):
        FAMILY.check(options(files["dev"], beside, t5xxl=str(beside / "clip_l.safetensors")))


def test_a_fill_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["dev"])
    tensors["img_in.weight"] = torch.cat([tensors["img_in.weight"]] * 2, dim=1)
    save_file(tensors, tmp_path / "fill.safetensors")
    with pytest.raises(UserError, match="takes 32 channels and gives 16"):
        FAMILY.check(options(tmp_path / "fill.safetensors", files["dev"].parent))


def test_a_missing_tensor_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["dev"])
    del tensors["double_blocks.1.img_attn.proj.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="1 missing: double_blocks.1.img_attn.proj.bias"):
        load(options(tmp_path / "short.safetensors", files["dev"].parent))


# ---- conditioning, latents and previews against diffusers' pipelines ---------------------------------------------------


def pipeline(folder: Path, kind: str) -> Any:
    import diffusers

    cls = diffusers.ChromaPipeline if kind == "chroma" else diffusers.FluxPipeline
    return cls.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_conditioning_is_that_of_the_pipeline(kind: str, folders: dict[str, Path]) -> None:
    chosen = options(folders[kind], t5xxl_max_token_length=24)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    captions = ["a red circle on green", "a much longer caption that does not fit into so few tokens"]
    with torch.no_grad():
        cond = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize(captions))
        pipe = pipeline(folders[kind], kind)
        if kind == "chroma":
            context, _, mask, *_ = pipe.encode_prompt(
                captions, do_classifier_free_guidance=False, max_sequence_length=24, device=CPU
            )
            assert torch.equal(with_one_padding(cond.mask.bool()), mask.bool())
        else:
            context, pooled, _ = pipe.encode_prompt(captions, captions, max_sequence_length=24, device=CPU)
            torch.testing.assert_close(cond.pooled, pooled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cond.context, context, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(cond.context[0], cond.context[1])


def test_latents_are_scaled_as_the_pipelines_scale_them(folders: dict[str, Path]) -> None:
    chosen = options(folders["dev"])
    bundle, strategy = load(chosen), FAMILY.strategies(chosen).latents_caching
    images = randn(2, 3, 32, 32, key="images").clamp(-1, 1)
    stored = strategy.encode(bundle.vae, images, [1, 2])
    pipe = pipeline(folders["dev"], "dev")
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    noise = torch.stack([torch.randn(4, 4, 4, generator=keyed_generator("vae", seed)) for seed in (1, 2)])
    sample = posterior.mean + posterior.std * noise
    torch.testing.assert_close(stored, (sample - 0.1159) * 0.3611, atol=1e-6, rtol=1e-5)
    spec = FAMILY.latent(chosen)
    assert (spec.stride, spec.patch, spec.scale, spec.shift) == (8, 2, 1.0, 0.0)
    decoded = FAMILY.decode(bundle.vae, stored, chosen)
    with torch.no_grad():
        torch.testing.assert_close(decoded, pipe.vae.decode(sample).sample.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_a_preview_is_the_picture_the_pipeline_makes(folders: dict[str, Path]) -> None:
    chosen = options(folders["dev"], t5xxl_max_token_length=24)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    prompt = "a blue square"
    with torch.no_grad():
        cond = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize([prompt]))
        request = SampleRequest(
            cond, cond, 64, 96, steps=4, guidance=1.0, sampler="", seeds=(3,), extra={"guidance_scale": 2.5}
        )
        ours = FAMILY.sample(bundle.denoiser, request, chosen, CPU)
        pipe = pipeline(folders["dev"], "dev")
        expected = pipe(
            prompt,
            width=64,
            height=96,
            num_inference_steps=4,
            guidance_scale=2.5,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
    expected = pipe._unpack_latents(expected, 96, 64, pipe.vae_scale_factor)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_padding_is_hidden_where_it_is_asked_for(files: dict[str, Path]) -> None:
    beside = files["dev"].parent
    plain, masked = options(files["dev"], beside), options(files["dev"], beside, apply_t5_attn_mask=True)
    bundle = load(plain)
    x, t = randn(1, 4, 8, 8, key="x"), torch.tensor([0.4])
    mask = (torch.arange(32) < 5).long().unsqueeze(0)
    one = FluxConditioning(context=randn(1, 32, 24, key="context"), mask=mask, pooled=randn(1, 64, key="pooled"))
    other = FluxConditioning(context=one.context + (1 - mask)[..., None], mask=mask, pooled=one.pooled)
    with torch.no_grad():
        same = [FAMILY.predict(bundle.denoiser, x, t, cond, None, masked) for cond in (one, other)]
        differ = [FAMILY.predict(bundle.denoiser, x, t, cond, None, plain) for cond in (one, other)]
    torch.testing.assert_close(same[0], same[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(differ[0], differ[1], atol=1e-3)


# ---- caches of sd-scripts --------------------------------------------------------------------------------------------


def sd_scripts_cache(path: Path, length: int, masked: bool) -> None:
    np.savez(
        path,
        l_pooled=np.zeros(64, np.float32),
        t5_out=np.ones((length, 24), np.float32),
        txt_ids=np.zeros((length, 3), np.float32),
        t5_attn_mask=np.ones(length, np.int64),
        apply_t5_attn_mask=masked,
    )


@pytest.mark.parametrize(("length", "masked", "usable"), [(32, False, True), (16, False, False), (32, True, False)])
def test_text_caches_of_sd_scripts_are_used_where_they_fit(
    length: int, masked: bool, usable: bool, files: dict[str, Path], tmp_path: Path
) -> None:
    from library.cache_io import Fingerprint, TextFile

    strategy = FAMILY.strategies(options(files["dev"], files["dev"].parent)).text_caching
    path = strategy.format.path_for(tmp_path / "picture.png")
    assert path.name == "picture_flux_te.npz"
    sd_scripts_cache(path, length, masked)
    file = TextFile(path, strategy, frozenset({"clip_l", "t5xxl"}))
    verdict = file.check(Fingerprint({}))
    assert (verdict.usable, verdict.foreign) == (usable, usable)
    if usable:
        entry = file.load()
        assert isinstance(entry, FluxConditioning)
        assert entry.context.shape == (32, 24)
        assert entry.mask.sum() == 32
    else:
        assert ("t5_out of the shape (16, 24), not (32, 24)" in verdict.stale) != ("apply_t5_attn_mask" in verdict.stale)


def test_latent_caches_have_sd_scripts_name_and_keys(files: dict[str, Path]) -> None:
    strategy = FAMILY.strategies(options(files["dev"], files["dev"].parent)).latents_caching
    assert strategy.format.path_for(Path("a/picture.png"), (640, 480)).name == "picture_0640x0480_flux.npz"
    assert strategy.format.by_resolution


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_saved_as_it_was(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    bundle = load(options(files[kind], files[kind].parent))
    _ = bundle.denoiser
    path = tmp_path / "saved.safetensors"
    FAMILY.save_checkpoint(bundle, path, SaveSettings("safetensors", metadata={"a": "b"}))
    assert tiny.same_tensors(load_file(path), load_file(files[kind]))


def test_a_kontext_folder_is_read_as_dev_and_stays_kontext(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its transformer has dev's shape. What a folder says of itself is not ours to change."""
    folder = shutil.copytree(folders["dev"], tmp_path / "kontext")
    index, scheduler = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxKontextPipeline"}))
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 2.5}))
    chosen = options(folder)
    FAMILY.check(chosen)
    assert describe(chosen).kind == "dev"
    bundle = load(chosen)
    FAMILY.save_checkpoint(bundle, tmp_path / "saved", SaveSettings("diffusers_safetensors"))
    assert json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 2.5
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    assert type(pipe) is diffusers.FluxKontextPipeline
    assert pipe.scheduler.config.shift == 2.5
    assert tiny.same_tensors(FLUX_DIFFUSERS.to_theirs(pipe.transformer.state_dict()), dict(bundle.denoiser.state_dict()))


@pytest.mark.parametrize("kind", ["dev", "chroma"])
def test_a_saved_folder_is_read_by_diffusers_and_by_us(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    bundle = load(options(files[kind], files[kind].parent))
    with torch.no_grad():
        for parameter in bundle.denoiser.parameters():
            parameter.mul_(1.1)  # as training would
    FAMILY.save_checkpoint(bundle, tmp_path / "saved", SaveSettings("diffusers_safetensors"))
    again = load(options(tmp_path / "saved"))
    assert_same(state(again), state(bundle))
    pipe = pipeline(tmp_path / "saved", kind)
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == type(pipe).__name__
    assert tiny.same_tensors(FLUX_DIFFUSERS.to_theirs(pipe.transformer.state_dict()), dict(bundle.denoiser.state_dict()))
