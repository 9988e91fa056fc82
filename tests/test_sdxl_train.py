"""Training SDXL beyond what every family's contract tests: rates of blocks and text encoders, text, sizes, caches, options."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import tiny_sdxl
import torch
from runs import CASES, Workspace
from safetensors import safe_open
from safetensors.torch import load_file

from library.clip_text import ClipCaptions
from library.clip_tokenizer import load_clip_tokenizer
from library.errors import UserError
from library.option_groups import FullTrainOptions, NetworkTrainOptions
from library.option_rules import check_rules
from library.options import from_flags
from library.sdxl_options import NUM_BLOCKS, SdxlFullOptions, SdxlOptions
from library.sdxl_train_utils import batch_sizes
from library.strategy_sdxl import (
    CLIP_L,
    OPEN_CLIP,
    SdxlConditioning,
    SdxlLatentsCachingStrategy,
    SdxlTextEncoderOutputsCachingStrategy,
    SdxlTextEncodingStrategy,
    SdxlTokenizeStrategy,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["sdxl"], tmp_path_factory.mktemp("sdxl"))


# ---- rates -----------------------------------------------------------------------------------------------------------


def test_each_block_learns_at_its_own_rate_and_a_block_of_rate_zero_stays(workspace: Workspace, tmp_path: Path) -> None:
    rates = [1e-3 * (block + 1) for block in range(NUM_BLOCKS)]
    rates[0] = rates[11] = 0.0
    arguments = (f"--block_lr={','.join(map(str, rates))}", "--no-train_text_encoder", "--max_train_steps=2")
    trainer = workspace.trainer("full", tmp_path / "a", *arguments)
    groups = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert groups == {f"block{n}": pytest.approx(rate) for n, rate in enumerate(rates) if rate}
    output = workspace.train("full", tmp_path / "b", *arguments)
    before, after = load_file(workspace.model), load_file(output / "tiny.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {
        key
        for key in before
        if key.startswith("model.diffusion_model.")
        and not key.startswith(
            tuple(f"model.diffusion_model.{name}." for name in ("time_embed", "label_emb", "middle_block.1"))
        )
    }
    with (output / "metrics.csv").open() as file:
        assert "lr/block5" in file.readline()


def test_one_rate_for_all_blocks_is_the_rate_of_the_unet(workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--no-train_text_encoder", "--max_train_steps=2")
    one = workspace.train("full", tmp_path / "one", "--block_lr=1e-3", *flags)
    other = workspace.train("full", tmp_path / "other", "--learning_rate=1e-3", *flags)
    assert runs.losses(one) == pytest.approx(runs.losses(other), rel=1e-4)  # norms add up in another order


def test_a_unet_of_rate_zero_is_frozen_and_the_text_encoders_learn_through_it(workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--learning_rate=0", "--learning_rate_te2=1e-3", "--mixed_precision=bf16", "--gradient_checkpointing")
    trainer = workspace.trainer("full", tmp_path / "a", *flags)
    assert trainer.trainable.parts == {OPEN_CLIP}  # the other one's rate is --learning_rate, too
    assert {parameter.dtype for parameter in trainer.bundle.denoiser.parameters()} == {torch.bfloat16}
    trainer.trainable.train()
    assert trainer.bundle.denoiser.training  # without which nothing would be recomputed
    trainer.loss(trainer.data.train[(0, 0)]).backward()
    assert all(parameter.grad is None for parameter in trainer.bundle.denoiser.parameters())
    assert any(parameter.grad is not None for parameter in trainer.bundle.part(OPEN_CLIP).parameters())
    output = workspace.train("full", tmp_path / "b", *flags, "--max_train_steps=1")
    before, after = load_file(workspace.model), load_file(output / "tiny.safetensors")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(key.startswith("conditioner.embedders.1.") for key in moved)


def test_blocks_may_learn_where_the_rate_of_the_rest_is_zero(workspace: Workspace, tmp_path: Path) -> None:
    rates = ["0"] * NUM_BLOCKS
    rates[5] = "1e-3"
    trainer = workspace.trainer("full", tmp_path, "--learning_rate=0", f"--block_lr={','.join(rates)}")
    assert trainer.trainable.parts == {"denoiser"}
    assert [group["name"] for group in trainer.optimizer.param_groups] == ["block5"]
    trainer.loss(trainer.data.train[(0, 0)]).backward()
    with_gradient = {name for name, p in trainer.bundle.denoiser.named_parameters() if p.grad is not None}
    assert with_gradient and all(name.startswith("down_blocks.1.") and ".0." in name for name in with_gradient)


def test_a_run_in_which_nothing_would_learn_is_an_error(workspace: Workspace, tmp_path: Path) -> None:
    for mode, flags in (("full", ["--no-train_text_encoder"]), ("full", []), ("network", [])):
        with pytest.raises(UserError, match="every learning rate .*is 0, so nothing would learn"):
            workspace.trainer(mode, tmp_path, "--learning_rate=0", *flags)  # type: ignore[arg-type]


def test_the_text_encoder_of_sd_is_frozen_by_a_rate_of_zero() -> None:
    from library.option_groups import DreamBoothOptions
    from library.run_plan import FullPlan
    from library.sd_train_utils import SdFamily

    for flags, parts in (({"learning_rate_te": 0.0}, {"denoiser"}), ({"learning_rate": 0.0}, set()), ({}, None)):
        learning = FullPlan(from_flags(DreamBoothOptions, **flags)).learning_parts(SdFamily())
        assert learning == ({"denoiser", "text_encoder"} if parts is None else parts)


@pytest.mark.parametrize(
    ("flags", "learning", "rates"),
    [
        (["--learning_rate_te1=1e-4", "--learning_rate_te2=2e-4"], {CLIP_L, OPEN_CLIP}, [1e-4, 2e-4]),
        (["--learning_rate_te1=0", "--learning_rate_te2=2e-4"], {OPEN_CLIP}, [2e-4]),
        (["--learning_rate_te2=0"], {CLIP_L}, [1e-3]),
        (["--learning_rate_te=5e-5", "--learning_rate_te2=2e-4"], {CLIP_L, OPEN_CLIP}, [5e-5, 2e-4]),
    ],
)
def test_either_text_encoder_learns_at_its_own_rate(
    flags: list[str], learning: set[str], rates: list[float], workspace: Workspace, tmp_path: Path
) -> None:
    trainer = workspace.trainer("full", tmp_path, *flags)
    assert trainer.trainable.parts == {"denoiser", *learning}
    groups = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    names = [f"textencoder{number}" for number, name in enumerate((CLIP_L, OPEN_CLIP), start=1) if name in learning]
    assert groups == {"unet": 1e-3, **dict(zip(names, rates, strict=True))}
    if CLIP_L in learning:  # what is behind the hidden state that is taken does not learn
        first: Any = trainer.bundle.part(CLIP_L)
        frozen = {name for name, parameter in first.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in first.named_parameters() if "layers.1." in name or "final_layer_norm" in name}


def test_trained_text_encoders_are_saved_and_frozen_ones_are_the_files(workspace: Workspace, tmp_path: Path) -> None:
    output = workspace.train("full", tmp_path, "--learning_rate_te1=0", "--max_train_steps=1")
    before, after = load_file(workspace.model), load_file(output / "tiny.safetensors")
    moved = {key.split(".model.")[0] for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith("conditioner.embedders.0.") for key in moved)
    assert "conditioner.embedders.1" in moved


def test_text_encoders_held_in_few_bits_are_saved_as_the_file_has_them(workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--no-train_text_encoder", "--quantize_text_encoders=int8", "--max_train_steps=1")
    before, after = load_file(workspace.model), load_file(workspace.train("full", tmp_path, *flags) / "tiny.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key.startswith("conditioner."))


def test_lora_has_a_rate_for_each_text_encoder(workspace: Workspace, tmp_path: Path) -> None:
    trainer = workspace.trainer("network", tmp_path, "--text_encoder_lr", "1e-4", "2e-4")
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"unet": 1e-3, "textencoder1": 1e-4, "textencoder2": 2e-4}


# ---- v prediction ----------------------------------------------------------------------------------------------------


def test_a_v_model_is_trained_as_one_and_the_adapter_says_so(workspace: Workspace, tmp_path: Path) -> None:
    model = tiny_sdxl.write_checkpoint(tmp_path / "v.safetensors", extra=tiny_sdxl.MARKERS)
    short = "--max_train_steps=2"
    marked = workspace.train("network", tmp_path / "marked", f"--pretrained_model_name_or_path={model}", short)
    told = workspace.train("network", tmp_path / "told", "--v_parameterization", "--zero_terminal_snr", short)
    assert runs.losses(marked) == runs.losses(told)
    assert runs.losses(workspace.train("network", tmp_path / "plain", short)) != runs.losses(told)
    with safe_open(marked / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_zero_terminal_snr"] == "True"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    full = workspace.train(
        "full", tmp_path / "full", f"--pretrained_model_name_or_path={model}", "--no-train_text_encoder", "--max_train_steps=1"
    )
    assert {"v_pred", "ztsnr"} <= load_file(full / "tiny.safetensors").keys()


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> ClipCaptions:
    return ClipCaptions(load_clip_tokenizer(tiny.write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def tokenize(captions: ClipCaptions, **changes: Any) -> SdxlTokenizeStrategy:
    from dataclasses import replace

    first = replace(captions, **changes)
    return SdxlTokenizeStrategy(first, replace(first, tokenizer=replace(first.tokenizer, pad=0)))


def test_the_second_encoders_captions_are_padded_with_zero(captions: ClipCaptions) -> None:
    tokens = tokenize(captions).tokenize(["a red circle"])
    first, second = (tokens[name][0, 0] for name in (CLIP_L, OPEN_CLIP))
    eos = captions.tokenizer.eos
    assert torch.equal(first[:5], second[:5]) and first[4] == eos
    assert (first[5:] == eos).all() and (second[5:] == 0).all()


@pytest.mark.parametrize(("length", "chunks"), [(75, 1), (150, 2), (225, 3)])
def test_long_captions_are_encoded_in_chunks_and_pooled_from_the_first(
    length: int, chunks: int, captions: ClipCaptions
) -> None:
    parts: dict[str, Any] = dict(tiny_sdxl.modules())
    strategy = SdxlTextEncodingStrategy(eos=captions.tokenizer.eos)
    tokens = tokenize(captions, max_length=length).tokenize(["a red circle", "on " * 300])
    assert tokens[OPEN_CLIP].shape == (2, chunks, 77)
    with torch.no_grad():
        cond = strategy.encode(parts, tokens)
        for name, states in ((CLIP_L, cond.hidden_state1), (OPEN_CLIP, cond.hidden_state2)):
            hidden = parts[name](input_ids=tokens[name].flatten(0, 1), output_hidden_states=True).hidden_states[-2]
            hidden = hidden.view(2, chunks, 77, 64)
            expected = [hidden[:, 0, :1], *(hidden[:, n, 1:76] for n in range(chunks)), hidden[:, -1, -1:]]
            torch.testing.assert_close(states, torch.cat(expected, dim=1))
        torch.testing.assert_close(cond.pool2, parts[OPEN_CLIP](input_ids=tokens[OPEN_CLIP][:, 0]).text_embeds)
        assert cond.hidden_state1.shape[1] == tokenize(captions, max_length=length).first.length
        assert strategy.encode(parts, tokens, frozenset({CLIP_L})).missing() == {OPEN_CLIP}


@pytest.mark.parametrize("length", [75, 150])
def test_weights_multiply_both_hidden_states_and_leave_the_pooled_one(length: int, captions: ClipCaptions) -> None:
    parts = tiny_sdxl.modules()
    strategy = SdxlTextEncodingStrategy(eos=captions.tokenizer.eos)
    weighted = tokenize(captions, max_length=length, weighted=True).tokenize(["red (circle:1.2) on"])
    plain = tokenize(captions, max_length=length).tokenize(["red circle on"])
    with torch.no_grad():
        one, other = (strategy.encode(parts, tokens) for tokens in (weighted, plain))
    expected = torch.ones(one.hidden_state1.shape[1])
    expected[2] = 1.2  # BOS, red, circle
    for name in ("hidden_state1", "hidden_state2"):
        ratio = getattr(one, name) / getattr(other, name)
        torch.testing.assert_close(ratio.mean(dim=(0, 2)), expected)
    assert torch.equal(one.pool2, other.pool2)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["", "--cache_latents", "--cache_latents_to_disk"])
def test_sizes_are_right_for_crops_and_flips_cached_or_not(cache: str, workspace: Workspace, tmp_path: Path) -> None:
    """97x64 is cut to 64x64: 16 columns from the left, 17 from the right. Of 64x90, 13 rows are cut above and below."""
    images = tmp_path / "images"
    tiny.write_images(images / "1_a", 1, (97, 64))
    tiny.write_images(images / "1_b", 1, (64, 90))
    arguments = [
        *(f"--train_data_dir={images}", "--flip_aug", "--no-enable_bucket", f"--cache_dir={tmp_path / 'cache'}"),
        *(["--network_train_unet_only", cache] if cache else []),
    ]
    trainer = workspace.trainer("network", tmp_path / "out", *arguments)
    seen: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for epoch in range(12):
        for index in range(trainer.data.train.num_batches):
            for row in batch_sizes(trainer.data.train[(epoch, index)]).tolist():
                seen.setdefault(tuple(row[:2]), set()).add(tuple(row[2:]))
    assert seen == {(64, 97): {(0, 16, 64, 64), (0, 17, 64, 64)}, (90, 64): {(13, 0, 64, 64)}}


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_caches_have_the_names_and_arrays_of_sd_scripts(workspace: Workspace, tmp_path: Path) -> None:
    flags = ("--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    workspace.trainer("network", tmp_path / "out", *flags, f"--cache_dir={tmp_path / 'cache'}")
    files = {path.name: dict(np.load(path)) for path in (tmp_path / "cache").rglob("*.npz")}
    latents, text = files["000_0064x0064_sdxl.npz"], files["000_te_outputs.npz"]
    assert set(latents) == {"latents", "original_size", "crop_ltrb", "fingerprint"}
    assert latents["latents"].shape == (4, 8, 8)
    assert {name: array.shape for name, array in text.items() if name != "fingerprint"} == {
        "hidden_state1": (77, 64),
        "hidden_state2": (77, 64),
        "pool2": (64,),
    }


def test_caches_by_sd_scripts_are_used_where_their_length_fits(workspace: Workspace, tmp_path: Path, caplog: Any) -> None:
    flags = (
        *("--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
        f"--cache_dir={tmp_path / 'cache'}",
    )
    workspace.trainer("network", tmp_path / "a", *flags)
    for path in (tmp_path / "cache").rglob("*.npz"):
        np.savez(path, **{name: array for name, array in np.load(path).items() if name != "fingerprint"})
    with caplog.at_level(logging.WARNING):
        trainer = workspace.trainer("network", tmp_path / "b", *flags)
        assert not trainer.bundle.loaded("vae") and not trainer.bundle.loaded(OPEN_CLIP)
        assert "have no fingerprint" in caplog.text
        workspace.trainer("network", tmp_path / "c", *flags, "--max_token_length=150")
    assert "because of hidden_state1 of the shape (77, 64), not (152, 64)" in caplog.text


def test_text_caches_of_another_width_are_made_again(workspace: Workspace, tmp_path: Path, caplog: Any) -> None:
    """Whoever wrote them; nothing else tells the text encoder of a file by sd-scripts."""
    flags = (
        *("--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"),
        f"--cache_dir={tmp_path / 'cache'}",
    )
    workspace.trainer("network", tmp_path / "a", *flags)
    paths = sorted((tmp_path / "cache").rglob("*_te_outputs*.npz"))
    for path in paths[1:]:
        np.savez(path, **{**np.load(path), "pool2": np.zeros(1280, np.float32)})
    np.savez(paths[0], **{name: array[..., :32] for name, array in np.load(paths[0]).items() if name != "fingerprint"})
    unchecked = workspace.trainer("network", tmp_path / "b", *flags, "--skip_cache_check")
    with pytest.raises(UserError, match=r"does not fit .(pool2|hidden_state1) of the shape.*Remove it, or --skip_cache_check"):
        runs.first_batches(unchecked, 7)
    with caplog.at_level(logging.WARNING):
        trainer = workspace.trainer("network", tmp_path / "c", *flags)
    assert "because of pool2 of the shape (1280,), not (64,)" in caplog.text
    assert "because of hidden_state1 of the shape (77, 32), not (77, 64)" in caplog.text
    assert "have no fingerprint" not in caplog.text
    trainer.loss(trainer.data.train[(0, 0)])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_vae_that_overflows_is_told_before_anything_is_trained(family: str, tmp_path: Path) -> None:
    """Where pictures are encoded live, as where latents are cached (`test_caching`)."""
    trainer = runs.make_workspace(CASES[family], tmp_path).trainer("network", tmp_path / "out")
    tiny.overflow_in_fp16(trainer.bundle.vae)
    trainer.bundle.vae.half()
    with pytest.raises(UserError, match=r"NaN or infinite latents for .*\.png(?s:.*)Use --no_half_vae"):
        trainer.update([trainer.data.train[(0, 0)]])
    trainer.bundle.vae.float()
    assert trainer.update([trainer.data.train[(0, 0)]])["loss"].isfinite()


def test_cache_files_are_named_as_sd_scripts_names_them() -> None:
    image = Path("data/10_cat/a.b.png")
    assert SdxlLatentsCachingStrategy().format.path_for(image, (640, 480)) == Path("data/10_cat/a.b_0640x0480_sdxl.npz")
    assert SdxlTextEncoderOutputsCachingStrategy().format.path_for(image) == Path("data/10_cat/a.b_te_outputs.npz")
    assert [field.name for field in SdxlConditioning.tensor_fields()] == ["hidden_state1", "hidden_state2", "pool2"]


# ---- options ---------------------------------------------------------------------------------------------------------

GIVEN = {
    "pretrained_model_name_or_path": "m",
    "output_dir": "o",
    "resolution": "64",
    "train_data_dir": ".",
    "learning_rate": 1.0,
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"block_lr": "1e-3,1e-4"}, r"--block_lr 1e-3,1e-4: SDXL's UNet has 23 blocks"),
        ({"block_lr": "0"}, "every rate is 0"),
        ({"v2": True}, "--v2 is for Stable Diffusion 2.x, and this script trains SDXL"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rules(from_flags(FullTrainOptions, SdxlFullOptions, **GIVEN, **flags))


@pytest.mark.parametrize("value", ["1e-3,x", "1e-3,-1", "nan"])
def test_block_rates_have_to_be_numbers(value: str) -> None:
    with pytest.raises(UserError, match="block_lr: expected (numbers|rates)"):
        from_flags(FullTrainOptions, SdxlFullOptions, block_lr=value)


def test_options_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_rules(from_flags(FullTrainOptions, SdxlFullOptions, **GIVEN, learning_rate_te1=1e-3, clip_skip=2))
        check_rules(from_flags(NetworkTrainOptions, SdxlOptions, **GIVEN, network_module="networks.lora"))
    assert re.search("--learning_rate_te1 and --learning_rate_te2 have no effect", caplog.text)
    assert re.search("--clip_skip 2 has no effect: SDXL always takes", caplog.text)
