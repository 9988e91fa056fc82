"""Stable Diffusion 3 on disk: every layout gives the same model, conditioning is diffusers', what is saved is read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_flux
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.cache_io import Fingerprint, TextFile
from library.errors import UserError
from library.family_base import ModelBundle, SampleRequest
from library.model_parts import SaveSettings
from library.option_groups import NetworkTrainOptions
from library.options import from_flags
from library.rng import keyed_generator
from library.sd3_models import Kind
from library.sd3_names import sd3_key_map
from library.sd3_options import Sd3Options
from library.sd3_train_utils import Sd3Family
from library.sd3_utils import describe
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL
from library.strategy_sd3 import Sd3Conditioning

FAMILY = Sd3Family()
CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("m", "5-medium", "5-large")
VERSIONS = {"m": "medium", "5-medium": "5-medium", "5-large": "5-large"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd3")
    return {kind: tiny_sd3.write_files(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3.write_folder(tmp_path_factory.mktemp("diffusers") / "medium")


def options(model: Path, beside: Path | None = None, **flags: Any) -> NetworkTrainOptions:
    """beside: the folder with the other parts and the tokenizers, for models that do not hold them."""
    given = dict(argument.removeprefix("--").split("=", 1) for argument in tiny_sd3.arguments(beside)) if beside else {}
    given = {key: int(value) if key.endswith("length") else value for key, value in given.items()} | flags
    given = {"network_train_unet_only": True, **{key: value for key, value in given.items() if value is not None}}
    return from_flags(NetworkTrainOptions, Sd3Options, pretrained_model_name_or_path=str(model), **given)


def load(chosen: NetworkTrainOptions, dtype: torch.dtype = torch.float32) -> ModelBundle:
    return FAMILY.load(chosen, device=CPU, dtype=dtype)


def state(bundle: ModelBundle) -> dict[str, dict[str, Tensor]]:
    return {name: dict(bundle.part(name).state_dict()) for name in ("denoiser", "vae", *bundle.text_encoder_names)}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for part in one:
        assert tiny.same_tensors(one[part], other[part]), part


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("sd3-loading", key))


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_from_the_file_and_separate_files_give_the_very_weights(kind: Kind, files: dict[str, Path]) -> None:
    chosen = options(files[kind], files[kind].parent)
    model = describe(chosen)
    assert model.kind == kind
    assert list(model.parts) == ["denoiser", CLIP_L, CLIP_G, T5XXL, "vae"]
    assert FAMILY.base_model_version(chosen) == kind
    assert FAMILY.modelspec_architecture(chosen) == f"stable-diffusion-3-{VERSIONS[kind]}"
    assert_same(state(load(chosen)), {name: dict(module.state_dict()) for name, module in tiny_sd3.modules(kind).items()})


def test_every_layout_gives_the_same_model(files: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    beside = files["5-medium"].parent
    expected = state(load(options(files["5-medium"], beside)))
    cache = str(tiny_flux.write_tokenizers(tmp_path / "tokenizers"))
    whole = tiny_sd3.write_whole(tmp_path / "whole.safetensors")
    assert_same(state(load(options(whole, tokenizer_cache_dir=cache))), expected)
    assert_same(state(load(options(folder))), expected)
    bare = tiny_sd3.write_files(tmp_path / "bare", prefix="")
    assert_same(state(load(options(bare, tmp_path / "bare"))), expected)
    tensors = load_file(whole)
    for number in range(1, 4):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 3]}
        save_file(part, tmp_path / f"sd3-{number:05d}-of-00003.safetensors")
    assert_same(state(load(options(tmp_path / "sd3-00002-of-00003.safetensors", tokenizer_cache_dir=cache))), expected)


def test_a_vae_of_its_own_goes_before_the_models(files: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_sd3.tensors(seed=5)["vae"]
    save_file(other, tmp_path / "vae.safetensors")
    chosen = options(files["m"], files["m"].parent, vae=str(tmp_path / "vae.safetensors"))
    assert tiny.same_tensors(dict(load(chosen).vae.state_dict()), dict(tiny_sd3.modules(seed=5)["vae"].state_dict()))


def test_a_clip_without_projection_has_the_identity_for_it(files: dict[str, Path], tmp_path: Path) -> None:
    beside = files["m"].parent
    kept = {key: value for key, value in load_file(beside / "clip_l.safetensors").items() if "projection" not in key}
    save_file(kept, tmp_path / "clip_l.safetensors")
    encoder: Any = load(options(files["m"], beside, clip_l=str(tmp_path / "clip_l.safetensors"))).part(CLIP_L)
    assert torch.equal(encoder.text_projection.weight, torch.eye(tiny_sd3.CLIP_L_WIDTH))


def test_turbo_is_what_the_metadata_calls_so(files: dict[str, Path], tmp_path: Path) -> None:
    """Its tensors are those of any large model."""
    beside = files["5-large"].parent
    assert FAMILY.preview_guidance(options(files["5-large"], beside)) == 3.5
    save_file(load_file(files["5-large"]), tmp_path / "t.safetensors", {"modelspec.title": "SD3.5 Large Turbo"})
    assert FAMILY.preview_guidance(options(tmp_path / "t.safetensors", beside)) == 1.0


def changed(files: dict[str, Path], tmp_path: Path, key: str, change: Any) -> Path:
    tensors = load_file(files["m"])
    key = f"model.diffusion_model.{key}"
    tensors[key] = change(tensors[key])
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_parts_that_do_not_fit_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    beside = files["m"].parent
    with pytest.raises(UserError, match="does not hold all parts .* --clip_l, --clip_g, each"):
        FAMILY.check(options(files["m"]))
    with pytest.raises(UserError, match="--t5xxl .*clip_l.safetensors has no T5 encoder in it: it is a CLIP text encoder"):
        FAMILY.check(options(files["m"], beside, t5xxl=str(beside / "clip_l.safetensors")))
    swapped = {CLIP_L: str(beside / "clip_g.safetensors"), CLIP_G: str(beside / "clip_l.safetensors")}
    with pytest.raises(UserError, match="They are exchanged: CLIP-G is the wider one"):
        FAMILY.check(options(files["m"], beside, **swapped))
    with pytest.raises(UserError, match="give 128 numbers together, and the transformer .* takes 96"):
        FAMILY.check(options(files["m"], beside, clip_l=str(beside / "clip_g.safetensors")))
    fewer = changed(files, tmp_path, "context_embedder.weight", lambda weight: weight[:, :100].contiguous())
    with pytest.raises(UserError, match="--t5xxl .* is 104 wide, and the transformer .* takes 100"):
        FAMILY.check(options(fewer, beside))
    twice = changed(files, tmp_path, "x_embedder.proj.weight", lambda weight: torch.cat([weight, weight], dim=1))
    with pytest.raises(UserError, match="takes 8 channels and gives 4"):
        FAMILY.check(options(twice, beside))


# ---- conditioning, latents and previews against diffusers' pipeline ------------------------------------------------------


def pipeline(folder: Path) -> Any:
    """A folder without T5 is read as diffusers' own documentation says: with None for it."""
    import diffusers

    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline.from_pretrained(str(folder), local_files_only=True, **absent)


