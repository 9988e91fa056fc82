"""LoRA for FLUX.1 and Chroma: which layers, under which names and ranks; split fused layers; files in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_flux
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from library.dit_layers import image_ids
from library.errors import UserError
from library.flux_models import Flux, FluxParams
from library.flux_names import FLUX_DIFFUSERS
from library.flux_saving import transformer_config
from library.rng import keyed_generator
from networks import lora_flux
from networks.file_formats import in_format
from networks.network_base import LayerNetwork
from tools import convert_lora


@pytest.fixture
def parts() -> dict[str, nn.Module]:
    return tiny_flux.modules("dev")


def make(parts: dict[str, nn.Module], dim: int = 4, alpha: float = 2.0, seed: int = 0, **arguments: Any) -> LayerNetwork:
    encoders = {name: parts[name] for name in ("clip_l", "t5xxl")}
    return lora_flux.create_network(1.0, dim, alpha, None, encoders, parts["denoiser"], init_seed=seed, **arguments)


def ranks(network: LayerNetwork) -> dict[str, int]:
    return {adapter.key: adapter.rank for adapter in network.adapters()}  # type: ignore[attr-defined]


def randomise(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=keyed_generator("lora", name)) * 0.2


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("lora-flux", key))


def run(model: nn.Module, params: FluxParams = tiny_flux.DEV) -> Tensor:
    with torch.no_grad():
        return model(
            randn(2, 12, params.in_channels, key="img"),
            image_ids(8, 6, "cpu"),
            randn(2, 5, params.context_width, key="txt"),
            torch.zeros(1, 5, 3),
            torch.tensor([0.2, 0.7]),
            pooled=randn(2, params.pooled_width, key="pooled"),
            guidance=torch.tensor([1.0, 3.0]),
        )


# ---- which layers ----------------------------------------------------------------------------------------------------

DOUBLE = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
BLOCK_KEYS = {f"lora_unet_double_blocks_{i}_{side}_{name}" for i in range(2) for side in ("img", "txt") for name in DOUBLE} | {
    f"lora_unet_single_blocks_{i}_{name}" for i in range(2) for name in ("linear1", "linear2", "modulation_lin")
}


def test_the_blocks_and_clip_are_adapted_and_t5_only_on_request(parts: dict[str, nn.Module]) -> None:
    found = ranks(make(parts))
    assert {key for key in found if key.startswith("lora_unet_")} == BLOCK_KEYS
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in found
    assert not any(key.startswith("lora_te3_") for key in found)
    with_t5 = ranks(make(parts, train_t5xxl="true"))
    assert with_t5.keys() - found.keys() == {
        f"lora_te3_encoder_block_{i}_layer_{layer}"
        for i in range(2)
        for layer in (
            *(f"0_SelfAttention_{name}" for name in "qkvo"),
            *(f"1_DenseReluDense_{name}" for name in ("wi_0", "wi_1", "wo")),
        )
    }


@pytest.mark.parametrize(
    ("argument", "signs"),
    [
        ("img_attn_dim", ["_img_attn_"]),
        ("txt_attn_dim", ["_txt_attn_"]),
        ("img_mlp_dim", ["_img_mlp_"]),
        ("txt_mlp_dim", ["_txt_mlp_"]),
        ("img_mod_dim", ["_img_mod_"]),
        ("txt_mod_dim", ["_txt_mod_"]),
        ("single_dim", ["_linear1", "_linear2"]),
        ("single_mod_dim", ["_modulation_"]),
    ],
)
def test_a_part_has_its_own_rank_and_rank_0_leaves_it_out(argument: str, signs: list[str], parts: dict[str, nn.Module]) -> None:
    own = {key for key in BLOCK_KEYS if any(sign in key for sign in signs)}
    assert own
    found = ranks(make(parts, **{argument: "7"}))
    assert {key for key in BLOCK_KEYS if found[key] == 7} == own
    assert {found[key] for key in BLOCK_KEYS - own} == {4}
    assert BLOCK_KEYS - ranks(make(parts, **{argument: "0"})).keys() == own


def test_input_layers_are_adapted_at_their_own_ranks(parts: dict[str, nn.Module]) -> None:
    found = ranks(make(parts, in_dims="1,2,0,3,5"))
    extra = {key: rank for key, rank in found.items() if key.startswith("lora_unet_") and key not in BLOCK_KEYS}
    assert extra == {
        "lora_unet_img_in": 1,
        "lora_unet_time_in_in_layer": 2,
        "lora_unet_time_in_out_layer": 2,
        "lora_unet_guidance_in_in_layer": 3,
        "lora_unet_guidance_in_out_layer": 3,
        "lora_unet_txt_in": 5,
    }
    with pytest.raises(UserError, match="5 ranks"):
        make(parts, in_dims="1,2")


def test_blocks_are_chosen_by_kind_and_number(parts: dict[str, nn.Module]) -> None:
    def blocks(**arguments: str) -> set[str]:
        return {"_".join(key.split("_")[2:5]) for key in ranks(make(parts, **arguments)) if key in BLOCK_KEYS}

    assert blocks(train_blocks="single") == {"single_blocks_0", "single_blocks_1"}
    assert blocks(train_blocks="double") == {"double_blocks_0", "double_blocks_1"}
    assert blocks(train_double_block_indices="1", train_single_block_indices="none") == {"double_blocks_1"}
    assert len(blocks(train_double_block_indices="0-1", train_single_block_indices="all")) == 4


def test_patterns_set_ranks_and_rates(parts: dict[str, nn.Module]) -> None:
    from library.optimizers import LearningRates

    network = make(parts, network_reg_dims="single_blocks_1_=9", network_reg_lrs="_img_mlp_=0.5,_txt_=0.25")
    assert {key for key, rank in ranks(network).items() if rank == 9} == {
        key for key in BLOCK_KEYS if "single_blocks_1_" in key
    }
    groups = network.param_groups(LearningRates(default=0.1, denoiser=None, text_encoders=()))
    sizes = {group.learning_rate: len(group.params) for group in groups}
    assert sizes[0.5] == 2 * 2 * 2  # two blocks, two layers, two matrices
    assert sizes[0.25] == 2 * 5 * 2


def test_a_misspelt_argument_is_an_error_with_a_suggestion(parts: dict[str, nn.Module]) -> None:
    with pytest.raises(UserError, match="img_atn_dim.*img_attn_dim"):
        make(parts, img_atn_dim="4")
    with pytest.raises(UserError, match="train_single_block_indices=one: expected block numbers"):
        make(parts, train_single_block_indices="one")


# ---- fused layers, split -----------------------------------------------------------------------------------------------


def test_split_parts_do_not_share_their_ranks_and_the_file_gives_what_was_trained(parts: dict[str, nn.Module]) -> None:
    network = make(parts, split_qkv="true")
    randomise(network)
    untrained = run(parts["denoiser"])
    network.attach()
    expected = run(parts["denoiser"])
    network.detach()
    tensors = network.file_state_dict(None)
    key = "lora_unet_single_blocks_0_linear1"
    assert tensors[f"{key}.lora_down.weight"].shape == (16, 64)
    up = tensors[f"{key}.lora_up.weight"]
    assert up.shape == (3 * 64 + 256, 16)
    assert up[:64, 4:].abs().max() == 0
    assert float(tensors[f"{key}.alpha"]) == 8.0
    fused, _ = lora_flux.create_network_from_weights(1.0, None, None, parts["clip_l"], parts["denoiser"], tensors)
    fused.attach()
    torch.testing.assert_close(run(parts["denoiser"]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(untrained, expected, atol=1e-2)


def test_a_split_file_continues_split_at_its_own_rank(parts: dict[str, nn.Module]) -> None:
    network = make(parts, split_qkv="true")
    randomise(network)
    tensors = network.file_state_dict(None)
    again, _ = lora_flux.create_network_from_weights(
        1.0, None, None, parts["clip_l"], parts["denoiser"], tensors, split_qkv="true"
    )
    assert ranks(again) == ranks(network)
    one, other = again.state_dict(), network.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_fused_file_is_not_read_as_split(parts: dict[str, nn.Module]) -> None:
    network = make(parts, dim=12)
    randomise(network)
    tensors = network.file_state_dict(None)
    with pytest.raises(UserError, match="was not trained with split_qkv"):
        lora_flux.create_network_from_weights(1.0, None, None, parts["clip_l"], parts["denoiser"], tensors, split_qkv="true")


def test_merging_a_split_network_gives_what_it_gave(parts: dict[str, nn.Module]) -> None:
    network = make(parts, split_qkv="true", in_dims="2,2,2,2,2")
    randomise(network)
    network.attach()
    expected = run(parts["denoiser"])
    network.merge_into_base()
    torch.testing.assert_close(run(parts["denoiser"]), expected, atol=1e-4, rtol=1e-4)


def test_norms_of_split_layers_are_those_of_their_weights(parts: dict[str, nn.Module]) -> None:
    network = make(parts, split_qkv="true")
    randomise(network)
    for adapter in network.adapters():
        torch.testing.assert_close(adapter.weight_norm(), adapter.delta_weight().norm(), rtol=1e-4, atol=1e-5)


def run_theirs(model: Any, params: FluxParams = tiny_flux.DEV) -> Tensor:
    """What `run` gives, of diffusers' class."""
    with torch.no_grad():
        out: Tensor = model(
            hidden_states=randn(2, 12, params.in_channels, key="img"),
            encoder_hidden_states=randn(2, 5, params.context_width, key="txt"),
            pooled_projections=randn(2, params.pooled_width, key="pooled"),
            timestep=torch.tensor([0.2, 0.7]),
            guidance=torch.tensor([1.0, 3.0]),
            img_ids=image_ids(8, 6, "cpu")[0],
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    return out


# ---- diffusers ---------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_same_output_in_diffusers(tmp_path: Path) -> None:
    """At FLUX.1's own width, which diffusers' reader takes for granted: one block of each kind, and CLIP."""
    import diffusers

    params = FluxParams(
        in_channels=16,
        out_channels=16,
        context_width=24,
        pooled_width=64,
        num_double_blocks=1,
        num_single_blocks=1,
    )
    with torch.device("meta"):
        model = Flux(params)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            few = torch.randn(4093, generator=keyed_generator("wide", name))  # 340 million of them would take long
            noise = few.repeat(parameter.numel() // len(few) + 1)[: parameter.numel()].view(parameter.shape)
            parameter.copy_(1 + 0.1 * noise if "scale" in name else noise * 0.5 * parameter.shape[-1] ** -0.5)
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=24,
            pooled_projection_dim=64,
            guidance_embeds=True,
        )
    theirs.load_state_dict(FLUX_DIFFUSERS.to_ours(model.state_dict()), strict=True, assign=True)
    network = lora_flux.create_network(1.0, 4, 2.0, None, None, model)
    randomise(network)
    save_file(network.file_state_dict(None), tmp_path / "lora.safetensors")
    plain = run(model, params)
    network.attach()
    expected = run(model, params)
    pipe = diffusers.FluxPipeline(None, None, None, None, None, None, theirs)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    adapted = sum(hasattr(module, "lora_A") for module in theirs.modules())
    assert adapted == 2 + 12 + 1 + 5  # modulations; q, k, v, out and MLPs of both streams; modulation; q, k, v, mlp, out
    out = run_theirs(theirs)
    assert (expected - plain).std() > 0.05
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)


