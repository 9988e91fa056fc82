"""Training FLUX.1 and Chroma beyond what every family's contract tests: guidance, partial caches, options."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CASES, MODES, Mode, Workspace
from safetensors.torch import load_file

from library.errors import UserError
from library.flux_options import FluxOptions
from library.flux_train_utils import FluxFamily
from library.memory_policy import MemoryPlan, read_to
from library.objectives import RectifiedFlow
from library.option_groups import NetworkTrainOptions
from library.option_rules import check_rules
from library.options import from_flags


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["flux"], tmp_path_factory.mktemp("flux"))


def test_clip_learns_while_t5_is_cached_and_gone(workspace: Workspace, tmp_path: Path) -> None:
    live = workspace.trainer("network", tmp_path / "live")
    cached = workspace.trainer("network", tmp_path / "cached", "--cache_text_encoder_outputs")
    assert cached.trainable.parts == {"denoiser", "clip_l"}
    loss = cached.loss(cached.data.train[(0, 0)])
    assert not cached.bundle.loaded("t5xxl")
    torch.testing.assert_close(loss, live.loss(live.data.train[(0, 0)]), rtol=1e-5, atol=0)
    for parameter in cached.parameters:
        torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    cached.loss(cached.data.train[(0, 0)]).backward()
    clip = [p for n, p in cached.trainable.network.named_parameters() if n.startswith("lora_te1_")]  # type: ignore[attr-defined]
    assert clip
    assert all(p.grad is not None and p.grad.abs().any() for p in clip)


def test_t5_learns_on_request_and_is_not_cached_then(workspace: Workspace, tmp_path: Path) -> None:
    arguments = ("--network_module=networks.lora_flux", "--network_args", "train_t5xxl=true")
    assert workspace.trainer("network", tmp_path / "a", *arguments).trainable.parts == {"denoiser", "clip_l", "t5xxl"}
    with pytest.raises(UserError, match="every text encoder learns"):
        workspace.trainer("network", tmp_path / "b", "--cache_text_encoder_outputs", *arguments)


def test_the_guidance_of_training_is_the_one_that_is_set(workspace: Workspace, tmp_path: Path) -> None:
    losses = []
    for number, extra in enumerate(((), ("--guidance_scale=1.0",), ("--guidance_scale=3.5",))):
        trainer = workspace.trainer("network", tmp_path / str(number), *extra)
        with torch.no_grad():
            losses.append(float(trainer.loss(trainer.data.train[(0, 0)])))
    assert losses[0] == losses[1] != losses[2]


@pytest.fixture(scope="module")
def swappable(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    case = CASES["flux"]
    assert case.write_swappable
    return runs.make_workspace(replace(case, write_model=case.write_swappable), tmp_path_factory.mktemp("swappable"))


def test_adapters_start_from_and_merge_into_a_model_whose_blocks_are_swapped(swappable: Workspace, tmp_path: Path) -> None:
    learned = swappable.train("network", tmp_path / "learned", "--max_train_steps=2", "--learning_rate=1") / "tiny.safetensors"
    flags = [f"--base_weights={learned}", f"--network_weights={learned}", "--dim_from_weights"]
    plain = swappable.trainer("network", tmp_path / "plain", *flags)
    swapped = swappable.trainer("network", tmp_path / "swapped", *flags, "--blocks_to_swap=2")
    unmerged = swappable.trainer("network", tmp_path / "unmerged", flags[1], flags[2])
    batch = plain.data.train[(0, 0)]
    assert torch.equal(swapped.loss(batch), plain.loss(batch))
    assert not torch.equal(unmerged.loss(batch), plain.loss(batch))


def test_weights_of_a_schedule_free_optimizer_are_saved_and_previewed_where_they_are(
    swappable: Workspace, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n")
    flags = ["--optimizer_type=AdamWScheduleFree", "--max_train_steps=3", f"--sample_prompts={prompts}"]
    flags += ["--sample_every_n_steps=1", "--save_every_n_steps=2", "--save_state"]
    plain = swappable.train("full", tmp_path / "plain", *flags)
    swapped = swappable.train("full", tmp_path / "swapped", *flags, "--blocks_to_swap=2")
    assert runs.losses(swapped) == runs.losses(plain)
    for file in ("tiny-step00000002.safetensors", "tiny.safetensors", "tiny-state/trainable.safetensors"):
        runs.assert_same_tensors(load_file(swapped / file), load_file(plain / file))
    images = [[path.read_bytes() for path in sorted((output / "sample").glob("*.png"))] for output in (swapped, plain)]
    assert images[0] == images[1]
    assert len(images[0]) == 3


@pytest.mark.parametrize("mode", MODES)
def test_training_steps_wait_for_no_block_and_offload_what_checkpoints_keep(
    mode: Mode, swappable: Workspace, tmp_path: Path
) -> None:
    trainer = swappable.trainer(mode, tmp_path, "--blocks_to_swap=2", "--cpu_offload_checkpointing")
    for index in range(3):
        trainer.update([trainer.data.train[(0, index)]])
        trainer.state.advance(1, trainer.length)
    swap, offload = trainer.memory.swap, trainer.memory.offload
    assert swap is not None and offload is not None
    assert swap.misses == 0
    assert offload.offloaded_bytes > 0
    assert [ring.plan.num_swapped for ring in swap.rings] == [1, 2]


def test_more_blocks_than_can_be_swapped_are_an_error_before_anything_is_loaded(
    workspace: Workspace, swappable: Workspace, tmp_path: Path
) -> None:
    """The folder without pictures would be the next error, and models are loaded after that."""
    (tmp_path / "empty" / "1_thing").mkdir(parents=True)
    empty = f"--train_data_dir={tmp_path / 'empty'}"
    with pytest.raises(UserError, match=r"swap 1 and 4 of this model's 3 double blocks and 4 single blocks.* Use 2 at most"):
        swappable.trainer("network", tmp_path, "--blocks_to_swap=3", empty)
    with pytest.raises(UserError, match="Leave --blocks_to_swap out"):
        workspace.trainer("network", tmp_path, "--blocks_to_swap=1", empty)


def test_the_denoiser_is_read_to_main_memory_if_its_blocks_are_swapped() -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert read_to("denoiser", options(blocks_to_swap=2), cuda) == cpu
    assert read_to("denoiser", options(split_mode=True), cuda) == cpu
    assert read_to("denoiser", options(split_mode=True, blocks_to_swap=0), cuda) == cuda
    assert read_to("t5xxl", options(blocks_to_swap=2), cuda) == cuda


@pytest.mark.parametrize("flags", [{"blocks_to_swap": 2}, {"cpu_offload_checkpointing": True}])
def test_a_device_that_has_no_transfers_is_an_error_before_anything_is_loaded(flags: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(flags))}: .* this run uses 'mps'"):
        MemoryPlan.of(FluxFamily(), options(**flags), torch.device("mps"))


def options(**flags: Any) -> NetworkTrainOptions:
    return from_flags(NetworkTrainOptions, FluxOptions, **flags)


def test_defaults_are_raw_and_guidance_one() -> None:
    objective = FluxFamily().objective(options())
    assert objective == RectifiedFlow(sampling="sigma", flow_shift=3.0)
    assert options().family.guidance_scale == 1.0


def test_sigma_scaled_reads_the_weighting_scheme_and_raw_does_not() -> None:
    scaled = FluxFamily().objective(options(model_prediction_type="sigma_scaled", weighting_scheme="cosmap"))
    assert (scaled.data_error, scaled.weighting) == (True, "cosmap")
    for kind in ("raw", "additive"):
        raw = FluxFamily().objective(options(model_prediction_type=kind, weighting_scheme="cosmap"))
        assert (raw.data_error, raw.weighting) == (False, "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"v_parameterization": True}, "are Stable Diffusion's, and this model is a flow"),
        ({"vae": "x.safetensors"}, "autoencoder is given as --ae"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rules(options(**flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"min_snr_gamma": 5.0}, "--min_snr_gamma, .* have no effect"),
        ({"weighting_scheme": "cosmap"}, "--weighting_scheme cosmap has no effect"),
        ({"weighting_scheme": "mode", "timestep_sampling": "shift"}, "--weighting_scheme mode has no effect"),
        ({"split_mode": True, "blocks_to_swap": 4}, "--split_mode has no effect beside --blocks_to_swap 4"),
        ({"cpu_offload_checkpointing": True}, "--cpu_offload_checkpointing turns on --gradient_checkpointing"),
        ({"clip_skip": 2}, "--clip_skip and --max_token_length have no effect"),
    ],
)
def test_options_without_effect_are_told(flags: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    import re

    base = {"pretrained_model_name_or_path": "m", "output_dir": "o", "network_module": "networks.lora", "resolution": "64"}
    with caplog.at_level(logging.WARNING):
        check_rules(options(**base, train_data_dir=".", **flags))
    assert re.search(message, caplog.text)
