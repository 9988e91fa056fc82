"""Block swap on a CUDA device: the same equality, memory, and transfers that hide behind computing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import runs
import torch
from offload_tools import UPDATES, learners
from runs import CASES, MODES, Mode
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.activation_offload import ActivationOffload
from library.custom_offloading_utils import BlockGroup, BlockSwap

pytestmark = pytest.mark.gpu


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.nn.functional.gelu(self.a(x)))


@dataclass(frozen=True)
class Training:
    """Four steps of a small stack whose blocks are swapped, each block's input passing through an adapter."""

    update: str
    checkpointing: str
    offload: bool
    pinned: int | None

    def forward(self, model: nn.Sequential, adapters: nn.ModuleList) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for block, adapter in zip(model, adapters, strict=True):
                x = x + 0.1 * adapter(x)
                if self.checkpointing == "none":
                    x = block(x)
                else:
                    x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            return x

        return run

    def run(self, num_swapped: int) -> tuple[list[Tensor], int]:
        """Outputs, gradients of inputs and weights at the end, and how many blocks came late."""
        device, width, learning = torch.device("cuda", 0), 512, self.update != "frozen"
        torch.manual_seed(0)
        model = nn.Sequential(*(Wide(width) for _ in range(8))).requires_grad_(learning)
        adapters = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(8)).to(device)
        groups = [BlockGroup(list(model.children()), num_swapped)]
        swap = BlockSwap(model, groups, device, learning=learning, pinned_limit=self.pinned)
        keeper = ActivationOffload(model, device, budget=swap.transport.budget, min_bytes=0) if self.offload else None
        model.forward = self.forward(model, adapters)  # type: ignore[method-assign]
        parameters = learners(model) if learning else learners(adapters)
        if self.update == "fused":
            step_in_backward(parameters)
        opt = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=False)
        found = []
        for number in range(4):
            x = torch.randn(64, width, generator=torch.Generator().manual_seed(number)).to(device).requires_grad_()
            out = model(x)
            out.square().mean().backward()
            assert x.grad is not None
            found += [out.detach().cpu(), x.grad.cpu()]
            if self.update != "fused":
                with swap.updating():
                    opt.step()
                    opt.zero_grad(set_to_none=True)
            with torch.no_grad():
                found.append(model(x).cpu())
        with swap.host_weights():
            found += [value.detach().cpu().clone() for value in model.state_dict().values()]
        misses = swap.misses
        if keeper is not None:
            keeper.close()
        swap.close()
        return found, misses


def step_in_backward(parameters: Sequence[nn.Parameter]) -> None:
    steppers = {parameter: torch.optim.SGD([parameter], lr=0.01) for parameter in parameters}

    def step(parameter: Tensor) -> None:
        steppers[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("pinned", [None, 0], ids=["pinned", "pageable"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("checkpointing", ["none", "plain", "reentrant"])
@pytest.mark.parametrize("update", UPDATES)
def test_cuda_training_with_swap_is_bit_equal_to_training_without(
    update: str, checkpointing: str, offload: bool, pinned: int | None
) -> None:
    training = Training(update, checkpointing, offload, pinned)
    expected, _ = training.run(0)
    for num_swapped in (2, 6):
        found, misses = training.run(num_swapped)
        # SGD's arithmetic on the host may round otherwise than on the device: the only place where bits may differ
        close = (lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)) if update == "learning" else torch.equal
        assert all(close(a, b) for a, b in zip(found, expected, strict=True))
        assert misses == 0


def test_cuda_memory_is_that_of_the_slots_and_host_memory_is_pinned() -> None:
    device = torch.device("cuda", 0)
    Wide(64).to(device)(torch.randn(4, 64, device=device)).sum().backward()  # the matmul library's own memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    model = nn.Sequential(*(Wide(1024) for _ in range(10)))
    block_bytes = sum(p.numel() * 4 for p in model[0].parameters())
    model.requires_grad_(False)
    swap = BlockSwap(model, [BlockGroup(list(model.children()), 8)], device)
    assert all(block.host.flat.is_pinned() for block in swap.rings[0].blocks.values())
    torch.cuda.reset_peak_memory_stats(device)
    x = torch.randn(4, 1024, device=device, requires_grad=True)
    for _ in range(3):
        model(x).sum().backward()
    assert torch.cuda.max_memory_allocated(device) - before < 2.5 * block_bytes
    assert swap.misses == 0
    swap.close()


def test_cuda_transfers_overlap_with_computing() -> None:
    """Computing that takes longer than the transfers hides them."""
    device = torch.device("cuda", 0)

    def seconds(num_swapped: int) -> float:
        model = nn.Sequential(*(Wide(2048) for _ in range(8))).to(torch.bfloat16)
        model.requires_grad_(False)
        swap = BlockSwap(model, [BlockGroup(list(model.children()), num_swapped)], device)
        x = torch.randn(32768, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for step in range(6):
            if step == 2:
                start.record()
            y = x
            for block in model:
                y = checkpoint(block, y, use_reentrant=False)
            y.sum().backward()
        end.record()
        end.synchronize()
        swap.close()
        return start.elapsed_time(end) / 4000

    assert seconds(4) < 1.25 * seconds(0)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("mode", MODES)
def test_cuda_runs_with_swapped_blocks_learn_and_resume_as_runs_without(mode: Mode, fused: bool, tmp_path: Path) -> None:
    """Through the trainer, where optimizer state lies beside the weights it belongs to, also once it was loaded."""
    if fused and mode == "network":
        pytest.skip("an adapter's weights are not swapped")
    case = CASES["flux"]
    assert case.write_swappable
    workspace = runs.make_workspace(replace(case, write_model=case.write_swappable), tmp_path / "flux")
    flags = ["--max_train_steps=4", "--save_every_n_steps=2", "--save_state", "--gradient_accumulation_steps=2"]
    flags += ["--fused_backward_pass"] if fused else []
    swap = ["--blocks_to_swap=2", "--cpu_offload_checkpointing"]
    plain = workspace.train(mode, tmp_path / "plain", *flags)
    swapped = workspace.train(mode, tmp_path / "swapped", *flags, *swap)
    state = f"--resume={swapped / 'tiny-step00000002-state'}"
    resumed = workspace.train(mode, tmp_path / "resumed", *flags, *swap, state)
    expected = load_file(plain / "tiny.safetensors")
    for output in (swapped, resumed):
        found = load_file(output / "tiny.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4)
