"""Writing Stable Diffusion models: every format, what is kept bit for bit, and what other programs find in the files."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.model_io import open_checkpoint
from library.option_groups import FullOptions, FullTrainOptions, ModelOptions
from library.sd_train_utils import SdFamily
from tests import tiny

FAMILY = SdFamily()


save = functools.partial(tiny.save, FAMILY)


@pytest.mark.parametrize(("version", "suffix"), [("v1", ".ckpt"), ("v2", ".safetensors")])
def test_load_and_save_gives_back_every_tensor_bit_for_bit(version: Any, suffix: str, tmp_path: Path, tokenizer: Path):
    path = tiny.write_sd_checkpoint(tmp_path / f"in{suffix}", version=version, dtype=torch.float16)
    bundle = tiny.load_sd(path, tokenizer, torch.float16, v2=version == "v2")
    _ = bundle.denoiser, bundle.text_encoders, bundle.vae
    out = save(bundle, tmp_path / f"out{suffix}", bundle.facts["format"])
    if suffix == ".safetensors":
        assert tiny.same_tensors(load_file(out), load_file(path))
        assert open_checkpoint(out).metadata == {"ss_epoch": "3", "ss_steps": "12"}
    else:
        saved = torch.load(out, weights_only=True)
        assert tiny.same_tensors(saved["state_dict"], torch.load(path, weights_only=True)["state_dict"])
        assert (saved["epoch"], saved["global_step"]) == (3, 12)


def test_parts_that_were_not_trained_are_written_as_the_file_has_them(sd1: Path, tmp_path: Path, tokenizer: Path):
    bundle = tiny.load_sd(sd1, tokenizer, torch.bfloat16)
    _ = bundle.text_encoders, bundle.vae
    bundle.denoiser.conv_in.bias.data += 1
    before, after = load_file(sd1), load_file(save(bundle, tmp_path / "out.safetensors", "safetensors"))
    for key, value in before.items():
        if key.startswith("model.diffusion_model."):
            assert after[key].dtype == torch.bfloat16
        else:
            assert torch.equal(after[key], value), key
    changed = "model.diffusion_model.input_blocks.0.0.bias"
    assert torch.equal(after[changed], before[changed].bfloat16() + 1)


def test_a_trained_text_encoder_is_written(sd2: Path, tmp_path: Path, tokenizer: Path):
    bundle = tiny.load_sd(sd2, tokenizer, v2=True)
    bundle.text_encoders["text_encoder"].encoder.layers[1].self_attn.k_proj.weight.data += 1
    before, after = load_file(sd2), load_file(save(bundle, tmp_path / "out.safetensors", "safetensors"))
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    width = before[key].shape[1]
    assert torch.equal(after[key][width : 2 * width], before[key][width : 2 * width] + 1)
    assert torch.equal(after[key][:width], before[key][:width])
    assert torch.equal(after["cond_stage_model.model.text_projection"], before["cond_stage_model.model.text_projection"])


def test_saving_in_another_precision_leaves_what_no_part_uses(sd1: Path, tmp_path: Path, tokenizer: Path):
    after = load_file(save(tiny.load_sd(sd1, tokenizer), tmp_path / "out.safetensors", "safetensors", torch.float16))
    assert after["alphas_cumprod"].dtype == torch.float32
    assert after["cond_stage_model.transformer.text_model.embeddings.position_ids"].dtype == torch.int64
    assert {v.dtype for k, v in after.items() if k.startswith(("model.", "first_stage"))} == {torch.float16}


def test_an_exchanged_vae_is_written_instead_of_the_files_own(sd1: Path, tmp_path: Path, tokenizer: Path):
    folder = tiny.write_sd_diffusers(tmp_path / "other", seed=7) / "vae"
    after = load_file(save(tiny.load_sd(sd1, tokenizer, vae=str(folder)), tmp_path / "out.safetensors", "safetensors"))
    expected = tiny.sd_ldm_tensors(seed=7)
    assert all(torch.equal(value, expected[key]) for key, value in after.items() if key.startswith("first_stage"))
    assert after.keys() == load_file(sd1).keys()


@pytest.mark.parametrize(("format", "version"), [("diffusers", "v1"), ("diffusers_safetensors", "v2")])
def test_a_file_saved_as_folder_is_read_by_diffusers_and_comes_back_as_the_same_file(
    format: str, version: Any, tmp_path: Path, tokenizer: Path
):
    from diffusers import StableDiffusionPipeline

    path = tiny.write_sd_checkpoint(tmp_path / "in.safetensors", version=version)
    out = save(tiny.load_sd(path, tokenizer, v2=version == "v2"), tmp_path / "folder", format)
    pipe = StableDiffusionPipeline.from_pretrained(str(out), local_files_only=True)
    for name, module in (("denoiser", pipe.unet), ("vae", pipe.vae), ("text_encoder", pipe.text_encoder)):
        assert tiny.same_tensors(dict(module.state_dict()), tiny.sd_modules(version)[name].state_dict())
    read: Any = FAMILY.strategies(tiny.sd_options(out)).tokenize
    assert pipe.tokenizer("a red circle").input_ids[1:-1] == read.captions.tokenizer.ids("a red circle")
    assert pipe.scheduler.config.prediction_type == "epsilon"

    bundle = tiny.load_sd(out, v2=version == "v2")
    assert bundle.facts["format"] == format
    back, source = load_file(save(bundle, tmp_path / "back.safetensors", "safetensors")), load_file(path)
    weights = {key for key in source if key.startswith(("model.diff", "first_stage", "cond_stage"))} - {
        "cond_stage_model.transformer.text_model.embeddings.position_ids"
    }
    assert weights == back.keys()
    unused = (".resblocks.2.", "text_projection", "logit_scale")
    assert all(torch.equal(back[key], source[key]) for key in weights if not any(name in key for name in unused))


def test_a_folders_text_encoder_is_written_under_the_names_every_reader_knows(sd1: Path, tmp_path: Path, tokenizer: Path):
    out = save(tiny.load_sd(sd1, tokenizer), tmp_path / "folder", "diffusers_safetensors")
    keys = load_file(out / "text_encoder" / "model.safetensors").keys()
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in keys
    assert all(key.startswith("text_model.") for key in keys)


def test_head_counts_that_a_single_file_cannot_hold_are_refused_before_training(tmp_path: Path):
    folder = tiny.write_sd_diffusers(tmp_path / "m")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"attention_head_dim": 4}))
    base = tiny.sd_options(folder).model
    FAMILY.check(FullTrainOptions(model=base))
    FAMILY.check(FullTrainOptions(model=base, full=FullOptions(save_model_as="diffusers")))
    with pytest.raises(UserError, match=r"4 attention heads.*diffusers_safetensors"):
        FAMILY.check(FullTrainOptions(model=base, full=FullOptions(save_model_as="safetensors")))


def test_norm_groups_that_a_single_file_cannot_hold_are_refused_before_training():
    """The example model's autoencoder has 4 groups."""
    folder = Path(__file__).parent.parent / "examples" / "tiny-sd"
    wanted = FullTrainOptions(
        model=ModelOptions(pretrained_model_name_or_path=str(folder)), full=FullOptions(save_model_as="safetensors")
    )
    with pytest.raises(UserError, match="VAE has 4 norm groups"):
        FAMILY.check(wanted)
