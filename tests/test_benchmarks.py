"""The benchmark of the real FLUX.1 runs at toy size on a CPU, and counts what it should; that of the real SDXL is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_flux(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_flux

    return gpu_flux


@pytest.fixture
def run(gpu_flux: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """The script with further arguments, which starts a process for each configuration; gives the rows that are there then."""
    out = tmp_path / "rows.jsonl"
    out.write_text('{"scenario": "earlier"}\n')

    def rows(*arguments: str) -> list[dict]:
        command = ["gpu_flux.py", "--tiny", "--device=cpu", "--steps=1", f"--out={out}", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        gpu_flux.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return rows


def test_a_configuration_is_measured_and_its_row_appended(run: Callable[..., list[dict]]) -> None:
    earlier, swapped = run("--only", "fp8_swap35")
    assert earlier == {"scenario": "earlier"}
    assert swapped["scenario"] == "gpu_flux/fp8_swap35"
    assert "error" not in swapped
    assert swapped["seconds_per_step"] > 0 and swapped["tflops"] > 0 and swapped["learning"] > 0
    assert swapped["late_loads"] == 0, "from step to step every block is under way before it is needed"
    assert (swapped["swap"], swapped["scheme"], swapped["checkpointing"]) == (35, "fp8", True)


def test_a_configuration_that_fails_leaves_a_row_and_the_next_one_runs(run: Callable[..., list[dict]]) -> None:
    _, *rows = run("--only", "lora", "checkpointing", "--timeout=1")
    assert [row["scenario"] for row in rows] == ["gpu_flux/lora", "gpu_flux/checkpointing"]
    assert all(row["error"] == "took longer than 1 s" and "seconds_per_step" not in row for row in rows)


def test_a_quantized_configuration_has_quantized_blocks(gpu_flux: ModuleType) -> None:
    from library.quantized_layers import QuantizedLinear

    bundle, network, policy = gpu_flux.build(gpu_flux.CONFIGURATIONS["int8"], gpu_flux.TINY, torch.device("cpu"))
    block = bundle.denoiser.double_blocks[0]
    assert isinstance(block.img_attn.qkv, QuantizedLinear)
    assert block.img_attn.qkv.stored.dtype == torch.int8
    assert policy.swap is None
    assert len(list(network.adapters())) == 19 * 10 + 38 * 3


def test_the_operations_of_a_step_are_those_of_its_matrices(gpu_flux: ModuleType) -> None:
    """Of FLUX.1, by hand: every token passes through the blocks' matrices forward and backward, and through attention, whose
    backward pass is 2 to 2.5 times its forward pass; the rest (one token for each modulation, LoRA) is below 3 %."""
    size = gpu_flux.REAL
    width, tokens = 3072, 128 * 128 // 4 + 512
    double, single = 12 * width**2, 12 * width**2  # parameters that each token meets in one block
    linear = 2 * 2 * tokens * (19 * double + 38 * single)
    attention = 57 * 4 * tokens**2 * width
    counted = gpu_flux.operations(size)
    assert linear + 3.0 * attention < counted < 1.03 * (linear + 3.5 * attention)


def test_the_sdxl_of_the_benchmark_has_the_published_sizes_and_its_file_is_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sdxl_full_size
    import tiny_sdxl

    from library.option_groups import ModelOptions
    from library.sdxl_utils import describe

    published = {  # parameters of the base model's parts
        "model.diffusion_model.": 2_567_463_684,
        "first_stage_model.": 83_653_863,
        "conditioner.embedders.0.": 123_060_480,
        "conditioner.embedders.1.": 694_659_840,
    }
    shapes = dict(sdxl_full_size.layout("full"))
    for prefix, expected in published.items():
        assert sum(value.numel() for name, value in shapes.items() if name.startswith(prefix)) == expected, prefix
    sdxl_full_size.write_checkpoint(tmp_path / "tiny.safetensors", "tiny")
    model = describe(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "tiny.safetensors")))
    for part in model.parts.values():
        part.check()
    assert model.unet.config["block_out_channels"] == tiny_sdxl.configs()["denoiser"]["block_out_channels"]
