"""Training Lumina-Image-2.0 beyond what every family's contract tests: system prompt, text lengths, swapped layers, options."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CASES, Workspace
from safetensors.torch import load_file

from library.errors import UserError
from library.lumina_options import LuminaOptions
from library.lumina_train_utils import LuminaFamily
from library.memory_policy import read_to
from library.objectives import RectifiedFlow
from library.option_groups import NetworkTrainOptions
from library.option_rules import check_rules
from library.options import from_flags

FROZEN = "--network_train_unet_only"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["lumina"], tmp_path_factory.mktemp("lumina"))


def test_every_layer_of_gemma_but_the_last_learns(workspace: Workspace, tmp_path: Path) -> None:
    """The last one's adapters are in the file all the same, as sd-scripts has them."""
    trainer = workspace.trainer("network", tmp_path)
    assert trainer.trainable.parts == {"denoiser", "gemma2"}
    for parameter in trainer.parameters:
        torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    trainer.loss(trainer.data.train[(0, 0)]).backward()
    gradients = {name: p.grad for name, p in trainer.trainable.network.named_parameters() if name.startswith("lora_te_")}  # type: ignore[attr-defined]
    with_one = {name.split("_")[3] for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert with_one == {"0", "1"}
    assert any(name.startswith("lora_te_layers_2_") for name in gradients)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "live"])
def test_text_is_as_long_as_the_longest_caption_and_padding_changes_nothing(cached: bool, tmp_path: Path) -> None:
    workspace = runs.make_workspace(CASES["lumina"], tmp_path)
    captions = ["a", "a much longer one", "short", "tiny"]
    for path, caption in zip(sorted(workspace.images.rglob("*.txt")), captions, strict=False):
        path.write_text(caption)
    trainer = workspace.trainer("network", tmp_path / "out", FROZEN, *(["--cache_text_encoder_outputs"] if cached else []))
    tokenize = trainer.strategies.tokenize
    seen = set()
    for batch in runs.first_batches(trainer, 7):
        cond: Any = trainer.conditioning(batch)
        lengths = tokenize.lengths(batch.captions)
        assert lengths is not None and cond.context.shape[1] == cond.mask.shape[1] == max(lengths)
        encoders = {"gemma2": trainer.bundle.part("gemma2")}
        with torch.no_grad():
            whole = trainer.strategies.text_encoding.encode(encoders, tokenize.tokenize(batch.captions))
            x, t = torch.randn(len(batch), 4, 8, 8), torch.full((len(batch),), 0.4)
            found, expected = (
                trainer.family.predict(trainer.bundle.denoiser, x, t, each, None, trainer.options) for each in (cond, whole)
            )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        seen.add(cond.whole)
    assert seen == ({True, False} if cached else {False}), "batches with and without padding"


def test_another_system_prompt_is_another_cache_and_empty_captions_have_none(workspace: Workspace, tmp_path: Path) -> None:
    one, other = (
        workspace.trainer("network", tmp_path / str(number), FROZEN, f"--system_prompt={told}").strategies.tokenize
        for number, told in enumerate(("re", "cire"))
    )
    assert one.fingerprint() != other.fingerprint()
    assert one.lengths(["red", ""]) != other.lengths(["red", ""])
    assert one.lengths([""]) == other.lengths([""]) == [1]


@pytest.fixture(scope="module")
def swappable(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    case = CASES["lumina"]
    assert case.write_swappable
    return runs.make_workspace(replace(case, write_model=case.write_swappable), tmp_path_factory.mktemp("swappable"))


def test_layers_are_swapped_and_refiners_stay(swappable: Workspace, tmp_path: Path) -> None:
    trainer = swappable.trainer("full", tmp_path, "--blocks_to_swap=2", "--cpu_offload_checkpointing")
    trainer.update([trainer.data.train[(0, 0)]])
    swap, offload = trainer.memory.swap, trainer.memory.offload
    assert swap is not None and offload is not None and offload.offloaded_bytes > 0
    assert sum(ring.plan.num_swapped for ring in swap.rings) == 2
    assert swap.misses == 0
    (tmp_path / "empty" / "1_thing").mkdir(parents=True)
    empty = f"--train_data_dir={tmp_path / 'empty'}"
    with pytest.raises(
        UserError, match="swap 0 and 0 and 3 of this model's 1 context refiners and 1 noise refiners and 4 layers"
    ):
        swappable.trainer("full", tmp_path, "--blocks_to_swap=3", empty)


def test_the_denoiser_is_read_to_main_memory_if_its_blocks_are_swapped() -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert read_to("denoiser", options(blocks_to_swap=2), cuda) == cpu
    assert read_to("gemma2", options(blocks_to_swap=2), cuda) == cuda


def test_the_norm_that_nothing_uses_is_in_what_is_trained_whole(workspace: Workspace, tmp_path: Path) -> None:
    saved = load_file(workspace.train("full", tmp_path, "--max_train_steps=1") / "tiny.safetensors")
    before = load_file(workspace.model)
    assert saved.keys() == before.keys()
    assert torch.equal(saved["norm_final.weight"], before["norm_final.weight"])
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert changed == saved.keys() - {"norm_final.weight"}


def options(**flags: Any) -> NetworkTrainOptions:
    return from_flags(NetworkTrainOptions, LuminaOptions, **flags)


def test_defaults_are_those_of_sd_scripts() -> None:
    assert LuminaFamily().objective(options()) == RectifiedFlow(sampling="shift", flow_shift=6.0)
    chosen = options().family
    assert (chosen.token_length, chosen.system_prompt, chosen.model_prediction_type) == (256, "", "raw")
    scaled = LuminaFamily().objective(options(model_prediction_type="sigma_scaled", weighting_scheme="cosmap"))
    assert (scaled.data_error, scaled.weighting) == (True, "cosmap")
    assert LuminaFamily().objective(options(timestep_sampling="nextdit_shift")).sampling == "nextdit_shift"


def test_flags_of_attention_are_names_of_back_ends() -> None:
    assert options(use_flash_attn=True).attention_mode == "flash"
    assert options(use_sage_attn=True, xformers=True).attention_modes == {"sageattn", "xformers"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"v_parameterization": True}, "are Stable Diffusion's, and this model is a flow"),
        ({"vae": "x.safetensors"}, "autoencoder is given as --ae"),
        ({"use_sage_attn": True}, "no backward pass"),
        ({"system_prompt": "You are. <Prompt Start> "}, "'<Prompt Start>' is put behind it by itself"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rules(options(**flags))


def test_options_without_effect_are_told(caplog: pytest.LogCaptureFixture) -> None:
    base = {"pretrained_model_name_or_path": "m", "output_dir": "o", "network_module": "networks.lora", "resolution": "64"}
    with caplog.at_level(logging.WARNING):
        check_rules(options(**base, train_data_dir=".", min_snr_gamma=5.0, weighting_scheme="cosmap", sample_batch_size=2))
    for message in ("--min_snr_gamma, .* have no effect", "--weighting_scheme cosmap has no effect"):
        assert re.search(message, caplog.text)
