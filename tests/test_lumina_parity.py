"""Our Lumina-Image-2.0 network against diffusers' class, through the key table: outputs, gradients, names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_lumina
import torch
from parity import Draw, assert_names_survive, assert_recomputing_changes_no_gradient, assert_same_outputs_and_gradients
from torch import Tensor, nn

from library.lumina_models import Lumina, LuminaParams, patchify, unpatchify
from library.lumina_names import LUMINA_DIFFUSERS, lumina_key_map
from library.lumina_saving import transformer_config

PARAMS = replace(tiny_lumina.PARAMS, num_layers=2, num_refiners=2)
OTHERS = {
    "published ratio": PARAMS,
    "two heads a key": replace(PARAMS, width=48, num_heads=4, num_kv_heads=2, mlp_width=256),
    "a key for each head": replace(PARAMS, width=24, num_heads=2, num_kv_heads=2, mlp_width=100),
}
HEIGHT, WIDTH, TEXT = 8, 6, 5
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


randn = Draw("lumina")


def native(params: LuminaParams = PARAMS) -> Lumina:
    return randn.fill(Lumina(params), "norm", 0.15)


def theirs_of(params: LuminaParams) -> nn.Module:
    import diffusers

    config = {key: value for key, value in transformer_config(params).items() if key[0] != "_"}
    return diffusers.Lumina2Transformer2DModel(**config)


def inputs() -> dict[str, Tensor]:
    return {
        "x": randn(2, 4, HEIGHT, WIDTH, key="x").requires_grad_(),
        "txt": randn(2, TEXT, 24, key="txt").requires_grad_(),
        "t": torch.tensor([0.15, 0.7312]),
    }


def run_theirs(model: Any, given: dict[str, Tensor], mask: Tensor) -> Tensor:
    out: Tensor = model(
        hidden_states=given["x"],
        timestep=given["t"],
        encoder_hidden_states=given["txt"],
        encoder_attention_mask=mask.int(),
        return_dict=False,
    )[0]
    return out


@pytest.mark.parametrize("sizes", OTHERS)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_those_of_diffusers(sizes: str, masked: bool) -> None:
    """Captions of two lengths, of which diffusers puts the image right behind its own, and of one."""
    params = OTHERS[sizes]
    names = lumina_key_map(params.num_heads // params.num_kv_heads)
    ours, theirs = native(params), theirs_of(params)
    assert_same_outputs_and_gradients(
        ours,
        theirs,
        names,
        inputs,
        lambda given: ours(**given, txt_mask=MASK if masked else None),
        lambda given: run_theirs(theirs, given, MASK if masked else torch.ones_like(MASK)),
        randn,
    )


@pytest.mark.parametrize("sizes", OTHERS)
def test_names_survive_the_way_to_diffusers_and_back_bit_for_bit(sizes: str) -> None:
    names = lumina_key_map(OTHERS[sizes].num_heads // OTHERS[sizes].num_kv_heads)
    assert_names_survive(names, native(OTHERS[sizes]).state_dict())


@pytest.mark.parametrize("sizes", OTHERS)
def test_sizes_are_told_from_shapes(sizes: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in native(OTHERS[sizes]).state_dict().items()}
    assert LuminaParams.of(shapes) == OTHERS[sizes]


def test_published_sizes_are_the_defaults() -> None:
    assert LuminaParams().axes == (32, 32, 32)
    assert LuminaParams().kv_width == 768
    config = transformer_config(LuminaParams())
    assert (config["multiple_of"], config["ffn_dim_multiplier"]) == (256, None)


def test_text_that_is_masked_changes_nothing_and_how_long_the_padding_is_neither() -> None:
    model, given = native(), inputs()
    other = given | {"txt": given["txt"] + 3 * (~MASK)[..., None]}
    longer = given | {"txt": torch.nn.functional.pad(given["txt"], (0, 0, 0, 4))}
    with torch.no_grad():
        expected = model(**given, txt_mask=MASK)
        torch.testing.assert_close(model(**other, txt_mask=MASK), expected, atol=1e-6, rtol=1e-6)
        padded = torch.nn.functional.pad(MASK, (0, 4))
        torch.testing.assert_close(model(**longer, txt_mask=padded), expected, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(model(**given), model(**other), atol=1e-2)


def test_recomputing_blocks_changes_no_gradient() -> None:
    assert_recomputing_changes_no_gradient(native, lambda model: model(**inputs(), txt_mask=MASK))


def test_blocks_are_in_execution_order_under_their_published_names() -> None:
    model = native(replace(PARAMS, num_refiners=1))
    names = [model.canonical_name(block) for block in model.blocks()]
    assert names == ["context_refiner.0", "noise_refiner.0", "layers.0", "layers.1"]
    division = LuminaParams().swap_division
    assert division.largest == 24
    assert [plan.num_swapped for plan in division.plans(20)] == [0, 0, 20]


def test_unpatchifying_undoes_patchifying() -> None:
    latents = randn(2, 4, HEIGHT, WIDTH, key="latents")
    assert torch.equal(unpatchify(patchify(latents), HEIGHT, WIDTH), latents)


def test_every_published_layer_has_a_name_in_diffusers() -> None:
    with torch.device("meta"):
        ours, theirs = Lumina(replace(LuminaParams(), num_layers=1)), theirs_of(replace(LuminaParams(), num_layers=1))
    assert LUMINA_DIFFUSERS.to_ours(dict(ours.state_dict())).keys() == theirs.state_dict().keys()
