"""Strengths by block: which layers a list reaches, in families that count blocks by a table and in those that do not."""

from __future__ import annotations

import pytest
import torch
from network_models import fill, tiny_text_encoder
from tiny_denoisers import DENOISERS

from library.errors import UserError
from networks.block_weights import layer_weights, parse_weights
from networks.lora import factory
from networks.network_targets import NetworkArch


def of_layers(family: str, text: str) -> dict[str, float]:
    denoiser = DENOISERS[family]
    return layer_weights(parse_weights(text), denoiser.arch, {"denoiser": denoiser.make()})


def reached(weights: dict[str, float], start: str) -> set[float]:
    """The strengths of all layers with keys that begin so."""
    found = {weight for key, weight in weights.items() if key.startswith(f"lora_unet_{start}")}
    assert found, start
    return found


def test_numbers_may_be_repeated_and_stand_in_brackets() -> None:
    assert parse_weights("[1, 0.5*3,-2]") == (1, 0.5, 0.5, 0.5, -2)


@pytest.mark.parametrize("text", ["", "1,x", "1*0", "1*y", "nan"])
def test_anything_else_is_named(text: str) -> None:
    with pytest.raises(UserError, match="is not a number"):
        parse_weights(text)


def test_a_whole_list_counts_the_blocks_as_the_family_does() -> None:
    weights = of_layers("sd", ",".join(map(str, range(25))))
    assert reached(weights, "down_blocks_0_attentions_1_") == {2}
    assert reached(weights, "mid_block_") == {12}
    assert reached(weights, "up_blocks_1_attentions_2_") == {18}
    assert reached(weights, "time_embedding_") == {1}
    assert of_layers("sd", "7," + ",".join(map(str, range(25)))) == weights | dict.fromkeys(
        [key for key in weights if key.startswith(("lora_unet_time", "lora_unet_conv_"))], 7
    )


def test_a_short_list_leaves_out_what_it_does_not_name() -> None:
    weights = of_layers("sd", "9,1,2,4,5,7,8,12," + ",".join(map(str, range(16, 25))))
    assert reached(weights, "down_blocks_0_attentions_1_") == {2}
    assert reached(weights, "mid_block_attentions_") == {12}
    assert reached(weights, "up_blocks_1_attentions_2_") == {18}
    assert reached(weights, "down_blocks_0_downsamplers_") == {0}
    assert reached(weights, "time_embedding_") == {9}


def test_sdxl_counts_its_middle_once_in_a_short_list() -> None:
    weights = of_layers("sdxl", "9,*".replace("*", ",".join(map(str, range(1, 20)))))
    assert reached(weights, "input_blocks_4_") == {5}
    assert reached(weights, "middle_block_") == {10}
    assert reached(weights, "output_blocks_0_") == {11}
    assert reached(weights, "time_embed_") == {9}
    assert reached(of_layers("sdxl", "9,4,5,7,8,10,0*6"), "input_blocks_4_") == {4}


def test_where_no_table_counts_blocks_they_are_the_models_own() -> None:
    weights = of_layers("flux", "1,2,3,4")  # two double blocks, two single ones
    assert reached(weights, "double_blocks_1_txt_mlp_0") == {2}
    assert reached(weights, "single_blocks_0_linear1") == {3}
    assert reached(weights, "img_in") == {1}
    assert reached(of_layers("flux", "5,1*4"), "img_in") == {5}
    weights = of_layers("sd3", "5,1,2")  # text and image of a block count as one
    assert reached(weights, "joint_blocks_1_x_block_") == reached(weights, "joint_blocks_1_context_block_") == {2}
    assert reached(weights, "joint_blocks_0_") == {1} and reached(weights, "context_embedder") == {5}


@pytest.mark.parametrize(("family", "known"), [("sd", "17, 25 or 26"), ("sdxl", "12, 20, 23 or 24"), ("flux", "4 or 5")])
def test_a_list_of_another_length_is_told_which_there_are(family: str, known: str) -> None:
    with pytest.raises(UserError, match=rf"3 block weights: this model takes {known}"):
        of_layers(family, "1,2,3")


def test_a_network_is_as_strong_in_a_block_as_the_list_says() -> None:
    arch: NetworkArch = DENOISERS["sd"].arch
    unet, encoder = DENOISERS["sd"].make(), tiny_text_encoder()
    network = factory.for_arch(arch).create_network(0.5, 2, 2, None, encoder, unet)
    fill(network)
    parts = {"denoiser": unet, "text_encoder": encoder}
    network.set_layer_weights(layer_weights(parse_weights("3,1*12,0,2*12"), arch, parts))
    strengths = {adapter.key: adapter.multiplier for adapter in network.adapters()}
    assert {strengths[key] for key in strengths if "_te_" in key} == {1.5}
    assert {strengths[key] for key in strengths if "_mid_" in key} == {0}
    assert {strengths[key] for key in strengths if "_up_" in key} == {1}
    network.set_multiplier(1.0)
    middle = next(adapter for adapter in network.adapters() if "_up_" in adapter.key)
    before = middle.base.weight.clone()
    network.merge_into_base()
    torch.testing.assert_close(middle.base.weight, before + 2 * middle.delta_weight())