@pytest.mark.parametrize("without_t5", [False, True])
def test_conditioning_is_that_of_the_pipeline(without_t5: bool, folder: Path, tmp_path: Path) -> None:
    where = tiny_sd3.write_folder(tmp_path / "no_t5", without_t5=True) if without_t5 else folder
    chosen = options(where, t5xxl_max_token_length=24)
    FAMILY.check(chosen)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    captions = ["a red circle on green!", "a much longer caption " * 6, ""]
    with torch.no_grad():
        cond: Any = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize(captions))
        text = cond.joined(tiny_sd3.T5_WIDTH, 24, mask_clip=False, mask_t5=False)
        context, _, pooled, _ = pipeline(where).encode_prompt(
            captions, captions, captions, max_sequence_length=24, device=CPU, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(text.context, context, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-6, rtol=1e-5)
    assert bool(context[:, 77:].any()) != without_t5
    for mask in (cond.l_mask, cond.g_mask):
        assert mask.sum(dim=1).tolist() == [8, 77, 2]  # BOS, a, red, circle, on, green, !, EOS


def test_latents_and_pictures_are_those_of_the_pipeline(folder: Path) -> None:
    chosen = options(folder)
    bundle, strategy, pipe = load(chosen), FAMILY.strategies(chosen).latents_caching, pipeline(folder)
    images = randn(2, 3, 32, 32, key="images").clamp(-1, 1)
    stored = strategy.encode(bundle.vae, images, [1, 2])
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    noise = torch.stack([torch.randn(4, 4, 4, generator=keyed_generator("vae", seed)) for seed in (1, 2)])
    torch.testing.assert_close(stored, posterior.mean + posterior.std * noise, atol=1e-6, rtol=1e-5)
    spec = FAMILY.latent(chosen)
    assert (spec.stride, spec.patch, spec.scale, spec.shift) == (8, 2, 1.5305, 0.0609)
    latents = spec.normalize(stored)
    torch.testing.assert_close(latents, (stored - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    with torch.no_grad():
        expected = pipe.vae.decode(stored).sample.clamp(-1, 1)
    torch.testing.assert_close(FAMILY.decode(bundle.vae, latents, chosen), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_preview_is_the_picture_the_pipeline_makes(guidance: float, folder: Path) -> None:
    chosen = options(folder, t5xxl_max_token_length=24)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    with torch.no_grad():
        prompt, negative = (
            strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize([text]))
            for text in ("a blue square", "bad")
        )
        request = SampleRequest(prompt, negative, 64, 96, steps=4, guidance=guidance, sampler="", seeds=(3,))
        ours = FAMILY.sample(bundle.denoiser, request, chosen, CPU)
        expected = pipeline(folder)(
            "a blue square",
            negative_prompt="bad",
            width=64,
            height=96,
            num_inference_steps=4,
            guidance_scale=guidance,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


# ---- what flags do to the conditioning -----------------------------------------------------------------------------------


def test_masks_hide_padding_whether_it_comes_from_a_cache_or_not(files: dict[str, Path], tmp_path: Path) -> None:
    chosen = options(files["m"], files["m"].parent, apply_lg_attn_mask=True, apply_t5_attn_mask=True)
    plain = options(files["m"], files["m"].parent)
    bundle, masked = load(chosen), FAMILY.strategies(chosen)
    with torch.no_grad():
        tokens = masked.tokenize.tokenize(["a red circle"])
        live: Any = masked.text_encoding.encode(bundle.text_encoders, tokens)
        shown: Any = FAMILY.strategies(plain).text_encoding.encode(bundle.text_encoders, tokens)
    file = TextFile(tmp_path / "a_sd3_te.npz", masked.text_caching, live.sources())
    file.save(live.rows(0), Fingerprint({}))
    cached: Any = Sd3Conditioning.collate([file.load()])  # type: ignore[list-item]
    both = [cond.joined(tiny_sd3.T5_WIDTH, 16, mask_clip=True, mask_t5=True) for cond in (live, cached)]
    assert torch.equal(both[0].context, both[1].context) and torch.equal(both[0].pooled, both[1].pooled)
    count = int(live.l_mask.sum())
    assert not both[0].context[0, count:77].any() and both[0].context[0, :count].any(dim=-1).all()
    t5 = int(live.t5_attn_mask.sum())
    assert not both[0].context[0, 77 + t5 :].any()
    unmasked = shown.joined(tiny_sd3.T5_WIDTH, 16, mask_clip=False, mask_t5=False)
    assert torch.equal(unmasked.context[0, :count], both[0].context[0, :count]), "CLIP reads from left to right"
    assert not torch.allclose(unmasked.context[0, 77 : 77 + t5], both[0].context[0, 77 : 77 + t5], atol=1e-3)
    assert unmasked.context[0, count:77].any() and unmasked.context[0, 77 + t5 :].any()


def sd_scripts_cache(path: Path, length: int, masked: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "lg_out": rng.standard_normal((77, 96)).astype(np.float32),
        "lg_pooled": rng.standard_normal(96).astype(np.float32),
        "t5_out": rng.standard_normal((length, tiny_sd3.T5_WIDTH)).astype(np.float32),
        "clip_l_attn_mask": np.ones(77, np.int64),
        "clip_g_attn_mask": np.ones(77, np.int64),
        "t5_attn_mask": np.ones(length, np.int64),
        "apply_lg_attn_mask": np.array(False),
        "apply_t5_attn_mask": np.array(masked),
    }
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize(("length", "masked", "usable"), [(16, False, True), (12, False, False), (16, True, False)])
def test_text_caches_of_sd_scripts_are_used_where_they_fit(
    length: int, masked: bool, usable: bool, files: dict[str, Path], tmp_path: Path
) -> None:
    strategy = FAMILY.strategies(options(files["m"], files["m"].parent)).text_caching
    path = strategy.format.path_for(tmp_path / "picture.png")
    arrays = sd_scripts_cache(path, length, masked)
    file = TextFile(path, strategy, frozenset({CLIP_L, CLIP_G, T5XXL}))
    verdict = file.check(Fingerprint({}))
    assert (verdict.usable, verdict.foreign) == (usable, usable)
    if not usable:
        assert ("t5_out of the shape (12, 104), not (16, 104)" in verdict.stale) != ("apply_t5_attn_mask" in verdict.stale)
        return
    entry: Any = file.load()
    assert torch.equal(torch.cat([entry.l_out, entry.g_out], dim=-1), torch.from_numpy(arrays["lg_out"]))
    assert torch.equal(entry.g_pooled, torch.from_numpy(arrays["lg_pooled"][32:]))


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_whole_file_is_saved_as_it_was_and_what_is_no_part_stays(tmp_path: Path) -> None:
    extra = {"some.notes": torch.arange(3)}
    whole = tiny_sd3.write_whole(tmp_path / "whole.safetensors", extra=extra)
    chosen = options(whole, tokenizer_cache_dir=str(tiny_flux.write_tokenizers(tmp_path / "tokenizers")))
    bundle = load(chosen)
    _ = bundle.denoiser
    FAMILY.save_checkpoint(bundle, tmp_path / "saved.safetensors", SaveSettings("safetensors", metadata={"a": "b"}))
    assert tiny.same_tensors(load_file(tmp_path / "saved.safetensors"), load_file(whole))


def test_a_file_without_text_encoders_is_saved_as_it_was_and_with_them_on_request(
    files: dict[str, Path], tmp_path: Path
) -> None:
    beside = files["m"].parent
    bundle = load(options(files["m"], beside))
    FAMILY.save_checkpoint(bundle, tmp_path / "saved.safetensors", SaveSettings("safetensors"))
    assert tiny.same_tensors(load_file(tmp_path / "saved.safetensors"), load_file(files["m"]))
    facts = {**bundle.facts, "saving": {"beside": frozenset({CLIP_L, CLIP_G})}}
    with torch.no_grad():
        for parameter in bundle.part(T5XXL).parameters():
            parameter.mul_(2)
    learned = replace(bundle, facts=facts, changed={T5XXL}, _parts=bundle._parts)
    FAMILY.save_checkpoint(learned, tmp_path / "more.safetensors", SaveSettings("safetensors"))
    cache = str(beside / "tokenizers")
    assert_same(state(load(options(tmp_path / "more.safetensors", tokenizer_cache_dir=cache))), state(bundle))


def test_a_saved_folder_is_read_by_diffusers_and_by_us(files: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    bundle = load(options(files["5-medium"], files["5-medium"].parent))
    with torch.no_grad():
        for parameter in bundle.denoiser.parameters():
            parameter.mul_(1.1)  # as training would
    FAMILY.save_checkpoint(bundle, tmp_path / "saved", SaveSettings("diffusers_safetensors"))
    assert_same(state(load(options(tmp_path / "saved"))), state(bundle))
    pipe = pipeline(tmp_path / "saved")
    assert tiny.same_tensors(sd3_key_map(2).to_theirs(dict(pipe.transformer.state_dict())), dict(bundle.denoiser.state_dict()))
    assert (pipe.tokenizer.pad_token, pipe.tokenizer_2.pad_token) == (tiny.EOS, "!")
    FAMILY.save_checkpoint(load(options(folder)), tmp_path / "again", SaveSettings("diffusers_safetensors"))
    for path in sorted(folder.rglob("*.safetensors")):
        assert tiny.same_tensors(load_file(tmp_path / "again" / path.relative_to(folder)), load_file(path)), path


def test_a_folder_without_t5_says_so(tmp_path: Path) -> None:
    folder = tiny_sd3.write_folder(tmp_path / "no_t5", "m", without_t5=True)
    FAMILY.save_checkpoint(load(options(folder)), tmp_path / "saved", SaveSettings("diffusers_safetensors"))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert pipeline(tmp_path / "saved").text_encoder_3 is None
