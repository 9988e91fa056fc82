"""Our Stable Diffusion 3 network against diffusers' class, through the key table: outputs, gradients, names, positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_sd3
import torch
from parity import (
    Draw,
    assert_names_survive,
    assert_recomputing_changes_no_gradient,
    assert_same_outputs_and_gradients,
    assert_times_stay_float32,
)
from torch import Tensor

from library.sd3_models import Kind, Sd3, Sd3Params, cropped_positions, middle_positions, reaches, scaled_positions
from library.sd3_names import SD3_LAYERS, sd3_key_map
from library.sd3_saving import transformer_config

HEIGHT, WIDTH, TEXT = 8, 6, 5
KINDS: tuple[Kind, ...] = ("m", "5-medium", "5-large")


randn = Draw("sd3")


def native(kind: Kind) -> Sd3:
    return randn.fill(Sd3(tiny_sd3.PARAMS[kind]), ".ln_", 0.09, pos_embed=0.5)


def diffusers_model(kind: Kind) -> Any:
    import diffusers

    config = transformer_config(tiny_sd3.PARAMS[kind])
    return diffusers.SD3Transformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})


def inputs() -> dict[str, Tensor]:
    return {
        "x": randn(2, 4, HEIGHT, WIDTH, key="x").requires_grad_(),
        "t": torch.tensor([0.15, 0.7312]),
        "context": randn(2, TEXT, tiny_sd3.T5_WIDTH, key="context").requires_grad_(),
        "pooled": randn(2, 96, key="pooled").requires_grad_(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_diffusers(kind: Kind) -> None:
    ours, theirs = native(kind), diffusers_model(kind)

    def run_theirs(given: dict[str, Tensor]) -> Tensor:
        out: Tensor = theirs(
            hidden_states=given["x"],
            timestep=given["t"] * 1000,
            encoder_hidden_states=given["context"],
            pooled_projections=given["pooled"],
            return_dict=False,
        )[0]
        return out

    unused = {id(parameter) for module in ours.unused_modules() for parameter in module.parameters()}
    assert_same_outputs_and_gradients(
        ours, theirs, sd3_key_map(2), inputs, lambda given: ours(**given), run_theirs, randn, unused
    )


@pytest.mark.parametrize("kind", KINDS)
def test_names_survive_the_way_to_diffusers_and_back_bit_for_bit(kind: Kind) -> None:
    tensors = native(kind).state_dict()
    for table in (sd3_key_map(2), SD3_LAYERS):  # of models as wide as these the adapters' table says the same
        there = assert_names_survive(table, tensors)
        first, last = (f"transformer_blocks.{number}.norm1_context.linear.bias" for number in (0, 1))
        assert torch.equal(there[first], tensors["joint_blocks.0.context_block.adaLN_modulation.1.bias"])
        shift, scale = tensors["joint_blocks.1.context_block.adaLN_modulation.1.bias"].chunk(2)
        assert torch.equal(there[last], torch.cat([scale, shift]))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_kinds_are_told_from_shapes(kind: Kind) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in native(kind).state_dict().items()}
    assert Sd3Params.of(shapes) == tiny_sd3.PARAMS[kind]
    assert Sd3Params.of(shapes).kind == kind


def test_published_sizes_are_read_from_their_shapes() -> None:
    medium = Sd3Params(num_blocks=24, positions=384, qk_norm=True, dual_blocks=tuple(range(13)))
    large = Sd3Params(width=2432, mlp_width=9728, num_blocks=38, qk_norm=True)
    for params, heads, kind in ((Sd3Params(), 24, "m"), (medium, 24, "5-medium"), (large, 38, "5-large")):
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in Sd3(params).state_dict().items()}
        assert Sd3Params.of(shapes) == params
        assert (params.num_heads, params.kind) == (heads, kind)
        assert params.swap_division.largest == params.num_blocks - 2


def test_times_are_not_rounded_to_the_precision_of_the_weights() -> None:
    given = {name: value if name == "t" else value.bfloat16() for name, value in inputs().items()}
    assert_times_stay_float32(native("5-large").to(torch.bfloat16), given)


def test_recomputing_blocks_changes_no_gradient() -> None:
    assert_recomputing_changes_no_gradient(lambda: native("5-medium"), lambda model: model(**inputs()))


# ---- positions -------------------------------------------------------------------------------------------------------


TABLE = tiny_sd3.sinusoids(64, 32)


def test_the_middle_of_the_table_is_diffusers_crop() -> None:
    from diffusers.models.embeddings import PatchEmbed

    theirs = PatchEmbed(height=128, width=128, patch_size=2, in_channels=4, embed_dim=32, pos_embed_max_size=64)
    theirs.pos_embed.copy_(TABLE)
    assert torch.equal(middle_positions(TABLE, 4, 7), theirs.cropped_pos_embed(8, 14))


def test_a_cut_from_the_middle_is_the_middle_and_others_are_others() -> None:
    top, left = torch.tensor([30, 0]), torch.tensor([28, 57])
    cut = cropped_positions(TABLE, 4, 7, top, left)
    assert torch.equal(cut[:1], middle_positions(TABLE, 4, 7))
    assert torch.equal(cut[1], TABLE.view(64, 64, 32)[:4, 57:].reshape(28, 32))


def test_scaled_positions_of_the_native_size_are_the_middle_and_of_half_of_it_every_second() -> None:
    table = tiny_sd3.sinusoids(130, 16)
    whole = scaled_positions(table, 64, 64)
    torch.testing.assert_close(whole, middle_positions(table, 64, 64), atol=1e-6, rtol=0)
    half = scaled_positions(table, 32, 32).view(32, 32, 16)
    between = whole.view(32, 2, 32, 2, 16).mean(dim=(1, 3))  # each token of the small picture is four of the large one
    torch.testing.assert_close(half, between, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rows", "columns", "scaled", "fits"),
    [(64, 64, False, True), (65, 4, False, False), (4, 4, True, True), (2, 6, True, False), (6, 2, True, False)],
)
def test_a_picture_beyond_the_table_is_known(rows: int, columns: int, scaled: bool, fits: bool) -> None:
    assert reaches(TABLE, rows, columns, scaled=scaled) == fits


def test_given_positions_go_before_the_middle() -> None:
    model, given = native("5-medium"), inputs()
    middle = middle_positions(model.pos_embed, HEIGHT // 2, WIDTH // 2)
    with torch.no_grad():
        assert torch.equal(model(**given, positions=middle), model(**given))
        assert not torch.allclose(model(**given, positions=middle.flip(1)), model(**given), atol=1e-3)


def test_blocks_are_in_execution_order_under_their_published_names() -> None:
    model = Sd3(replace(tiny_sd3.MEDIUM, num_blocks=3))
    assert [model.canonical_name(block) for block in model.blocks()] == [f"joint_blocks.{number}" for number in range(3)]
