"""Layers in LyCORIS' files: it computes with ours what we do, and we with its what it does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from network_models import fill
from test_algorithms import ALGORITHMS, change, layers, sample
from torch import Tensor, nn

from networks.network_base import Adapter, Layer, algorithm_of

pytest.importorskip("lycoris")

KEY = "lora_unet_x"
SHARED = (
    "lora", "pissa", "rslora", "dora", "loha", "loha-dora", "lokr", "lokr-both", "lokr-full", "lokr-dora", "oft-free", "boft",
    "glora",
)  # fmt: skip
"""What LyCORIS 4.1 reads as it was written. It takes DoRA's lengths for rows', its reader of (IA)^3 raises TypeError, and its
OFT wants at least as many blocks as a block has outputs."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def theirs_of(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """LyCORIS' module for the tensors of a file's layer, in the layer's forward."""
    from lycoris.modules import get_module, make_module

    with torch.no_grad():
        kind, parameters = get_module({f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, KEY)
        module = make_module(kind, parameters, KEY, layer)
    module.apply_to()


def ours_of(layer: nn.Module, tensors: dict[str, Tensor]) -> Adapter:
    kind = algorithm_of(KEY, tensors)
    place = Layer(KEY, "denoiser", layer)  # type: ignore[arg-type]
    adapter = kind.like_file(place, kind.size_in_file(KEY, tensors), kind.arguments(), torch.Generator(), tensors)
    adapter.load_file_tensors(tensors, "a file")
    return adapter


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
@pytest.mark.parametrize("name", SHARED)
def test_lycoris_computes_with_our_file_what_we_do(name: str, kind: str) -> None:
    layer, other = layers()[kind], layers()[kind]
    adapter = ALGORITHMS[name].adapter(layer)
    change(adapter)
    adapter.attach()
    theirs_of(other, adapter.file_tensors())
    torch.testing.assert_close(other(sample(other)), layer(sample(layer)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("locon", {}),
        ("locon", {"use_tucker": True}),
        ("locon", {"weight_decompose": True}),
        ("locon", {"weight_decompose": True, "wd_on_out": False}),
        ("locon", {"rs_lora": True}),
        ("loha", {}),
        ("loha", {"use_tucker": True}),
        ("loha", {"weight_decompose": True}),
        ("lokr", {"factor": 2}),
        ("lokr", {"factor": 2, "use_tucker": True}),
        ("lokr", {"factor": 4, "decompose_both": True, "lora_dim": 1}),
        ("lokr", {"full_matrix": True}),
        ("lokr", {"factor": 2, "unbalanced_factorization": True}),
        ("diag-oft", {"constraint": 0}),
        ("diag-oft", {"constraint": 1e-2}),
        ("boft", {"constraint": 0}),
        ("boft", {"constraint": 1e-2, "lora_dim": 5}),
        ("glora", {}),
        ("ia3", {}),
        ("ia3", {"train_on_input": True}),
    ],
)
def test_we_compute_with_lycoris_file_what_it_does(algorithm: str, arguments: dict[str, Any], kind: str) -> None:
    import lycoris.modules as modules

    layer, other = layers()[kind], layers()[kind]
    known = {getattr(module, "name", ""): module for module in modules.MODULE_LIST} | {"lokr": modules.LokrModule}
    module = known[algorithm](KEY, other, **{"lora_dim": 2, "alpha": 1.5, **arguments})
    fill(module)
    module.apply_to()
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    ours_of(layer, tensors).attach()
    torch.testing.assert_close(layer(sample(layer)), other(sample(other)), atol=2e-5, rtol=1e-4)


def test_factorings_are_lycoris() -> None:
    from lycoris.functional import factorization

    from networks.lokr import split_width

    for width in (1, 8, 12, 127, 250, 320, 360, 512, 640, 1280, 3072, 12288, 15360):
        for factor in (-1, 1, 2, 4, 7, 8, 16, 64):
            assert split_width(width, factor) == factorization(width, factor), (width, factor)
