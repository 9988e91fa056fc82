"""Weights in 8 and 4 bits: how exact they are, the layers that use them, reading them, and training adapters on them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny_flux
import torch
from runs import CASES, SHALLOW_CASES, Workspace
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.dit_text import open_t5
from library.errors import UserError
from library.flux_utils import FLUX_LAYERS, describe
from library.key_layout import IDENTITY
from library.memory_tracker import MemoryTracker
from library.model_io import open_checkpoint
from library.module_loading import load_into
from library.quantization import (
    E4M3,
    NF4_CODE,
    SCHEMES,
    LayerTable,
    StoredWeight,
    as_grid,
    dequantize,
    quantize_grid,
    requantize,
    tile_grid,
)
from library.quantized_layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Quantizer, quantize
from networks.lora import LoRA

EVERY_LAYER = LayerTable(quantized=(r".*",))
NF4_GAP = max(after - before for before, after in zip(NF4_CODE, NF4_CODE[1:], strict=False)) / 2


def matrix(rows: int = 96, columns: int = 160, seed: int = 0) -> Tensor:
    """Rows of very different sizes, and a row of zeros."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows)[:, None]
    sizes[rows // 2] = 0
    return torch.randn(rows, columns, generator=random) * sizes


def restored(weight: Tensor, scheme: str) -> Tensor:
    return dequantize(SCHEMES[scheme](weight), tuple(weight.shape), torch.float32)


def spread(values: Tensor, grid: Tensor) -> Tensor:
    """A grid's numbers at every place of its tiles."""
    (rows, columns), (down, across) = values.shape, grid.shape
    return grid.repeat_interleave(rows // down, 0).repeat_interleave(columns // across, 1)


# ---- how exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp8", "fp8_rows"])
def test_fp8_loses_at_most_half_of_its_last_place(scheme: str) -> None:
    weight = matrix()
    made = SCHEMES[scheme](weight)
    bound = torch.maximum(weight.abs() * 2**-4, spread(weight, made.scale) * 2**-10)
    lost = (restored(weight, scheme) - weight).abs()
    assert (lost <= bound).all()
    assert lost.max() > 0
    largest = (weight.abs() / spread(weight, made.scale)).unflatten(0, (made.scale.shape[0], -1)).flatten(1).amax(1)
    assert ((largest > 224) & (largest <= 448) | (largest == 0)).all()


def test_int8_loses_at_most_half_a_step_of_its_row() -> None:
    weight = matrix()
    step = weight.abs().amax(1, keepdim=True) / 127
    lost = (restored(weight, "int8") - weight).abs()
    assert (lost <= step * (0.5 + 1e-4)).all()
    assert (lost / step.clamp(min=1e-9)).max() > 0.45


def test_nf4_loses_at_most_half_of_its_widest_gap() -> None:
    weight = matrix()
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    lost = (restored(weight, "nf4") - weight).view(-1, 64).abs()
    assert (lost <= largest * (NF4_GAP + 1e-5)).all()
    assert (lost / largest.clamp(min=1e-9)).max() > 0.9 * NF4_GAP


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = matrix()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    made = SCHEMES["nf4"](weight)
    assert torch.equal(made.stored, packed.flatten())
    assert torch.equal(made.scale, state.absmax)
    for dtype in (torch.float32, torch.bfloat16):
        kernel: Any = torch.ops.bitsandbytes.dequantize_4bit
        expected = kernel(made.stored[:, None], made.scale, 64, "nf4", [weight.numel()], dtype).flatten()  # blocks span rows
        assert torch.equal(dequantize(made, (weight.numel(),), dtype), expected)


def test_the_raw_cast_is_the_cast() -> None:
    weight = torch.cat([matrix(), torch.full((1, 160), 1000.0)])
    assert torch.equal(restored(weight, "fp8_raw"), weight.clamp(-448, 448).to(E4M3).float())


@pytest.mark.parametrize("scheme", ["fp8", "fp8_rows", "int8", "nf4"])
def test_what_is_quantised_already_loses_nothing(scheme: str) -> None:
    once = restored(matrix(), scheme)
    torch.testing.assert_close(restored(once, scheme), once, rtol=1e-6 if scheme == "int8" else 0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_once_to_the_dtype_it_is_used_in(scheme: str, dtype: torch.dtype) -> None:
    weight = matrix()
    made = SCHEMES[scheme](weight)
    assert torch.equal(dequantize(made, (96, 160), dtype), dequantize(made, (96, 160), torch.float32).to(dtype))


def test_large_matrices_are_quantised_in_pieces_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(256, 256)
    whole = {scheme: SCHEMES[scheme](weight) for scheme in SCHEMES}
    monkeypatch.setattr("library.quantization._ELEMENTS", 1 << 10)
    for scheme, expected in whole.items():
        for one, other in zip(SCHEMES[scheme](weight), expected, strict=True):
            assert torch.equal(one.float(), other.float()), scheme


@pytest.mark.parametrize(
    ("size", "tiles"), [((3072, 12288), (24, 96)), ((320, 2880), (5, 45)), ((24, 77), (1, 1)), ((768, 48), (6, 3))]
)
def test_tiles_divide_the_matrix(size: tuple[int, int], tiles: tuple[int, int]) -> None:
    assert tile_grid(*size) == tiles


def test_scales_of_files_are_read_in_every_form() -> None:
    forms = [torch.tensor(2.0), torch.ones(1), torch.ones(8), torch.ones(8, 1), torch.ones(8, 2, 1), torch.ones(4, 2)]
    shapes = [grid.shape for form in forms if (grid := as_grid(form, 8, 4)) is not None]
    assert shapes == [(1, 1), (1, 1), (8, 1), (8, 1), (8, 2), (4, 2)]
    assert as_grid(torch.ones(3, 2), 8, 4) is None


# ---- layers ----------------------------------------------------------------------------------------------------------


def layer_pair(
    base: nn.Linear | nn.Conv2d, scheme: str, dtype: torch.dtype = torch.float32, *, eight_bit: bool = False
) -> tuple[QuantizedLayer, nn.Module]:
    """A layer's quantised form, and an ordinary layer with the weight that it stands for."""
    root = nn.Sequential(base).to(dtype)
    kept = base.weight.detach().clone()
    [(layer, stored)] = Quantizer(scheme, EVERY_LAYER, eight_bit=eight_bit).replace_layers(root, dtype).values()
    layer.fill(quantize(kept, stored, "weight"), lambda: kept)
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    return layer, base


def results(layer: nn.Module, x: Tensor, *, autocast: bool = False) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(48, 80), (2, 20, 48)),
    "linear without bias": (lambda: nn.Linear(48, 80, bias=False), (40, 48)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "convolution of groups": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2), (2, 8, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_quantised_layer_computes_as_one_with_the_weight_it_stands_for(kind: str, scheme: str, precision: str) -> None:
    make, shape = LAYERS[kind]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    torch.manual_seed(0)
    layer, ordinary = layer_pair(make(), scheme, dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(
        results(layer, x, autocast=precision == "autocast"), results(ordinary, x, autocast=precision == "autocast"), strict=True
    ):
        assert one.dtype == other.dtype
        # the gradient of a Linear is the product ordinary layers make, which may add up in another order
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 and precision != "autocast" else {}
        torch.testing.assert_close(one, other, **tolerance)
    assert torch.equal(results(layer, x)[0], results(ordinary, x)[0])


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_autograd_keeps_what_is_stored_and_no_weight(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, _ = layer_pair(make(), "int8")
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(shape).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {layer.stored.data_ptr(), layer.scale.data_ptr()}


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_products_in_8_bits_are_close_and_are_made_in_8_bits(scheme: str, bound: float) -> None:
    """Inputs and gradients are rounded once each: half a step of 1/127 of a row's largest value, or 2^-4 of every value."""
    torch.manual_seed(0)
    layer, ordinary = layer_pair(nn.Linear(96, 64), scheme, eight_bit=True)
    x = torch.randn(32, 96)
    for one, other in zip(results(layer, x), results(ordinary, x), strict=True):
        error = float((one - other).norm() / other.norm())
        assert 1e-4 < error < bound
    few = x[:4]  # too few rows: dequantised
    assert torch.equal(results(layer, few)[0], results(ordinary, few)[0])


COMPILED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)),
        lambda number: torch.randn(number, 64),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 8, 3, stride=2, padding=1)),
        lambda number: torch.randn(2, 8, number, 12),
    ),
}


