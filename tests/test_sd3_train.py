"""Training Stable Diffusion 3 beyond every family's contract: the loss, dropout, positions, what learns and is saved."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import tiny_flux
import tiny_sd3
import torch
from runs import CASES, Workspace
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.objectives import RectifiedFlow
from library.option_groups import FullTrainOptions, NetworkTrainOptions
from library.option_rules import check_rules
from library.options import from_flags
from library.sd3_models import cropped_positions, middle_positions, scaled_positions
from library.sd3_options import Sd3FullOptions, Sd3Options
from library.sd3_train_utils import Sd3Family
from library.strategy_sd3 import Sd3ClipConditioning, Sd3Conditioning

FAMILY = Sd3Family()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["sd3"], tmp_path_factory.mktemp("sd3"))


def options(**flags: Any) -> NetworkTrainOptions:
    return from_flags(NetworkTrainOptions, Sd3Options, **flags)


# ---- times and loss --------------------------------------------------------------------------------------------------


def test_the_default_is_uniform_times_and_the_error_of_the_data() -> None:
    assert FAMILY.objective(options()) == RectifiedFlow(
        sampling="density", flow_shift=1.0, density="uniform", weighting="uniform", data_error=True
    )


@pytest.mark.parametrize("scheme", ["uniform", "sigma_sqrt", "cosmap"])
def test_the_loss_is_sd_scripts_and_weights_do_not_mix_pictures(scheme: str, workspace: Workspace, tmp_path: Path) -> None:
    trainer = workspace.trainer("network", tmp_path, "--network_train_unet_only", f"--weighting_scheme={scheme}")
    batch = trainer.data.train[(0, 0)]
    assert len(batch) == 2
    with torch.no_grad():
        seen = trainer.seen(batch)
        t = seen.times.view(-1, 1, 1, 1)
        velocity = trainer.predict(seen.noised, seen.times, seen.conditioning, batch)
        x0 = trainer.latent.normalize(trainer.latents(batch))
        data = seen.noised.x_t - t * velocity
        errors = (data - x0).square().mean(dim=(1, 2, 3))
        weights = {
            "uniform": torch.ones(2),
            "sigma_sqrt": seen.times**-2,
            "cosmap": 2 / (math.pi * (1 - 2 * seen.times + 2 * seen.times**2)),
        }[scheme]
        torch.testing.assert_close(trainer.loss(batch), (errors * weights).mean(), rtol=1e-4, atol=0)


# ---- dropout of text encoders ------------------------------------------------------------------------------------------


def silent(cond: Any, *names: str) -> Any:
    for name in names:
        cond = cond.without(name, torch.ones(len(cond.l_out), dtype=torch.bool))
    return cond


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "live"])
def test_dropped_encoders_give_zeros_cached_or_not(cached: bool, workspace: Workspace, tmp_path: Path) -> None:
    extra = ["--network_train_unet_only", "--clip_l_dropout_rate=1", "--t5_dropout_rate=1"]
    extra += ["--cache_text_encoder_outputs"] if cached else []
    trainer = workspace.trainer("network", tmp_path, *extra)
    batch = trainer.data.train[(0, 0)]
    with torch.no_grad():
        seen = trainer.seen(batch)
        found = trainer.predict(seen.noised, seen.times, seen.conditioning, batch)
        bare = replace(batch, chances={})
        whole = trainer.predict(seen.noised, seen.times, seen.conditioning, bare)
        expected = trainer.predict(seen.noised, seen.times, silent(seen.conditioning, "clip_l", "t5xxl"), bare)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, whole, atol=1e-4)


def test_each_encoder_is_dropped_by_its_own_chance_and_none_in_validation(workspace: Workspace, tmp_path: Path) -> None:
    extra = ["--network_train_unet_only", "--clip_g_dropout_rate=0.5", "--validation_split=0.3"]
    trainer = workspace.trainer("network", tmp_path, *extra)
    data = trainer.data.train
    chances = [data[(epoch, index)].chances for epoch in range(20) for index in range(data.num_batches)]
    drawn = torch.cat([found["clip_g"] for found in chances])
    assert 0.35 < (drawn < 0.5).float().mean() < 0.65
    assert not torch.equal(drawn, torch.cat([found["clip_l"] for found in chances]))
    assert torch.equal(data[(3, 1)].chances["clip_g"], data[(3, 1)].chances["clip_g"])
    assert trainer.data.validation is not None
    assert trainer.data.validation[(0, 0)].chances == {}
    assert workspace.trainer("network", tmp_path / "without").data.train[(0, 0)].chances == {}


def test_a_dropped_encoder_loses_its_row_alone() -> None:
    fields = {name: torch.ones(2, 3) for name in ("l_out", "l_pooled", "l_mask", "g_out", "g_pooled", "g_mask", "t5_out")}
    cond = Sd3Conditioning(**fields, t5_attn_mask=torch.ones(2, 3)).without("clip_g", torch.tensor([False, True]))
    assert {name: value.sum(dim=1).tolist() for name, value in cond.tensors().items()} == {
        **dict.fromkeys(("l_out", "l_pooled", "l_mask", "t5_out", "t5_attn_mask"), [3, 3]),
        **dict.fromkeys(("g_out", "g_pooled", "g_mask"), [3, 0]),
    }


# ---- positions -------------------------------------------------------------------------------------------------------


def test_positions_are_what_the_flags_say() -> None:
    model: Any = tiny_sd3.modules()["denoiser"]
    x = torch.zeros(2, 4, 8, 8)
    drawn = {"crop": [0.1, 0.9], "crop_top": [0.0, 0.5], "crop_left": [0.999, 0.5]}
    chances = {name: torch.tensor(values) for name, values in drawn.items()}
    assert model.positions_of(x, chances) is None
    assert torch.equal(model.positions_of(x, {}, scaled=True), scaled_positions(model.pos_embed, 4, 4))
    found = model.positions_of(x, chances, crop_rate=0.5)
    assert torch.equal(found[0], cropped_positions(model.pos_embed, 4, 4, torch.tensor([0]), torch.tensor([60]))[0])
    assert torch.equal(found[1], middle_positions(model.pos_embed, 4, 4)[0])
    assert model.positions_of(x, {}, crop_rate=0.5) is None, "previews and validation"
    with pytest.raises(UserError, match="65 x 4 tokens is beyond the model's positions, of which there are 64 x 64"):
        model.positions_of(torch.zeros(1, 4, 8, 130), {})


@pytest.mark.parametrize("flag", ["--enable_scaled_pos_embed", "--pos_emb_random_crop_rate=1"])
def test_training_is_given_the_positions(flag: str, workspace: Workspace, tmp_path: Path) -> None:
    images = tmp_path / "images" / "1_thing"
    tiny.write_images(images, 2, (64, 64))  # the tiny table has no scaled positions of narrower ones
    extra = (f"--train_data_dir={images.parent}", "--network_train_unet_only")
    plain, other = (workspace.trainer("network", tmp_path / str(n), *extra, *f) for n, f in enumerate(((), (flag,))))
    with torch.no_grad():
        one, two = (each.loss(each.data.train[(0, 0)]) for each in (plain, other))
    assert one != two


@pytest.mark.parametrize("flag", [{"enable_scaled_pos_embed": True}, {"pos_emb_random_crop_rate": 0.1}])
def test_flags_of_positions_are_for_medium_alone(flag: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_sd3.write_files(tmp_path, "5-large")
    given = dict(argument.removeprefix("--").split("=", 1) for argument in tiny_sd3.arguments(tmp_path))
    given["t5xxl_max_token_length"] = 16  # type: ignore[assignment]
    with pytest.raises(UserError, match="is for SD3.5 medium"):
        FAMILY.check(options(pretrained_model_name_or_path=str(model), network_train_unet_only=True, **given, **flag))


# ---- what learns, and what is saved ------------------------------------------------------------------------------------


def test_a_clip_learns_while_t5_is_cached_and_gone(workspace: Workspace, tmp_path: Path) -> None:
    live = workspace.trainer("network", tmp_path / "live")
    cached = workspace.trainer("network", tmp_path / "cached", "--cache_text_encoder_outputs")
    assert cached.trainable.parts == {"denoiser", "clip_l", "clip_g"}
    loss = cached.loss(cached.data.train[(0, 0)])
    assert not cached.bundle.loaded("t5xxl")
    torch.testing.assert_close(loss, live.loss(live.data.train[(0, 0)]), rtol=1e-5, atol=0)


def test_t5_learns_on_request_at_a_rate_of_its_own(workspace: Workspace, tmp_path: Path) -> None:
    arguments = ("--network_module=networks.lora_sd3", "--network_args", "train_t5xxl=true")
    trainer = workspace.trainer("network", tmp_path / "a", "--text_encoder_lr", "1e-4", "2e-4", "3e-4", *arguments)
    assert trainer.trainable.parts == {"denoiser", "clip_l", "clip_g", "t5xxl"}
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-3, 1e-4, 2e-4, 3e-4}
    with pytest.raises(UserError, match="every text encoder learns"):
        workspace.trainer("network", tmp_path / "b", "--cache_text_encoder_outputs", *arguments)


def without_t5(workspace: Workspace) -> Workspace:
    arguments = [argument for argument in tiny_sd3.arguments(workspace.model.parent) if not argument.startswith("--t5xxl=")]
    return replace(workspace, case=replace(workspace.case, arguments=lambda folder: arguments))


def test_a_model_without_t5_trains_as_with_zeros(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = without_t5(workspace)
    flags = ("--cache_text_encoder_outputs", "--network_train_unet_only", "--apply_t5_attn_mask")
    trainer = bare.trainer("network", tmp_path / "bare", *flags)
    assert "--apply_t5_attn_mask has no effect: there is no T5" in caplog.text
    dropped = workspace.trainer("network", tmp_path / "zeros", "--network_train_unet_only", "--t5_dropout_rate=1")
    assert trainer.strategies.text_caching.conditioning is Sd3ClipConditioning
    with torch.no_grad():
        torch.testing.assert_close(trainer.loss(trainer.data.train[(0, 0)]), dropped.loss(dropped.data.train[(0, 0)]))
    with pytest.raises(UserError, match="there is no T5 in the model. Give one as --t5xxl, or leave"):
        bare.trainer("network", tmp_path / "x", "--network_module=networks.lora_sd3", "--network_args", "train_t5xxl=true")


def test_the_last_blocks_stay_and_encoders_have_their_rates_in_full_training(workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--num_last_block_to_freeze=1", "--learning_rate_te1=0", "--learning_rate_te2=1e-4", "--train_t5xxl")
    trainer = workspace.trainer("full", tmp_path, *flags, "--learning_rate_te3=2e-4", "--learning_rate=1e-3")
    assert trainer.trainable.parts == {"denoiser", "clip_g", "t5xxl"}
    learning = {name for name, parameter in trainer.bundle.denoiser.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("joint_blocks.1.") for name in learning)
    assert {name.split(".")[0] for name in learning} > {"joint_blocks", "x_embedder", "final_layer"}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-4, 2e-4}
    with pytest.raises(UserError, match="--num_last_block_to_freeze 2: the model has 2 blocks"):
        workspace.prepared("full", tmp_path, "--num_last_block_to_freeze=2")


@pytest.mark.parametrize("whole", [False, True], ids=["separate", "whole"])
def test_what_learned_is_in_the_saved_file_and_trains_on(whole: bool, workspace: Workspace, tmp_path: Path) -> None:
    """Blockwise fused; CLIP-L learns; T5 is saved on request, or as the model's own file has it."""
    own = workspace
    if whole:
        model = tiny_sd3.write_whole(tmp_path / "whole.safetensors")
        tokenizers = f"--tokenizer_cache_dir={tiny_flux.write_tokenizers(tmp_path / 'tokenizers')}"
        case = replace(workspace.case, arguments=lambda folder: [tokenizers, "--t5xxl_max_token_length=16"])
        own = replace(workspace, model=model, case=case)
    flags = ["--learning_rate_te2=0", "--max_train_steps=1", "--blockwise_fused_optimizers", "--learning_rate=1e-2"]
    saved = load_file(own.train("full", tmp_path / "out", *flags, *([] if whole else ["--save_t5xxl"])) / "tiny.safetensors")
    before = tiny_sd3.tensors()
    inside = {name for name in ("clip_l", "clip_g", "t5xxl") if any(key.startswith(f"text_encoders.{name}.") for key in saved)}
    assert inside == ({"clip_l", "clip_g", "t5xxl"} if whole else {"clip_l", "t5xxl"})

    def moved(part: str, prefix: str) -> bool:
        return any(not torch.equal(saved[prefix + key], value) for key, value in before[part].items())

    prefixes = {name: f"text_encoders.{name}.transformer." for name in inside}
    assert {name: moved(name, prefix) for name, prefix in prefixes.items()} == {name: name == "clip_l" for name in inside}
    assert moved("denoiser", "model.diffusion_model.") and not moved("vae", "first_stage_model.")
    assert torch.equal(saved["model.diffusion_model.pos_embed"], before["denoiser"]["pos_embed"])


