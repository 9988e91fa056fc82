"""Weights shared out among processes: what can be, and what each part does. Two processes train so in test_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.errors import UserError
from library.flux_options import FluxFullOptions
from library.option_groups import FullTrainOptions, NetworkTrainOptions
from library.option_rules import check_rules
from library.options import from_flags
from library.processes import Processes
from library.saved_state import load_state, save_state
from library.sharded_weights import ELEMENTWISE, ShardedWeights, check_sharding, gathered_modules
from library.state_parts import Part, join_optimizer, split_optimizer, write_parts

WIDTH = 16


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=0, eos_token_id=63, pad_token_id=63,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModelWithProjection(config).double()


def gradients(model: Any) -> dict[str, Tensor | None]:
    """Of what is asked of the second encoder of SDXL: a part of it, and a layer by itself."""
    output = model.text_model(torch.arange(16)[None] % 60, output_hidden_states=True)
    loss = output.hidden_states[-2].square().sum() + model.text_projection(output.last_hidden_state[:, 3]).square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_what_is_called_of_an_encoder_without_the_encoder_around_it_is_gathered(alone: None) -> None:
    model = encoder()
    found = gathered_modules(model)
    inside = [id(parameter) for module in found for parameter in module.parameters()]
    assert sorted(inside) == sorted(map(id, model.parameters()))
    expected = {name: None if gradient is None else gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    shards = ShardedWeights({"text_encoder": model}, torch.device("cpu"))
    assert type(model).__name__ == "CLIPTextModelWithProjection"
    gradients(model)
    with shards.updating():
        for name, parameter in model.named_parameters():
            own, wanted = shards.own(parameter).grad, expected[name]
            assert own is not None and wanted is not None, name
            torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-12, msg=name)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)

    def blocks(self) -> list[nn.Module]:
        return [self.block]

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.block(x))
        return last


def test_what_is_stepped_is_what_is_gathered_and_saved(alone: None) -> None:
    """In a block and beside the blocks: nothing stays gathered that may change before it is used again."""
    model = Denoiser()
    shards = ShardedWeights({"denoiser": model}, torch.device("cpu"))
    block, weight = model.block.weight, model.last.weight
    with torch.no_grad():
        model(torch.ones(1, 4))
        shards.own(block).fill_(0.25)
        shards.own(weight).fill_(0.5)
        torch.testing.assert_close(model(torch.ones(1, 4)), torch.full((1, 2), 2.0))
    with shards.gathered(torch.bfloat16, keep=True):
        assert type(model.last.weight) is nn.Parameter
        assert model.state_dict()["last.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(model.last.weight.float(), torch.full((2, 4), 0.5))
    assert model.last.weight is weight
    assert shards.replicated([shards.own(weight), nn.Parameter(torch.ones(1))])[0].shape == (1,)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in ELEMENTWISE.items() for name in names])
def test_optimizers_that_are_allowed_step_a_part_as_they_step_the_whole(module: str, name: str) -> None:
    import importlib

    cls = getattr(importlib.import_module(module), name)
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 5, generator=generator))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split([4, 2])]
    extra = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {}
    optimizers = [cls([one], lr=1e-2, **extra) for one in (whole, *parts)]
    for optimizer in optimizers:
        if hasattr(optimizer, "train"):
            optimizer.train()
    for _ in range(4):
        whole.grad = torch.randn(6, 5, generator=generator)
        for part, gradient in zip(parts, whole.grad.split([4, 2]), strict=True):
            part.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole.detach())


def full(**given: Any) -> FullTrainOptions:
    flags = {"pretrained_model_name_or_path": "m", "output_dir": "o", "train_data_dir": ".", "resolution": 64}
    return from_flags(FullTrainOptions, FluxFullOptions, **flags, shard_weights=True, learning_rate=1e-4, **given)


@pytest.mark.parametrize("name", ["AdamW8bit", "Adafactor", "Prodigy", "DAdaptAdam", "LBFGS", "Muon", "some.Other"])
def test_an_optimizer_that_looks_at_whole_weights_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"--shard_weights: {name} looks at.*AdamW, .*Lion, .*AdamWScheduleFree"):
        check_sharding(full(optimizer_type=name), 2)
    check_sharding(full(optimizer_type="Lion"), 2)
    adapter = from_flags(NetworkTrainOptions, shard_weights=True, optimizer_type=name)
    check_sharding(adapter, 2)  # an adapter is whole on every process


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(UserError, match="--shard_weights: this is one process.*--num_processes 2"):
        check_sharding(full(), 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mixed_precision": "fp16", "gradient_checkpointing": True}, "overflows of its own part"),
        ({"stop_text_encoder_training": 3, "train_text_encoder": True}, "what is shared out learns to the end"),
        ({"blocks_to_swap": 2}, "both say where a block is"),
    ],
)
def test_what_cannot_be_combined_with_it_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_rules(full(**given))


def test_casts_that_are_kept_for_all_blocks_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_rules(full(mixed_precision="bf16"))
    assert "--shard_weights without --gradient_checkpointing" in caplog.text


def test_an_optimizers_tensors_are_split_off_and_put_back() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    before = optimizer.state_dict()
    rest, tensors = split_optimizer(before)
    assert set(tensors) == {"0.step", "0.exp_avg", "0.exp_avg_sq"} and rest["state"] == {0: {}}
    join_optimizer(rest, tensors)
    assert rest == before


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_state_is_read_in_as_many_parts_as_there_are_processes(count: int, tmp_path: Path) -> None:
    """Three rows for four processes: one has none."""
    weight = nn.Parameter(torch.arange(6.0).view(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = weight.detach().clone()
    optimizer.step()
    rest = {"scheduler": {}, "scaler": None, "train_state": {"epoch": 0, "step": 1}}
    whole = {"w": weight.detach()}
    save_state(tmp_path / "s", trainable=whole, averages=whole, optimizer=optimizer.state_dict(), **rest)
    read = [load_state(tmp_path / "s", Part(rank, count)) for rank in range(count)]
    assert torch.equal(torch.cat([one.trainable["w"] for one in read]), weight.detach())
    assert torch.equal(torch.cat([one.averages["w"] for one in read]), weight.detach())
    states = [one.optimizer["state"][0] for one in read]
    assert torch.equal(torch.cat([state["exp_avg"] for state in states]), optimizer.state[weight]["exp_avg"])
    assert all(state["step"] == 1 and state["exp_avg"].shape[1:] == (2,) for state in states)
    assert [one.trainable["w"].shape[0] for one in read] == {1: [3], 2: [2, 1], 4: [1, 1, 1, 0]}[count]


def test_a_part_is_written_beside_the_state_or_not_at_all(tmp_path: Path) -> None:
    processes = Processes(Accelerator(cpu=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_parts(tmp_path / "file" / "a-state", {"trainable.safetensors": {}}, processes)
    parts = write_parts(tmp_path / "a-state", {"trainable.safetensors": {"x": torch.ones(2)}}, processes)
    parts.move_to(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["trainable.safetensors"]
