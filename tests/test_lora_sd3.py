"""LoRA for Stable Diffusion 3: which layers, under which names and ranks; split fused layers; files in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_sd3
import torch
from safetensors import safe_open
from tiny_denoisers import sd3_output
from torch import nn

from library.errors import UserError
from library.rng import keyed_generator
from networks import lora_sd3
from networks.file_formats import arch_of, by_layer, in_format
from networks.network_base import LayerNetwork
from tools import convert_lora

ENCODERS = ("clip_l", "clip_g", "t5xxl")
IMAGE = ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1")
BLOCK_KEYS = (
    {f"lora_unet_joint_blocks_{i}_x_block_{name}" for i in range(2) for name in IMAGE}
    | {f"lora_unet_joint_blocks_0_context_block_{name}" for name in IMAGE}
    | {f"lora_unet_joint_blocks_0_x_block_attn2_{name}" for name in ("qkv", "proj")}
    | {f"lora_unet_joint_blocks_1_context_block_{name}" for name in ("attn_qkv", "adaLN_modulation_1")}
)


@pytest.fixture
def parts() -> dict[str, nn.Module]:
    return tiny_sd3.modules()


def make(parts: dict[str, nn.Module], **arguments: Any) -> LayerNetwork:
    encoders = {name: parts[name] for name in ENCODERS}
    return lora_sd3.create_network(1.0, 4, 2.0, None, encoders, parts["denoiser"], init_seed=0, **arguments)


def ranks(network: LayerNetwork) -> dict[str, int]:
    return {adapter.key: adapter.rank for adapter in network.adapters()}  # type: ignore[attr-defined]


def randomise(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=keyed_generator("lora", name)) * 0.2


def test_the_blocks_and_both_clips_are_adapted_and_t5_only_on_request(parts: dict[str, nn.Module]) -> None:
    found = ranks(make(parts))
    assert {key for key in found if key.startswith("lora_unet_")} == BLOCK_KEYS
    assert {key.split("_")[1] for key in found} == {"unet", "te1", "te2"}
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj" in found
    with_t5 = ranks(make(parts, train_t5xxl="true")).keys() - found.keys()
    assert len(with_t5) == 14
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q" in with_t5


@pytest.mark.parametrize(
    ("argument", "sign"),
    [
        ("context_attn_dim", "context_block_attn_"),
        ("context_mlp_dim", "context_block_mlp_"),
        ("context_mod_dim", "context_block_adaLN"),
        ("x_attn_dim", "x_block_attn"),
        ("x_mlp_dim", "x_block_mlp_"),
        ("x_mod_dim", "x_block_adaLN"),
    ],
)
def test_a_part_has_its_own_rank_and_rank_0_leaves_it_out(argument: str, sign: str, parts: dict[str, nn.Module]) -> None:
    own = {key for key in BLOCK_KEYS if f"_{sign}" in key}
    assert own
    found = ranks(make(parts, **{argument: "7"}))
    assert {key for key in BLOCK_KEYS if found[key] == 7} == own
    assert BLOCK_KEYS - ranks(make(parts, **{argument: "0"})).keys() == own


def test_layers_outside_of_the_blocks_have_ranks_of_their_own(parts: dict[str, nn.Module]) -> None:
    found = ranks(make(parts, emb_dims="1,2,3,4,0,6", conv_dim="3"))
    extra = {key: rank for key, rank in found.items() if key.startswith("lora_unet_") and key not in BLOCK_KEYS}
    assert extra == {
        "lora_unet_context_embedder": 1,
        "lora_unet_t_embedder_mlp_0": 2,
        "lora_unet_t_embedder_mlp_2": 2,
        "lora_unet_x_embedder_proj": 3,
        "lora_unet_y_embedder_mlp_0": 4,
        "lora_unet_y_embedder_mlp_2": 4,
        "lora_unet_final_layer_linear": 6,
    }
    with pytest.raises(UserError, match="6 ranks"):
        make(parts, emb_dims="1,2")


def test_blocks_are_chosen_by_number(parts: dict[str, nn.Module]) -> None:
    chosen = ranks(make(parts, train_block_indices="1", emb_dims="1,0,0,0,0,0"))
    unet = {key for key in chosen if key.startswith("lora_unet_")}
    assert unet == {key for key in BLOCK_KEYS if "_joint_blocks_1_" in key} | {"lora_unet_context_embedder"}
    assert any(key.startswith("lora_te1_") for key in chosen)
    with pytest.raises(UserError, match="no layer is adapted in block 5"):
        make(parts, train_block_indices="5")


def test_split_parts_do_not_share_their_ranks_and_the_file_gives_what_was_trained(parts: dict[str, nn.Module]) -> None:
    network = make(parts, split_qkv="true")
    randomise(network)
    with torch.no_grad():
        untrained = sd3_output(parts["denoiser"])
        network.attach()
        expected = sd3_output(parts["denoiser"])
        network.detach()
        tensors = network.file_state_dict(None)
        key = "lora_unet_joint_blocks_0_x_block_attn2_qkv"
        assert tensors[f"{key}.lora_down.weight"].shape == (12, 128)
        assert tensors[f"{key}.lora_up.weight"][:128, 4:].abs().max() == 0
        fused, _ = lora_sd3.create_network_from_weights(1.0, None, None, parts["clip_l"], parts["denoiser"], tensors)
        fused.attach()
        torch.testing.assert_close(sd3_output(parts["denoiser"]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(untrained, expected, atol=1e-2)


def test_a_file_is_known_to_be_of_this_family(parts: dict[str, nn.Module]) -> None:
    tensors = make(parts).file_state_dict(None)
    for format in ("kohya", "comfy"):
        assert arch_of(by_layer(in_format(tensors, lora_sd3.ARCH, format, "x")), "x").name == "sd3"


# ---- diffusers ---------------------------------------------------------------------------------------------------------


def test_under_diffusers_names_the_pipeline_reads_every_layer_and_gives_the_same(
    parts: dict[str, nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformer, the last block's swapped modulation and layers outside of blocks among it, and both CLIPs."""
    import diffusers
    import transformers
    from test_interop_matrix import sd3_class, sd3_class_output

    network = make(parts, emb_dims="2,3,4,5,6,7", conv_dim="3")
    randomise(network)
    network.save_weights(tmp_path / "ours.safetensors", None, {"ss_seed": "1"})
    convert_lora.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")])
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        given = {key.rsplit(".lora_", 1)[0] for key in file.keys()}  # noqa: SIM118 (not a dict)
    transformer = sd3_class()
    clips: list[Any] = []
    for name in ("clip_l", "clip_g"):
        clip = transformers.CLIPTextModelWithProjection(parts[name].config)
        clip.load_state_dict(parts[name].state_dict())
        clips.append(clip.eval())
    pipe = diffusers.StableDiffusion3Pipeline(transformer, None, None, clips[0], None, clips[1], None, None, None)
    with caplog.at_level("WARNING"):
        pipe.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
    assert "unexpected" not in caplog.text and "missing" not in caplog.text
    taken = {
        f"{part}.{path}"
        for part, module in (("transformer", transformer), ("text_encoder", clips[0]), ("text_encoder_2", clips[1]))
        for path, layer in module.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {path.replace("text_model.", "") for path in taken} == {path.replace("text_model.", "") for path in given}
    ids = torch.arange(10)[None] % 40
    with torch.no_grad():
        plain = sd3_output(parts["denoiser"])
        network.attach()
        expected = sd3_output(parts["denoiser"])
        assert (expected - plain).std() > 0.05
        torch.testing.assert_close(sd3_class_output(transformer), expected, atol=1e-5, rtol=1e-4)
        for clip, name in zip(clips, ("clip_l", "clip_g"), strict=True):
            torch.testing.assert_close(clip(ids)[0], parts[name](ids)[0], atol=1e-5, rtol=1e-4)


def test_what_diffusers_has_no_place_for_is_named(parts: dict[str, nn.Module]) -> None:
    network = make(parts, train_t5xxl="true")
    with pytest.raises(UserError, match=r"some file has 14 layers that diffusers has no place for .*lora_te3_encoder_block_0"):
        in_format(network.file_state_dict(None), lora_sd3.ARCH, "diffusers", "some file")
