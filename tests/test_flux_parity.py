"""Our FLUX.1 and Chroma networks against diffusers' classes, through the key table: outputs, gradients, names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_flux
import torch
from parity import (
    Draw,
    assert_names_survive,
    assert_recomputing_changes_no_gradient,
    assert_same_outputs_and_gradients,
    assert_times_stay_float32,
)
from torch import Tensor, nn

from library.dit_layers import image_ids
from library.flux_models import ApproximatorParams, Flux, FluxParams, pack, unpack
from library.flux_names import FLUX_DIFFUSERS

DEV = replace(tiny_flux.DEV, pooled_width=20, num_single_blocks=3)
PARAMS = {
    "dev": DEV,
    "schnell": replace(DEV, guidance_embed=False),
    "chroma": replace(DEV, guidance_embed=False, pooled_width=0, approximator=ApproximatorParams(16, 48, 2)),
}
HEIGHT, WIDTH, TEXT = 8, 6, 5


randn = Draw("flux")


def native(variant: str) -> Flux:
    return randn.fill(Flux(PARAMS[variant]), "scale", 0.15)


def diffusers_model(variant: str) -> nn.Module:
    import diffusers

    params = PARAMS[variant]
    shared: dict[str, Any] = {
        "in_channels": params.in_channels,
        "num_layers": params.num_double_blocks,
        "num_single_layers": params.num_single_blocks,
        "attention_head_dim": params.head_width,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_width,
        "axes_dims_rope": params.axes,
    }
    if params.approximator is not None:
        sizes = params.approximator
        return diffusers.ChromaTransformer2DModel(
            **shared,
            approximator_num_channels=sizes.inputs,
            approximator_hidden_dim=sizes.hidden,
            approximator_layers=sizes.num_layers,
        )
    return diffusers.FluxTransformer2DModel(
        **shared, pooled_projection_dim=params.pooled_width, guidance_embeds=params.guidance_embed
    )


def inputs(variant: str) -> dict[str, Tensor]:
    tokens = HEIGHT * WIDTH // 4
    made = {
        "img": randn(2, tokens, 16, key="img").requires_grad_(),
        "txt": randn(2, TEXT, 24, key="txt").requires_grad_(),
        "t": torch.tensor([0.15, 0.7312]),
        "img_ids": image_ids(HEIGHT, WIDTH, "cpu"),
        "txt_ids": torch.zeros(1, TEXT, 3),
    }
    if variant != "chroma":
        made["pooled"] = randn(2, 20, key="pooled").requires_grad_()
    if variant == "dev":
        made["guidance"] = torch.tensor([1.0, 3.5])
    return made


def run_diffusers(model: Any, given: dict[str, Tensor], key_mask: Tensor | None) -> Tensor:
    arguments = {
        "hidden_states": given["img"],
        "encoder_hidden_states": given["txt"],
        "timestep": given["t"],
        "img_ids": given["img_ids"][0],
        "txt_ids": given["txt_ids"][0],
    }
    if "pooled" in given:
        arguments["pooled_projections"] = given["pooled"]
    if "guidance" in given:
        arguments["guidance"] = given["guidance"]
    if key_mask is not None and "pooled" in given:
        return model(**arguments, joint_attention_kwargs={"attention_mask": key_mask[:, None, None]}, return_dict=False)[0]
    if key_mask is not None:
        arguments["attention_mask"] = key_mask
    return model(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", PARAMS)
def test_outputs_and_gradients_are_those_of_diffusers(variant: str, masked: bool) -> None:
    ours, theirs = native(variant), diffusers_model(variant)
    if variant == "chroma":  # diffusers leaves out the 1e-6 of the original's norms, which is 1e-5 of the output here
        for norm in ours.distilled_guidance_layer.norms:
            norm.eps = torch.finfo(torch.float32).eps
    txt_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool() if masked else None
    key_mask = None if txt_mask is None else torch.cat([txt_mask, torch.ones(2, HEIGHT * WIDTH // 4).bool()], dim=1)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        FLUX_DIFFUSERS,
        lambda: inputs(variant),
        lambda given: ours(**given, txt_mask=txt_mask),
        lambda given: run_diffusers(theirs, given, key_mask),
        randn,
    )


@pytest.mark.parametrize("variant", PARAMS)
def test_names_survive_the_way_to_diffusers_and_back_bit_for_bit(variant: str) -> None:
    assert_names_survive(FLUX_DIFFUSERS, native(variant).state_dict())


@pytest.mark.parametrize("variant", PARAMS)
def test_sizes_are_told_from_shapes(variant: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in native(variant).state_dict().items()}
    assert FluxParams.of(shapes) == PARAMS[variant]


def test_a_pruned_model_has_the_blocks_that_are_in_its_file() -> None:
    params = replace(DEV, num_double_blocks=1, num_single_blocks=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in Flux(params).state_dict().items()}
    assert FluxParams.of(shapes) == params


def test_published_sizes_give_the_published_rotary_widths_and_number_of_modulations() -> None:
    assert FluxParams().axes == (16, 56, 56)
    assert FluxParams().num_modulations == 344


def test_text_that_is_masked_changes_nothing() -> None:
    model, given = native("dev"), inputs("dev")
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool().expand(2, -1)
    other = given | {"txt": given["txt"] + 3 * (~mask)[..., None]}
    with torch.no_grad():
        torch.testing.assert_close(model(**given, txt_mask=mask), model(**other, txt_mask=mask), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(model(**given), model(**other), atol=1e-2)


def test_times_are_not_rounded_to_the_precision_of_the_weights() -> None:
    given = {name: value.bfloat16() if name in ("img", "txt", "pooled") else value for name, value in inputs("dev").items()}
    assert_times_stay_float32(native("dev").to(torch.bfloat16), given)


def test_recomputing_blocks_changes_no_gradient() -> None:
    assert_recomputing_changes_no_gradient(lambda: native("chroma"), lambda model: model(**inputs("chroma")))


def test_blocks_are_in_execution_order_under_their_published_names() -> None:
    model = native("dev")
    names = [model.canonical_name(block) for block in model.blocks()]
    assert names == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2"]


def test_packing_is_undone_by_unpacking_and_is_diffusers_own() -> None:
    from diffusers import FluxPipeline

    latents = randn(2, 4, HEIGHT, WIDTH, key="latents")
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 4, HEIGHT, WIDTH))
    assert torch.equal(unpack(pack(latents), HEIGHT, WIDTH), latents)
    expected = FluxPipeline._prepare_latent_image_ids(2, HEIGHT // 2, WIDTH // 2, "cpu", torch.float32)
    assert torch.equal(image_ids(HEIGHT, WIDTH, "cpu")[0], expected)
