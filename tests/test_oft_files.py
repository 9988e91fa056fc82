"""OFT in sd-scripts' files, made by hand here: names, limits and the parts of fused layers."""

from __future__ import annotations

import pytest
import torch
from network_models import fill
from tiny_denoisers import DENOISERS, randn
from torch import Tensor, nn

from library.errors import UserError
from networks import boft, lora, oft, oft_flux
from networks.file_formats import flat, in_format, own_layers
from networks.network_base import Layer, LayerSize


def turned(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """As the formula is: (I + Q)(I - Q)^-1 of every block, limited by alpha times the outputs, on the weight's rows."""
    skew = blocks - blocks.transpose(1, 2)
    skew = skew * min(1.0, alpha * len(weight) / float(skew.norm()))
    eye = torch.eye(skew.shape[-1])
    rotation = torch.block_diag(*((eye + one) @ torch.linalg.inv(eye - one) for one in skew))
    return rotation.T @ weight


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return DENOISERS["sd"].make()


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return DENOISERS["flux"].make()


@pytest.mark.parametrize("alpha", [1e-3, 1.0])
def test_a_file_of_sd_scripts_turns_what_it_says(unet: nn.Module, alpha: float) -> None:
    name = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    blocks = randn(4, 4, 4, key="blocks") * 0.1
    tensors = {f"oft_unet_{name}.oft_blocks": blocks, f"oft_unet_{name}.alpha": torch.tensor(alpha)}
    network, _ = oft.create_network_from_weights(1.0, None, None, None, unet, tensors)
    (adapter,) = network.adapters()
    torch.testing.assert_close(adapter.merged(adapter.base.weight), turned(adapter.base.weight, blocks, alpha))
    written = network.file_state_dict(None)
    assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)


def test_parts_of_a_fused_layer_turn_by_themselves_and_every_reader_takes_the_list(flux: nn.Module) -> None:
    """64 wide: q, k, v are rows of 64, and the MLP of linear1 has 256."""
    network = oft_flux.create_network(1.0, 4, 1e-3, None, None, flux, enable_all_linear=True)
    written = network.file_state_dict(None)
    key = "oft_unet_single_blocks_0_linear1"
    shapes = {name.removeprefix(f"{key}."): tuple(tensor.shape) for name, tensor in written.items() if name.startswith(key)}
    assert shapes == {f"oft_blocks.{i}": (4, 16, 16) for i in range(3)} | {"oft_blocks.3": (4, 64, 64), "alpha": ()}
    assert "oft_unet_double_blocks_0_img_mlp_0.oft_blocks.0" in written
    assert all(name.startswith("oft_unet_") for name in written)

    parts = [randn(*shapes[f"oft_blocks.{i}"], key=f"part{i}") * 0.05 for i in range(4)]
    tensors = {f"{key}.oft_blocks.{i}": part for i, part in enumerate(parts)} | {f"{key}.alpha": torch.tensor(1e-2)}
    weight = flux.get_submodule("single_blocks.0.linear1").weight
    assert isinstance(weight, Tensor)
    rows = weight.split((64, 64, 64, 256))
    expected = torch.cat([turned(one, part, 1e-2) for one, part in zip(rows, parts, strict=True)])
    for factory, inference in ((oft_flux.factory, False), (oft.factory, False), (lora.factory, True)):
        made, _ = factory.create_network_from_weights(1.0, None, None, None, flux, tensors, for_inference=inference)
        (adapter,) = made.adapters()
        torch.testing.assert_close(adapter.merged(weight), expected)


