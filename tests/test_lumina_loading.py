"""Lumina-Image-2.0 on disk: every layout gives the same model, conditioning is diffusers', what is saved is read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_flux
import tiny_lumina
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.family_base import ModelBundle, SampleRequest
from library.lumina_models import Lumina
from library.lumina_names import LUMINA_DIFFUSERS
from library.lumina_train_utils import LuminaFamily, guided
from library.lumina_utils import describe
from library.model_parts import SaveSettings
from library.option_groups import NetworkTrainOptions
from library.rng import keyed_generator
from library.strategy_lumina import LuminaConditioning

FAMILY = LuminaFamily()
CPU = torch.device("cpu")
options = tiny_lumina.options


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lumina.write_files(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lumina.write_folder(tmp_path_factory.mktemp("diffusers") / "lumina")


def load(chosen: NetworkTrainOptions, dtype: torch.dtype = torch.float32) -> ModelBundle:
    return FAMILY.load(chosen, device=CPU, dtype=dtype)


def state(bundle: ModelBundle) -> dict[str, dict[str, Tensor]]:
    return {name: bundle.part(name).state_dict() for name in ("denoiser", "vae", "gemma2")}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for part in one:
        assert tiny.same_tensors(one[part], other[part]), part


def expected_state() -> dict[str, dict[str, Tensor]]:
    return {name: module.state_dict() for name, module in tiny_lumina.modules().items()}


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("lumina-loading", key))


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_separate_files_give_the_very_weights_and_sizes(files: Path) -> None:
    chosen = options(files, files.parent)
    model = describe(chosen)
    assert model.params == tiny_lumina.PARAMS
    assert list(model.parts) == ["denoiser", "gemma2", "vae"]
    assert (FAMILY.base_model_version(chosen), FAMILY.modelspec_architecture(chosen)) == ("lumina2", "lumina-2")
    bundle = load(chosen)
    assert_same(state(bundle), expected_state())
    told, made = bundle.part("gemma2").config, tiny_lumina.configs()["gemma2"]  # type: ignore[attr-defined]
    assert {name: getattr(told, name) for name in made} == made


def test_one_file_with_everything_gives_the_same_model(files: Path, tmp_path: Path) -> None:
    path = tiny_lumina.write_single(tmp_path / "all.safetensors")
    tokenizer = str(tiny_lumina.write_tokenizer(tmp_path / "tokenizer"))
    assert_same(state(load(options(path, tokenizer=tokenizer))), expected_state())
    pointed_at = {"gemma2": str(path), "ae": str(path), "tokenizer": tokenizer}
    assert_same(state(load(options(files, **pointed_at))), expected_state())


def test_a_diffusers_folder_gives_the_same_model(folder: Path) -> None:
    assert_same(state(load(options(folder))), expected_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_lower_precisions_under_the_common_prefix_are_read(dtype: torch.dtype, files: Path, tmp_path: Path) -> None:
    path = tiny_lumina.write_files(tmp_path, dtype=dtype, prefix="model.diffusion_model.")
    read = load(options(path, tmp_path)).denoiser.state_dict()
    exact = load_file(files)
    assert all(torch.equal(read[name], exact[name].to(dtype).float()) for name in read)


def test_shards_are_one_model_and_a_pruned_model_is_read(files: Path, tmp_path: Path) -> None:
    tensors = {name: t for name, t in load_file(files).items() if not name.startswith("layers.1.")}
    names = sorted(tensors)
    for number in range(1, 4):
        part = {name: tensors[name] for name in names[number - 1 :: 3]}
        save_file(part, tmp_path / f"lumina-{number:05d}-of-00003.safetensors")
    denoiser = load(options(tmp_path / "lumina-00002-of-00003.safetensors", files.parent)).denoiser
    assert isinstance(denoiser, Lumina)
    assert len(denoiser.layers) == 1
    assert denoiser.state_dict().keys() == tensors.keys() - {"norm_final.weight"}


def test_all_missing_parts_are_told_at_once(files: Path) -> None:
    with pytest.raises(UserError, match="--gemma2, --ae"):
        FAMILY.check(options(files))


def test_a_missing_tensor_is_named(files: Path, tmp_path: Path) -> None:
    tensors = load_file(files)
    del tensors["layers.1.attention.out.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"1 missing: layers.1.attention.out.weight"):
        load(options(tmp_path / "short.safetensors", files.parent))


def wrong_parts(files: Path, folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    """What is wrong -> flags, and what is said."""
    flux = tiny_flux.write_flux_files(folder / "flux")
    narrow = {k: v[..., :16] if v.ndim > 1 else v[:16] for k, v in load_file(files.parent / "gemma2.safetensors").items()}
    narrow["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(16, 16)
    save_file({k: v.contiguous() for k, v in narrow.items()}, folder / "narrow.safetensors")
    vae = load_file(files.parent / "ae.safetensors")
    vae["encoder.conv_out.weight"] = torch.cat([vae["encoder.conv_out.weight"]] * 2)
    save_file(vae, folder / "wide_vae.safetensors")
    return {
        "a FLUX model": ({"pretrained_model_name_or_path": str(flux)}, r"is FLUX.1, and lumina_train_network.py needs Lumina"),
        "an SD3 model": (
            {"pretrained_model_name_or_path": str(folder / "sd3.safetensors")},
            r"is Stable Diffusion 3/3.5, and .*sd3_train_network.py",
        ),
        "Z-Image": ({"pretrained_model_name_or_path": str(folder / "z.safetensors")}, "is Z-Image, and lumina_train"),
        "T5 for Gemma": ({"gemma2": str(flux.parent / "t5xxl.safetensors")}, "no Gemma-2 in it: it is a T5 text encoder"),
        "a narrow Gemma": ({"gemma2": str(folder / "narrow.safetensors")}, "is 16 wide, and the transformer .* takes 24"),
        "Gemma for the autoencoder": ({"ae": str(files.parent / "gemma2.safetensors")}, "no VAE in it: it is a Gemma-2"),
        "another autoencoder": ({"ae": str(folder / "wide_vae.safetensors")}, "makes 8 latent channels, .* takes 4"),
        "CLIP's tokenizer": (
            {"tokenizer": str(tiny.write_clip_tokenizer(folder / "clip"))},
            "no Gemma-2 tokenizer there .tokenizer.json",
        ),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        "a FLUX model", "an SD3 model", "Z-Image", "T5 for Gemma", "a narrow Gemma", "Gemma for the autoencoder",
        "another autoencoder", "CLIP's tokenizer",
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_named(wrong: str, files: Path, tmp_path: Path) -> None:
    save_file({"joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "sd3.safetensors")
    keys = ("cap_embedder.0.weight", "context_refiner.0.attention.qkv.weight", "cap_pad_token")
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "z.safetensors")
    flags, says = wrong_parts(files, tmp_path)[wrong]
    with pytest.raises(UserError, match=says):
        FAMILY.check(options(files, files.parent, **flags))


# ---- conditioning, latents and previews against diffusers' pipeline ----------------------------------------------------


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    import diffusers

    return diffusers.Lumina2Pipeline.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("length", [40, 96])
def test_conditioning_is_that_of_the_pipeline(length: int, folder: Path, pipe: Any) -> None:
    told = pipe.system_prompt[:9]
    chosen = options(folder, gemma2_max_token_length=length, system_prompt=told)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    captions = ["a red circle", "a much longer caption that does not fit into so few tokens"]
    with torch.no_grad():
        sides = []
        for tokenizer, texts in ((strategies.tokenize, captions), (strategies.tokenize.for_negatives(), ["", "a blur"])):
            sides.append(strategies.text_encoding.encode(bundle.text_encoders, tokenizer.tokenize(texts)))
        given = {"negative_prompt": ["", "a blur"], "system_prompt": told, "max_sequence_length": length}
        found = pipe.encode_prompt(captions, device=CPU, **given)
        for cond, context, mask in zip(sides, found[::2], found[1::2], strict=True):
            assert isinstance(cond, LuminaConditioning)
            assert torch.equal(cond.mask, mask)
            torch.testing.assert_close(cond.context, context, atol=1e-6, rtol=1e-5)
        empty = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.tokenize([""]))
    assert torch.equal(empty.context[0], sides[1].context[0]), "what is trained where captions are dropped"
    assert not torch.allclose(sides[0].context[0], sides[0].context[1])


def test_text_as_long_as_it_has_to_be_gives_the_same(folder: Path) -> None:
    chosen = options(folder, gemma2_max_token_length=32)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    captions = ["a red circle", "circle"]
    tokens, lengths = strategies.tokenize.tokenize(captions), strategies.tokenize.lengths(captions)
    assert lengths is not None and max(lengths) < 32
    with torch.no_grad():
        whole = strategies.text_encoding.encode(bundle.text_encoders, tokens)
        short = strategies.text_encoding.encode(bundle.text_encoders, strategies.tokenize.fitted(tokens, lengths))
        assert whole.mask.sum(1).tolist() == list(lengths)  # type: ignore[attr-defined]
        x, t = randn(2, 4, 8, 8, key="x"), torch.tensor([0.3, 0.8])
        one, other = (FAMILY.predict(bundle.denoiser, x, t, cond, None, chosen) for cond in (whole, short))  # type: ignore[arg-type]
        cut: Any = whole.fitted(lengths)
        assert cut.context.shape[1] == max(lengths) and not cut.whole
        assert whole.rows(slice(0, 1)).fitted(lengths[:1]).whole  # type: ignore[attr-defined]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_sign_and_time_are_turned_round_for_the_network(folder: Path, pipe: Any) -> None:
    """The pipeline gives its scheduler, which takes noise - data, the negative of what the network says at 1 - t."""
    chosen = options(folder)
    bundle = load(chosen)
    x, t = randn(2, 4, 8, 8, key="x"), torch.tensor([0.25, 0.9])
    mask = (torch.arange(6) < torch.tensor([[3], [6]])).long()
    cond = LuminaConditioning(context=randn(2, 6, 24, key="context"), mask=mask)
    with torch.no_grad():
        expected = -pipe.transformer(x, 1 - t, cond.context, cond.mask, return_dict=False)[0]
        torch.testing.assert_close(FAMILY.predict(bundle.denoiser, x, t, cond, None, chosen), expected, atol=1e-5, rtol=1e-5)


def test_latents_are_scaled_as_the_pipeline_scales_them(folder: Path, pipe: Any) -> None:
    chosen = options(folder)
    bundle, strategy = load(chosen), FAMILY.strategies(chosen).latents_caching
    images = randn(1, 3, 32, 32, key="images").clamp(-1, 1)
    stored = strategy.encode(bundle.vae, images, [1])
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
        sample = posterior.mean + posterior.std * torch.randn(1, 4, 4, 4, generator=keyed_generator("vae", 1))
        torch.testing.assert_close(stored, (sample - 0.1159) * 0.3611, atol=1e-6, rtol=1e-5)
        expected = pipe.vae.decode(sample).sample.clamp(-1, 1)
    torch.testing.assert_close(FAMILY.decode(bundle.vae, stored, chosen), expected, atol=1e-5, rtol=1e-4)
    spec = FAMILY.latent(chosen)
    assert (spec.stride, spec.patch, spec.scale, spec.shift) == (8, 2, 1.0, 0.0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_preview_is_the_picture_the_pipeline_makes(scale: float, folder: Path, pipe: Any) -> None:
    chosen = options(folder, gemma2_max_token_length=24)
    bundle, strategies = load(chosen), FAMILY.strategies(chosen)
    with torch.no_grad():
        tokens = [strategies.tokenize.tokenize([text]) for text in ("a red", "")]
        sides: list[Any] = [strategies.text_encoding.encode(bundle.text_encoders, ids) for ids in tokens]
        bounds = {"cfg_trunc_ratio": 2.0, "renorm_cfg": 0.0}
        request = SampleRequest(*sides, 64, 96, steps=4, guidance=scale, sampler="", seeds=(3,), extra=bounds)
        ours = FAMILY.sample(bundle.denoiser, request, chosen, CPU)
        expected = pipe(
            prompt_embeds=sides[0].context,
            prompt_attention_mask=sides[0].mask,
            negative_prompt_embeds=sides[1].context,
            negative_prompt_attention_mask=sides[1].mask,
            width=64,
            height=96,
            num_inference_steps=4,
            guidance_scale=scale,
            cfg_normalization=False,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_guidance_ends_early_and_goes_only_so_far() -> None:
    def both(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) < 1, 3.0, -1.0) * torch.ones_like(x)

    x, early, late = torch.zeros(1, 1, 2, 2), torch.tensor([0.9]), torch.tensor([0.7])
    free = guided(both, 2.0, until=0.25, largest=0.0)
    assert free(x, early).unique().tolist() == [7.0]
    assert free(x, late).unique().tolist() == [3.0]
    assert guided(both, 2.0, until=0.25, largest=1.0)(x, early).unique().tolist() == [3.0]
    assert guided(both, 2.0, until=0.25, largest=2.0)(x, early).unique().tolist() == [6.0]
    assert guided(both, 0.5, until=0.25, largest=2.0)(x, early).unique().tolist() == [1.0], "shorter ones stay"


# ---- caches of sd-scripts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "usable"), [(32, True), (16, False)])
def test_text_caches_of_sd_scripts_are_used_where_they_fit(length: int, usable: bool, files: Path, tmp_path: Path) -> None:
    from library.cache_io import Fingerprint, TextFile

    strategy = FAMILY.strategies(options(files, files.parent)).text_caching
    path = strategy.format.path_for(tmp_path / "picture.png")
    assert path.name == "picture_lumina_te.npz"
    mask = (np.arange(length) < 5).astype(np.int64)
    np.savez(path, hidden_state=np.ones((length, 24), np.float32), attention_mask=mask, input_ids=mask * 7)
    file = TextFile(path, strategy, frozenset({"gemma2"}))
    verdict = file.check(Fingerprint({}))
    assert (verdict.usable, verdict.foreign) == (usable, usable)
    if usable:
        entry = file.load()
        assert isinstance(entry, LuminaConditioning)
        assert entry.context.shape == (32, 24)
        assert entry.mask.sum() == 5


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_a_loaded_model_is_saved_byte_for_byte_as_it_was(whole: bool, files: Path, tmp_path: Path) -> None:
    """A single file holds the transformer alone, and the norm that nothing uses."""
    bundle = load(options(files, files.parent))
    if whole:
        _ = bundle.denoiser
    FAMILY.save_checkpoint(bundle, tmp_path / "saved.safetensors", SaveSettings("safetensors"))
    assert tiny.same_tensors(load_file(tmp_path / "saved.safetensors"), load_file(files))
    assert "norm_final.weight" in load_file(tmp_path / "saved.safetensors")
    again = load(options(tmp_path / "saved.safetensors", files.parent))
    FAMILY.save_checkpoint(again, tmp_path / "again.safetensors", SaveSettings("safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()


def test_a_saved_folder_is_read_by_diffusers_and_by_us(files: Path, tmp_path: Path) -> None:
    import diffusers

    bundle = load(options(files, files.parent))
    with torch.no_grad():
        for parameter in bundle.denoiser.parameters():
            parameter.mul_(1.1)  # as training would
    FAMILY.save_checkpoint(bundle, tmp_path / "saved", SaveSettings("diffusers_safetensors"))
    assert_same(state(load(options(tmp_path / "saved"))), state(bundle))
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    assert type(pipe) is diffusers.Lumina2Pipeline
    assert pipe.scheduler.config.shift == 6.0
    assert tiny.same_tensors(LUMINA_DIFFUSERS.to_theirs(pipe.transformer.state_dict()), dict(bundle.denoiser.state_dict()))
    assert tiny.same_tensors(dict(pipe.text_encoder.state_dict()), dict(bundle.part("gemma2").state_dict()))


def test_a_folder_comes_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    """With what it says of itself: the class that the first release named."""
    source = shutil.copytree(folder, tmp_path / "source")
    index = source / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "Lumina2Text2ImgPipeline"}))
    bundle = load(options(source))
    _ = bundle.denoiser
    FAMILY.save_checkpoint(bundle, tmp_path / "saved", SaveSettings("diffusers_safetensors"))
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "Lumina2Text2ImgPipeline"
    for weights in source.rglob("*.safetensors"):
        assert (tmp_path / "saved" / weights.relative_to(source)).read_bytes() == weights.read_bytes(), weights
