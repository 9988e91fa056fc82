"""Which layers are adapted, at which rank and rate: patterns and block numbers, the same for every family."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_denoisers import DENOISERS
from torch import nn

from library.errors import UserError
from library.optimizers import LearningRates
from networks import lora, oft
from networks.network_base import LayerNetwork, NetworkFactory

ATTENTION = {
    "sd": "attn1_to_q$",
    "sdxl": "attn1_to_q$",
    "flux": "img_attn_qkv$",
    "chroma": "img_attn_qkv$",
    "sd3": "_x_block_attn2?_qkv$",
    "lumina": "attention_qkv$",
}
PATHS = {
    "sd": r"mid_block\.attentions\.0\.proj_in",
    "sdxl": r"middle_block\.1\.proj_in",
    "flux": r"double_blocks\.0\.txt_mlp\.0",
    "chroma": r"double_blocks\.0\.txt_mlp\.0",
    "sd3": r"joint_blocks\.0\.context_block\.mlp\.fc2",
    "lumina": r"layers\.0\.feed_forward\.w2",
}
OUTSIDE = {
    "sd": "time_embedding_linear_1$",
    "sdxl": "time_embed_0$",
    "flux": "final_layer_linear$",
    "chroma": "final_layer_linear$",
    "sd3": "context_embedder$",
    "lumina": "cap_embedder_1$",
}


@pytest.fixture(scope="module")
def denoisers() -> dict[str, nn.Module]:
    return {name: denoiser.make() for name, denoiser in DENOISERS.items()}


def make(family: str, model: nn.Module, factory: NetworkFactory = lora.factory, **arguments: Any) -> LayerNetwork:
    return factory.for_arch(DENOISERS[family].arch).create_network(1.0, 4, 1.0, None, None, model, **arguments)


def ranks(network: LayerNetwork) -> dict[str, int]:
    return {adapter.key: adapter.rank for adapter in network.adapters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", DENOISERS)
def test_patterns_leave_out_add_and_give_ranks_and_rates(family: str, denoisers: dict[str, nn.Module]) -> None:
    import re

    model, attention, path = denoisers[family], ATTENTION[family], PATHS[family]
    every = ranks(make(family, model))
    matching = {key for key in every if re.search(attention, key)}
    assert matching and len(matching) < len(every)
    assert ranks(make(family, model, exclude_patterns=attention)).keys() == every.keys() - matching
    by_path = every.keys() - ranks(make(family, model, exclude_patterns=path)).keys()
    assert len(by_path) == 1  # the whole path, or nothing
    only = make(family, model, exclude_patterns="['.*']", include_patterns=f"['{attention}', '{OUTSIDE[family]}']")
    outside = ranks(only).keys() - matching
    assert ranks(only).keys() >= matching and len(outside) == 1 and not outside & every.keys()

    assert ranks(make(family, model, network_reg_dims=f"{attention}=0")).keys() == every.keys() - matching

    network = make(family, model, network_reg_dims=f"{attention}=7", network_reg_lrs=f"{path}=0.5,{attention}=0.25")
    assert {key for key, rank in ranks(network).items() if rank == 7} == matching
    groups = {group.name: group for group in network.param_groups(LearningRates(0.1, None, ()))}
    assert len(groups["unet_lr0.25"].params) == 2 * len(matching) and len(groups["unet_lr0.5"].params) == 2
    kinds = network.layer_kinds()
    assert sum(kind.layers for kind in kinds) == len(every)
    assert sum(kind.parameters for kind in kinds) == sum(parameter.numel() for parameter in network.parameters())
    assert {kind.rate for kind in kinds} == {0.1, 0.25, 0.5}


@pytest.mark.parametrize("argument", ["exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_pattern_that_fits_no_layer_is_an_error(family: str, argument: str, denoisers: dict[str, nn.Module]) -> None:
    value = "no_such_layer" + ("=2" if "reg" in argument else "")
    with pytest.raises(UserError, match=f"{argument}: 'no_such_layer' fits no layer.*lora_unet_"):
        make(family, denoisers[family], **{argument: value})


def test_blocks_are_chosen_by_number_where_the_family_counts_them(denoisers: dict[str, nn.Module]) -> None:
    keys = ranks(make("sd", denoisers["sd"], train_block_indices="1-2,12"))
    starts = {"_".join(key.split("_")[2:7]) for key in keys}
    assert starts == {"down_blocks_0_attentions_0", "down_blocks_0_attentions_1", "mid_block_attentions_0_transformer"} | {
        "mid_block_attentions_0_proj"
    }
    with pytest.raises(UserError, match="no layer is adapted in block 9. Blocks with layers: 1, 2, 12"):
        make("sd", denoisers["sd"], train_block_indices="1,9")
    with pytest.raises(UserError, match="'flux' network table does not count blocks"):
        make("flux", denoisers["flux"], train_block_indices="1")
    with pytest.raises(UserError, match="train_block_indices=two: expected block numbers"):
        make("sd", denoisers["sd"], train_block_indices="two")


def test_a_large_convolution_that_is_named_needs_a_rank(denoisers: dict[str, nn.Module]) -> None:
    model, name = denoisers["sd"], "down_blocks_0_resnets_0_conv1$"
    with pytest.raises(UserError, match="include_patterns names lora_unet_down_blocks_0_resnets_0_conv1.*conv_dim"):
        make("sd", model, include_patterns=name)
    for argument in ({"conv_dim": 3}, {"network_reg_dims": f"{name}=3"}):
        assert ranks(make("sd", model, include_patterns=name, **argument))["lora_unet_down_blocks_0_resnets_0_conv1"] == 3


def test_a_pattern_has_to_be_a_regular_expression(denoisers: dict[str, nn.Module]) -> None:
    for argument, value in (("exclude_patterns", "(attn"), ("network_reg_dims", "(attn=3"), ("network_reg_lrs", "attn=fast")):
        with pytest.raises(UserError, match=f"{argument}=.*expected re"):
            make("sd", denoisers["sd"], **{argument: value})


@pytest.mark.parametrize("family", DENOISERS)
def test_oft_takes_attention_alone_unless_it_is_given_more(family: str, denoisers: dict[str, nn.Module]) -> None:
    attention = {adapter.key for adapter in make(family, denoisers[family], oft.factory).adapters()}
    assert attention and all("attn" in key or "attention" in key for key in attention)
    more = {adapter.key for adapter in make(family, denoisers[family], oft.factory, enable_all_linear="true").adapters()}
    assert more == ranks(make(family, denoisers[family])).keys()
    if family == "sd":
        conv = {adapter.key for adapter in make(family, denoisers[family], oft.factory, enable_conv="true").adapters()}
        assert conv - attention == {
            key for key in ranks(make(family, denoisers[family], conv_dim=4)) if "attentions" not in key
        }
    with pytest.raises(UserError, match="rank_dropout=0.5 has no meaning"):
        make(family, denoisers[family], oft.factory, rank_dropout=0.5)
