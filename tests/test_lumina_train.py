"""Training Lumina-Image-2.0 beyond what every family's contract tests: system prompt, text lengths, swapped layers, options."""

from __future__ import annotations

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
from library.objectives import RectifiedFlow
from library.option_groups import NetworkTrainOptions
from library.option_rules import check_rules
from library.options import from_flags
from library.quantized_layers import QuantizedLayer

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
    network: Any = trainer.trainable.network  # type: ignore[attr-defined]
    gradients = {name: p.grad for name, p in network.named_parameters() if name.startswith("lora_te_")}
    with_one = {name.split("_")[3] for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert with_one == {"0", "1"}
    assert {p.requires_grad for name, p in network.named_parameters() if name.startswith("lora_te_layers_2_")} == {False}


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


def test_all_weights_learn_in_bf16_with_swapped_layers_and_the_norm_that_nothing_uses_stays(
    swappable: Workspace, tmp_path: Path
) -> None:
    flags = ["--mixed_precision=bf16", "--full_bf16", "--fused_backward_pass", "--gradient_checkpointing", "--blocks_to_swap=2"]
    output = swappable.train("full", tmp_path / "out", *flags, "--max_train_steps=2", "--learning_rate=1e-2")
    saved, before = load_file(output / "tiny.safetensors"), load_file(swappable.model)
    assert saved.keys() == before.keys()
    assert torch.equal(saved["norm_final.weight"], before["norm_final.weight"])
    changed = {name for name in saved if not torch.equal(saved[name].float(), before[name])}
    assert changed == saved.keys() - {"norm_final.weight"}


FP8 = {"denoiser": {"float8_e4m3fn", "int8"}, "gemma2": {"float8_e4m3fn"}}
"""Modulation is kept in int8."""


def test_the_base_and_gemma_may_be_kept_in_8_bits(workspace: Workspace, tmp_path: Path) -> None:
    plain = workspace.trainer("network", tmp_path / "plain", FROZEN)
    batch = plain.data.train[(0, 0)]
    with torch.no_grad():
        expected = plain.loss(batch)
        for flags in (["--quantize_base=int8", "--quantize_text_encoders=int8"], ["--fp8_base"]):
            trainer = workspace.trainer("network", tmp_path / "other", FROZEN, *flags)
            kinds = {
                part: {str(m.stored.dtype)[6:] for m in trainer.bundle.part(part).modules() if isinstance(m, QuantizedLayer)}
                for part in ("denoiser", "gemma2")
            }
            assert kinds == ({"denoiser": {"int8"}, "gemma2": {"int8"}} if len(flags) > 1 else FP8)
            assert float(trainer.loss(batch)) == pytest.approx(float(expected), rel=0.05)


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
    with pytest.raises(UserError, match="no backward pass"):
        check_rules(options(use_sage_attn=True))