@pytest.mark.parametrize(
    ("kind", "scheme", "eight_bit"),
    [("linear", "nf4", False), ("linear", "int8", True), ("linear", "fp8", True), ("convolution", "fp8", False)],
)
def test_a_compiled_block_gives_the_same_at_every_size_without_a_graph_break(kind: str, scheme: str, eight_bit: bool) -> None:
    """As `library.compiling` compiles them: what could be a variable is one."""
    torch.manual_seed(0)
    make, draw = COMPILED[kind]
    block = make()
    weights = {name: tensor.detach().clone() for name, tensor in block.named_parameters()}
    for name, (layer, stored) in (
        Quantizer(scheme, EVERY_LAYER, eight_bit=eight_bit).replace_layers(block, torch.float32).items()
    ):
        layer.fill(quantize(weights[name], stored, name), lambda: torch.empty(0))
    block.requires_grad_(False)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for number in (40, 72):
        x = draw(number)
        for one, other in zip(results(compiled, x), results(block, x), strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_merging_quantises_the_sum_once() -> None:
    torch.manual_seed(0)
    layer, _ = layer_pair(nn.Linear(64, 128), "fp8")
    assert layer.exact is not None
    weight, first, second = layer.exact(), torch.randn(128, 64) * 0.01, torch.randn(128, 64) * 0.01
    layer.change_weight(lambda before: before + first)
    layer.change_weight(lambda before: before + second)
    expected = requantize(weight + first + second, StoredWeight(layer.stored, layer.scale))
    assert torch.equal(layer.weight, dequantize(expected, (128, 64), torch.float32))


# ---- loading ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def test_loading_never_holds_the_model_twice(tmp_path: Path) -> None:
    count, width = 24, 128
    tensors = {f"layers.{i}.weight": matrix(width, width, seed=i).to(torch.bfloat16) for i in range(count)}
    tensors |= {f"layers.{i}.bias": torch.zeros(width, dtype=torch.bfloat16) for i in range(count)}
    save_file(tensors, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")
    for scheme, size in (("fp8", 1), ("nf4", 0.57)):
        with torch.device("meta"):
            module = Stack(count, width)
        with MemoryTracker() as tracker:
            load_into(module, source, IDENTITY, dtype=torch.bfloat16, quantizer=Quantizer(scheme, EVERY_LAYER))
        one_layer = width * width * 4
        assert tracker.peak("cpu").total < size * count * width**2 * 1.1 + (10 if scheme == "nf4" else 5) * one_layer
        assert all(isinstance(layer, QuantizedLinear) for layer in module.layers)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_weight_is_named(scheme: str, value: float, tmp_path: Path) -> None:
    weight = torch.ones(32, 32)
    weight[3, 5] = value
    broken = {"layers.0.weight": weight, "layers.0.bias": torch.zeros(32)}
    save_file(broken, tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = Stack(1, 32)
    with pytest.raises(UserError, match=r"layers\.0\.weight.* not finite"):
        load_into(module, open_checkpoint(tmp_path / "m.safetensors"), IDENTITY, quantizer=Quantizer(scheme, EVERY_LAYER))


@pytest.mark.parametrize("scheme", ["fp8", "fp8_raw"])
@pytest.mark.parametrize("sign", [0, 128])
def test_a_damaged_weight_that_is_in_fp8_is_named(scheme: str, sign: int, tmp_path: Path) -> None:
    """Its bytes are kept, so that no scale would tell."""
    weight = torch.ones(32, 32).to(E4M3)
    weight.view(torch.uint8)[3, 5] = 127 + sign
    save_file({"layers.0.weight": weight, "layers.0.bias": torch.zeros(32)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        module = Stack(1, 32)
    with pytest.raises(UserError, match=r"layers\.0\.weight.* not finite"):
        load_into(module, open_checkpoint(tmp_path / "m.safetensors"), IDENTITY, quantizer=Quantizer(scheme, EVERY_LAYER))


def scaled(tensors: dict[str, Tensor], wanted: Callable[[str], bool], suffix: str) -> dict[str, Tensor]:
    """As ComfyUI writes scaled fp8."""
    made = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith(".weight") and tensor.ndim == 2 and wanted(key):
            scale = tensor.abs().max() / 448 * 1.1  # not a power of two
            made[key] = (tensor / scale).to(E4M3)
            made[key.removesuffix(".weight") + suffix] = scale
    return {**made, "scaled_fp8": torch.zeros(2, dtype=E4M3)}


@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
def test_a_scaled_fp8_t5_is_read(suffix: str, tmp_path: Path) -> None:
    tensors = scaled(tiny_flux.tensors()["t5xxl"], lambda key: "block" in key and "bias" not in key, suffix)
    save_file(tensors, tmp_path / "t5.safetensors")
    component = open_t5(tmp_path / "t5.safetensors", "--t5xxl")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    key = name.removesuffix(".weight") + suffix
    expected = tensors[name].float() * tensors[key]
    plain = component.load(dtype=torch.float32, device="cpu")
    assert torch.equal(plain.get_parameter(name), expected)
    kept: Any = component.load(dtype=torch.bfloat16, device="cpu", quantizer=Quantizer("fp8", EVERY_LAYER))
    layer = kept.get_submodule(name.removesuffix(".weight"))
    assert torch.equal(layer.stored.float(), tensors[name].float()), "the file's bytes"
    assert torch.equal(layer.scale.flatten(), tensors[key].flatten())
    tokens = torch.arange(12)[None] % 90
    ordinary: Any = component.load(dtype=torch.bfloat16, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(kept(tokens)[0], ordinary(tokens)[0], rtol=0.05, atol=0.05)


def test_a_file_of_plain_fp8_keeps_its_bytes(tmp_path: Path) -> None:
    tiny_flux.write_flux_files(tmp_path, dtype=E4M3)
    file = load_file(tmp_path / "flux.safetensors")
    options = _options(tmp_path)
    module = (
        describe(options).parts["denoiser"].load(dtype=torch.float32, device="cpu", quantizer=Quantizer("fp8", FLUX_LAYERS))
    )
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}
    assert len(layers) == 2 * 10 + 2 * 3
    for path, layer in layers.items():
        assert torch.equal(layer.weight, file[f"{path}.weight"].float())
        assert layer.stored.dtype == E4M3


def _options(folder: Path) -> Any:
    from library.flux_options import FluxOptions
    from library.option_groups import NetworkTrainOptions
    from library.options import from_flags

    files = {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "t5xxl", "ae")}
    return from_flags(NetworkTrainOptions, FluxOptions, pretrained_model_name_or_path=str(folder / "flux.safetensors"), **files)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    cases = {"sd": SHALLOW_CASES["sd"], "flux": replace(CASES["flux"], write_model=CASES["flux"].write_swappable)}
    return {name: runs.make_workspace(case, tmp_path_factory.mktemp(name)) for name, case in cases.items()}


@pytest.fixture(scope="module")
def unquantised(workspaces: dict[str, Workspace], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("unquantised")
    return {name: runs.losses(workspace.train("network", folder / name)) for name, workspace in workspaces.items()}


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        (("--fp8_base",), 0.03),
        (("--quantize_base=fp8_raw", "--mixed_precision=bf16", "--no_half_vae", "--gradient_checkpointing"), 0.04),
        (("--quantize_base=int8", "--quantized_compute=8bit"), 0.03),
        (("--quantize_base=nf4",), 0.1),
    ],
    ids=["fp8", "raw", "int8", "nf4"],
)
def test_training_on_a_quantised_base_is_close_to_training_on_the_base(
    family: str,
    flags: tuple[str, ...],
    bound: float,
    workspaces: dict[str, Workspace],
    unquantised: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    found = runs.losses(workspaces[family].train("network", tmp_path, *flags))
    assert found != unquantised[family]
    assert found == pytest.approx(unquantised[family], rel=bound)


def test_a_run_on_a_quantised_base_resumes_exactly(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    flags = ("--fp8_base", "--save_every_n_steps=2", "--save_state", "--network_dropout=0.1")
    whole = workspaces["flux"].train("network", tmp_path / "whole", *flags)
    state = whole / "tiny-step00000002-state"
    resumed = workspaces["flux"].train("network", tmp_path / "resumed", *flags, f"--resume={state}")
    assert runs.losses(resumed) == runs.losses(whole)[2:]
    runs.assert_same_tensors(load_file(resumed / "tiny.safetensors"), load_file(whole / "tiny.safetensors"))


@pytest.mark.parametrize("flags", [["--fp8_base"], ["--quantize_base=nf4", "--gradient_checkpointing"]], ids=["fp8", "nf4"])
def test_swapping_quantised_blocks_changes_nothing(flags: list[str], workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    plain = workspaces["flux"].train("network", tmp_path / "plain", *flags)
    swapped = workspaces["flux"].train("network", tmp_path / "swapped", *flags, "--blocks_to_swap=2")
    assert runs.losses(swapped) == runs.losses(plain)
    runs.assert_same_tensors(load_file(swapped / "tiny.safetensors"), load_file(plain / "tiny.safetensors"))


def test_networks_are_merged_before_the_base_is_quantised(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    workspace = workspaces["flux"]
    learned = workspace.train("network", tmp_path / "base", "--max_train_steps=2", "--learning_rate=0.1")
    merge = ["--base_weights", *[str(learned / "tiny.safetensors")] * 2, "--base_weights_multiplier", "0.5", "0.25"]
    merged = workspace.trainer("network", tmp_path / "merged", *merge)
    quantised = workspace.trainer("network", tmp_path / "quantised", *merge, "--quantize_base=int8")
    weights = dict(merged.bundle.denoiser.named_parameters())
    layers = {f"{path}.weight": m for path, m in quantised.bundle.denoiser.named_modules() if isinstance(m, QuantizedLayer)}
    assert layers
    for name, layer in layers.items():
        expected = quantize_grid(weights[name], torch.int8, (weights[name].shape[0], 1))
        different = (layer.stored != expected.stored).float().mean()
        assert different < 1e-3, f"{name}: the sums differ in their last places at most"


def test_lycoris_says_that_it_cannot_merge_into_a_quantised_base(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    """Before anything is loaded: the folder without pictures would be the next error."""
    pytest.importorskip("lycoris.kohya")
    (tmp_path / "empty" / "1_thing").mkdir(parents=True)
    (tmp_path / "any.safetensors").touch()
    flags = ["--network_module=lycoris.kohya", f"--base_weights={tmp_path / 'any.safetensors'}"]
    for quantised in ("--fp8_base_unet", "--quantize_base=nf4"):
        with pytest.raises(UserError, match=r"lycoris.kohya merges into whole weights, and this model's \(denoiser\)"):
            workspaces["sd"].trainer("network", tmp_path, *flags, quantised, f"--train_data_dir={tmp_path / 'empty'}")


def test_merged_adapters_are_not_kept(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    learned = workspaces["flux"].train("network", tmp_path / "base", "--max_train_steps=1") / "tiny.safetensors"
    flags = ("--quantize_base=int8", f"--base_weights={learned}", "--network_train_unet_only")
    trainer = workspaces["flux"].trainer("network", tmp_path / "run", *flags)
    layers = {id(layer) for layer in trainer.bundle.denoiser.modules()}
    gc.collect()
    alive = [found for found in gc.get_objects() if isinstance(found, LoRA) and id(found.base) in layers]
    assert len(alive) == len(list(trainer.trainable.network.adapters())) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_lycoris_trains_on_a_quantised_base(
    algorithm: str, workspaces: dict[str, Workspace], unquantised: dict[str, list[float]], tmp_path: Path
) -> None:
    pytest.importorskip("lycoris.kohya")
    flags = ["--network_module=lycoris.kohya", "--network_args", f"algo={algorithm}", "conv_dim=2", "--fp8_base"]
    found = runs.losses(workspaces["sd"].train("network", tmp_path, *flags, "--max_train_steps=2"))
    assert found == pytest.approx(unquantised["sd"][:2], rel=0.03)


def quantised_parts(workspace: Workspace, output: Path, *flags: str) -> dict[str, str]:
    """Part -> how it is kept, for those that are quantised."""
    bundle = workspace.trainer("network", output, *flags).bundle
    found = {}
    for part in ("denoiser", *bundle.text_encoder_names):
        kinds = {m.stored.dtype for m in bundle.part(part).modules() if isinstance(m, QuantizedLayer)}
        if kinds:
            found[part] = " ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    return found


def test_flags_choose_the_parts(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    flux, fp8, both = workspaces["flux"], "float8_e4m3fn", "float8_e4m3fn int8"
    cached = "--cache_text_encoder_outputs"
    assert quantised_parts(flux, tmp_path, "--fp8_base") == {"denoiser": both, "clip_l": fp8, "t5xxl": fp8}
    assert quantised_parts(flux, tmp_path, "--fp8_base_unet") == {"denoiser": both}
    assert quantised_parts(flux, tmp_path, "--fp8_base", cached) == {"denoiser": both, "clip_l": fp8}
    explicit = quantised_parts(flux, tmp_path, cached, "--network_train_unet_only", "--quantize_text_encoders=int8")
    assert explicit == {"clip_l": "int8", "t5xxl": "int8"}
    assert quantised_parts(flux, tmp_path, "--fp8_base_unet", "--quantize_base=fp8_raw") == {"denoiser": fp8}


def test_a_quantised_text_encoder_has_caches_of_its_own(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    identities = [
        workspaces["flux"].trainer("network", tmp_path, *flags).bundle.identity["t5xxl"]
        for flags in ([], ["--quantize_text_encoders=int8"], ["--quantize_text_encoders=fp8"])
    ]
    assert len(set(identities)) == 3


def test_frozen_text_encoders_of_full_fine_tuning_can_be_quantised(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    bundle = workspaces["flux"].trainer("full", tmp_path, "--quantize_text_encoders=int8").bundle
    assert any(isinstance(module, QuantizedLinear) for module in bundle.part("t5xxl").modules())
    assert not any(isinstance(module, QuantizedLayer) for module in bundle.denoiser.modules())
    with pytest.raises(UserError, match="cannot learn"):
        workspaces["sd"].train("full", tmp_path, "--quantize_text_encoders=int8")


def test_a_unet_keeps_what_the_time_passes_through(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    unet = workspaces["sd"].trainer("network", tmp_path, "--quantize_base=int8").bundle.denoiser
    ordinary = {path for path, module in unet.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    assert {path.partition(".")[0] for path in ordinary if "time_emb_proj" not in path} == {
        "conv_in", "conv_out", "time_embedding",
    }  # fmt: skip
    assert any(isinstance(module, QuantizedConv2d) for module in unet.modules())


def test_the_file_says_what_it_was_trained_on(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    from safetensors import safe_open

    flags = ["--fp8_base", "--quantize_base=fp8_raw", "--max_train_steps=1"]
    with safe_open(workspaces["sd"].train("network", tmp_path, *flags) / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_fp8_base"], metadata["ss_fp8_base_unet"]) == ("True", "False")
    assert metadata["ss_quantize_base"] == "fp8_raw"


# ---- the tool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_tool_measures_every_quantised_layer(
    family: str, workspaces: dict[str, Workspace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.quantization_error import find_family, main, measure

    model = workspaces[family].model
    main([str(model), "--quantize_base", "fp8", "int8", "--output", str(tmp_path / "errors.png")])
    said = capsys.readouterr().out
    assert "int8: 0.00 GiB, output error" in said
    assert (tmp_path / "errors.png").read_bytes()[:4] == b"\x89PNG"
    found = find_family(model)
    rows = list(measure(found.open_denoiser(model), found, ["fp8", "int8"], eight_bit=False))
    assert all(row.path in said for row in rows)
    ordinary = [row for row in rows if not row.path.endswith(".lin")]
    assert all(0.015 < row.weight["fp8"] < 0.04 for row in ordinary)
    assert all(row.weight["bf16"] < row.weight["int8"] < row.weight["fp8"] for row in ordinary)
    assert all(row.weight["fp8"] == row.weight["int8"] for row in rows if row.path.endswith(".lin"))