def read_by_comfy(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """ComfyUI's formula for a stack [n, b, b]: `alpha` itself limits ||Q||, and 0 is no limit."""
    skew = blocks - blocks.transpose(1, 2)
    norm = float(skew.norm())
    skew = skew * alpha / norm if 0 < alpha < norm else skew
    eye = torch.eye(skew.shape[-1])
    rotations = (eye + skew) @ torch.linalg.inv(eye - skew)
    return torch.einsum("knm,kni->kmi", rotations, weight.view(*skew.shape[:2], -1)).reshape(weight.shape)


@pytest.mark.parametrize("alpha", [1e-3, 0.0])
def test_what_is_written_for_comfyui_turns_there_as_here(unet: nn.Module, flux: nn.Module, alpha: float) -> None:
    attention = {"exclude_patterns": ".*", "include_patterns": "mid_block_.*attn1_to_q$|single_blocks_1_linear1"}
    for model, factory, name in (
        (unet, oft.factory, "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"),
        (flux, oft_flux.factory, "diffusion_model.single_blocks.1.linear1"),
    ):
        arch = DENOISERS["sd" if model is unet else "flux"].arch
        network = factory.for_arch(arch).create_network(1.0, 4, alpha, None, None, model, **attention)
        fill(network)
        (adapter,) = network.adapters()
        weight = adapter.base.weight
        expected = adapter.merged(weight)
        written = in_format(network.file_state_dict(None), arch, "comfy", "x")
        assert written.keys() == {f"{name}.oft_blocks", f"{name}.alpha"}
        found = read_by_comfy(weight, written[f"{name}.oft_blocks"], float(written[f"{name}.alpha"]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        (again,) = oft.factory.for_arch(arch).create_network_from_weights(1.0, None, None, None, model, written)[0].adapters()
        torch.testing.assert_close(again.merged(weight), expected, atol=1e-5, rtol=1e-5)
        kohya = network.file_state_dict(None)
        assert all(name.startswith("oft_unet_") for name in kohya)
        back = in_format(flat(own_layers(kohya, arch, "x")), arch, "kohya", "x")
        assert back.keys() == kohya.keys()


def test_no_limit_is_none_to_sd_scripts_either(unet: nn.Module) -> None:
    """Where alpha is 0, it would never turn."""
    network = oft.create_network(
        1.0, 4, 0.0, None, None, unet, include_patterns="mid_block_.*attn1_to_q$", exclude_patterns=".*"
    )
    fill(network, scale=2.0)
    (adapter,) = network.adapters()
    blocks, alpha = network.file_state_dict(torch.float16).values()
    weight = adapter.base.weight
    torch.testing.assert_close(turned(weight, blocks.float(), float(alpha)), adapter.merged(weight), atol=2e-3, rtol=2e-3)
    size = adapter.size_in_file("x", {"oft_blocks": blocks, "alpha": alpha})
    assert size == LayerSize(4, 0.0)


def test_boft_is_written_for_comfyui_without_its_limit_and_parts_that_do_not_fit_are_refused(
    unet: nn.Module, flux: nn.Module
) -> None:
    few = {"exclude_patterns": ".*", "include_patterns": "mid_block_.*attn1_to_q$|single_blocks_1_linear1"}
    arch = DENOISERS["sd"].arch
    network = boft.factory.for_arch(arch).create_network(1.0, 4, 1e-3, None, None, unet, **few)
    fill(network)
    written = in_format(network.file_state_dict(None), arch, "comfy", "x")
    (adapter,) = network.adapters()
    again, _ = boft.factory.for_arch(arch).create_network_from_weights(1.0, None, None, None, unet, written)
    assert [float(tensor) for name, tensor in written.items() if name.endswith("alpha")] == [0.0]
    (other,) = again.adapters()
    weight = adapter.base.weight
    assert (adapter.merged(weight) - weight).abs().max() > 1e-4
    torch.testing.assert_close(other.merged(weight), adapter.merged(weight), atol=1e-6, rtol=1e-5)
    split = oft_flux.create_network(1.0, 2, 0.0, None, None, flux, **few)
    with pytest.raises(UserError, match="linear1: its parts are turned in blocks of 32 and of 128.*multiple of 4"):
        in_format(split.file_state_dict(None), DENOISERS["flux"].arch, "comfy", "x")


def test_what_does_not_fit_says_why(unet: nn.Module) -> None:
    name = "oft_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(UserError, match="8 outputs do not divide into 3 blocks"):
        oft.create_network(1.0, 3, 1.0, None, None, unet)
    with pytest.raises(UserError, match="made by BOFT, not by OFT. Use --network_module networks.boft"):
        oft.create_network_from_weights(1.0, None, None, None, unet, {f"{name}.oft_blocks": torch.zeros(3, 4, 4, 4)})
    with pytest.raises(UserError, match="made by OFT, not by BOFT. Use --network_module networks.oft"):
        boft.create_network_from_weights(1.0, None, None, None, unet, {f"{name}.oft_blocks": torch.zeros(4, 4, 4)})
    network = oft.create_network(1.0, 4, 1.0, None, None, unet)
    with pytest.raises(UserError, match=r"blocks \(2, 8, 8\), this network \(4, 4, 4\). Use --dim_from_weights"):
        network.load_file_state_dict({f"{name}.oft_blocks": torch.zeros(2, 8, 8)}, "a file", strict=False)
    place = Layer("x", "denoiser", nn.Linear(4, 24))
    with pytest.raises(UserError, match="24 outputs.*--network_dim 4 is too small for it; at least 6"):
        boft.BOFT(place, LayerSize(4, 0.0), boft.BOFTArgs(), torch.Generator())
