"""LoRA for Lumina-Image-2.0: which layers, under which names and ranks; split q, k, v; files in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_lumina
import torch
from safetensors import safe_open
from test_interop_matrix import THEIRS as DIFFUSERS
from test_interop_matrix import lumina_class, lumina_class_output, pipeline_of, randomise
from tiny_denoisers import DENOISERS, lumina_output
from torch import nn

from library.errors import UserError
from networks import lora_lumina
from networks.file_formats import in_format
from networks.network_base import LayerNetwork
from tools import convert_lora

BLOCK = ("attention_qkv", "attention_out", "feed_forward_w1", "feed_forward_w2", "feed_forward_w3")
MODULATED = ("layers_0", "layers_1", "noise_refiner_0")
KEYS = {f"lora_unet_{block}_{name}" for block in (*MODULATED, "context_refiner_0") for name in BLOCK}
KEYS |= {f"lora_unet_{block}_adaLN_modulation_1" for block in (*MODULATED, "final_layer")} | {"lora_unet_final_layer_linear"}


@pytest.fixture(scope="module")
def parts() -> dict[str, nn.Module]:
    return tiny_lumina.modules()


def make(parts: dict[str, nn.Module], dim: int = 4, **arguments: Any) -> LayerNetwork:
    encoders = {"gemma2": parts["gemma2"]}
    return lora_lumina.create_network(1.0, dim, 2.0, None, encoders, parts["denoiser"], init_seed=0, **arguments)


def ranks(network: LayerNetwork) -> dict[str, int]:
    return {adapter.key: adapter.rank for adapter in network.adapters()}  # type: ignore[attr-defined]


def denoiser_ranks(network: LayerNetwork) -> dict[str, int]:
    return {key: rank for key, rank in ranks(network).items() if key.startswith("lora_unet_")}


def test_blocks_refiners_the_last_layer_and_gemma_are_adapted(parts: dict[str, nn.Module]) -> None:
    found = ranks(make(parts))
    assert denoiser_ranks(make(parts)).keys() == KEYS
    assert found.keys() - KEYS == {
        f"lora_te_layers_{layer}_{name}"
        for layer in range(3)
        for name in (
            *(f"self_attn_{one}_proj" for one in "qkvo"),
            *(f"mlp_{one}_proj" for one in ("gate", "up", "down")),
        )
    }


@pytest.mark.parametrize(
    ("argument", "signs"),
    [
        ("attn_dim", ("_attention_",)),
        ("mlp_dim", ("_feed_forward_",)),
        ("mod_dim", ("_adaLN_modulation_",)),
        ("refiner_dim", ("_refiner_",)),
    ],
)
def test_a_part_has_its_own_rank_and_rank_0_leaves_it_out(
    argument: str, signs: tuple[str, ...], parts: dict[str, nn.Module]
) -> None:
    own = {key for key in KEYS if any(sign in key for sign in signs)}
    found = ranks(make(parts, **{argument: "7"}))
    assert own and {key for key, rank in found.items() if rank == 7} == own
    assert {found[key] for key in found.keys() - own} == {4}
    assert KEYS - ranks(make(parts, **{argument: "0"})).keys() == own


def test_the_first_part_that_fits_counts_and_embedders_have_ranks_of_their_own(parts: dict[str, nn.Module]) -> None:
    found = ranks(make(parts, attn_dim="2", refiner_dim="3"))
    assert found["lora_unet_noise_refiner_0_attention_qkv"] == 2
    assert found["lora_unet_noise_refiner_0_feed_forward_w1"] == 3
    found = denoiser_ranks(make(parts, embedder_dims="[1,2,0]", train_blocks="context_refiner"))
    assert {key: rank for key, rank in found.items() if key not in KEYS} == {
        "lora_unet_x_embedder": 1,
        "lora_unet_t_embedder_mlp_0": 2,
        "lora_unet_t_embedder_mlp_2": 2,
    }
    with pytest.raises(UserError, match="3 ranks"):
        make(parts, embedder_dims="1,2")


@pytest.mark.parametrize(
    ("chosen", "starts"),
    [
        ("all", ("",)),
        ("transformer", ("layers_",)),
        ("refiners", ("noise_refiner_", "context_refiner_")),
        ("noise_refiner", ("noise_refiner_",)),
        ("context_refiner", ("context_refiner_",)),
    ],
)
def test_blocks_are_chosen_by_kind(chosen: str, starts: tuple[str, ...], parts: dict[str, nn.Module]) -> None:
    found = denoiser_ranks(make(parts, train_blocks=chosen))
    assert found.keys() == {key for key in KEYS if key.startswith(tuple(f"lora_unet_{start}" for start in starts))}


def test_split_parts_do_not_share_their_ranks_and_the_file_gives_what_was_trained(parts: dict[str, nn.Module]) -> None:
    """36 rows of queries, 12 of keys, 12 of values."""
    network, model = make(parts, split_qkv="true"), parts["denoiser"]
    randomise(network)
    untrained = lumina_output(model)
    network.attach()
    expected = lumina_output(model)
    network.detach()
    tensors = network.file_state_dict(None)
    key = "lora_unet_layers_0_attention_qkv"
    up = tensors[f"{key}.lora_up.weight"]
    assert up.shape == (60, 12) and tensors[f"{key}.lora_down.weight"].shape == (12, 36)
    assert up[:36, :4].any() and not up[:36, 4:].any()
    assert up[36:48, 4:8].any() and not up[36:48, :4].any() and not up[36:48, 8:].any()
    assert up[48:, 8:].any() and not up[48:, :8].any()
    fused, _ = lora_lumina.create_network_from_weights(1.0, None, None, parts["gemma2"], model, tensors)
    fused.attach()
    torch.testing.assert_close(lumina_output(model), expected, atol=1e-5, rtol=1e-5)
    fused.detach()
    assert not torch.allclose(untrained, expected, atol=1e-2)


@pytest.mark.parametrize("split", ["false", "true"])
def test_under_diffusers_names_its_pipeline_reads_every_layer(split: str, tmp_path: Path) -> None:
    """Also embedders, and at other sizes than the published ones. Under sd-scripts' names it reads nothing of this family."""
    kind = DENOISERS["lumina"]
    model = kind.make()
    network = lora_lumina.create_network(1.0, 4, 2.0, None, None, model, init_seed=0, embedder_dims="2,3,4", split_qkv=split)
    randomise(network)
    network.save_weights(tmp_path / "ours.safetensors", None, {"ss_seed": "1"})
    convert_lora.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")])
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        given = {key.rsplit(".lora_", 1)[0] for key in file.keys()}  # noqa: SIM118 (not a dict)
    theirs = lumina_class()
    pipeline_of(DIFFUSERS["lumina"], theirs).load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    taken = {f"transformer.{path}" for path, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    assert taken == given
    plain = lumina_output(model)
    network.attach()
    expected = lumina_output(model)
    assert (expected - plain).std() > 0.05
    torch.testing.assert_close(lumina_class_output(theirs), expected, atol=1e-5, rtol=1e-4)


def test_gemma_has_no_place_in_diffusers_and_one_in_comfy(parts: dict[str, nn.Module]) -> None:
    network = make(parts)
    tensors = network.file_state_dict(None)
    with pytest.raises(UserError, match=r"some file has 21 layers that diffusers has no place for .*lora_te_layers_0"):
        in_format(tensors, lora_lumina.ARCH, "diffusers", "some file")
    names = in_format(tensors, lora_lumina.ARCH, "comfy", "some file")
    assert "diffusion_model.layers.0.attention.qkv.lora_down.weight" in names
    assert "text_encoders.gemma2_2b.transformer.model.layers.0.mlp.gate_proj.lora_up.weight" in names