def test_a_frozen_base_in_few_bits_learns(workspace: Workspace, tmp_path: Path) -> None:
    flags = ["--network_train_unet_only", "--quantize_base=int8"]
    trainer = workspace.trainer("network", tmp_path / "few", *flags)
    plain = workspace.trainer("network", tmp_path / "plain", "--network_train_unet_only")
    names = [
        name for name, _ in trainer.bundle.denoiser.named_buffers() if name.startswith("joint_blocks.0.x_block.attn2.qkv.")
    ]
    assert names, "the second attention is kept in int8, too"
    one, other = (each.loss(each.data.train[(0, 0)]) for each in (trainer, plain))
    torch.testing.assert_close(one, other, rtol=0.05, atol=0)
    one.backward()


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_that_cannot_be_meant_are_errors() -> None:
    with pytest.raises(UserError, match="both say where a picture's positions are"):
        check_rules(options(enable_scaled_pos_embed=True, pos_emb_random_crop_rate=0.1))
    with pytest.raises(UserError, match="--train_t5xxl has no effect without --train_text_encoder"):
        check_rules(from_flags(FullTrainOptions, Sd3FullOptions, train_t5xxl=True))


def test_options_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    base = {"pretrained_model_name_or_path": "m", "output_dir": "o", "resolution": "64", "train_data_dir": "."}
    with caplog.at_level(logging.WARNING):
        check_rules(from_flags(FullTrainOptions, Sd3FullOptions, **base, learning_rate_te1=1e-5))
        check_rules(from_flags(FullTrainOptions, Sd3FullOptions, **base, learning_rate_te3=1e-5, train_text_encoder=True))
    assert "--learning_rate_te1, --learning_rate_te2 and --learning_rate_te3 have no effect" in caplog.text
    assert "--learning_rate_te3 1e-05 has no effect without --train_t5xxl" in caplog.text


def test_freed_t5_is_not_read_for_previews(workspace: Workspace, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 2 --l 3 --n bad\n")
    flags = ["--cache_text_encoder_outputs", "--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_every_n_steps=1"]
    output = workspace.train("network", tmp_path / "out", *flags, "--validation_split=0.3", "--validate_every_n_steps=1")
    assert len(list((output / "sample").glob("*.png"))) == 1
    tensors: dict[str, Tensor] = load_file(output / "tiny.safetensors")
    assert {key.split("_", 2)[1] for key in tensors} == {"unet", "te1", "te2"}
