"""Training FLUX.1 and Chroma beyond what every family's contract tests: guidance, partial caches, options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CASES, Workspace

from library.errors import UserError
from library.flux_options import FluxOptions
from library.flux_train_utils import FluxFamily
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
        ({"vae": "x.safetensors"}, "take their autoencoder as --ae"),
        ({"blocks_to_swap": 4}, "--blocks_to_swap is known, but not implemented"),
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
        ({"clip_skip": 2}, "--clip_skip and --max_token_length have no effect"),
    ],
)
def test_options_without_effect_are_told(flags: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    import re

    base = {"pretrained_model_name_or_path": "m", "output_dir": "o", "network_module": "networks.lora", "resolution": "64"}
    with caplog.at_level(logging.WARNING):
        check_rules(options(**base, train_data_dir=".", **flags))
    assert re.search(message, caplog.text)
