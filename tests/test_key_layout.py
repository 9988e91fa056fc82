"""The key-layout engine, and the names that the Stable Diffusion tables give."""

import pytest
import torch

from library import clip_parts, unet_names
from library.key_layout import CONV_TO_LINEAR, IDENTITY, SWAP_HALVES, TRANSPOSE, KeyMap, Rule, UnmappedKeys, key_map, nested

FLUX_LIKE = key_map(
    nested(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        [
            Rule("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            Rule("img_attn.proj", "attn.to_out.0"),
            Rule("img_mlp.{j}", "ff.net.{j}"),
        ],
    ),
    Rule(
        "single_blocks.{i}.linear1",
        tuple(f"single_transformer_blocks.{{i}}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        widths=(1, 1, 1, 4),
    ),
    Rule("final_layer.adaLN_modulation.1", "norm_out.linear", SWAP_HALVES),
    Rule("text_projection", "text_projection.weight", TRANSPOSE),
)


def theirs() -> dict[str, torch.Tensor]:
    return {
        "double_blocks.0.img_attn.qkv.weight": torch.arange(12.0).view(6, 2),
        "double_blocks.0.img_attn.qkv.bias": torch.arange(6.0),
        "double_blocks.11.img_attn.proj.weight": torch.rand(2, 2),
        "double_blocks.11.img_mlp.2.bias": torch.rand(3),
        "single_blocks.3.linear1.weight": torch.arange(28.0).view(14, 2),
        "final_layer.adaLN_modulation.1.weight": torch.arange(8.0).view(4, 2),
        "text_projection": torch.arange(6.0).view(2, 3),
    }


def test_concatenated_and_swapped_tensors_are_taken_apart():
    ours = FLUX_LIKE.to_ours(theirs())
    assert ours["transformer_blocks.0.attn.to_k.weight"].tolist() == [[4, 5], [6, 7]]
    assert ours["transformer_blocks.0.attn.to_v.bias"].tolist() == [4, 5]
    assert ours["single_transformer_blocks.3.attn.to_v.weight"].tolist() == [[8, 9], [10, 11]]
    assert ours["single_transformer_blocks.3.proj_mlp.weight"].shape == (8, 2)
    assert ours["norm_out.linear.weight"].tolist() == [[4, 5], [6, 7], [0, 1], [2, 3]]
    assert ours["text_projection.weight"].shape == (3, 2)
    assert "transformer_blocks.11.ff.net.2.bias" in ours


def test_both_directions_undo_each_other_bit_for_bit():
    tensors = theirs()
    back = FLUX_LIKE.to_theirs(FLUX_LIKE.to_ours(tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_names_map_without_tensors_in_both_directions():
    names = FLUX_LIKE.our_names("double_blocks.7.img_attn.qkv")
    assert names == tuple(f"transformer_blocks.7.attn.to_{part}" for part in "qkv")
    assert FLUX_LIKE.their_name("transformer_blocks.7.attn.to_v") == "double_blocks.7.img_attn.qkv"
    assert FLUX_LIKE.their_name("transformer_blocks.7.attn.to_vx") is None
    assert FLUX_LIKE.our_names("double_blocks.x.img_attn.qkv") is None


def test_keys_that_no_rule_knows_are_reported_not_dropped():
    with pytest.raises(UnmappedKeys, match="norm_final.weight") as caught:
        FLUX_LIKE.to_ours(theirs() | {"norm_final.weight": torch.zeros(1)})
    assert caught.value.keys == ["norm_final.weight"]


def test_a_concatenation_with_an_absent_part_is_reported():
    ours = FLUX_LIKE.to_ours(theirs())
    del ours["transformer_blocks.0.attn.to_k.bias"]
    with pytest.raises(UnmappedKeys) as caught:
        FLUX_LIKE.to_theirs(ours)
    assert caught.value.keys == ["transformer_blocks.0.attn.to_q.bias", "transformer_blocks.0.attn.to_v.bias"]


def test_rows_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="do not divide"):
        FLUX_LIKE.to_ours({"single_blocks.0.linear1.bias": torch.zeros(8)})


def test_the_first_rule_that_fits_wins():
    table = KeyMap((Rule("a.b", "special"), Rule("a", "general")))
    assert table.our_names("a.b.weight") == ("special.weight",)
    assert table.our_names("a.c.weight") == ("general.c.weight",)


def test_the_identity_keeps_every_name():
    assert IDENTITY.our_names("any.name.0.weight") == ("any.name.0.weight",)
    assert IDENTITY.their_name("plain") == "plain"


def test_1x1_convolutions_become_linear_and_biases_stay():
    table = KeyMap((Rule("q", "to_q", CONV_TO_LINEAR),))
    theirs = {"q.weight": torch.rand(3, 2, 1, 1), "q.bias": torch.rand(3)}
    ours = table.to_ours(theirs)
    assert ours["to_q.weight"].shape == (3, 2)
    back = table.to_theirs(ours)
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("input_blocks.0.0.weight", "conv_in.weight"),
        ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        (
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
            "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
        ),
        ("middle_block.2.emb_layers.1.bias", "mid_block.resnets.1.time_emb_proj.bias"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        ("output_blocks.11.1.proj_out.weight", "up_blocks.3.attentions.2.proj_out.weight"),
        ("out.2.bias", "conv_out.bias"),
    ],
)
def test_unet_names_of_published_checkpoints(original: str, ours: str):
    table = unet_names.unet_key_map([True, True, True, False], 2)
    assert table.our_names(original) == (ours,)
    assert table.their_name(ours) == original


def test_clip_names_in_files_have_text_model_whatever_transformers_calls_its_modules():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=8,
        eos_token_id=9,
    )
    names = [clip_parts.CLIP_NAMES.their_name(name) for name in CLIPTextModel(config).state_dict()]
    layer = "text_model.encoder.layers.0"
    linears = [f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + [f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"]
    norms = [f"{layer}.layer_norm1", f"{layer}.layer_norm2", "text_model.final_layer_norm"]
    embeddings = ["text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"]
    assert sorted(map(str, names)) == sorted(
        [*embeddings, *(f"{n}.{kind}" for n in linears + norms for kind in ("weight", "bias"))]
    )
