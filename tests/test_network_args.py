"""network_args: types, suggestions, block tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from library.errors import UserError
from networks.lora import LoRAArgs
from networks.lora_sd import ARCH, block_index
from networks.network_args import BOOLEAN, NetworkArgs, parse_network_args


def parse(**values: Any) -> NetworkArgs:
    return parse_network_args(NetworkArgs, values, module="networks.lora")


def test_strings_from_the_command_line_and_typed_values_from_a_file_mean_the_same() -> None:
    from_command_line = parse(conv_dim="8", conv_alpha="0.5", block_dims="1, 2,3", up_lr_weight="1,,0.5")
    from_file = parse(conv_dim=8, conv_alpha=0.5, block_dims=[1, 2, 3], up_lr_weight=[1, 0, 0.5])
    assert from_command_line == from_file
    assert from_command_line.up_lr_weight == (1.0, 0.0, 0.5)


def test_none_counts_as_not_given() -> None:
    assert parse(conv_dim=None, dropout=None) == NetworkArgs()


def test_an_unknown_argument_is_suggested_and_the_known_ones_listed() -> None:
    with pytest.raises(UserError, match=r"unknown network argument 'conv_dims'. Did you mean 'conv_dim'\?.*loraplus_lr_ratio"):
        parse(conv_dims=4)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse(alfa=1, conv_dim="four", block_alphas="1,x")
    text = str(caught.value)
    assert "'alfa'" in text
    assert "conv_dim=four: expected a whole number" in text
    assert "block_alphas=1,x: expected numbers separated by commas" in text


@pytest.mark.parametrize("bad", [{"conv_dim": 4.5}, {"conv_dim": True}, {"conv_alpha": "nan"}, {"down_lr_weight": "cosinus"}])
def test_a_wrong_type_names_what_was_expected(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        parse(**bad)


@pytest.mark.parametrize("bad", [{"rank_dropout": 1}, {"module_dropout": -0.1}, {"loraplus_lr_ratio": -1}, {"conv_dim": -2}])
def test_a_value_out_of_range_is_an_error(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        parse(**bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"ggpo_sigma": 0.1}, "Add ggpo_beta"),
        ({"ggpo_beta": 0.1}, "Add ggpo_sigma"),
        ({"ggpo_beta": -1, "ggpo_sigma": 0}, "factor"),
    ],
)
def test_ggpo_needs_both_of_its_factors(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_network_args(LoRAArgs, bad, module="networks.lora")


def test_booleans_are_read_by_meaning_not_by_truth_of_the_string() -> None:
    assert [BOOLEAN.convert(text) for text in ("False", "true", "0", "YES")] == [False, True, False, True]
    with pytest.raises(KeyError):
        BOOLEAN.convert("perhaps")


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 1),
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q", 2),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", 3),
        ("lora_unet_down_blocks_3_resnets_1_conv2", 11),
        ("lora_unet_mid_block_attentions_0_proj_in", 12),
        ("lora_unet_up_blocks_0_resnets_0_conv1", 13),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", 15),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", 24),
        ("lora_unet_conv_in", None),
    ],
)
def test_blocks_of_sd_are_counted_as_sd_scripts_does(key: str, block: int | None) -> None:
    assert block_index(key) == block


def test_rate_presets_run_from_the_first_block_to_the_last() -> None:
    assert ARCH.blocks is not None
    weights = ARCH.blocks.rate_weights(parse(down_lr_weight="sine", mid_lr_weight="0.5", up_lr_weight="reverse_linear+0.25"))
    assert weights is not None and len(weights) == 25
    assert weights[:12] == pytest.approx([math.sin(math.pi * i / 11 / 2) for i in range(12)])
    assert weights[12] == 0.5
    assert weights[13:] == pytest.approx([1 - i / 11 + 0.25 for i in range(12)])


def test_rate_factors_not_above_the_threshold_become_zero() -> None:
    assert ARCH.blocks is not None
    weights = ARCH.blocks.rate_weights(parse(down_lr_weight="linear", block_lr_zero_threshold="0.5"))
    assert weights is not None
    assert weights[5] == 0.0 and weights[6] == pytest.approx(6 / 11)
    assert weights[12:] == (1.0,) * 13  # what was not given stays at 1


def test_a_short_list_of_rate_factors_is_filled_with_one_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    assert ARCH.blocks is not None
    weights = ARCH.blocks.rate_weights(parse(up_lr_weight="0.1,0.2"))
    assert weights is not None and weights[13:] == (0.1, 0.2) + (1.0,) * 10
    assert "up_lr_weight has 2 values for 12 blocks" in caplog.text
