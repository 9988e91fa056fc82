"""Compiled blocks: the same results, few graphs, no other names. Blocks are traced and run without code being generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import tiny_sdxl
import torch
from runs import CASES, Mode, Workspace
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from library.batch import TrainBatch
from library.compiling import check_compiler, compile_blocks, repeated_blocks
from library.errors import UserError
from library.rng import keyed_generator
from library.train_util import Trainer


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return runs.Workspaces(CASES, tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def steps(trainer: Trainer, batches: Sequence[TrainBatch]) -> list[Tensor]:
    """Losses of `batches`, and their gradients together, of an adapter that has moved."""
    for parameter in trainer.parameters:
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        parameter.grad = None
    trainer.trainable.train()
    losses = [trainer.loss(batch) for batch in batches]
    torch.stack(losses).sum().backward()
    gradients = [parameter.grad for parameter in trainer.parameters if parameter.grad is not None]
    return [torch.stack(losses).detach(), *gradients]


def compare(
    workspace: Workspace, mode: Mode, folder: Path, most_graphs: int, *extra: str, backend: str = "eager"
) -> tuple[Trainer, Trainer]:
    """A plain and a compiled run over batches of two sizes: equal, without a break, and in at most `most_graphs` graphs,
    which serve all further batches."""
    plain = workspace.trainer(mode, folder / "plain", *extra)
    compiled = workspace.trainer(mode, folder / "compiled", *extra, "--torch_compile", f"--dynamo_backend={backend}")
    batches = runs.first_batches(plain, 7)
    assert len({batch.images.shape for batch in batches[:4]}) > 1, "batches of one size would prove nothing"
    for found, expected in zip(steps(compiled, batches[:4]), steps(plain, batches[:4]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= most_graphs
    for batch in batches[4:]:
        compiled.loss(batch).backward()
    assert counters["stats"]["unique_graphs"] == graphs, "further batches compiled again"
    assert list(compiled.bundle.denoiser.state_dict()) == list(plain.bundle.denoiser.state_dict())
    return plain, compiled


FLUX_GRAPHS = 3
"""The first block, whose text comes without a gradient; the other double blocks; the single blocks."""
LEVEL_GRAPHS = 5
"""Residual blocks of three shapes, transformer blocks of two."""
UNET_GRAPHS = 22
"""13 of residual blocks, which differ in their shapes, and 5 of transformer blocks; more, where a tiny picture is one pixel."""


def test_compiled_blocks_with_adapters_and_checkpointing_give_the_same_in_few_graphs(
    workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    plain, compiled = compare(workspaces["flux"], "network", tmp_path, FLUX_GRAPHS, "--gradient_checkpointing")
    batch = plain.data.train[(0, 0)]
    for multiplier in (0.5, 0.7, 0.9, 1.0):  # a data set's network_multiplier
        strength = replace(batch, multiplier=multiplier)
        for found, expected in zip(steps(compiled, [strength]), steps(plain, [strength]), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2 * FLUX_GRAPHS, "every multiplier compiles again"
    for trainer in (plain, compiled):
        trainer.trainable.save(tmp_path / f"{id(trainer)}.safetensors", dtype=None, metadata={})
    first, second = (load_file(tmp_path / f"{id(trainer)}.safetensors") for trainer in (plain, compiled))
    assert first.keys() == second.keys()


def test_compiled_blocks_in_8_bits_give_the_same_in_few_graphs(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    compare(workspaces["flux"], "network", tmp_path, FLUX_GRAPHS, "--quantize_base=int8", "--quantized_compute=8bit")


def test_compiled_blocks_that_learn_give_the_same_in_few_graphs(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    compare(workspaces["flux"], "full", tmp_path, FLUX_GRAPHS)


def test_graphs_of_a_unets_blocks_serve_every_bucket() -> None:
    """Of one level of SDXL's and its middle; the whole network takes its time (below)."""
    plain, compiled = (tiny_sdxl.modules()["denoiser"] for _ in range(2))
    compile_blocks([*repeated_blocks(compiled.down_blocks[1]), *repeated_blocks(compiled.mid_block)], "eager")
    added = {"text_embeds": torch.ones(2, tiny_sdxl.WIDTH), "time_ids": torch.ones(2, 6)}
    t, context = torch.tensor([3, 700]), torch.ones(2, 77, 2 * tiny_sdxl.WIDTH)
    graphs = []
    for height, width in ((8, 8), (8, 16), (24, 8), (16, 16)):
        found = []
        for unet in (compiled, plain):
            x = torch.randn(2, 4, height, width, generator=keyed_generator("compile", height)).requires_grad_()
            out = unet(x, t, context, added_cond_kwargs=added).sample
            out.square().mean().backward()
            found.append((out.detach(), x.grad))
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs == [LEVEL_GRAPHS] * 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_compiled_unet_gives_the_same_in_few_graphs(family: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    compare(workspaces[family], "network", tmp_path, UNET_GRAPHS)


@pytest.mark.slow
def test_generated_code_gives_the_same(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    compare(workspaces["flux"], "network", tmp_path, FLUX_GRAPHS, "--gradient_checkpointing", backend="inductor")


def test_an_unknown_compiler_is_named() -> None:
    with pytest.raises(UserError, match="--dynamo_backend fx2trt: this torch knows .*inductor"):
        check_compiler("fx2trt", torch.device("cpu"))


def test_a_missing_c_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    check_compiler("aot_eager", torch.device("cpu"))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        check_compiler("inductor", torch.device("cpu"))