def test_under_diffusers_names_it_reads_every_layer_that_it_has(parts: dict[str, nn.Module], tmp_path: Path) -> None:
    """Also those before the blocks, and at other sizes than the published ones: what it drops from files in our names."""
    import diffusers
    import transformers

    network = make(parts, in_dims="2,3,4,5,6")
    randomise(network)
    assert len([key for key in ranks(network) if key.startswith("lora_unet_")]) == 2 * 10 + 2 * 3 + 2 + 2 * 3
    network.save_weights(tmp_path / "ours.safetensors", None, {"ss_seed": "1", "sshs_model_hash": "of ours"})
    convert_lora.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")])
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        assert {"format": "pt", "ss_seed": "1"}.items() <= file.metadata().items()
        assert file.metadata()["sshs_model_hash"] != "of ours"
        given = {key.rsplit(".lora_", 1)[0] for key in file.keys()}  # noqa: SIM118 (not a dict)
    theirs = diffusers.FluxTransformer2DModel(**{k: v for k, v in transformer_config(tiny_flux.DEV).items() if k[0] != "_"})
    theirs.load_state_dict(FLUX_DIFFUSERS.to_ours(parts["denoiser"].state_dict()), strict=True)
    clip = transformers.CLIPTextModel(parts["clip_l"].config)
    clip.load_state_dict(parts["clip_l"].state_dict())
    pipe = diffusers.FluxPipeline(None, None, clip.eval(), None, None, None, theirs)
    pipe.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
    taken = {
        f"{part}.{path}"
        for part, module in (("transformer", theirs), ("text_encoder", clip))
        for path, layer in module.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {path.replace("text_model.", "") for path in taken} == {path.replace("text_model.", "") for path in given}
    ids = torch.arange(10)[None] % 40
    plain = run(parts["denoiser"])
    network.attach()
    out = run_theirs(theirs)
    with torch.no_grad():
        torch.testing.assert_close(clip(ids)[0], parts["clip_l"](ids)[0], atol=1e-5, rtol=1e-5)
    expected = run(parts["denoiser"])
    assert (expected - plain).std() > 0.05
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_what_diffusers_has_no_place_for_is_named(parts: dict[str, nn.Module]) -> None:
    network = make(parts, train_t5xxl="true")
    with pytest.raises(UserError, match=r"some file has 14 layers that diffusers has no place for .*lora_te3_encoder_block_0"):
        in_format(network.file_state_dict(None), lora_flux.ARCH, "diffusers", "some file")
