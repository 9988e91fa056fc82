"""Reading and writing SDXL: every format, what is kept bit for bit, what a model says of its training, and what is refused."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.model_io import open_checkpoint
from library.option_groups import FullTrainOptions
from library.options import from_flags
from library.sdxl_options import SdxlFullOptions
from library.sdxl_train_utils import SdxlFamily
from library.sdxl_utils import OPEN_CLIP_PREFIX
from library.strategy_sdxl import CLIP_L, OPEN_CLIP
from library.unet_parts import UNET_PREFIX

FAMILY = SdxlFamily()
CPU = torch.device("cpu")
PARTS = ("denoiser", "vae", CLIP_L, OPEN_CLIP)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_checkpoint(tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors")


def options(path: Path, tokenizer: Path | None = None, **flags: Any) -> FullTrainOptions:
    given = {"tokenizer": str(tokenizer)} if tokenizer else {}
    return from_flags(FullTrainOptions, SdxlFullOptions, pretrained_model_name_or_path=str(path), **given, **flags)


def load(path: Path, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32, **flags: Any) -> Any:
    return FAMILY.load(options(path, tokenizer, **flags), device=CPU, dtype=dtype)


save = functools.partial(tiny.save, FAMILY)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "markers"), [(".safetensors", True), (".ckpt", False)])
def test_load_and_save_gives_back_every_tensor_bit_for_bit(suffix: str, markers: bool, tmp_path: Path, tokenizer: Path) -> None:
    extra = tiny_sdxl.MARKERS if markers else {}
    path = tiny_sdxl.write_checkpoint(tmp_path / f"in{suffix}", dtype=torch.float16, extra=extra)
    bundle = load(path, tokenizer, torch.float16)
    for name in PARTS:
        bundle.part(name)
    out = save(bundle, tmp_path / f"out{suffix}", bundle.facts["format"])
    if suffix == ".safetensors":
        assert tiny.same_tensors(load_file(out), load_file(path))
        assert open_checkpoint(out).metadata == {"ss_epoch": "3", "ss_steps": "12"}
    else:
        one, other = (torch.load(file, weights_only=True)["state_dict"] for file in (out, path))
        assert tiny.same_tensors(one, other)


def test_a_projection_kept_as_a_linear_layers_weight_is_read_and_written_as_it_was(tmp_path: Path, tokenizer: Path) -> None:
    tensors = dict(tiny_sdxl.ldm_tensors())
    name = f"{OPEN_CLIP_PREFIX}text_projection"
    tensors[f"{name}.weight"] = tensors.pop(name).T.contiguous()
    save_file(tensors, tmp_path / "in.safetensors")
    bundle = load(tmp_path / "in.safetensors", tokenizer)
    expected = tiny_sdxl.modules()[OPEN_CLIP].state_dict()["text_projection.weight"]
    assert torch.equal(bundle.part(OPEN_CLIP).text_projection.weight, expected)
    out = save(bundle, tmp_path / "out.safetensors", "safetensors")
    assert tiny.same_tensors(load_file(out), tensors)


@pytest.mark.parametrize("format", ["diffusers_safetensors", "diffusers"])
def test_a_folder_of_ours_is_read_by_diffusers_and_comes_back_as_the_same_file(
    format: str, single: Path, tmp_path: Path, tokenizer: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = save(load(single, tokenizer), tmp_path / "folder", format)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    read = {
        "denoiser": pipeline.unet,
        "vae": pipeline.vae,
        CLIP_L: pipeline.text_encoder,
        OPEN_CLIP: pipeline.text_encoder_2,
    }
    for name, module in tiny_sdxl.modules().items():
        assert tiny.same_tensors(dict(read[name].state_dict()), dict(module.state_dict())), name
    strategy: Any = FAMILY.strategies(options(folder)).tokenize
    for own, theirs in ((strategy.first, pipeline.tokenizer), (strategy.second, pipeline.tokenizer_2)):
        expected = theirs("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(own.ids_and_weights(["a red circle"])[0][0], expected)
    again = save(load(folder), tmp_path / "again.safetensors", "safetensors")
    before, after = load_file(single), load_file(again)
    extra = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    assert tiny.same_tensors({key: value for key, value in before.items() if key != extra}, after)


def test_a_folder_by_diffusers_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "in")
    out = save(load(folder), tmp_path / "out", "diffusers_safetensors")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        one, other = (open_checkpoint(next((side / part).glob("*.safetensors"))) for side in (folder, out))
        names = {
            key: key.removeprefix("text_model.") if part == "text_encoder" else key for key in [*one.keys(), *other.keys()]
        }
        assert {names[key] for key in one} == {names[key] for key in other}
        by_name = {names[key]: key for key in other}
        assert all(torch.equal(one.get(key), other.get(by_name[names[key]])) for key in one), part
    assert (out / "tokenizer_2" / "vocab.json").is_file()


def test_a_folder_keeps_its_scheduler_and_tells_what_was_trained(tmp_path: Path) -> None:
    import json

    def saved(name: str, **flags: Any) -> tuple[dict[str, Any], list[str]]:
        out = save(load(folder, **flags), tmp_path / name, "diffusers_safetensors")
        assert not (out / "tokenizer" / "model.safetensors").exists()
        scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        return scheduler, json.loads((out / "model_index.json").read_text())["scheduler"]

    folder = tiny_sdxl.write_folder(
        tmp_path / "in", scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    )
    (folder / "tokenizer" / "model.safetensors").write_bytes(b"weights, as a folder of the hub's cache may hold")
    for name, flags, made in (
        ("as_it_was", {}, "DDIMScheduler"),
        ("without", {"zero_terminal_snr": False}, "EulerDiscreteScheduler"),
    ):
        scheduler, index = saved(name, **flags)
        assert index == ["diffusers", made] == ["diffusers", scheduler["_class_name"]]
        assert scheduler["rescale_betas_zero_snr"] is (made == "DDIMScheduler")


def test_trained_text_encoders_are_written_and_the_rest_stays(single: Path, tmp_path: Path, tokenizer: Path) -> None:
    bundle = load(single, tokenizer, torch.bfloat16)
    for name in PARTS:
        bundle.part(name)
    bundle.part(OPEN_CLIP).text_projection.weight.data[0, 1] += 1
    before, after = load_file(single), load_file(save(bundle, tmp_path / "out.safetensors", "safetensors"))
    changed = f"{OPEN_CLIP_PREFIX}text_projection"
    assert after[changed][1, 0] == before[changed][1, 0].bfloat16() + 1  # OpenCLIP multiplies from the right
    for key, value in before.items():
        if not key.startswith(OPEN_CLIP_PREFIX):
            assert torch.equal(after[key], value), key


def test_an_exchanged_vae_is_used_and_written(single: Path, tmp_path: Path, tokenizer: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "other", seed=7) / "vae"
    after = load_file(save(load(single, tokenizer, vae=str(folder)), tmp_path / "out.safetensors", "safetensors"))
    expected = tiny_sdxl.ldm_tensors(7)
    assert all(torch.equal(value, expected[key]) for key, value in after.items() if key.startswith("first_stage"))
    assert after.keys() == load_file(single).keys()


# ---- what it was trained with ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "folder"])
def test_marks_of_v_prediction_and_zero_terminal_snr_are_honoured(where: str, tmp_path: Path, tokenizer: Path) -> None:
    if where == "file":
        path = tiny_sdxl.write_checkpoint(tmp_path / "v.safetensors", extra=tiny_sdxl.MARKERS)
    else:
        path = tiny_sdxl.write_folder(
            tmp_path / "v", scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        )
    plain = options(path, tokenizer)
    FAMILY.check(plain)
    objective = FAMILY.objective(plain)
    assert objective.v_prediction and objective.zero_terminal_snr
    assert FAMILY.prediction_type(plain) == "v"
    assert FAMILY.metadata(plain)["ss_zero_terminal_snr"] is True
    assert not FAMILY.objective(options(path, tokenizer, zero_terminal_snr=False)).zero_terminal_snr


def test_marks_are_written_where_a_model_has_learned_v(single: Path, tmp_path: Path, tokenizer: Path) -> None:
    for flags, expected in (
        ({}, set()),
        ({"v_parameterization": True}, {"v_pred"}),
        ({"v_parameterization": True, "zero_terminal_snr": True}, {"v_pred", "ztsnr"}),
    ):
        bundle = load(single, tokenizer, **flags)
        written = load_file(save(bundle, tmp_path / "out.safetensors", "safetensors"))
        assert written.keys() - load_file(single).keys() == expected
        if len(expected) == 1:
            continue
        folder = save(bundle, tmp_path / "-".join(["folder", *sorted(expected)]), "diffusers_safetensors")
        assert FAMILY.objective(options(folder)).v_prediction == ("v_pred" in expected)
        assert FAMILY.objective(options(folder)).zero_terminal_snr == ("ztsnr" in expected)


def test_flags_against_what_the_model_says(single: Path, tmp_path: Path, tokenizer: Path, caplog: Any) -> None:
    v = tiny_sdxl.write_checkpoint(tmp_path / "v.safetensors", extra=tiny_sdxl.MARKERS)
    with pytest.raises(UserError, match="predicts v according to its marker key 'v_pred'.*Remove --no-v_parameterization"):
        FAMILY.check(options(v, tokenizer, v_parameterization=False))
    with pytest.raises(UserError, match="--v_pred_like_loss is for noise predictions, and this model predicts v"):
        FAMILY.check(options(v, tokenizer, v_pred_like_loss=0.5))
    noise = tiny_sdxl.write_checkpoint(tmp_path / "e.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    with caplog.at_level(logging.WARNING):
        FAMILY.check(options(noise, tokenizer))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        FAMILY.check(options(noise, tokenizer, v_parameterization=True))
        FAMILY.check(options(v, tokenizer, zero_terminal_snr=False))
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "--v_parameterization teaches it v anew" in said
    assert "--no-zero_terminal_snr trains it without" in said


# ---- what is refused -------------------------------------------------------------------------------------------------


def changed(path: Path, *, drop: str = "", rename: tuple[str, str] = ("", ""), **shapes: Any) -> Path:
    """The tiny checkpoint without some tensors, with others renamed, and with further channels in front of the UNet."""
    tensors = {
        key.replace(*rename) if rename[0] else key: value
        for key, value in tiny_sdxl.ldm_tensors().items()
        if not drop or not key.startswith(drop)
    }
    if shapes:
        name = "model.diffusion_model.input_blocks.0.0.weight"
        tensors[name] = torch.zeros(32, shapes["channels"], 3, 3)
    save_file(tensors, path)
    return path


def test_other_models_are_refused_with_what_they_are(tmp_path: Path, tokenizer: Path, single: Path) -> None:
    refiner = {
        "drop": "conditioner.embedders.0.",
        "rename": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    }
    cases: list[tuple[dict[str, Any], str]] = [
        (refiner, "is the SDXL refiner, and sdxl_train_network.py needs SDXL. Give another model"),
        ({"channels": 9}, "is an inpainting model .its UNet takes 9 channels, not 4."),
        ({"channels": 8}, "is an instruction-editing"),
        ({"drop": "conditioner.embedders.1."}, "has no text encoder OpenCLIP bigG"),
        ({"drop": "conditioner.embedders.0."}, "has no text encoder CLIP-L"),
        ({"drop": "first_stage_model."}, "has no VAE. Give one as --vae"),
        ({"drop": f"{OPEN_CLIP_PREFIX}text_proj"}, "is incomplete: it lacks conditioner.embedders.1.model.text_projection"),
        ({"drop": f"{UNET_PREFIX}middle_block.1.proj_in."}, "it lacks model.diffusion_model.middle_block.1.proj_in.weight"),
    ]
    for number, (change, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            FAMILY.check(options(changed(tmp_path / f"{number}.safetensors", **change), tokenizer))
    sd1 = tiny.write_sd_checkpoint(tmp_path / "sd1.safetensors")
    with pytest.raises(UserError, match=r"is Stable Diffusion 1.x, .* Train it with train_network.py"):
        FAMILY.check(options(sd1, tokenizer))
    with pytest.raises(UserError, match=r"No CLIP tokenizer|no CLIP tokenizer"):
        FAMILY.check(options(single, tmp_path))


def test_tensors_that_do_not_fit_are_named_before_any_is_read(tmp_path: Path, tokenizer: Path) -> None:
    """Whatever part they are of: captions and pictures are not encoded first."""
    lacking = ("model.diffusion_model.out.0.weight", f"{OPEN_CLIP_PREFIX}transformer.resblocks.1.attn.in_proj_bias")
    for name in lacking:
        with pytest.raises(UserError, match=f"does not fit .*missing: {name}"):
            load(changed(tmp_path / "lacks.safetensors", drop=name), tokenizer)
    name = f"{OPEN_CLIP_PREFIX}transformer.resblocks.1.attn.in_proj_weight"
    tensors = tiny_sdxl.ldm_tensors() | {name: torch.zeros(190, 64)}
    save_file(tensors, tmp_path / "rows.safetensors")
    with pytest.raises(UserError, match="190 rows do not divide"):
        load(tmp_path / "rows.safetensors", tokenizer)
    save_file(tensors | {name: torch.zeros(192, 32)}, tmp_path / "shape.safetensors")
    with pytest.raises(UserError, match=rf"'{name}' has shape \(64, 32\), and CLIPTextModelWithProjection needs \(64, 64\)"):
        load(tmp_path / "shape.safetensors", tokenizer)


@pytest.mark.parametrize(
    ("pipeline", "channels", "message"),
    [
        ("StableDiffusionXLImg2ImgPipeline", 4, "is the SDXL refiner"),
        ("StableDiffusionXLInpaintPipeline", 9, "is an inpainting model"),
        ("StableDiffusionXLInstructPix2PixPipeline", 8, "is an instruction-editing"),
        ("StableDiffusionPipeline", 4, "is Stable Diffusion 1.x"),
    ],
)
def test_folders_of_other_models_are_refused(pipeline: str, channels: int, message: str, tmp_path: Path) -> None:
    import json

    folder = tiny_sdxl.write_folder(tmp_path / "model")
    for file, key, value in (("model_index.json", "_class_name", pipeline), ("unet/config.json", "in_channels", channels)):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {key: value}))
    if pipeline == "StableDiffusionXLImg2ImgPipeline":
        shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match=message):
        FAMILY.check(options(folder))


def test_models_with_the_noise_of_edm_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    import json

    marks = {"v_pred": torch.tensor([]), "edm_vpred.sigma_max": torch.tensor([120.0])}  # as ComfyUI saves CosXL
    file = tiny_sdxl.write_checkpoint(tmp_path / "cosxl.safetensors", extra=marks)
    with pytest.raises(UserError, match=r"trained with EDM's noise .edm_vpred.sigma_max."):
        FAMILY.check(options(file, tokenizer))
    folder = tiny_sdxl.write_folder(tmp_path / "model")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(UserError, match=r"trained with EDM's noise .EDMEulerScheduler."):
        FAMILY.check(options(folder))


def test_text_encoders_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = tiny_sdxl.write_folder(tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    tiny.write_sd_diffusers(tmp_path / "sd2", version="v2")
    shutil.copytree(tmp_path / "sd2" / "text_encoder", folder / "text_encoder")
    with pytest.raises(UserError, match="the text encoder is 192 wide and the UNet takes 128"):
        FAMILY.check(options(folder))
