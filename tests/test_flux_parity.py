"""Our FLUX.1 and Chroma networks against diffusers' classes, through the key table: outputs, gradients, names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.dit_layers import image_ids, run_recomputing
from library.flux_models import ApproximatorParams, Flux, FluxParams, pack, unpack
from library.flux_names import FLUX_DIFFUSERS
from library.rng import keyed_generator

DEV = FluxParams(
    in_channels=16,
    out_channels=16,
    width=64,
    num_heads=2,
    mlp_width=256,
    context_width=24,
    pooled_width=20,
    num_double_blocks=2,
    num_single_blocks=3,
    guidance_embed=True,
)
PARAMS = {
    "dev": DEV,
    "schnell": replace(DEV, guidance_embed=False),
    "chroma": replace(DEV, guidance_embed=False, pooled_width=0, approximator=ApproximatorParams(16, 48, 2)),
}
HEIGHT, WIDTH, TEXT = 8, 6, 5


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("flux", key))


def native(variant: str) -> Flux:
    """Every weight random, those that begin as zeros or ones too, so that no wrong modulation can hide."""
    model = Flux(PARAMS[variant])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = randn(*parameter.shape, key=name)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 and "scale" in name else noise * 0.15)
    return model


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
    theirs.load_state_dict(FLUX_DIFFUSERS.to_ours(ours.state_dict()), strict=True)
    txt_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool() if masked else None
    key_mask = None if txt_mask is None else torch.cat([txt_mask, torch.ones(2, HEIGHT * WIDTH // 4).bool()], dim=1)
    mine, their = inputs(variant), inputs(variant)
    out = ours(**mine, txt_mask=txt_mask)
    expected = run_diffusers(theirs, their, key_mask)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = randn(*out.shape, key="weight")
    (out * weight).mean().backward()
    (expected * weight).mean().backward()
    for name in mine:
        if mine[name].requires_grad:
            torch.testing.assert_close(mine[name].grad, their[name].grad, atol=1e-5, rtol=1e-4)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    fused = FLUX_DIFFUSERS.to_theirs(gradients)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, fused[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", PARAMS)
def test_names_survive_the_way_to_diffusers_and_back_bit_for_bit(variant: str) -> None:
    tensors = native(variant).state_dict()
    back = FLUX_DIFFUSERS.to_theirs(FLUX_DIFFUSERS.to_ours(tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


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
    """bf16 has no number between 0.75 and 0.7539; the embedding of a time there is made in float32."""
    model, given = native("dev").to(torch.bfloat16), inputs("dev")
    given = {name: value.bfloat16() if name in ("img", "txt", "pooled") else value for name, value in given.items()}
    with torch.no_grad():
        low, high = (model(**given | {"t": torch.tensor([t, t])}) for t in (0.7505, 0.7515))
    assert torch.tensor(0.7505).bfloat16() == torch.tensor(0.7515).bfloat16()
    assert not torch.equal(low, high)


def test_recomputing_blocks_changes_no_gradient() -> None:
    grads = []
    for run_block in (native("chroma").run_block, run_recomputing):
        model = native("chroma")
        model.run_block = run_block
        model(**inputs("chroma")).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


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
